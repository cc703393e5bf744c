"""Routing, its losses and the bank of experts on one process, against plain loops over the published formulas."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import megascale.model.router as router_module
from megascale.comm.piece import Piece
from megascale.config.routers import routers
from megascale.config.schema import Model, Moe, Moeut, Parallel
from megascale.model.experts import MixtureOfExperts
from megascale.model.init import initialize, orthogonal
from megascale.model.residual import Stack, residual
from megascale.model.router import Choice, Router, balance_loss, choose, entropy_loss, moved_bias, within_capacity, z_loss
from megascale.model.spec import specs_of
from megascale.plugins import resolve
from tests.layouts import Case, build, fake_batch, tiny

B, S, E, K = 2, 7, 5, 2


def logits_of(seed: int = 0, **keys: Any) -> Tensor:
    return torch.randn(B, S, E, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), **keys) * 2


def chosen_by(router: str, logits: Tensor, top_k: int, bias: Tensor | None) -> Choice:
    return choose(resolve(routers()[router].score, router), logits, top_k, bias)


def filled(module: torch.nn.Module) -> Any:
    """A meta module in fp64 memory with random weights; declared states at zero."""
    torch.manual_seed(3)
    module.to_empty(device="cpu")
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    for b in module.buffers():
        b.zero_()
    return module


def declared(cfg: Model) -> MixtureOfExperts:
    """The mixture of the first of two pre-norm blocks, on the meta device."""
    return MixtureOfExperts(cfg, residual(cfg, Stack("decoder", 2), 0), torch.float64)


def mixture(**keys: Any) -> MixtureOfExperts:
    return filled(declared(tiny(moe={"num_experts": E, "top_k": K, "ffn_size": 16, **keys})))  # type: ignore[no-any-return]


@pytest.mark.parametrize("rule", ["topk_softmax", "xmoe", "softmax_topk", "sigmoid"])
@pytest.mark.parametrize("biased", [False, True])
def test_each_rule_against_its_formula(rule: str, biased: bool) -> None:
    """Catches a softmax on the wrong side of the selection, a bias that leaks into gates, and sigmoid gates that do not sum to one."""
    logits = logits_of()
    bias = torch.linspace(-1, 1, E, dtype=torch.float64) if biased else None
    got = chosen_by(rule, logits, K, bias)
    for b in range(B):
        for s in range(S):
            x = logits[b, s].tolist()
            soft = [math.exp(v) / sum(map(math.exp, x)) for v in x]
            sigma = [1 / (1 + math.exp(-v)) for v in x]
            rank = {"softmax_topk": soft, "sigmoid": sigma}.get(rule, x)
            order = sorted(range(E), key=lambda i: -(rank[i] + (0 if bias is None else float(bias[i]))))[:K]
            assert got.experts[b, s].tolist() == order
            chosen = [rank[i] for i in order]
            if rule in ("topk_softmax", "xmoe"):
                gates = [math.exp(v) / sum(map(math.exp, chosen)) for v in chosen]
            else:
                gates = [v / sum(chosen) for v in chosen] if rule == "sigmoid" else chosen
            assert got.gates[b, s].tolist() == pytest.approx(gates, abs=1e-14)
            probabilities = [v / sum(sigma) for v in sigma] if rule == "sigmoid" else soft
            assert got.probabilities[b, s].tolist() == pytest.approx(probabilities, abs=1e-14)


def test_a_single_sigmoid_gate_is_not_normalized() -> None:
    """Catches σ/σ = 1: with one expert a token the router would get no gradient."""
    got = chosen_by("sigmoid", logits_of(), 1, None)
    assert torch.equal(got.gates.squeeze(-1), torch.sigmoid(logits_of()).amax(-1))


@pytest.mark.parametrize("rule", ["topk_softmax", "xmoe"])
def test_a_single_gate_is_a_probability(rule: str) -> None:
    """Catches softmax over one logit, which is 1: Switch's and X-MoE's gate is the probability among all experts."""
    got = chosen_by(rule, logits_of(), 1, torch.linspace(-1, 1, E, dtype=torch.float64))
    assert torch.equal(got.gates, torch.softmax(logits_of(), -1).gather(-1, got.experts))


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("rule", ["topk_softmax", "xmoe", "softmax_topk", "sigmoid", "sigma"])
def test_one_expert_a_token_teaches_the_router(rule: str, shared: int, unit: bool) -> None:
    """Catches gates that are 1 whatever the router says, by a softmax over one or by a division by their own size."""
    moe = mixture(router=rule, top_k=1, num_shared=shared)
    moe.unit_gates = unit
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(B, S, 24, generator=generator, dtype=torch.float64)
    (moe(x, None) * torch.randn(B, S, 24, generator=generator, dtype=torch.float64)).sum().backward()
    for weight in moe.router.parameters():
        assert weight.grad is not None and weight.grad.abs().max() > 1e-6


@pytest.mark.parametrize("top_k", [1, K])
@pytest.mark.parametrize("rule", ["sigmoid", "sigma"])
def test_sigmoids_that_all_underflow(rule: str, top_k: int) -> None:
    """Catches 0/0 in gates, in the probabilities that balance is judged by, and in the size that unit gates are divided by."""
    logits = (logits_of().float() - 200).requires_grad_()
    got = chosen_by(rule, logits, top_k, None)
    if rule == "sigmoid":
        # σ tends to the exponential, and its shares to a softmax, from which they differ by nothing in fp32.
        torch.testing.assert_close(got.probabilities, torch.softmax(logits, -1))
        if top_k > 1:
            torch.testing.assert_close(got.gates, torch.softmax(logits.gather(-1, got.experts), -1))
    (got.gates.sum() + (got.probabilities * torch.randn_like(logits)).sum()).backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    moe = mixture(router=rule, top_k=top_k).float()
    moe.unit_gates = True
    with torch.no_grad():
        moe.router.weight.fill_(-10.0)
    x = torch.ones(B, S, 24, requires_grad=True)
    y = moe(x, None)
    y.sum().backward()
    assert y.isfinite().all() and x.grad is not None and x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in moe.parameters())


COUNTED = torch.tensor([[0.1] * 5 + [0.0] * 2, [0.0] * 2 + [0.3] * 5], dtype=torch.float64)


def test_losses_against_loops() -> None:
    """Catches a balance loss over the whole micro-batch instead of each sequence, and tokens that should not count."""
    logits = logits_of()
    choice = chosen_by("topk_softmax", logits, K, None)
    balance = entropy = z = 0.0
    for b in range(B):
        weights = COUNTED[b].tolist()
        for s, w in enumerate(weights):
            z += w * math.log(sum(math.exp(v) for v in logits[b, s].tolist())) ** 2
        for i in range(E):
            f = sum(w * choice.experts[b, s].tolist().count(i) for s, w in enumerate(weights)) / (K * sum(weights))
            p = sum(w * float(choice.probabilities[b, s, i]) for s, w in enumerate(weights)) / sum(weights)
            balance += sum(weights) * E * f * p
            entropy += sum(weights) * p * math.log(p)
    assert float(balance_loss(choice, COUNTED)) == pytest.approx(balance, rel=1e-13)
    assert float(entropy_loss(choice, COUNTED)) == pytest.approx(entropy, rel=1e-13)
    assert float(z_loss(logits, COUNTED)) == pytest.approx(z, rel=1e-13)
    even = Choice(torch.arange(E).repeat(2, 1)[:, :, None], torch.ones(2, E, 1), torch.full((2, E, E), 1 / E))
    assert float(balance_loss(even, torch.ones(2, E))) == pytest.approx(2 * E)  # one a token


@pytest.mark.parametrize("form", [balance_loss, entropy_loss])
def test_losses_do_not_depend_on_how_the_batch_is_cut(form: Any) -> None:
    """Catches what makes a curve depend on the layout: sequences alone, or cut in two with their loads summed, give the same losses."""
    choice = chosen_by("softmax_topk", logits_of(), K, None)
    whole = float(form(choice, COUNTED))
    apart = sum(float(form(Choice(*(t[b : b + 1] for t in choice)), COUNTED[b : b + 1])) for b in range(B))
    assert apart == pytest.approx(whole, rel=1e-14)
    loads: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        loads.append(x)
        return x

    halves = [slice(0, 3), slice(3, S)]
    for part in halves:
        form(Choice(*(t[:, part] for t in choice)), COUNTED[:, part], note)
    total = loads[0] + loads[1]
    shares = [float(form(Choice(*(t[:, p] for t in choice)), COUNTED[:, p], lambda _: total)) for p in halves]
    assert sum(shares) == pytest.approx(whole, rel=1e-14)


@pytest.mark.parametrize("kind", ["balance", "entropy", "z"])
def test_gradients_of_the_losses_by_finite_differences(kind: str) -> None:
    """Catches a gradient through the counts, which are constants, or one that is lost through the probabilities."""
    logits = logits_of().requires_grad_()

    def value(x: Tensor) -> Tensor:
        if kind == "z":
            return z_loss(x, COUNTED)
        form = entropy_loss if kind == "entropy" else balance_loss
        return form(chosen_by("topk_softmax", x, K, None), COUNTED)

    value(logits).backward()
    assert logits.grad is not None
    step = 1e-6
    for index in [(0, 0, 0), (0, 3, 4), (1, 6, 2), (1, 0, 1)]:
        moved = logits.detach().clone()
        moved[index] += step
        back = logits.detach().clone()
        back[index] -= step
        slope = float(value(moved) - value(back)) / (2 * step)
        assert float(logits.grad[index]) == pytest.approx(slope, abs=1e-8)
    assert torch.all(logits.grad[COUNTED == 0] == 0)


def test_capacity_against_a_loop() -> None:
    """Catches second choices served before first ones, room that is rounded down, and room shared between sequences."""
    experts = chosen_by("topk_softmax", logits_of(5), K, None).experts
    for factor in (0.5, 1.0, 1.25, 10.0):
        kept = within_capacity(experts, E, factor)
        room = math.ceil(S * K / E * factor)
        for b in range(B):
            taken = [0] * E
            for choice in range(K):
                for s in range(S):
                    expert = int(experts[b, s, choice])
                    taken[expert] += 1
                    assert bool(kept[b, s, choice]) == (taken[expert] <= room)
    assert kept.all()


def test_bias_moves_towards_the_idle() -> None:
    """Catches the wrong sign, a drifting mean, and a step that depends on how often the same tokens were counted."""
    counts = torch.tensor([10, 0, 5, 5])
    moved = moved_bias(torch.zeros(4, dtype=torch.float64), counts, 1e-3)
    assert moved.tolist() == pytest.approx([-1e-3, 1e-3, 0, 0])
    assert torch.equal(moved, moved_bias(torch.zeros(4, dtype=torch.float64), 3 * counts, 1e-3))
    lone = moved_bias(torch.zeros(4, dtype=torch.float64), torch.tensor([9, 0, 0, 0]), 1e-3)
    assert lone.tolist() == pytest.approx([-1.5e-3, 0.5e-3, 0.5e-3, 0.5e-3])


def test_xmoe_compares_directions() -> None:
    """Catches logits that feel the length of an expert's row, and a temperature that multiplies."""
    router = filled(Router(24, Moe(num_experts=E, top_k=K, router="xmoe"), 0.1, False, torch.float64))
    x = torch.randn(B, S, 24, dtype=torch.float64)
    low, rows = x @ router.project.t(), router.weight / router.weight.norm(dim=1, keepdim=True)
    want = low @ rows.t() / router.temperature
    torch.testing.assert_close(router.logits(x), want)
    with torch.no_grad():
        router.weight.mul_(3.0)
    torch.testing.assert_close(router.logits(x), want)
    assert router.project.shape == (16, 24)


