"""Group-limited routing, gates, biases, shared gates and the balance of a batch, on one process against loops over tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megascale.config.schema import Model, Moe
from megascale.model.experts import MixtureOfExperts
from megascale.model.families import build_part
from megascale.model.residual import Stack, residual
from megascale.model.router import Among, choose, share_of, sigmoid
from megascale.model.shape import Shape
from megascale.model.spec import active_parameters, specs_of
from megascale.parallel import expert
from tests.layouts import Case, build, fake_batch, tiny
from tests.test_router import filled

B, S, D, E, K = 2, 5, 24, 8, 3
DEEPSEEK = {
    "router": "sigmoid",
    "balance": "bias",
    "groups": 4,
    "top_groups": 2,
    "routed_scale": 2.5,
    "num_shared": 1,
    "sequence_loss": 0.3,
}
GPT_OSS = {"router": "topk_softmax", "expert_bias": True, "router_bias": True, "balance_over": "batch"}
QWEN = {"router": "softmax_topk", "renormalize": True, "num_shared": 1, "shared_gate": True, "balance_over": "batch"}


def mixture(ffn: str = "swiglu", **keys: Any) -> MixtureOfExperts:
    cfg = tiny(ffn=ffn, moe={"num_experts": E, "top_k": K, "ffn_size": 16, "aux_loss": 0.2, "z_loss": 0.05, **keys})
    found: MixtureOfExperts = filled(MixtureOfExperts(cfg, residual(cfg, Stack("decoder", 2), 0), torch.float64))
    generator = torch.Generator().manual_seed(5)
    for state in (found.router.bias, found.router.share):
        if state is not None:
            state.copy_(torch.rand(E, generator=generator))
    return found


def best_of(values: list[float], k: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])[:k]


def scored(moe: MixtureOfExperts, logits: list[float]) -> tuple[list[float], list[float], list[float]]:
    """Scores that experts are chosen by, own gates, and probabilities of one token."""
    top = max(logits)
    soft = [math.exp(v - top) / sum(math.exp(w - top) for w in logits) for v in logits]
    sigmas = [1 / (1 + math.exp(-v)) for v in logits]
    return {
        "sigmoid": (sigmas, sigmas, [v / sum(sigmas) for v in sigmas]),
        "sigma": (sigmas, sigmas, soft),
        "softmax_topk": (soft, soft, soft),
        "topk_softmax": (logits, soft, soft),
    }[moe.moe.router]


def chosen_by_loop(moe: MixtureOfExperts, logits: list[float], plain: bool = False) -> list[int]:
    """The published selection, one token; `plain`: without biases and groups."""
    cfg, scores = moe.moe, scored(moe, logits)[0]
    if plain:
        return best_of(scores, K)
    if moe.router.bias is not None:
        scores = [s + float(b) for s, b in zip(scores, moe.router.bias)]
    if cfg.groups is not None:
        size = E // cfg.groups
        parts = [scores[g * size : (g + 1) * size] for g in range(cfg.groups)]
        of = [sum(sorted(p)[-2:]) if cfg.group_score == "top2" else max(p) for p in parts]
        there = best_of(of, cfg.top_groups or 0)
        scores = [s if i // size in there else -math.inf for i, s in enumerate(scores)]
    return best_of(scores, K)


def gates_by_loop(moe: MixtureOfExperts, logits: list[float], experts: list[int]) -> list[float]:
    cfg = moe.moe
    own = [scored(moe, logits)[1][e] for e in experts]
    divided = cfg.router in ("sigmoid", "topk_softmax") if cfg.renormalize is None else cfg.renormalize
    return [cfg.routed_scale * g / (sum(own) if divided else 1.0) for g in own]


def feed_forward(x: Tensor, up: Any, gate: Any, down: Any, kind: str, e: int | None = None) -> Tensor:
    def product(part: Any, x: Tensor) -> Tensor:
        weight, bias = (part.weight, part.bias) if e is None else (part.weight[e], None if part.bias is None else part.bias[e])
        return weight @ x if bias is None else weight @ x + bias

    y, z = product(up, x), product(gate, x)
    if kind == "swiglu":
        return product(down, z / (1 + (-z).exp()) * y)
    z, y = z.clamp(max=7.0), y.clamp(-7.0, 7.0)
    return product(down, z / (1 + (-1.702 * z).exp()) * (y + 1))


@pytest.mark.parametrize(
    ("ffn", "keys"),
    [
        ("swiglu", DEEPSEEK),
        ("swiglu", DEEPSEEK | {"group_score": "max", "renormalize": False}),
        ("swiglu_clamped", GPT_OSS),
        ("swiglu", QWEN),
        ("swiglu", {"router": "topk_softmax", "renormalize": False, "groups": 2, "top_groups": 1}),
        ("swiglu", {"router": "sigma", "renormalize": True, "routed_scale": 0.5}),
    ],
)
def test_the_layer_against_loops_over_tokens(ffn: str, keys: dict[str, Any]) -> None:
    """Catches groups scored by something else, a masked expert that a bias brings back, biases in gates, a scale on shared experts, a gate
    on the wrong side, biases of other experts, and a clamp of the wrong factor.
    """
    moe = mixture(ffn, **keys)
    x = torch.randn(B, S, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2
    got = moe(x, None)
    bank, shared = moe.experts, moe.shared
    for b in range(B):
        for s in range(S):
            token = x[b, s]
            logits = (moe.router.weight @ token + (0.0 if moe.router.logit_bias is None else moe.router.logit_bias)).tolist()
            experts = chosen_by_loop(moe, logits)
            gates = gates_by_loop(moe, logits, experts)
            want = sum(g * feed_forward(token, bank.up, bank.gate, bank.down, ffn, e) for g, e in zip(gates, experts))
            if shared is not None:
                part = feed_forward(token, shared.up, shared.gate, shared.down, ffn)
                want = want + (part if moe.shared_gate is None else part / (1 + torch.exp(-(moe.shared_gate.weight @ token))))
            torch.testing.assert_close(got[b, s], want, rtol=1e-12, atol=1e-12)


def test_a_dense_block_takes_the_clamped_feed_forward() -> None:
    """Catches a clamp that experts have and dense layers do not: gate up to 7, the other factor within 7 and plus one."""
    moe = mixture("swiglu_clamped", num_shared=1)
    assert moe.shared is not None
    x = torch.randn(1, 9, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 4
    z, y = moe.shared.gate(x), moe.shared.up(x)  # type: ignore[misc]
    assert (z > 7).any() and (y > 7).any() and (y < -7).any()
    want = torch.stack([feed_forward(t, moe.shared.up, moe.shared.gate, moe.shared.down, "swiglu_clamped") for t in x[0]])
    torch.testing.assert_close(moe.shared(x)[0], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keys", [DEEPSEEK, GPT_OSS])
def test_losses_and_gradients_against_loops(keys: dict[str, Any]) -> None:
    """Catches a sequence loss that counts biased or grouped choices, a batch loss with this batch's load or with a gradient through it, and
    biases of experts and router that get another gradient.
    """
    moe = mixture(**keys)
    x = torch.randn(B, S, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    weights = torch.tensor([[0.1] * S, [0.0, 0.2, 0.2, 0.2, 0.0]], dtype=torch.float64)
    y = moe(x.requires_grad_(), weights)
    y.sum().backward()
    got = {n: p.grad.clone() for n, p in moe.named_parameters() if p.grad is not None}
    moe.zero_grad()
    logits = moe.router.logits(x.detach())
    probabilities = torch.stack([torch.stack(_probabilities(moe, logits[b])) for b in range(B)])
    loss = moe.moe.z_loss * (weights * logits.logsumexp(-1).square()).sum()
    for b in range(B):
        if moe.router.share is not None:
            loss = loss + 0.2 * E * (moe.router.share * (weights[b, :, None] * probabilities[b]).sum(0)).sum()
            continue
        of = torch.zeros(E, dtype=torch.float64)
        for s in range(S):
            for e in chosen_by_loop(moe, logits[b, s].tolist(), plain=True):
                of[e] += weights[b, s] / K / weights[b].sum()
        loss = loss + 0.3 * E * (of * (weights[b, :, None] * probabilities[b]).sum(0)).sum()
    (moe(x.detach(), None).sum() + loss).backward()
    for name, parameter in moe.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-12, atol=1e-12, msg=name)
    assert moe.experts.up.bias is None or (got["experts.up.bias"].abs().sum(1) > 0).sum() >= K


def _probabilities(moe: MixtureOfExperts, logits: Tensor) -> list[Tensor]:
    """One sequence's probabilities, with their gradient."""
    if moe.moe.router == "sigmoid":
        return [v.sigmoid() / v.sigmoid().sum() for v in logits]
    return [torch.softmax(v, 0) for v in logits]


