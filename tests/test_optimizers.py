"""Ways of computing the same update: many matrices in one product, gradients scaled in the kernel, smaller number formats."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megascale.config import optimizers as config_optimizers
from megascale.config.schema import Optim, Parallel
from megascale.errors import UsageError
from megascale.optim import moments, muon, optimizers, owners
from megascale.optim.optimizers import build_optimizer
from megascale.train.estimate.memory import optimizer_bytes
from tests.layouts import Case, build, tiny
from tests.ranks import fresh_process, run_ranks

CASE = Case(tiny(num_layers=3, ffn_size=48), optim=Optim(name="muon"))


def stepped(case: Case, ranks: int = 1, factor: float = 0.5, finite: bool = True) -> dict[str, Tensor]:
    """The whole weights after two updates with gradients that depend on the weights alone."""
    model = build(case, ranks)
    optimizer = build_optimizer(model, case.optim)
    for _ in range(2):
        step(model, optimizer, factor, finite)
    whole = {}
    for w in model.weights:
        x: Any = w.parameter.detach()
        whole[w.name] = (x.full_tensor() if w.sharded else x).clone()
    return whole


def step(model: Any, optimizer: Any, factor: float = 0.5, finite: bool = True) -> None:
    """One update with gradients that depend on the weights alone."""
    for w in model.weights:
        grad = w.local * 3 + 0.01
        if not w.sharded:
            w.parameter.grad = grad
        else:
            from torch.distributed.tensor import DTensor

            parameter: Any = w.parameter
            w.parameter.grad = DTensor.from_local(
                grad, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
            )
    optimizer.step(0.01, torch.tensor(factor, dtype=torch.float64), torch.tensor(finite))


def batched(case: Case, ranks: int, together: int) -> tuple[dict[str, Tensor], str]:
    """The weights, and in what order exchanges began (e) and were worked on (w)."""
    order = ""

    def noted(letter: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal order
            order += letter
            return function(*args)

        return call

    muon.batch_of = lambda w: together
    muon.orthogonalized = noted("w", muon.orthogonalized)
    owners.start_rows = noted("e", owners.start_rows)
    return stepped(case, ranks), order


@pytest.mark.dist
@pytest.mark.parametrize("muon_dtype", [None, "bf16"])
def test_matrices_together_are_those_alone(muon_dtype: Any) -> None:
    """Catches matrices of a batch that get each other's results, a turn that skips some, a next turn whose pieces meet those of the present
    one, and layouts that round Muon's products differently.
    """
    case = replace(CASE, optim=Optim(name="muon", muon_dtype=muon_dtype))
    alone = stepped(case)
    apart = run_ranks(3, batched, replace(case, parallel=Parallel(dp_shard=3)), 3, 2)
    assert apart[0][1].startswith("eew"), "the second turn's pieces must be on their way while the first is worked on"
    moved = 0.01 if muon_dtype is None else 0.5  # of an update: bf16 rounds sums of any order at their last place
    before = stepped(case, finite=False)
    for name, w in alone.items():
        bound = moved * (w - before[name]).abs().max()
        assert (apart[0][0][name] - w).abs().max() <= bound * (1e-9 if muon_dtype is None else 0.1), name
        assert bound > 0, name


def test_muon_in_bf16_is_torchs() -> None:
    """Catches another rounding than torch.optim.Muon's, whose products are in bf16."""
    torch.manual_seed(0)
    for shape in ((12, 20), (20, 12)):
        grad = torch.randn(shape)
        theirs = torch.nn.Parameter(torch.zeros(shape))
        theirs.grad = grad.clone()
        torch.optim.Muon([theirs], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, adjust_lr_fn="match_rms_adamw").step()
        ours = muon.orthogonalize(grad.bfloat16(), muon.JORDAN * 5)
        assert (-0.2 * max(shape) ** 0.5 * ours.float() - theirs).abs().max() < 0.05 * theirs.abs().max()
        exact = muon.orthogonalize(grad, muon.JORDAN * 5)
        assert 1e-4 < (exact - ours.float()).abs().max() < 0.05, "bf16 was not used, or is wrong"


def test_gradients_scaled_in_the_kernel_are_those_scaled_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a gradient multiplied where the kernel divides, scaled twice or not at all, and a bad step that is taken."""
    case = replace(CASE, optim=Optim(name="adamw", eps=1e-2), precision="fp32")
    before, plain = stepped(case, finite=False), stepped(case)
    monkeypatch.setattr(optimizers, "divided_in_kernel", lambda weights: True)
    inside = stepped(case)
    for name, w in plain.items():
        torch.testing.assert_close(inside[name], w, rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(before[n], plain[n]) for n in plain)
    skipped = stepped(case, finite=False)
    assert all(torch.equal(skipped[n], before[n]) for n in before)


def test_lion_in_runs_is_lion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run of weights that gets the rate, decay or average of another, against the formula weight by weight."""
    case = replace(CASE, optim=Optim(name="lion", multipliers={"head.weight": {"lr": 0.5}}))  # type: ignore[dict-item]
    monkeypatch.setattr(optimizers, "RUN", 3000)  # some weights alone, some together
    found = stepped(case)
    model = build(case, 1)
    for w in model.weights:
        p, m = w.local.clone(), torch.zeros_like(w.local)
        rate = 0.01 * (0.5 if w.name == "head.weight" else 1.0)
        decay = case.optim.weight_decay if w.placement.spec.decays else 0.0
        for _ in range(2):
            g = (p * 3 + 0.01) * 0.5
            p, m = p - rate * ((0.9 * m + 0.1 * g).sign() + decay * p), 0.95 * m + 0.05 * g
        torch.testing.assert_close(found[w.name], p, rtol=1e-9, atol=1e-12)


