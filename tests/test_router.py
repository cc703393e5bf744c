"""Routing, its losses and the bank of experts on one process, against plain loops over the published formulas."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import megascale.model.ops.grouped_matmul
import megascale.model.router as router_module
from megascale.comm.piece import Piece
from megascale.config.routers import routers
from megascale.config.schema import Model, Moe, Moeut, Parallel
from megascale.model.experts import MixtureOfExperts, readings
from megascale.model.init import initialize, orthogonal
from megascale.model.ops.grouped_matmul import Permutation, grouped_product, in_one, sum_of_rows
from megascale.model.residual import Stack, residual
from megascale.model.router import Choice, Router, balance_loss, choose, entropy_loss, moved_bias, within_capacity, z_loss
from megascale.model.spec import ParamSpec, specs_of
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


@pytest.mark.parametrize("kind", ["swiglu", "gelu", "relu"])
def test_the_mixture_against_a_loop(kind: str) -> None:
    """Catches a token that meets the wrong expert, a gate on the wrong row, and shared experts that are left out or gated."""
    cfg = tiny(ffn=kind, moe={"num_experts": E, "top_k": K, "ffn_size": 16, "num_shared": 2})
    moe = filled(declared(cfg))
    x = torch.randn(B, S, 24, dtype=torch.float64)
    got = moe(x, None)

    def ffn(v: Tensor, up: Tensor, gate: Tensor | None, down: Tensor) -> Tensor:
        y = up @ v
        if gate is not None:
            y = torch.nn.functional.silu(gate @ v) * y
        else:
            y = torch.nn.functional.gelu(y) if kind == "gelu" else y.relu()
        return down @ y

    bank = moe.experts
    for b in range(B):
        for s in range(S):
            scores = moe.router.weight @ x[b, s]
            chosen = scores.topk(K).indices.tolist()
            gates = torch.softmax(scores[chosen], 0)
            want = sum(
                g * ffn(x[b, s], bank.up.weight[e], None if bank.gate is None else bank.gate.weight[e], bank.down.weight[e])
                for g, e in zip(gates, chosen)
            )
            shared = moe.shared
            want = want + ffn(x[b, s], shared.up.weight, None if shared.gate is None else shared.gate.weight, shared.down.weight)
            torch.testing.assert_close(got[b, s], want)
    assert shared.up.weight.shape == (32, 24)


def test_order_of_tokens_changes_nothing() -> None:
    """Catches a combination that depends on where a token stands in its expert's block."""
    moe = mixture()
    x = torch.randn(1, 20, 24, dtype=torch.float64)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(moe(x[:, order], None), moe(x, None)[:, order], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dropped_tokens_pass_by(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches garbage of rows without an expert in results or gradients, expert by expert and by the grouped product, which leaves them
    undefined: with all tokens alike only the first find room, the others get zero, and so do their gradients.
    """
    monkeypatch.setattr(megascale.model.ops.grouped_matmul, "by_expert", lambda x, weight: dtype == torch.float64)
    monkeypatch.setattr(megascale.model.ops.grouped_matmul, "in_one", with_garbage)
    moe = mixture(capacity_factor=0.5, top_k=1).to(dtype)
    x = torch.randn(1, 1, 24, dtype=dtype).repeat(1, 20, 1).requires_grad_()
    y = moe(x, torch.ones(1, 20, dtype=dtype))
    room = math.ceil(20 * 1 / E * 0.5)
    assert (y[0, :room].abs().amax(-1) > 0).all() and torch.all(y[0, room:] == 0)
    y.sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()
    assert float(moe.metrics.totals["dropped"]) == 20 - room


def with_garbage(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The grouped product where its memory held no numbers before."""
    beyond = torch.arange(len(x)) >= counts.sum()
    return in_one(x, weight, counts).masked_fill(beyond.unsqueeze(1), math.nan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(4, 0, 7, 1, 0), (12, 0, 0, 0, 0), (0, 0, 0, 0, 12)])
def test_the_grouped_product_equals_the_loop(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    """Catches offsets that are off by one expert, and empty experts whose gradient is not zero."""
    torch.manual_seed(0)
    counts = torch.tensor(sizes)
    x, w = torch.randn(12, 16), torch.randn(5, 8, 16)
    outcomes = []
    for kind in (dtype, torch.float64):
        a, b = (t.to(dtype).to(kind).clone().requires_grad_() for t in (x, w))
        y = (grouped_product if kind == torch.float64 else in_one)(a, b, counts)
        (y * torch.arange(8)).sum().backward()
        outcomes.append([t.to(torch.float64) for t in (y.detach(), a.grad, b.grad)])
    bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]  # sums of 16 products in each type
    for fast, plain in zip(*outcomes):
        assert (fast - plain).abs().max() <= bound * plain.abs().max()
    assert torch.all(outcomes[0][2][counts == 0] == 0)


@pytest.mark.parametrize("top_k", [1, 3])
def test_combined_by_gates(top_k: int) -> None:
    """Catches gates of other rows, forward or backward."""
    generator = torch.Generator().manual_seed(3)
    sort = Permutation.of(torch.randint(0, E, (7, top_k), generator=generator))
    rows = torch.randn(7 * top_k, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    gates = torch.rand(7, top_k, dtype=torch.float64, generator=generator, requires_grad=True)
    want = torch.einsum("tk,tkd->td", gates, sort.gather(rows))
    g = torch.randn(want.shape, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(sort.unpermute(rows, gates), want, rtol=0, atol=1e-14)
    for ours, theirs in zip(
        torch.autograd.grad(sort.unpermute(rows, gates), (rows, gates), g), torch.autograd.grad(want, (rows, gates), g)
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_sums_of_rows_are_rounded_once(top_k: int) -> None:
    """Catches sums in bf16 that round after every row, or halves always away from zero."""
    torch.manual_seed(0)
    rows, places = torch.randn(512 * top_k, 32).bfloat16(), torch.randperm(512 * top_k).view(512, top_k)
    assert torch.equal(sum_of_rows(rows, places), rows[places].double().sum(1).bfloat16())


def test_st_moes_start() -> None:
    """Catches a start without truncation, or of the wrong deviation: √(0.1/fan_in), within two deviations."""
    from megascale.comm.piece import Piece
    from megascale.model.init import initialize

    cfg = tiny(moe={"num_experts": E, "ffn_size": 16, "init": "st_moe"})
    specs = specs_of(declared(cfg))
    for name, fan_in in (("router.weight", 24), ("experts.up.weight", 24), ("experts.down.weight", 16)):
        assert specs[name].std == pytest.approx(math.sqrt(0.1 / fan_in)) and specs[name].truncated
    spec = ParamSpec((3, 300, 400), "up", 1, 0.5, truncated=True)
    whole = torch.empty(spec.shape)
    initialize(Piece(spec.shape, (0, 0, 0), whole), "w", spec, 1)
    assert 0.98 < whole.abs().max() <= 1.0
    assert whole.std().item() == pytest.approx(0.5 * 0.8796, rel=0.01)  # of a normal cut at two deviations


def test_readings_of_a_layer() -> None:
    """Catches ratios that depend on how often the same tokens were counted, and an entropy that is not a share."""
    raw = {
        n: torch.tensor(v, dtype=torch.float64)
        for n, v in {"dropped": 3.0, "counted": 2.0, "balance": 4.0, "z": 1.0, "logits": 5.0}.items()
    }
    seen = readings({**raw, "counts": torch.tensor([6.0, 2.0, 2.0, 2.0])})
    assert seen["load_max_over_mean"] == 2.0 and seen["dropped_share"] == 0.25 and seen["aux_loss"] == 2.0 and seen["router_logits"] == 5.0
    assert readings({**raw, "counts": torch.full((4,), 3.0)})["load_entropy"] == pytest.approx(1.0)
    assert readings({**raw, "counts": torch.tensor([12.0, 0, 0, 0])})["load_entropy"] == 0.0


@pytest.mark.parametrize("sizes", [[3, 0, 4, 1, 0], [0, 0, 8, 0, 0]])
@pytest.mark.parametrize("hooked", [False, True])
def test_rounding_one_expert_at_a_time(sizes: list[int], hooked: bool) -> None:
    """Catches a gradient that later micro-batches replace or a hook never sees, one of an expert without rows that is no zero, and a
    difference of one bit to rounding the whole bank.
    """
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(E, 24, 16, generator=generator)
    grads, outputs, seen = [], [], []
    for whole in (False, True):
        weight, generator = start.clone().requires_grad_(), torch.Generator().manual_seed(6)
        if hooked and not whole:
            weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad is not None))
        for _ in range(3):
            x = torch.randn(10, 16, generator=generator).bfloat16().requires_grad_()
            y = grouped_product(x, weight.bfloat16() if whole else weight, torch.tensor(sizes))[: sum(sizes)]
            y.backward(torch.randn(sum(sizes), 24, generator=generator).bfloat16())
            assert x.grad is not None
            outputs.append((y.detach(), x.grad[: sum(sizes)]))
        grads.append(weight.grad)
    for (y, into_x), (want_y, want_into_x) in zip(outputs[:3], outputs[3:]):
        assert torch.equal(y, want_y) and torch.equal(into_x, want_into_x)
    assert torch.equal(*grads)
    assert len(seen) == (3 if hooked else 0)


@pytest.mark.parametrize("mode", ["selective", "full", "nested"])
@pytest.mark.parametrize("variant", ["plain", "moeut"])
def test_recomputation_chooses_as_before(mode: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an expert that is chosen anew when a block is recomputed: where a logit comes out otherwise in its last place, rows and gates
    are of one token and gradients of another, or ranks wait for rows that do not come.
    """
    moe = Moe(num_experts=4, top_k=2, ffn_size=16)
    changes: dict[str, Any] = {"moe": moe}
    if variant == "moeut":
        changes = {"moe": moe.model_copy(update={"router": "sigma", "balance": "entropy"}), "moeut": Moeut(attention_experts=4)}
    case = Case(tiny(num_layers=4, num_kv_heads=4, **changes), Parallel(recompute=mode))
    model = build(case, 1)
    seen: list[Tensor] = []
    chosen = router_module.choose
    again = [False]

    def shaky(score: Any, logits: Tensor, top_k: int, bias: Tensor | None) -> Choice:
        choice = chosen(score, logits * (-1.0 if again[0] else 1.0), top_k, bias)
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


@pytest.mark.parametrize("name", ["product_by_expert", "weight_gradient_by_expert", "fp8_by_expert", "fp8_weight_gradient_by_expert"])
def test_operators_describe_their_results(name: str) -> None:
    """Catches an operator without a fake, or with one of another shape or dtype, which no graph, dry run or fake device could contain."""
    import megascale.model.experts  # noqa: F401  it declares them

    counts, x, g, w = torch.tensor([3, 0, 5]), torch.randn(8, 16), torch.randn(8, 32), torch.randn(3, 32, 16)
    x8, w8, g8 = (t.to(torch.float8_e4m3fn) for t in (x, w, g))
    inputs: dict[str, tuple[Any, ...]] = {
        "product_by_expert": (x, w, counts, False),
        "weight_gradient_by_expert": (w, x, g, counts),
        "fp8_by_expert": (x8, w8, counts, 2.0, torch.bfloat16, False),
        "fp8_weight_gradient_by_expert": (g8.to(torch.float8_e5m2), x8, counts, 2.0, torch.bfloat16),
    }
    torch.library.opcheck(getattr(torch.ops.megascale, name).default, inputs[name], test_utils="test_faketensor")
