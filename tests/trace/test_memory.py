"""A traced step takes as many bytes, and sends as many, as the same step on real gloo ranks, measured by the same meter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megascale.config.schema import Config, Optim, Parallel
from megascale.config.schema.model import Moe
from tests.layouts import Case, tiny
from tests.ranks import run_ranks
from tests.test_golden import CASES as VARIANTS

pytestmark = pytest.mark.dist

SIZES: dict[str, Any] = {"hidden_size": 32, "num_layers": 4, "ffn_size": 64, "vocab_size": 64}
DENSE = Case(tiny(**SIZES), precision="fp32", batch=8, seq_len=16)
MIXTURE = replace(DENSE, seq_len=64, model=tiny(hidden_size=32, vocab_size=64, moe=Moe(num_experts=4, top_k=2, ffn_size=16)))
MUS_FP8 = replace(DENSE, model=tiny(**SIZES, residual="mus", ffn="gelu", num_kv_heads=4), fp8="static")
TIED = replace(DENSE, model=tiny(**SIZES, tie_embeddings=True))


def on(ranks: int, case: Case = DENSE, **parallel: Any) -> tuple[int, Case]:
    return ranks, replace(case, parallel=Parallel(**parallel))


LAYOUTS = {
    "one": on(1),
    "tied": on(1, TIED),
    "sinks": on(1, replace(DENSE, model=tiny(**SIZES, attention_sink="learned", attention_gate="channel", logit_softcap=9.0))),
    "fsdp": on(2, dp_shard=2),
    "fsdp selective": on(2, dp_shard=2, recompute="selective"),
    "fsdp full": on(2, dp_shard=2, recompute="full"),
    "fsdp nested": on(2, dp_shard=2, recompute="nested"),
    "zero-2": on(2, dp_shard=2, reshard_after_forward=False),
    "bf16": on(2, replace(DENSE, precision="bf16"), dp_shard=2),
    "hsdp": on(4, dp_replicate=2, dp_shard=2),
    "tp": on(2, tp=2),
    "tp sequence": on(2, tp=2, tp_sequence=True),
    "ring": on(2, cp=2),
    "ulysses": on(2, cp=2, cp_method="ulysses"),
    "gpipe": on(2, pp=2, pp_schedule="gpipe"),
    "1f1b": on(2, pp=2),
    "zbv": on(2, pp=2, pp_schedule="zbv"),
    "dualpipev": on(2, pp=2, pp_schedule="dualpipev"),
    "interleaved": on(2, pp=2, pp_schedule="interleaved_1f1b", pp_virtual=2),
    "1f1b tied": on(2, TIED, pp=2),
    "1f1b over fsdp": on(4, pp=2, dp_shard=2),
    "layered": on(2, dp_shard=2, accumulation="layered"),
    "update in backward": on(2, replace(DENSE, clip=0), dp_shard=2, accumulation="layered", update_in_backward=True),
    "experts": on(2, MIXTURE, dp_shard=2, ep=2),
    "grouped experts": on(2, replace(MIXTURE, model=VARIANTS["grouped experts"].model), dp_shard=2, ep=2),
    "experts sharded": on(2, MIXTURE, dp_shard=2),
    "fp8": on(2, MUS_FP8, dp_shard=2),
    "lion": on(2, replace(DENSE, optim=Optim(name="lion", lr=1e-3)), dp_shard=2),
    "muon": on(2, replace(DENSE, optim=VARIANTS["muon"].optim), dp_shard=2),
    **{name: on(2, VARIANTS[name], dp_shard=2) for name in ("encoder", "encoder decoder", "spacetime", "moeut")},
}
STEPS = 2
CONTROL = 4096  # bytes of a group's messages that carry no tensors of the model, such as shapes and the loss


def micro_batches(config: Config) -> int:
    return 4 if config.parallel.pp > 1 else 2


def random_integers(shape: tuple[int, ...], vocabulary: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, shape)


def measured(config: Config, model: Any) -> dict[str, Any]:
    """Peak and traffic of two steps under a meter."""
    from megascale.trace.fakes import open_operators
    from megascale.trace.memory import Memory, follow_resizing
    from megascale.trace.meter import Meter
    from megascale.trace.step import run_steps

    open_operators()
    memory = Memory()
    follow_resizing(memory)
    sent = run_steps(config, model, torch.device("cpu"), random_integers, micro_batches(config), STEPS, Meter("cpu", memory))
    peak = memory.peak("cpu")
    assert peak.total == memory.most["cpu"] == sum(peak.by_kind.values())
    return {"peak": peak.total, "kinds": peak.by_kind, "sent": sent}


def real(config: Config) -> dict[str, Any]:
    """On this gloo rank, with the loads of its experts."""
    from megascale.comm import exchange
    from megascale.train.build import draw_model

    ranks, loads, asked = (dist.get_world_size() if dist.is_initialized() else 1), [], exchange.rows_exchanged

    def noted(*args: Any) -> Any:
        loads.append(asked(*args))
        return loads[-1]

    exchange.rows_exchanged = noted  # type: ignore[assignment]
    return {**measured(config, draw_model(config, ranks, torch.device("cpu"))), "loads": loads}


def faked(config: Config, ranks: int, rank: int, loads: list[Any]) -> dict[str, Any]:
    """As this rank of fakes. Experts have the real run's loads."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from megascale.comm import exchange
    from megascale.trace import fakes, group
    from megascale.train.build import place_model

    calls, told = group.Calls(frozenset(("cpu",))), iter(loads)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    if ranks > 1:
        group.start(rank, ranks, calls)
    fakes.without_values(mode)
    exchange.rows_exchanged = lambda *_: next(told)
    model = place_model(config, ranks, torch.device("cpu"))
    with mode:
        found = measured(config, model)
    assert calls.wrong == []
    names = {axis.group: axis.name for axis in model.mesh.axes.values() if axis.group is not None}
    logged = dict.fromkeys(names.values(), 0)
    for call in calls.log:
        if call.group in names:
            logged[names[call.group]] += call.sent
    return {**found, "logged": logged}


def import_once() -> None:
    """Before ranks are forked."""

    import megascale.schedule.layered
    import megascale.schedule.pipeline
    import megascale.trace.fakes
    import megascale.trace.step  # noqa: F401


def compare(name: str) -> None:
    import_once()
    ranks, case = LAYOUTS[name]
    there = run_ranks(ranks, real, case.config, timeout=500)
    for rank in {0, ranks - 1}:
        (here,) = run_ranks(1, faked, case.config, ranks, rank, there[rank]["loads"], timeout=500)
        assert here["kinds"] == there[rank]["kinds"], rank
        assert here["peak"] == there[rank]["peak"], rank
        assert here["sent"] == there[rank]["sent"], rank
        sends = {**here["sent"], "pp": here["sent"].get("pp", 0) + here["sent"].get("tied", 0)}  # over the same links
        for axis, sent in sends.items():
            if axis in here["logged"]:
                assert 0 <= here["logged"][axis] - STEPS * sent <= CONTROL, axis


@pytest.mark.parametrize("name", ["fsdp selective", "1f1b"])
def test_peak_and_traffic_are_those_of_real_ranks(name: str) -> None:
    """Catches memory that the meter misses or sees twice, a work that lets its tensors go too early, and uncounted traffic."""
    compare(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_traced_to_the_byte(name: str) -> None:
    """The same on every kind of layout."""
    compare(name)
