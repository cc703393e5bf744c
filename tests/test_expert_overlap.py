"""DualPipeV's pairs of passes: one computes while the other's rows travel to experts, and all numbers stay as they are."""

from __future__ import annotations

import threading
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from megascale.comm import exchange
from megascale.comm.turns import Turns
from megascale.config.schema import Parallel
from megascale.model.ops import grouped_matmul
from megascale.parallel import apply
from tests.layouts import CPU, Case, train
from tests.ranks import run_ranks
from tests.test_experts import sparse

PARALLEL = Parallel(pp=2, pp_schedule="dualpipev", ep=2, ep_overlap=True)
CASE = Case(sparse(4, num_shared=1), PARALLEL, batch=12, steps=2)
Event = tuple[bool, str]  # whether in the forward pass, and what: start, land, compute


def overlapped(events: list[Event], forward: bool) -> int:
    """How many exchanges of one pass started before the other computed, which it did before they were waited for."""
    count, pending = 0, [False, False]
    for own, what in events:
        if own == forward:
            count += what == "land" and all(pending)
            pending = [what == "start", False] if what != "compute" else pending
        else:
            pending[1] |= pending[0] and what == "compute"
    return count


def watched(case: Case) -> tuple[dict[str, Any], list[Event]]:
    """Trains; what happened in both passes, in order."""
    events: list[Event] = []
    main = threading.get_ident()

    def spy(patch: pytest.MonkeyPatch, where: Any, name: str, what: str) -> None:
        real = getattr(where, name)

        def noted(*args: Any, **keys: Any) -> Any:
            events.append((threading.get_ident() == main, what))
            return real(*args, **keys)

        patch.setattr(where, name, noted)

    with pytest.MonkeyPatch.context() as patch:
        spy(patch, exchange, "start_rows", "start")
        spy(patch, exchange, "wait", "land")
        spy(patch, grouped_matmul, "product_by_expert", "compute")
        return train(case), events


def both(cases: list[Case]) -> list[tuple[dict[str, Any], list[Event]]]:
    return [watched(case) for case in cases]


def both_in_graphs(cases: list[Case], backend: str | None) -> list[tuple[dict[str, Any], list[bool]]]:
    """Trains each case; whether each exchange was the forward pass's, in order."""
    if backend is not None:
        apply.counting_backend = lambda axes, settings: backend  # type: ignore[assignment, return-value]
    found, main, start = [], threading.get_ident(), exchange.start_rows
    for case in cases:
        passes: list[bool] = []

        def noted(*args: Any, into: list[bool] = passes) -> Tensor:
            into.append(threading.get_ident() == main)
            return start(*args)

        exchange.start_rows = noted  # type: ignore[assignment]
        found.append((train(case), passes))
    return found


@pytest.mark.dist
@pytest.mark.parametrize(
    ("recompute", "backend"),
    [
        ("none", "aot_eager"),
        pytest.param("selective", "aot_eager", marks=pytest.mark.slow),
        pytest.param("full", "aot_eager", marks=pytest.mark.slow),
        pytest.param("selective", None, marks=pytest.mark.slow),  # inductor
    ],
)
def test_graphs_overlap_and_agree(recompute: str, backend: str | None) -> None:
    """Catches compiled blocks whose exchanges do not pass the turn on, and graphs of two threads that take each other's memory."""
    parallel = PARALLEL.model_copy(update={"recompute": recompute, "compile": True})
    case = replace(CASE, parallel=parallel, precision="fp32")
    apart = replace(case, parallel=parallel.model_copy(update={"ep_overlap": False}))
    (got, passes), (wanted, alone) = run_ranks(4, both_in_graphs, [case, apart], backend, timeout=600)[0]
    assert got["loss"] == wanted["loss"] and got["norm"] == wanted["norm"]
    assert all(torch.equal(got[kind][n], x) for kind in ("grad", "weight") for n, x in wanted[kind].items())
    assert (got["sent"], got["calls"]) == (wanted["sent"], wanted["calls"])
    assert sum(a != b for a, b in pairwise(passes)) >= 16 and all(alone)