@pytest.mark.parametrize("experts", [6, 40])
def test_xmoe_starts_from_an_orthogonal_matrix(experts: int) -> None:
    """Catches rows drawn one by one, lengths that are not the published one, and a start that follows how the rows are dealt out."""
    spec = specs_of(declared(tiny(moe={"num_experts": experts, "router": "xmoe"})))["router.weight"]
    whole = torch.empty(spec.shape, dtype=torch.float64)
    initialize(Piece(spec.shape, (0, 0), whole), "w", spec, 3)
    assert whole.norm(dim=1).tolist() == pytest.approx([1.5] * experts, rel=1e-6)
    if experts <= spec.shape[1]:
        torch.testing.assert_close(whole @ whole.t(), 2.25 * torch.eye(experts, dtype=torch.float64), rtol=0, atol=1e-6)
    else:  # more rows than dimensions: the columns are orthogonal, up to what bringing the rows to one length changes
        normal = torch.empty(spec.shape)
        initialize(Piece(spec.shape, (0, 0), normal), "w", replace(spec, orthogonal=False, equal_rows=False, std=1.0), 3)
        q = orthogonal(normal)
        torch.testing.assert_close(q.t() @ q, torch.eye(16, dtype=torch.float64))
        torch.testing.assert_close(whole, 1.5 * q / q.norm(dim=1, keepdim=True), rtol=0, atol=1e-6)
    for low, high in ((0, 1), (1, 4), (experts - 2, experts)):
        part = torch.empty(high - low, spec.shape[1], dtype=torch.float64)
        initialize(Piece(spec.shape, (low, 0), part), "w", spec, 3)
        assert torch.equal(part, whole[low:high])


