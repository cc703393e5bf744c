"""Settings by pattern: factors, frozen weights, and phases that freeze and thaw them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megascale.config.load import build_config
from megascale.config.schema import Group, Optim, Parallel
from megascale.errors import UsageError
from megascale.optim.optimizers import build_optimizer
from megascale.optim.rates import check_names, group_of
from megascale.train.estimate.memory import optimizer_bytes
from megascale.train.phases import phases_of
from tests.layouts import CPU, Case, build, tiny, train, whole
from tests.ranks import run_ranks
from tests.runs import losses, make_tokens, rows, run, settings, weights_at

GROUPS = (
    Group(match="embedding", lr=4.0, weight_decay=0.0),
    Group(match="blocks.*.weight", frozen=True, lr=0.5),
    Group(match="blocks.1.*", frozen=False, weight_decay=3.0),
    Group(match="query", lr=0.5, eps=2.0),
)


def test_entries_count_together() -> None:
    """Catches an entry that replaces another, a pattern that stops at a dot, a role that is not found, and a thawed layer that stays."""
    specs = {w.name: w.placement.spec for w in build(Case(tiny()), 1).weights}
    found = {name: group_of(Optim(groups=GROUPS), name, spec) for name, spec in specs.items()}
    told = {name: (g.lr, g.weight_decay, g.eps, bool(g.frozen)) for name, g in found.items()}
    assert told["embedding.weight"] == (4.0, 0.0, 1.0, False)
    assert told["blocks.0.attention.q.weight"] == (0.25, 1.0, 2.0, True)
    assert told["blocks.1.attention.q.weight"] == (0.25, 3.0, 2.0, False)
    assert told["head.weight"] == (1.0, 1.0, 1.0, False)


def size(of: dict[str, Any], names: list[str]) -> float:
    return float(sum(of["grad"][n].square().sum() for n in names)) ** 0.5


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_factors_and_frozen_weights(name: str) -> None:
    """Catches a frozen weight that moves, decays or adds to the norm, a state that changes, and a rate or decay that is not scaled."""
    case = Case(tiny(), optim=Optim(name=name, lr=1e-3, groups=GROUPS), steps=2, clip=0.0)
    plain = train(replace(case, optim=Optim(name=name, lr=1e-3), steps=1))
    found, begun = train(replace(case, steps=1)), whole(build(case, 1), "local")
    frozen = [n for n in begun if n.startswith("blocks.0.")]
    assert all(torch.equal(found["weight"][n], begun[n]) for n in frozen)
    share = size(found, [n for n in begun if n not in frozen]) / size(plain, list(begun))
    assert found["norm"][0] == pytest.approx(share * plain["norm"][0], rel=1e-9)
    assert share < 0.99

    def update(of: dict[str, Any], n: str, decay: float) -> torch.Tensor:
        return of["weight"][n] - begun[n] * (1 - decay)

    rate, decay = 1e-3, 0.1
    for n, factor, share in (("embedding.weight", 4.0, 0.0), ("blocks.1.ffn.up.weight", 0.5, 3.0), ("blocks.1.ffn_norm.weight", 0.5, 0.0)):
        own = 0.0 if n.endswith("norm.weight") else decay
        here, there = update(found, n, rate * factor * own * share), update(plain, n, rate * own)
        torch.testing.assert_close(here, there * factor, rtol=1e-6, atol=1e-12)
    assert torch.equal(found["weight"]["head.weight"], plain["weight"]["head.weight"])


def test_frozen_state_is_counted_and_kept() -> None:
    """Catches bytes of the dry run that are not those of the state, and a state that frozen weights lose."""
    model = build(Case(tiny()), 1)
    optim = Optim(groups=GROUPS)
    state = build_optimizer(model, optim).state()
    held = sum(x.nbytes for of in state.values() for x in of.values())
    assert held == sum(optimizer_bytes(optim, w.placement, w.local.shape, 8) for w in model.weights)


def test_an_optimizer_on_the_host_leaves_frozen_weights() -> None:
    """Catches frozen weights that the host updates, or copies of them that come back otherwise."""
    case = Case(tiny(), Parallel(offload=("optimizer",)), Optim(lr=1e-3, groups=GROUPS))
    there, here = train(case)["weight"], train(replace(case, parallel=Parallel()))["weight"]
    assert all(torch.equal(there[n], w) for n, w in here.items())


def test_entries_without_weights_are_refused() -> None:
    """Catches a pattern with a typing error that freezes nothing in silence."""
    specs = {w.name: w.placement.spec for w in build(Case(tiny()), 1, CPU).weights}
    with pytest.raises(UsageError, match=r"groups\[1\].match is 'blocks.\*.atention.q.weight', .* are blocks.\*.attention.q.weight"):
        check_names(Optim(groups=(GROUPS[0], Group(match="blocks.*.atention.q.weight"))), specs)
    with pytest.raises(UsageError, match="freezes all 21 weights"):
        check_names(Optim(groups=(Group(match="*", frozen=True),)), specs)
    late = {"phases": [{"from": "1 steps", "set": {"optim.groups": [{"match": "emberding"}]}}]}
    with pytest.raises(UsageError, match="the nearest are embedding"):
        phases_of(build_config({**Case(tiny()).config.plain(), **late}), 1)


def thawing(folder: Path, place: Path, name: str, **changes: Any) -> dict[str, Any]:
    """The first layer and the embedding are frozen from step 3 on; from step 6 the layer moves again, at another rate."""
    first = [{"match": "blocks.0.*", "frozen": True}, {"match": "embedding", "frozen": True}]
    then = [{"match": "blocks.0.*", "lr": 0.5}, {"match": "embedding", "frozen": True}]
    entries = [{"from": "2 steps", "set": {"optim.groups": first}}, {"from": "5 steps", "set": {"optim.groups": then}}]
    found = settings(place, train__steps=8, checkpoint__every=1, checkpoint__keep_last=9, optim__name=name, **changes)
    return {**found, "data": {"train": str(folder / "tokens")}, "phases": entries}


ROUTES: dict[str, tuple[str, list[tuple[int, dict[str, Any]]]]] = {
    "muon": ("muon", [(2, {"parallel__tp": 2}), (2, {"parallel__dp_shard": 2}), (1, {})]),
    "adamw": ("adamw", [(2, {"parallel__pp": 2}), (2, {"parallel__dp_shard": 2, "parallel__accumulation": "layered"}), (1, {})]),
    "lion": ("lion", [(4, {"parallel__tp": 2, "parallel__dp_shard": 2}), (2, {"parallel__cp": 2}), (2, {"parallel__pp": 2})]),
}


@pytest.mark.dist
@pytest.mark.parametrize("route", ["muon", *(pytest.param(r, marks=pytest.mark.slow) for r in ROUTES if r != "muon")])
def test_phases_freeze_and_thaw_on_any_layout(route: str, tmp_path: Path) -> None:
    """Catches frozen weights that move on a layout, and a state that is lost, shared or updated while its weight is frozen: a run that
    stops in each phase and goes on elsewhere has the curve and the state of the one that stayed.
    """
    name, layouts = ROUTES[route]
    make_tokens(tmp_path / "tokens", 200)
    assert run(thawing(tmp_path, tmp_path, name)) == (0, "done")
    at = {step: weights_at(tmp_path, step) for step in (1, 2, 4, 5, 6, 8)}
    layer = [n for n in at[1] if ".blocks.0." in n]
    assert all(torch.equal(at[2][n], at[5][n]) for n in (*layer, "model.embedding.weight", "optim.exp_avg.embedding.weight") if n in at[2])
    assert all(not torch.equal(at[5][n], at[6][n]) for n in layer if n.startswith("model."))
    assert torch.equal(at[8]["model.embedding.weight"], at[2]["model.embedding.weight"])
    wandering = tmp_path / "wandering"
    for (ranks, changes), stop in zip(layouts, (3, 6, None)):
        values = thawing(tmp_path, wandering, name, **changes)
        codes = run_ranks(ranks, run, values, stop) if ranks > 1 else [run(values, stop)]
        assert {c for c, _ in codes} == {75 if stop else 0}, codes
    assert max(abs(a - b) / b for a, b in zip(losses(wandering), losses(tmp_path), strict=True)) <= 1e-12
    there = weights_at(wandering, 8)
    assert all((at[8][n] - there[n]).abs().max() <= 1e-12 for n in there if there[n].is_floating_point())
    assert [e["step"] for e in rows(wandering, "events") if e["event"] == "phase"] == [2, 5]