def test_gradients_of_experts_biases_by_finite_differences() -> None:
    """Catches a bias whose rows are summed over another expert, and one that rows without an expert reach."""
    moe = mixture("swiglu_clamped", capacity_factor=0.5, **GPT_OSS)
    x = torch.randn(B, S, D, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    into = torch.randn(B, S, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    (moe(x, None) * into).sum().backward()
    for bank in (moe.experts.up, moe.experts.gate, moe.experts.down):
        assert bank is not None and bank.bias is not None and bank.bias.grad is not None
        for e in range(E):
            with torch.no_grad():
                values = []
                for step in (1e-6, -2e-6):
                    bank.bias[e, 3] += step
                    values.append(float((moe(x, None) * into).sum()))
                bank.bias[e, 3] += 1e-6
            assert float(bank.bias.grad[e, 3]) == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-7)


def test_a_group_of_one_expert_scores_like_that_expert() -> None:
    """Catches a sum of two that a group does not have."""
    scores = torch.tensor([3.0, 1.0, 2.0, 0.0])
    assert Among(4, 2, 1).limit(scores).tolist() == [3.0, -math.inf, 2.0, -math.inf]
    moe = mixture(groups=E, top_groups=K, group_score="top2")
    assert moe.router.among == Among(E, K, 1)
    logits = torch.randn(B, S, E, dtype=torch.float64)
    assert torch.equal(
        choose(moe.router.score, logits, K, None, moe.router.among).experts, choose(moe.router.score, logits, K, None).experts
    )


def test_biases_far_from_scores() -> None:
    """Catches masked groups whose 0 beats negative sums of score and bias (vLLM #13474), and gates made by subtracting a bias that has
    swallowed the score in fp32 (flashinfer #3875).
    """
    logits = torch.tensor([2.0, 1.0, -1.0, -2.0])
    limited = choose(sigmoid, logits, 2, torch.tensor([-9.0, -9.0, -5.0, -5.0]), Among(2, 1, 2))
    assert sorted(limited.experts.tolist()) == [2, 3]
    low = logits - 18
    gates = choose(sigmoid, low, 2, torch.tensor([12.0, 12.0, 13.0, 13.0]), None).gates
    torch.testing.assert_close(gates.sort().values, low[2:].sigmoid().sort().values / low[2:].sigmoid().sum())


def test_published_numbers_of_parameters() -> None:
    """Catches biases, gates or shared experts that are not there, or more than once: gpt-oss-20b has 20.9B parameters without its sinks, of
    which a token uses 3.6B besides its embedding, DeepSeek-V3 671.0B and 36.6B.
    """
    oss = {"num_layers": 24, "hidden_size": 2880, "num_heads": 64, "num_kv_heads": 8, "head_dim": 64, "vocab_size": 201088}
    experts = {"num_experts": 32, "top_k": 4, "ffn_size": 2880, "expert_bias": True, "router_bias": True}
    assert numbers(Model(**oss, ffn="swiglu_clamped", attention_bias=True, moe=Moe(**experts))) == (20_914_755_648, 3_608_305_728)
    sizes = {"num_layers": 61, "hidden_size": 7168, "num_heads": 128, "head_dim": 128, "ffn_size": 18432, "vocab_size": 129280}
    latent = {"kv_rank": 512, "query_rank": 1536, "rope_dim": 64, "value_dim": 128}
    kinds = {"kinds": {"dense": {"moe": None}, "sparse": {}}, "pattern_first": ["dense"] * 3, "pattern": ["sparse"]}
    moe = {"num_experts": 256, "top_k": 8, "num_shared": 1, "ffn_size": 2048, "balance": "bias", "router": "sigmoid"}
    deepseek = Model(**sizes, **kinds, attention="latent", latent=latent, moe=Moe(**moe))  # type: ignore[arg-type]
    assert [round(n / 1e8) for n in numbers(deepseek)] == [6710, 366]


def numbers(model: Model) -> tuple[int, int]:
    """Parameters, and those that a token uses besides the table of its embedding."""
    specs = specs_of(build_part(model, Shape(16, torch.bfloat16, torch.float32)))
    return sum(s.numel for s in specs.values()), active_parameters(specs) - specs["embedding.weight"].numel


def test_the_load_of_the_last_batch() -> None:
    """Catches a share of one micro-batch, one that uncounted targets are in, one that a step that was not finite moves, and a first step
    that is not even.
    """
    case = Case(tiny(moe={"num_experts": 4, "top_k": 2, "ffn_size": 16, "balance_over": "batch"}), packed=True)
    model = build(case, 1)
    moes = [m for m in model.model.modules() if isinstance(m, MixtureOfExperts)]
    assert [m.router.share.tolist() for m in moes if m.router.share is not None] == [[0.25] * 4] * 2
    counted: list[Tensor] = []
    moes[0].router.register_forward_hook(lambda module, inputs, result: counted.append(result[1].experts))
    batches = [fake_batch(case, [0, 1]), fake_batch(case, [2])]
    for batch in batches:
        model.module(**batch.inputs(), scale=0.5).backward()
    want = [0] * 4
    for experts, batch in zip(counted, batches):
        for chosen, target in zip(experts.flatten(0, 1).tolist(), batch.targets.flatten().tolist()):
            for e in chosen:
                want[e] += int(target >= 0)
    before = moes[0].router.share.clone()  # type: ignore[union-attr]
    expert.settle_routers(model.stages, model.mesh.axes, torch.tensor(False))
    assert moes[0].router.share is not None and torch.equal(moes[0].router.share, before)
    expert.settle_routers(model.stages, model.mesh.axes, torch.tensor(True))
    assert moes[0].router.share.tolist() == pytest.approx([n / sum(want) for n in want], rel=1e-7) and sum(want) > 0
    assert torch.equal(share_of(torch.tensor(want)), share_of(3 * torch.tensor(want)))
