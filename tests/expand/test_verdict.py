"""The verdict on a growth: what is exact is never lossy by chance, and what is lost is never exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.growth.exactness import MOE, SEQ, grown_reader, random_state, reader, toy
from megascale.config.schema import Model
from megascale.expand.apply import Read
from megascale.expand.options import GrowthOptions, Sizes
from megascale.expand.plan import Growth, plan_growth
from megascale.expand.proof import judge, units_apart
from megascale.expand.verify import compare, run

STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
MODELS: dict[str, tuple[dict[str, Any], Sizes]] = {
    "decoder": ({}, Sizes(hidden_size=36, num_heads=6, num_kv_heads=3, ffn_size=48, num_layers=3)),
    "gpt": ({"norm": "layernorm", "bias": True, "position": "learned", "ffn": "gelu"}, Sizes(hidden_size=48, num_layers=4)),
    "experts": ({"moe": {**MOE, "router": "topk_softmax"}, "qk_norm": True}, Sizes(hidden_size=36, num_heads=6, num_kv_heads=3)),
}
Change = Callable[[str, Tensor], Tensor]


def grown(name: str, seed: int) -> tuple[Growth, dict[str, Tensor], Tensor]:
    model: Model = toy(**MODELS[name][0])
    growth = plan_growth(model, SEQ, MODELS[name][1], GrowthOptions(seed=seed))
    tokens = torch.randint(0, 37, (4, SEQ), generator=torch.Generator().manual_seed(seed))
    return growth, random_state(model, seed), tokens


def judged(name: str, compute: str, seed: int, change: Change | None = None, before: Change | None = None) -> dict[str, Any]:
    """The proof of a growth stored in `compute`, with the stored numbers changed, or those of the transform `before` they are stored."""
    growth, state, tokens = grown(name, seed)
    state = {n: t.to(STORED[compute]) for n, t in state.items()}

    def changed(read: Read, how: Change | None) -> Read:
        return read if how is None else lambda n, offset, shape: how(n, read(n, offset, shape))

    exact = changed(grown_reader(growth, state), before)
    stored = changed(changed(grown_reader(growth, state, STORED[compute]), before), change)
    small = run(growth.source, SEQ, reader(state), torch.float64, tokens)
    transform = compare(growth, small, run(growth.target, growth.seq_lens[1], exact, torch.float64, tokens), tokens)
    return judge(growth, reader(state), exact, stored, compute, tokens, transform)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models as small as these are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("compute", STORED)
@pytest.mark.parametrize("name", MODELS)
def test_exact_growths_are_never_lossy(name: str, compute: str) -> None:
    """Catches a verdict by chance, as the ratio of two maxima is: 2 of 10 exact growths were called lossy."""
    for seed in range(3):
        found = judged(name, compute, seed)
        assert found["verdict"] == "exact", found
        # Chance has a say in the error in the run's dtype alone, and stays far from its limit.
        assert found["stored_units"] <= 0.51 and found["stored_error_typical"] < 0.5 * found["stored_error_allowed"]


def off(name: str, x: Tensor) -> Tensor:
    """Each number of one weight off by 1e-4 of itself."""
    return x * (1 + 1e-4) if name == "blocks.1.ffn.up.weight" or name == "blocks.0.attention.v.weight" else x


def row(name: str, x: Tensor) -> Tensor:
    """One number of one token's row is another."""
    if name == "embedding.weight":
        x = x.clone()
        x[5, 3] += 0.01
    return x


@pytest.mark.parametrize("change", [off, row])
@pytest.mark.parametrize("name", MODELS)
def test_losses_are_never_exact(name: str, change: Change) -> None:
    """Catches a loss that hides behind rounding, in the transform or on the way to the disk: of 1e-4 in fp32, and in any dtype where it is
    seen before storing.
    """
    assert judged(name, "fp32", 1, change)["verdict"] == "lossy", "as stored"
    assert judged(name, "fp32", 2, before=change)["verdict"] == "lossy", "in the transform"
    assert judged(name, "bf16", 3, before=change)["verdict"] != "exact"


def test_what_is_no_number_is_lossy() -> None:
    """Catches a stored NaN that passes, since no comparison with it holds."""
    assert judged("decoder", "fp32", 0, lambda n, x: x * float("nan") if n == "head.weight" else x)["verdict"] == "lossy"
    assert units_apart(torch.tensor([1.0, float("nan")]), torch.ones(2, dtype=torch.float64)) == float("inf")
    assert units_apart(torch.tensor([1.0, 1e-45]), torch.tensor([1.0, 0.0], dtype=torch.float64)) <= 1
