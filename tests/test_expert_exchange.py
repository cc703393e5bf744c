"""The exchange of tokens between experts: extreme loads, bytes, memory, order, and what is seen of it in metrics."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megascale.comm.mesh import Axis, Traffic, build_mesh
from megascale.config.layout import axis_sizes
from megascale.config.schema import Optim, Parallel
from megascale.handles import handle_of
from megascale.model.experts import MixtureOfExperts
from megascale.model.ops.compiled import compile_static
from megascale.parallel.expert import dispatch, shard_dim
from megascale.parallel.once import once
from megascale.schedule.accumulate import Accumulation
from tests.layouts import Case, build, fake_batch, train, worst
from tests.planned import assert_planned
from tests.ranks import run_ranks
from tests.test_counts import live_bytes
from tests.test_experts import sparse

pytestmark = pytest.mark.dist


def steered(model: Any, to: list[int]) -> None:
    """Every token chooses the experts `to`: the routers see a constant beside their tokens."""
    for stage in model.stages:
        for moe in stage.modules():
            if isinstance(moe, MixtureOfExperts):
                logits = torch.full((moe.num_experts,), -5.0, dtype=torch.float64)
                logits[to] = torch.arange(5.0, 5.0 + len(to), dtype=torch.float64)
                plain = moe.router.logits
                moe.router.logits = lambda x, plain=plain, logits=logits: plain(x) * 1e-3 + logits


def forced(case: Case, to: list[int]) -> dict[str, Any]:
    """The first step's loss and gradients with all tokens steered to a few experts."""
    import tests.layouts as layouts

    original = layouts.build

    def with_steering(case: Case, ranks: int) -> Any:
        model = original(case, ranks)
        steered(model, to)
        return model

    layouts.build = with_steering
    try:
        return train(case)
    finally:
        layouts.build = original


GROUPS = {"groups": 2, "top_groups": 2}


@pytest.mark.parametrize(
    ("to", "ep_rows", "keys"), [([0, 1], None, {}), ([0, 3], None, {}), ([3, 2], None, {}), ([3, 2], None, GROUPS), ([0, 1], 1.1, {})]
)
def test_all_tokens_to_one_rank(to: list[int], ep_rows: float | None, keys: dict[str, Any]) -> None:
    """Catches an exchange that cannot be empty, an expert without rows that gets no gradient, or a rank that waits for rows in vain. With
    groups also a token that is sent for each of its experts there, or to ranks that have none: one copy goes, with two gates and numbers.
    """
    case = Case(sparse(1, **keys), Parallel(ep=2), steps=1)
    case = case if ep_rows is None else replace(case, parallel=Parallel(ep=2, ep_rows=ep_rows))
    reference = run_ranks(1, forced, replace(case, parallel=Parallel()), to)[0]
    got, other = run_ranks(2, forced, case, to)
    assert worst(got["grad"], reference["grad"])[0] <= 1e-12
    idle = [e for e in range(4) if e not in to]
    assert all(torch.all(got["grad"]["blocks.0.ffn.experts.up.weight"][e] == 0) for e in idle)
    tokens, d = case.batch // 2 * case.seq_len, case.model.hidden_size
    if keys:
        there, back = (d + 2) * 8, d * 8
        assert got["sent"]["ep"] == tokens * (there + 2 + back) and other["sent"]["ep"] == tokens * (back + there)
    elif to == [3, 2]:
        assert got["sent"]["ep"] == other["sent"]["ep"] == tokens * 2 * 2 * d * 8


def test_bytes_of_the_exchange() -> None:
    """Catches rows sent twice, padding, and gates or counts that travel as payload. An even load sends T·k·h·bytes·(EP−1)/EP each way."""
    case = Case(sparse(3, top_k=4), Parallel(ep=4), steps=1, micro_batch=2, batch=16, keep_tensors=False)
    tokens = 2 * case.seq_len
    each_way = tokens * 4 * case.model.hidden_size * 8 * 3 // 4
    micro_batches, layers, ways = 2, 3, 4  # there and back, forward and backward
    results = run_ranks(4, train, case)
    assert_planned(case, results)
    for result in results:
        assert result["sent"]["ep"] == micro_batches * layers * ways * each_way
        assert result["calls"]["ep", "all_to_all"] == micro_batches * layers * ways