@pytest.mark.dist
@pytest.mark.parametrize(
    "recompute", ["none", pytest.param("selective", marks=pytest.mark.slow), pytest.param("full", marks=pytest.mark.slow)]
)
def test_passes_overlap_and_agree(recompute: str) -> None:
    """Catches pairs that run one after the other, an exchange that is waited for at once, a gradient that one pass takes from the other,
    and ranks that send in another order, which would hang.
    """
    case = replace(CASE, parallel=CASE.parallel.model_copy(update={"recompute": recompute}))
    apart = replace(case, parallel=case.parallel.model_copy(update={"ep_overlap": False}))
    (got, events), (wanted, alone) = run_ranks(4, both, [case, apart], timeout=300)[0]
    assert got["loss"] == wanted["loss"] and got["norm"] == wanted["norm"]
    assert all(torch.equal(got[kind][n], x) for kind in ("grad", "weight") for n, x in wanted[kind].items())
    assert (got["sent"], got["calls"]) == (wanted["sent"], wanted["calls"])
    assert min(overlapped(events, True), overlapped(events, False)) >= 8
    assert overlapped(alone, True) == overlapped(alone, False) == 0


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("keys", [{"ep_rows": 1.0}, {"dp_shard": 4, "ep": 2}], ids=str)
def test_other_layouts_agree(keys: dict[str, Any]) -> None:
    """Catches rounds and experts that FSDP2 shards, in which passes cannot take turns."""
    case = replace(CASE, parallel=Parallel(**{**PARALLEL.model_dump(exclude_unset=True), **keys}), batch=24)
    apart = replace(case, parallel=case.parallel.model_copy(update={"ep_overlap": False}))
    ranks = 8 if "dp_shard" in keys else 4
    got, wanted = (run_ranks(ranks, train, c, timeout=600)[0] for c in (case, apart))
    assert got["loss"] == wanted["loss"] and all(torch.equal(got["weight"][n], x) for n, x in wanted["weight"].items())


def test_turns() -> None:
    """Catches passes that run at the same time, a pass that waits for one that has ended, and an error that is lost."""
    turns, done = Turns(), list[str]()

    def steps(name: str, n: int) -> None:
        for i in range(n):
            done.append(f"{name}{i}")
            turns.pass_on()

    turns.run(lambda: steps("a", 2), lambda: steps("b", 4), CPU)
    assert done == ["a0", "b0", "a1", "b1", "b2", "b3"]

    def fails() -> None:
        x = torch.ones(2, requires_grad=True)
        x.register_hook(lambda g: Tensor.view(g, 3))
        x.sum().backward()

    for first, second in ((fails, lambda: None), (lambda: None, fails)):
        with pytest.raises(RuntimeError, match="shape"):
            Turns().run(first, second, CPU)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_pass_ends_when_the_other_fails(failing: int) -> None:
    """Catches an error of one rank that nobody sees: its other pass went on and waited in an exchange that no other rank was in, until the
    time-out of collectives.
    """
    turns, sent = Turns(), [0]

    def fails() -> None:
        turns.pass_on()
        raise ValueError("planted")

    def goes_on() -> None:
        for _ in range(4):
            sent[0] += 1
            turns.pass_on()

    with pytest.raises(ValueError, match="planted"):
        turns.run(*((fails, goes_on) if failing == 0 else (goes_on, fails)), CPU)
    assert sent[0] <= 2


def test_a_pass_is_not_begun_when_the_other_has_failed() -> None:
    """Catches exchanges that only this rank starts."""
    begun = list[int]()

    def fails() -> None:
        raise ValueError("planted")

    with pytest.raises(ValueError, match="planted"):
        Turns().run(fails, lambda: begun.append(1), CPU)
    assert not begun
