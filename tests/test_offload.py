"""Offload to host memory: the same training, and what goes away is what should, once each way."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megascale.config.load import build_config
from megascale.config.schema import Optim, Parallel
from megascale.config.support import check
from megascale.errors import UsageError
from megascale.launch.ranks import RankInfo
from megascale.optim.host import OnHost
from megascale.parallel import apply
from megascale.parallel.offload import HostStash
from megascale.train.estimate.memory import check_host_room, host_bytes, needed
from tests.layouts import CPU, Case, build, tiny, train
from tests.ranks import run_ranks
from tests.test_layouts import MODELS, assert_equal, single

pytestmark = pytest.mark.dist
LAYOUTS: dict[str, tuple[int, Parallel]] = {
    "optimizer": (1, Parallel(offload="optimizer")),
    "optimizer x zero": (2, Parallel(offload="optimizer", dp_shard=2)),
    "parameters x zero": (2, Parallel(offload="parameters", dp_shard=2)),
    "parameters x hsdp x tp": (4, Parallel(offload="parameters", dp_shard=2, tp=2, tp_sequence=True)),
    "inputs": (1, Parallel(offload="activations", recompute="full")),
    "everything x layered": (2, Parallel(offload=["parameters", "activations"], recompute="full", dp_shard=2, accumulation="layered")),
    "everything x hsdp x layered": (
        4,
        Parallel(offload=["optimizer", "activations"], recompute="full", dp_replicate=2, dp_shard=2, accumulation="layered"),
    ),
    "inputs x pipeline": (2, Parallel(offload=["optimizer", "activations"], recompute="full", pp=2, pp_schedule="zbv")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_offloading_changes_nothing(layout: str) -> None:
    """Catches a stale copy of weights, an input given back to another block, gradients that never arrive on the host."""
    ranks, parallel = LAYOUTS[layout]
    model = tiny(num_layers=4) if parallel.pp > 1 else MODELS["llama"]
    assert_equal(Case(model, parallel, batch=3 * ranks), ranks)


def test_lion_on_the_host() -> None:
    """Catches an optimizer that reads the device's gradient instead of the host's. Lion turns on rounding: losses alone are compared."""
    case = Case(MODELS["llama"], Parallel(offload="optimizer", dp_shard=2), Optim(name="lion", lr=1e-3))
    reference, got = single(case), run_ranks(2, train, case)[0]
    assert max(abs(a - b) for a, b in zip(got["loss"], reference["loss"])) <= 1e-6


def stashes(case: Case) -> list[tuple[int, int, int, int]]:
    """Of every stage with blocks: tensors sent, called back, most bytes away, and what is still away after a step."""
    made: list[HostStash] = []
    counts: dict[int, list[int]] = {}

    class Counting(HostStash):
        def send(self, x: torch.Tensor) -> Any:
            counts.setdefault(id(self), [0, 0])[0] += 1
            return super().send(x)

        def call_back(self, parcel: Any) -> torch.Tensor:
            counts[id(self)][1] += 1
            return super().call_back(parcel)

    real = apply.offload_block_inputs

    def offload(model: Any, device: torch.device) -> HostStash:
        stash = real(model, device)
        stash.__class__ = Counting
        made.append(stash)
        return stash

    apply.offload_block_inputs = offload
    train(case)
    return [(*counts[id(s)], s.most, s.held) for s in made if id(s) in counts]


@pytest.mark.parametrize("accumulation", ["depth_first", "layered"])
def test_inputs_travel_once_each_way(accumulation: Any) -> None:
    """Catches inputs that stay on the device, are written twice by recomputation, or are never freed on the host."""
    m, layers = 3, 2
    parallel = Parallel(offload="activations", recompute="full", accumulation=accumulation)
    case = Case(tiny(num_layers=layers), parallel, batch=m, steps=2)
    found = run_ranks(1, stashes, case)[0]
    assert sum(sent for sent, *_ in found) == sum(back for _, back, *_ in found) == 2 * m * layers
    assert all(held == 0 for *_, held in found)
    one = case.seq_len * case.model.hidden_size * 8
    assert sum(most for _, _, most, _ in found) == layers * one * (m if accumulation == "layered" else 1)
    config = described(accumulation=accumulation, recompute="full", offload=["activations"])
    assert host_bytes(config, 1)["inputs"] == sum(most for _, _, most, _ in found)


def held_after_forward(offload: tuple[Any, ...]) -> int:
    """How many tensors of a block input's shape live outside the stash between forward and backward."""
    import gc

    case = Case(tiny(num_layers=6), Parallel(recompute="full", offload=offload))
    model = build(case, 1)
    tokens = torch.zeros(1, case.seq_len, dtype=torch.int64)
    loss = model.module(tokens, tokens, scale=1.0)
    shape = (1, case.seq_len, case.model.hidden_size)
    gc.collect()
    away = {id(parcel.host) for o in gc.get_objects() if type(o) is HostStash for parcel in o.sent}
    live = {t.data_ptr() for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == shape and id(t) not in away}
    loss.backward()
    return len(live)