def test_expert_gradients_are_reduced_over_edp_only() -> None:
    """Catches dense bytes for experts: over edp = 2 go half of them, of which a rank holds half."""
    case = Case(sparse(3), Parallel(ep=2), steps=1, keep_tensors=False, batch=4)
    model = build(Case(sparse(3)), 1)
    bank = sum(w.placement.spec.numel for w in model.weights if w.placement.spec.experts) * 8
    for result in run_ranks(4, train, case):
        assert result["sent"]["edp"] == 3 * (bank // 2) * (2 - 1) // 2  # two gathers and a reduction


def test_where_experts_are_sharded() -> None:
    """Catches ranks of edp without a share, where rows can be cut instead."""
    assert [shard_dim([4, 6, 8], n) for n in (1, 2, 4, 3, 8)] == [0, 0, 0, 1, 0]


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (4, Parallel(ep=2)),
        (3, Parallel()),
        (4, Parallel(ep=4)),
        (4, Parallel(tp=2, ep=2)),
        (4, Parallel(tp=2, tp_sequence=True, etp=1, ep=2)),
        (4, Parallel(pp=2, pp_schedule="zbv", ep=2)),
        (4, Parallel(dp_replicate=2, ep=2)),
    ],
)
def test_dry_run_bytes_are_exact(ranks: int, parallel: Parallel) -> None:
    """Catches a dry run that forgets that experts lie on other axes, on any rank."""
    sizes = axis_sizes(parallel, ranks)
    resolved = parallel.model_copy(update={"dp_shard": sizes["dp_shard"]})
    for optimizer in ("adamw", "muon"):
        model = sparse(4, every=2, expert_bias=True, router_bias=True, num_shared=1, shared_gate=True, balance_over="batch")
        case = Case(model, resolved, Optim(name=optimizer))  # type: ignore[arg-type]
        for held, said in run_ranks(ranks, live_bytes, case):
            assert held == said


def test_the_memory_of_a_banks_gradient_is_kept() -> None:
    """Catches pages handed out anew every step, and a gradient that the next step's is added to."""
    case = Case(sparse(num_shared=1))
    model = build(case, 1)
    batches = [fake_batch(case, [n]) for n in range(2)]
    kept: dict[str, int] = {}
    before: dict[str, Tensor] = {}
    for _ in range(2):
        Accumulation(model).run(batches, 1.0)
        for w in model.weights:
            grad = w.parameter.grad
            assert grad is not None
            if w.placement.spec.experts:
                assert kept.setdefault(w.name, grad.data_ptr()) == grad.data_ptr()
            assert torch.equal(grad, before.setdefault(w.name, grad.clone())), w.name
            w.forget_gradient()
            assert w.parameter.grad is None or (w.placement.spec.experts and not w.parameter.grad.any())
    assert len(kept) == 2 * 3


def overlapped() -> list[str]:
    """The order in which an exchange, its landing and what is computed meanwhile begin."""
    mesh = build_mesh(axis_sizes(Parallel(ep=2), 2), "cpu")
    seen: list[str] = []
    rows = torch.arange(8.0).view(4, 2).requires_grad_()
    handle = handle_of(mesh["ep"])
    (arrival,) = dispatch(torch.tensor([1, 1, 1, 1]), mesh["ep"], handle)(rows)
    work = mesh.traffic.calls["ep", "all_to_all"]
    seen.append(f"sent {work}")
    here, counts = arrival.wait()
    assert counts.tolist() == [2, 2]
    back = arrival.back(here * 2)
    back.sum().backward()
    assert torch.equal(back, rows * 2) and torch.equal(rows.grad, torch.full_like(rows, 2.0))  # type: ignore[arg-type]
    seen.append(f"sent {mesh.traffic.calls['ep', 'all_to_all']}")
    return seen


