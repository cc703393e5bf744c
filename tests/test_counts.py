"""Bytes, collectives and memory equal their formulas: equality of losses cannot notice a layout that saves nothing."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megascale.comm.mesh import Axis, Traffic, coordinates
from megascale.comm.piece import chunk_bounds
from megascale.config.layout import axis_sizes, even_dim
from megascale.config.load import build_config
from megascale.config.schema import Optim, Parallel
from megascale.config.support import check
from megascale.errors import UsageError
from megascale.model.spec import MATRICES, ParamSpec
from megascale.optim import muon
from megascale.optim.clip import global_norm
from megascale.optim.optimizers import build_optimizer
from megascale.parallel.data import CountingAllGather, CountingReduceScatter, symmetric
from megascale.parallel.model import Weight
from megascale.parallel.tensor import Placement
from megascale.train.estimate.memory import rank_bytes
from tests.layouts import Case, build, tiny, train
from tests.planned import assert_planned
from tests.ranks import run_ranks

pytestmark = pytest.mark.dist
MODEL = tiny(num_layers=3)
M = 2  # micro-batches a step
ITEM = 8  # bytes of fp64


def padded(shape: tuple[int, ...], ranks: int) -> int:
    """FSDP2 pads dimension 0 to a multiple of its ranks."""
    rows = -(-shape[0] // ranks) * ranks
    n = 1
    for size in (rows, *shape[1:]):
        n *= size
    return n


def group_bytes(ranks: int) -> tuple[int, int]:
    """Bytes of one block's and of the root's gathered weights."""
    model = build(Case(MODEL, steps=1), 1)
    block = sum(padded(w.placement.spec.shape, ranks) for w in model.weights if w.name.startswith("blocks.0."))
    root = sum(padded(w.placement.spec.shape, ranks) for w in model.weights if not w.name.startswith("blocks."))
    return block * ITEM, root * ITEM


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize(("shard", "cp"), [(2, 1), (1, 2), (2, 2)])
def test_sharding_sends_what_it_should(reshard: bool, shard: int, cp: int) -> None:
    """Catches extra gathers: ZeRO-3 gathers each block twice a micro-batch and the root once, ZeRO-2 everything once; all reduce once.
    Ranks of cp share in this as those of dp_shard do.
    """
    n, layers = shard * cp, MODEL.num_layers
    layout = Parallel(dp_shard=shard, cp=cp, reshard_after_forward=reshard)
    case = Case(MODEL, layout, batch=shard * M, steps=2, keep_tensors=False)
    results = run_ranks(n, train, case)
    result = results[0]
    assert_planned(case, results)
    gathers = 2 if reshard else 1
    assert result["calls"]["dp_shard", "all_gather"] == M * (gathers * layers + 2)  # two: the root with the embedding; final norm and head
    assert result["calls"]["dp_shard", "reduce_scatter"] == M * (layers + 2)
    block, root = group_bytes(n)
    share = (n - 1) / n
    assert result["sent"]["dp_shard"] == M * share * ((gathers + 1) * layers * block + 2 * root)


def test_backward_gathers_inside_a_node() -> None:
    """Catches weights that are freed, or kept whole, where they should stay on two neighbours, and gathers counted as if all ranks took
    part.
    """
    n, kept, layers = 4, 2, MODEL.num_layers
    case = Case(MODEL, Parallel(dp_shard=n, reshard_after_forward=kept), batch=n * M, steps=2, keep_tensors=False)
    results = run_ranks(n, train, case)
    result = results[0]
    assert_planned(case, results)
    block, root = group_bytes(n)
    assert result["calls"]["dp_shard", "all_gather"] == M * (2 * layers + 2)
    once, again = (n - 1) / n, (kept - 1) / kept
    assert result["sent"]["dp_shard"] == M * ((2 * once + again) * layers * block + 2 * once * root)


def groups_of(case: Case) -> tuple[dict[str, Any], int]:
    """A training, and over how many groups FSDP2 communicates."""
    found: set[str] = set()
    for kind in (CountingAllGather, CountingReduceScatter):
        original = kind.__call__

        def call(self: Any, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            found.add((kwargs.get("group") or args[2]).group_name)
            return original(self, *args, **kwargs)

        kind.__call__ = call  # type: ignore[method-assign]
    return train(case), len(found)


def test_separate_groups_send_the_same() -> None:
    """Catches gathers and reductions that share a group though asked not to, and counts or sums that follow the group."""
    found = {}
    for comm in ("shared", "separate"):
        case = Case(MODEL, Parallel(dp_shard=2, dp_comm=comm), batch=2 * M, keep_tensors=False)  # type: ignore[arg-type]
        found[comm] = run_ranks(2, groups_of, case)[0]
    assert [groups for _, groups in found.values()] == [1, 2]
    assert found["shared"][0] == found["separate"][0]


def test_symmetric_buffers_are_counted_and_refused_on_cpus() -> None:
    """Catches bytes that only torch's own collectives are counted for, and a traceback where NCCL's memory is missing."""
    traffic, calls = Traffic(), []

    class Inner:
        def allocate(self, *args: Any, **kwargs: Any) -> str:
            return "from its own memory"

        def __call__(self, *args: Any) -> None:
            calls.append(args)

    axis, inner, group = Axis("dp_shard", 4, 0, None, traffic), Inner(), SimpleNamespace(size=lambda: 4)
    gather, scatter = CountingAllGather(axis, inner), CountingReduceScatter(axis, inner)  # type: ignore[arg-type]
    whole, part = torch.zeros(8), torch.zeros(2)
    assert gather.allocate([8], dtype=whole.dtype, device=whole.device) == "from its own memory"
    gather(whole, part, group, True)  # type: ignore[arg-type]
    scatter(part, whole, group, "sum", True)  # type: ignore[arg-type]
    assert calls == [(whole, part, group, True), (part, whole, group, "sum", True)]
    assert traffic.take()[0] == {"dp_shard": 2 * 3 * 2 * 4}
    with pytest.raises(UsageError, match=r"parallel\.dp_comm is symmetric but the device is cpu"):
        symmetric(None, "cpu")  # type: ignore[arg-type]


def test_few_rows_are_not_padded() -> None:
    """Catches k and v of a large model padded to the number of ranks: 6 rows on 4 ranks are 24 columns, cut instead."""
    assert [even_dim(shape, 512) for shape in ([128, 16384], [128, 100], [128256, 1024], [100], [512, 512])] == [1, 0, 0, 0, 0]
    n, model = 4, tiny(num_kv_heads=1, num_layers=1)
    case = Case(model, Parallel(dp_shard=n), batch=n, steps=2, keep_tensors=False)
    result, alone = run_ranks(n, train, case)[0], train(Case(model, batch=n, steps=2, keep_tensors=False))
    size = sum(
        w.placement.spec.numel if w.name.endswith(("k.weight", "v.weight")) else padded(w.placement.spec.shape, n)
        for w in build(Case(model), 1).weights
        if w.name.startswith("blocks.")
    )
    root = group_bytes(n)[1]
    assert result["sent"]["dp_shard"] == (n - 1) / n * (3 * size * ITEM + 2 * root)
    assert max(abs(a - b) for a, b in zip(result["loss"], alone["loss"])) <= 1e-12


def test_gradients_summed_in_bf16() -> None:
    """Catches a key that nothing reads: a reduce-scatter of fp32 gradients sends half as much, and the loss moves by bf16's rounding."""
    found = {}
    for name in ("fp32", "bf16"):
        case = Case(MODEL, Parallel(dp_shard=2), precision="fp32", reduce=name, batch=2 * M, keep_tensors=False)
        results = run_ranks(2, train, case)
        found[name] = results[0]
        assert_planned(case, results)
    gathers = 2 * MODEL.num_layers + 2
    assert found["fp32"]["calls"] == found["bf16"]["calls"] and found["fp32"]["calls"]["dp_shard", "all_gather"] == M * gathers
    block, root = (size // 2 for size in group_bytes(2))  # of fp32 in place of fp64
    saved = M * (MODEL.num_layers * block + root) / 2 / 2
    assert found["fp32"]["sent"]["dp_shard"] - found["bf16"]["sent"]["dp_shard"] == saved
    gaps = [abs(a - b) / abs(a) for a, b in zip(found["fp32"]["loss"], found["bf16"]["loss"])]
    assert 0 < max(gaps) <= 5e-3


def test_replicas_are_reduced_once_a_step() -> None:
    """Catches an all-reduce of every micro-batch: HSDP's crosses the slow link, and DDP's is the whole of its cost."""
    for parallel, ranks, shards in (
        (Parallel(dp_replicate=2, dp_shard=2), 4, 2),
        (Parallel(dp_replicate=2, engine="ddp", dp_shard=1), 2, 1),
    ):
        case = Case(MODEL, parallel, batch=ranks * M, steps=2, keep_tensors=False)
        results = run_ranks(ranks, train, case)
        result = results[0]
        assert_planned(case, results)
        block, root = group_bytes(shards)
        size = (block * MODEL.num_layers + root) // shards
        assert result["sent"]["dp_replicate"] == 2 * size * (2 - 1) // 2
        if shards == 2:
            assert result["calls"]["dp_replicate", "all_reduce"] == MODEL.num_layers + 2


@pytest.mark.parametrize("sequence", [False, True])
def test_tensor_parallel_sends_what_it_should(sequence: bool) -> None:
    """Catches a gather or sum too many: two exchanges a sublayer pair each way, plus embedding, head, loss and partial gradients."""
    n, layers, batch, seq, d = 2, MODEL.num_layers, 1, 12, MODEL.hidden_size
    case = Case(MODEL, Parallel(tp=n, tp_sequence=sequence), batch=1, steps=1, keep_tensors=False)
    results = run_ranks(n, train, case)
    result = results[0]
    assert_planned(case, results)
    activation = batch * seq * d * ITEM
    # Forward: 2 sums a block and the embedding's; backward: 2 a block and the head's. With the sequence cut, gather + scatter cost as much,
    # and each of them has its mirror in the backward pass.
    exchanges = 2 * layers + 1
    stream = 2 * exchanges * 2 * activation * (n - 1) // n
    loss = 2 * (seq + 2 * seq) * ITEM * (n - 1) // n
    norms = (2 * layers + 1) * d * ITEM if sequence else 0
    assert result["sent"]["tp"] == stream + loss + 2 * norms * (n - 1) // n
    calls = {k[1]: v for k, v in result["calls"].items() if k[0] == "tp"}
    if sequence:
        assert calls == {"all_gather": 2 * exchanges, "reduce_scatter": 2 * exchanges, "all_reduce": 2 + 1}
    else:
        assert calls == {"all_reduce": 2 * exchanges + 2}


def live_bytes(case: Case) -> tuple[dict[str, int], dict[str, int]]:
    """What this rank really holds, and what the dry run says of its place."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    model = build(case, ranks)
    state = build_optimizer(model, case.optim).state()
    weights = sum(w.local.nbytes for w in [*model.weights, *([model.tied_copy] if model.tied_copy else [])])
    shadows = sum(x.nbytes for stage in model.stages for m in stage.modules() if (x := getattr(m, "shadow", None)) is not None)
    held = {"parameters": weights, "gradients": weights, "optimizer": sum(t.nbytes for ts in state.values() for t in ts.values())}
    held |= {"shadows": shadows} if shadows else {}
    config = build_config({"model": case.model.model_dump(), "train": {"steps": 1, "seq_len": case.seq_len}, "data": {"train": "x"}})
    config = config.model_copy(
        update={
            "parallel": case.parallel,
            "optim": case.optim,
            "precision": config.precision.model_copy(update={"compute": case.precision}),
        }
    )
    sizes = axis_sizes(case.parallel, ranks)
    return held, rank_bytes(check(config, ranks), coordinates(dist.get_rank() if ranks > 1 else 0, sizes), sizes)


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "muon"])
@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (1, Parallel()),
        (3, Parallel(dp_shard=3)),
        (4, Parallel(tp=2, dp_shard=2, tp_sequence=True)),
        (4, Parallel(tp=4)),
        (2, Parallel(engine="ddp", dp_replicate=2, dp_shard=1)),
        (4, Parallel(pp=2, pp_schedule="zbv", dp_shard=2)),
        (4, Parallel(cp=2, dp_shard=2)),
        (2, Parallel(cp=2, engine="ddp")),
        (3, Parallel(pp=3)),
    ],
)
def test_dry_run_bytes_are_exact(ranks: int, parallel: Parallel, optimizer: Any) -> None:
    """Catches a dry run that flatters: bytes of weights, gradients and optimizer equal the running program's on every rank."""
    case = Case(tiny(vocab_size=37, bias=True, num_layers=4, tie_embeddings=parallel.pp > 1), parallel, Optim(name=optimizer))
    for held, said in run_ranks(ranks, live_bytes, case):
        assert held == said


def test_counting_follows_the_ring() -> None:
    """Catches an axis that counts what it receives, or counts itself at size one."""
    traffic = Traffic()
    alone = Axis("tp", 1, 0, None, traffic)
    from megascale.comm.collectives import all_gather, all_reduce

    all_reduce(torch.ones(3), alone)
    all_gather(torch.ones(3), alone, 0)
    assert traffic.take() == ({}, {})
    assert [chunk_bounds(5, 3, r) for r in range(3)] == [(0, 2), (2, 4), (4, 5)]


def muon_step(case: Case) -> tuple[dict[str, int], int, int, dict[str, int]]:
    """Bytes this rank sends in one step of the optimizer, how many matrices it works on, how many there are, and their bytes by kind."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    model = build(case, ranks)
    optimizer = build_optimizer(model, case.optim)
    for w in model.weights:
        w.parameter.grad = torch.ones_like(w.parameter)
    worked = []
    original = muon.orthogonalize
    muon.orthogonalize = lambda *args: worked.append(1) or original(*args)  # type: ignore[func-returns-value]
    model.mesh.traffic.take()
    optimizer.step(0.1, torch.ones(()), torch.tensor(True))
    matrices = [w for w in model.weights if w.placement.spec.role in MATRICES]
    sizes: Counter[str] = Counter()
    for w in matrices:
        sizes["cut" if w.placement.cuts else "whole"] += w.placement.spec.numel * ITEM
    return model.mesh.traffic.take()[0], len(worked), len(matrices), dict(sizes)


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (3, Parallel(dp_shard=3)),
        (2, Parallel(engine="ddp", dp_replicate=2, dp_shard=1)),
        (4, Parallel(tp=2, dp_shard=2)),
        (4, Parallel(dp_replicate=2, dp_shard=2)),
        (4, Parallel(tp=4, dp_shard=1)),
    ],
)
def test_muon_shares_its_work(ranks: int, parallel: Parallel) -> None:
    """Catches a matrix that is orthogonalized twice, and pieces that travel to ranks that have no use for them."""
    results = run_ranks(ranks, muon_step, Case(tiny(num_layers=4, ffn_size=48), parallel, Optim(name="muon")))
    count, sizes = results[0][2], results[0][3]
    assert sum(worked for _, worked, _, _ in results) == count
    assert max(worked for _, worked, _, _ in results) <= -(-count // ranks) + 1  # matrices cut and held whole are shared out apart
    sent: Counter[str] = Counter()
    for bytes_of_rank, *_ in results:
        sent.update(bytes_of_rank)
    shards, copies, tp = parallel.dp_shard, parallel.dp_replicate, parallel.tp
    everything = sum(sizes.values())
    # To the owner and back where they are cut, back only where all hold the same; KV heads fewer than ranks are held whole over tp.
    expected = {
        "dp_shard": 2 * everything * (shards - 1) // shards,
        "dp_replicate": everything * (copies - 1),
        "tp": 2 * sizes.get("cut", 0) * (tp - 1) // tp + sizes.get("whole", 0) * (tp - 1),
    }
    assert dict(sent) == {axis: n for axis, n in expected.items() if n}


def test_the_norm_is_that_of_the_whole() -> None:
    """Catches sums in fp32 over all of a weight, whose error grows with its size: a norm, and a clipping factor, that follow the layout.
    Two million gradients in one weight and in two halves; fp64 gives the truth.
    """
    torch.manual_seed(0)
    whole = torch.randn(2048, 1024)
    found = []
    for parts in ([whole], list(whole.chunk(2))):
        weights = [Weight("w", nn.Parameter(torch.empty_like(p)), Placement(ParamSpec((2048, 1024), "up", 0)), 1) for p in parts]
        for w, p in zip(weights, parts):
            w.parameter.grad = p.clone()
        found.append(global_norm(weights, 1).item())
    truth = whole.double().norm().item()
    assert all(abs(f / truth - 1) < 1e-7 for f in found)