def test_the_device_keeps_no_block_input() -> None:
    """Catches an input that is copied to the host and kept on the device all the same."""
    assert run_ranks(1, held_after_forward, ())[0] == 7
    assert run_ranks(1, held_after_forward, ("activations",))[0] == 1  # the last block's output, which the final norm saves


def test_a_stash_gives_back_what_it_was_sent_in_any_order() -> None:
    """Catches a buffer that is used again while its tensor is still away."""
    stash = HostStash(CPU)
    for order in ([2, 1, 0], [0, 1, 2], [1, 2, 0]):
        parcels = [stash.send(torch.full((4,), float(i))) for i in range(3)]
        assert [stash.call_back(parcels[i])[0].item() for i in order] == order
    assert stash.held == 0 and stash.most == 3 * 16 and not stash.sent


def described(**parallel: Any) -> Any:
    values = {
        "model": tiny().model_dump(),
        "parallel": parallel,
        "train": {"steps": 1, "seq_len": 12, "global_batch_size": 3},
        "data": {"train": "x"},
        "precision": {"compute": "fp64"},
    }
    return check(build_config(values), 1)


def test_no_room_on_the_host() -> None:
    """Catches a run that swaps a node to death, and advice without numbers."""
    config = described(offload=["optimizer", "activations"], recompute="full")
    need = host_bytes(config, 1)
    assert need["state"] > 0 and need["inputs"] > 0
    check_host_room(config, RankInfo(), free=float(sum(need.values())))
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"dp_shard": 4})})
    with pytest.raises(UsageError, match="breadth_first") as error:
        check_host_room(config, RankInfo(0, 4, 0, 4), free=1e3)
    assert "4 ranks" in str(error.value) and "optimizer, activations" in str(error.value)


def test_the_device_needs_less() -> None:
    """Catches advice after an out-of-memory that counts what is on the host."""
    state, rest = needed(described(recompute="full"), 1)
    away = described(recompute="full", offload=["activations"])
    assert needed(away, 1)[0] == state and needed(away, 1)[1] <= rest - host_bytes(away, 1)["inputs"] / 2
    assert 0 < needed(described(offload=["optimizer"]), 1)[0] < state


def test_state_lies_on_the_host() -> None:
    """Catches an offload that leaves the optimizer's state beside the weights: the mirror shares no memory with them."""
    from megascale.optim.optimizers import build_optimizer

    model = build(Case(MODELS["llama"]), 1)
    optimizer = build_optimizer(model, Optim(), ("optimizer",))
    assert isinstance(optimizer, OnHost) and optimizer.mirror is not None
    own = {w.local.data_ptr() for w in model.weights}
    assert not own & {w.local.data_ptr() for w in optimizer.mirror.weights}