@pytest.mark.parametrize("mode", ["selective", "full", "nested"])
@pytest.mark.parametrize("variant", ["plain", "grouped", "moeut"])
def test_recomputation_chooses_as_before(mode: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an expert that is chosen anew when a block is recomputed: where a logit comes out otherwise in its last place, rows and gates
    are of one token and gradients of another, or ranks wait for rows that do not come.
    """
    moe = Moe(num_experts=4, top_k=2, ffn_size=16)
    changes: dict[str, Any] = {"moe": moe}
    if variant == "grouped":
        limits = {"groups": 4, "top_groups": 2, "balance": "bias", "sequence_loss": 0.1}
        changes = {"moe": moe.model_copy(update=limits)}
    if variant == "moeut":
        changes = {"moe": moe.model_copy(update={"router": "sigma", "balance": "entropy"}), "moeut": Moeut(attention_experts=4)}
    case = Case(tiny(num_layers=4, num_kv_heads=4, **changes), Parallel(recompute=mode))
    model = build(case, 1)
    seen: list[Tensor] = []
    chosen = router_module.choose
    again = [False]

    def shaky(score: Any, logits: Tensor, *rest: Any) -> Choice:
        choice = chosen(score, logits * (-1.0 if again[0] else 1.0), *rest)
        seen.append(choice.experts)
        return choice

    monkeypatch.setattr(router_module, "choose", shaky)
    loss = model.module(**fake_batch(case, [0]).inputs())
    first, again[0] = [x.clone() for x in seen], True
    seen.clear()
    loss.backward()
    assert len(seen) >= len(first) > 0
    assert all(any(torch.equal(x, y) for y in first) for x in seen)
    assert all(w.local_grad is not None and torch.isfinite(w.local_grad).all() for w in model.weights)