ADAMW = Case(tiny(num_layers=2, ffn_size=48), optim=Optim(), precision="fp32")


def small(kind: str | None) -> Case:
    return replace(ADAMW, optim=Optim(moments=kind))  # type: ignore[arg-type]


def with_state(case: Case, ranks: int) -> tuple[Any, Any]:
    """A model and its optimizer after two updates."""
    config_optimizers.BLOCK = 4  # widths are small here
    model = build(case, ranks)
    optimizer = build_optimizer(model, case.optim)
    for _ in range(2):
        step(model, optimizer)
    return model, optimizer


def keep(case: Case, root: str) -> list[str]:
    from megascale.checkpoint.saver import write_checkpoint
    from megascale.train.state import state_pieces

    model, optimizer = with_state(case, 1)
    write_checkpoint(root, 1, state_pieces(model, optimizer.state()), {"step": 1})
    return sorted(optimizer.state())


def differences(case: Case, ranks: int, root: str) -> dict[str, float]:
    """By key, the largest difference of a loaded state from the one that these ranks have after the same updates."""
    from megascale.checkpoint.loader import find, load
    from megascale.train.state import state_pieces

    model, optimizer = with_state(case, ranks)
    own = {name: piece.local.clone() for name, piece in state_pieces(model, optimizer.state()).items()}
    pieces = state_pieces(model, optimizer.state())
    for piece in pieces.values():
        piece.local.zero_()
    load(find(root), pieces)
    found: dict[str, float] = {}
    for name, piece in pieces.items():
        x, y = piece.local.double(), own[name].double()
        if name.startswith("optim.") and x.numel():
            key = name.split(".")[1]
            found[key] = max(found.get(key, 0.0), (x - y).abs().max().item() / max(1e-30, y.abs().max().item()))
    return found


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_small_moments_resume_on_any_layout(kind: str, tmp_path: Path) -> None:
    """Catches blocks that a layout cuts, scales saved as if they were weights, a moment that is loaded as another, and padding in a
    checkpoint: what one process saved is what tp × dp has after the same updates.
    """
    case = small(kind)
    keys = fresh_process(keep, case, str(tmp_path))
    assert ("exp_avg_scale" in keys) == (kind == "int8")
    for found in run_ranks(4, differences, replace(case, parallel=Parallel(tp=2, dp_shard=2)), 4, str(tmp_path), timeout=200):
        assert set(found) == set(keys)
        assert all(share <= (1 / 100 if key.endswith(("avg", "sq")) else 1e-5) for key, share in found.items()), found


@pytest.mark.parametrize(("kind", "bound"), [("bf16", 0.02), ("int8", 0.2)])
def test_small_moments_take_about_the_same_steps(kind: str, bound: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches moments that are scaled, cut or forgotten between updates, a bad step that changes them, and wrong numbers of bytes."""
    monkeypatch.setattr(config_optimizers, "BLOCK", 8)
    exact, rough, start = stepped(small(None)), stepped(small(kind)), stepped(small(kind), finite=False)
    moved = max(float((exact[n] - start[n]).abs().max()) for n in exact)
    assert 0 < max(float((exact[n] - rough[n]).abs().max()) for n in exact) < bound * moved
    model = build(small(kind), 1)
    optimizer = build_optimizer(model, small(kind).optim)
    step(model, optimizer)
    before = {key: {n: x.clone() for n, x in of.items()} for key, of in optimizer.state().items()}
    step(model, optimizer, finite=False)
    assert all(torch.equal(x, before[key][n]) for key, of in optimizer.state().items() for n, x in of.items())
    held = sum(x.nbytes for of in optimizer.state().values() for x in of.values())
    assert held == sum(optimizer_bytes(small(kind).optim, w.placement, w.local.shape, 4) for w in model.weights)


def test_codes_are_those_of_the_paper() -> None:
    """Catches a format with other values, a zero that is not one, and codes that change when they are read and written again."""
    for signed in (True, False):
        table = moments.code_values(signed)
        assert len(set(table.tolist())) == 256 and table.max() == 1.0 and (table == 0).sum() == 1
        assert (table < 0).sum() == (127 if signed else 0)
        smallest = table[table > 0].min().item()
        assert smallest == pytest.approx(5.5e-7 if signed else 3.25e-7)
        values = torch.randn(4, 512).double() if signed else torch.rand(4, 512).double() ** 8
        kept = moments.Blocks(values, 256, signed)
        kept.close(values)
        opened, codes = kept.open(), kept.tensors[""].clone()
        assert (opened - values).abs().max() < 0.02 * values.abs().max()
        assert signed or bool((opened[values > 0] > 0).all())
        kept.close(opened)
        assert torch.equal(kept.tensors[""], codes)


def test_blocks_that_a_layout_would_cut_are_refused() -> None:
    """Catches scales over another part of a row than on another layout."""
    model = build(small("int8"), 1)
    w = next(w for w in model.weights if w.name.endswith("ffn.down.weight"))
    cut = replace(w, parameter=torch.nn.Parameter(w.local[:, :5].clone()))
    with pytest.raises(UsageError, match=r"holds 5 of the 48 columns of .*, which cuts its blocks of 16: use fewer tensor-parallel"):
        moments.moment_of(cut, "int8", True)
