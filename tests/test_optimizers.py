"""Ways of computing the same update: many matrices in one product, gradients scaled in the kernel, smaller number formats."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megascale.config.schema import Optim, Parallel
from megascale.optim import optimizers, owners
from megascale.optim.optimizers import build_optimizer
from tests.layouts import Case, build, tiny
from tests.ranks import run_ranks

CASE = Case(tiny(num_layers=3, ffn_size=48), optim=Optim(name="muon"))


def stepped(case: Case, ranks: int = 1, factor: float = 0.5, finite: bool = True) -> dict[str, Tensor]:
    """The whole weights after two updates with gradients that depend on the weights alone."""
    model = build(case, ranks)
    optimizer = build_optimizer(model, case.optim)
    for _ in range(2):
        for w in model.weights:
            grad = w.local * 3 + 0.01
            if w.sharded:
                from torch.distributed.tensor import DTensor

                parameter: Any = w.parameter
                w.parameter.grad = DTensor.from_local(grad, parameter.device_mesh, parameter.placements, run_check=False,
                                                      shape=parameter.shape, stride=parameter.stride())  # fmt: skip
            else:
                w.parameter.grad = grad.clone()
        optimizer.step(0.01, torch.tensor(factor, dtype=torch.float64), torch.tensor(finite))
    whole = {}
    for w in model.weights:
        x: Any = w.parameter.detach()
        whole[w.name] = (x.full_tensor() if w.sharded else x).clone()
    return whole


def batched(case: Case, ranks: int, together: int) -> tuple[dict[str, Tensor], str]:
    """The weights, and in what order exchanges began (e) and were worked on (w)."""
    order = ""

    def noted(letter: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal order
            order += letter
            return function(*args)

        return call

    optimizers.batch_of = lambda w: together
    optimizers.orthogonalized = noted("w", optimizers.orthogonalized)
    owners.Flight.start = noted("e", owners.Flight.start)  # type: ignore[method-assign]
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
        ours = optimizers.orthogonalize(grad.bfloat16(), optimizers.Muon.COEFFICIENTS, optimizers.Muon.ROUNDS)
        assert (-0.2 * max(shape) ** 0.5 * ours.float() - theirs).abs().max() < 0.05 * theirs.abs().max()
        exact = optimizers.orthogonalize(grad, optimizers.Muon.COEFFICIENTS, optimizers.Muon.ROUNDS)
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