def test_rows_travel_while_shared_experts_compute() -> None:
    """Catches an exchange that has not begun when `dispatch` returns, which is when shared experts run."""
    assert run_ranks(2, overlapped) == [["sent 1", "sent 4"]] * 2


class Order(TorchDispatchMode):
    """The names of exchanges and products, in the order in which they run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if name in ("send_rows", "move_rows", "wait_tensor", "mm", "product_by_expert"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("compiled", [False, True])
def test_shared_experts_run_while_rows_travel(compiled: bool) -> None:
    """Catches an exchange that is waited for before shared experts run, or started after them: forward, backward, and in a graph."""
    model = build(Case(sparse(1, num_shared=1, aux_loss=0.0, z_loss=0.0)), 1).model
    axis = Axis("ep", 1, 0, None, Traffic())
    moe = model.get_submodule("blocks.0.ffn")
    assert isinstance(moe, MixtureOfExperts)
    moe.dispatch = partial(dispatch, axis=axis, handle=handle_of(axis))
    run = compile_static(moe.forward, backend="aot_eager") if compiled else moe.forward
    x = torch.randn(1, 12, 24, dtype=torch.float64, requires_grad=True)
    with Order() as forward:
        y = run(x, None)
    with Order() as backward:
        y.sum().backward()
    # The first product is the router's. One exchange brings rows there, one back.
    assert ["send_rows", *["mm"] * 3, "wait_tensor"] == [n for n in forward.names if n != "product_by_expert"][1:6], forward.names
    assert forward.names[-2:] == ["move_rows", "wait_tensor"]
    begun = [i for i, n in enumerate(backward.names) if n == "move_rows"]
    ended = [i for i, n in enumerate(backward.names) if n == "wait_tensor"]
    assert len(begun) == len(ended) == 2
    assert backward.names[begun[1] + 1 : ended[1]] == ["mm"] * 6, backward.names


@pytest.mark.slow
def test_tokens_travel_once_in_a_graph() -> None:
    """Catches an exchange of grouped tokens that breaks a graph, or gives another result there or without any exchange."""
    moe = build(Case(sparse(1, num_experts=8, top_k=3, groups=4, top_groups=2, expert_bias=True)), 1).model.get_submodule("blocks.0.ffn")
    assert isinstance(moe, MixtureOfExperts)
    axis = Axis("ep", 1, 0, None, Traffic())
    travel = partial(once, num_experts=8, most=1, axis=axis, handle=handle_of(axis))
    found = []
    for how in (None, travel, travel):
        moe.travel = how
        run = compile_static(moe.forward, backend="aot_eager") if len(found) == 2 else moe.forward
        moe.zero_grad()
        x = torch.randn(1, 12, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = run(x, None)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in moe.parameters())])
    for plain, eager, compiled in zip(*found):
        assert plain is not None and eager is not None and compiled is not None
        torch.testing.assert_close(eager, plain, rtol=0, atol=1e-13)
        torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-13)


def test_observations_do_not_double() -> None:
    """Catches counts taken in forward, which recomputation repeats: they are of every counted token once."""
    for recompute in ("none", "full"):
        case = Case(sparse(), Parallel(recompute=recompute))  # type: ignore[arg-type]
        model = build(case, 1)
        batch = fake_batch(case, [0, 1])
        model.module(batch.tokens, batch.targets, scale=0.5).backward()
        for moe in (m for m in model.model.modules() if isinstance(m, MixtureOfExperts)):
            seen = moe.metrics.flush()
            assert int(seen["counts"].sum()) == 2 * case.seq_len * 2
            assert float(seen["counted"]) == pytest.approx(0.5 * 2 * case.seq_len)


def test_an_axis_of_one_sends_nothing() -> None:
    """Catches a dispatch that copies or counts at size one."""
    traffic = Traffic()
    rows = torch.randn(4, 3)
    axis = Axis("ep", 1, 0, None, traffic)
    handle = handle_of(axis)
    (arrival,) = dispatch(torch.tensor([3, 1]), axis, handle)(rows)
    assert torch.equal(arrival.back(arrival.wait()[0]), rows) and traffic.take() == ({}, {})
    assert not dist.is_initialized()
