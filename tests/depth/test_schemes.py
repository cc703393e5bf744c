"""Every scheme's forward pass written out in plain loops, and its gradients by finite differences of that."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megascale.model.ops.bitlinear import Statistics, quantized_input, quantized_weight
from tests.depth.test_table import SCHEMES, scheme
from tests.layouts import Case, build, fake_batch

Weights = dict[str, Tensor]


class Reference:
    """A decoder of L blocks by the definitions of spec and papers, with nothing of the system but its weights."""

    def __init__(self, case: Case, weights: Weights, step: int) -> None:
        self.cfg, self.w, self.s, self.step = case.model, weights, case.seq_len, step

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.w[f"{name}.weight"], self.w.get(f"{name}.bias", 0.0)
        out = torch.empty_like(x)
        for index in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:-1])):
            v = x[tuple(index)]
            if self.cfg.norm == "dyt":
                v = torch.tanh(self.w[f"{name}.alpha"] * v)
            elif self.cfg.norm == "layernorm":
                v = (v - v.mean()) / math.sqrt(((v - v.mean()) ** 2).mean() + 1e-5)
            else:
                v = v / math.sqrt((v**2).mean() + 1e-5)
            out[tuple(index)] = v * weight + bias
        return out

    def product(self, x: Tensor, name: str) -> Tensor:
        w = self.w[f"{name}.weight"]
        if self.cfg.linear == "bitlinear":
            size = w.abs().mean()
            w = torch.tensor([[max(-1, min(1, round(float(v / size)))) for v in row] for row in w], dtype=w.dtype) * size
            x = x / ((x**2).mean(-1, keepdim=True) + 1e-5).sqrt()
            top = x.abs().max(-1, keepdim=True).values
            x = torch.clamp(torch.round(127 * x / top), -128, 127) * top / 127
        scale = 1 / math.sqrt(w.shape[1]) if self.cfg.residual == "mus" else 1.0
        return scale * (x @ w.t()) + self.w.get(f"{name}.bias", 0.0)

    def attention(self, x: Tensor, at: str) -> Tensor:
        b, e, heads, group = x.shape[0], 6, 4, 4 // (self.cfg.num_kv_heads or 4)
        q, k, v = (self.product(x, f"{at}.attention.{n}").view(b, self.s, -1, e) for n in "qkv")
        if self.cfg.qk_norm or self.cfg.residual == "parallel":
            q, k = self.norm(q, f"{at}.attention.q_norm"), self.norm(k, f"{at}.attention.k_norm")
        angle = torch.arange(self.s, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(0, e, 2, dtype=torch.float64) / e)
        turn = torch.polar(torch.ones_like(angle), angle)[None, :, None]

        def rotated(t: Tensor) -> Tensor:
            z = torch.complex(t[..., : e // 2], t[..., e // 2 :]) * turn
            return torch.cat((z.real, z.imag), -1)

        q, k = rotated(q), rotated(k)
        y = torch.zeros(b, self.s, heads, e, dtype=x.dtype)
        for h in range(heads):
            for n in range(self.s):
                end = self.s if self.cfg.family == "encoder" else n + 1
                score = (q[:, n, None, h] * k[:, :end, h // group]).sum(-1) / math.sqrt(e)
                y[:, n, h] = (score.softmax(-1).unsqueeze(-1) * v[:, :end, h // group]).sum(1)
        y = y.flatten(2)
        if self.cfg.residual == "subln":
            y = self.norm(y, f"{at}.attention.inner_norm")
        return self.product(y, f"{at}.attention.o")

    def ffn(self, x: Tensor, at: str) -> Tensor:
        y = self.product(x, f"{at}.ffn.up")
        if self.cfg.ffn == "swiglu":
            gate = self.product(x, f"{at}.ffn.gate")
            y = gate * gate.sigmoid() * y
        else:
            y = y.clamp(min=0)
        if self.cfg.residual == "subln":
            y = self.norm(y, f"{at}.ffn.inner_norm")
        return self.product(y, f"{at}.ffn.down")

    def block(self, x: Tensor, at: str) -> Tensor:
        L = self.cfg.num_layers
        first, second = f"{at}.attention_norm", f"{at}.ffn_norm"
        for f, norm, scale in ((self.attention, first, "attention_scale"), (self.ffn, second, "ffn_scale")):
            match self.cfg.residual:
                case "pre" | "subln":
                    x = x + f(self.norm(x, norm), at)
                case "post":
                    x = self.norm(x + f(x, at), norm)
                case "res_post":
                    x = x + self.norm(f(x, at), norm)
                case "deepnorm":
                    x = self.norm((2 * L) ** 0.25 * x + f(x, at), norm)
                case "branchnorm":
                    x = self.norm(x + min(1.0, self.step / 5) * f(x, at), norm)
                case "deepscale":
                    x = math.sqrt(1 - 1 / L) * x + math.sqrt(1 / L) * f(self.norm(x, norm), at)
                case "deepscale_post":
                    x = self.norm(math.sqrt(1 - 1 / L) * x + math.sqrt(1 / L) * f(x, at), norm)
                case "layerscale":
                    x = x + self.w[f"{at}.{scale}"] * f(self.norm(x, norm), at)
                case "mus":
                    tau = min(0.4, max(0.1, 0.8 / math.sqrt(L)))
                    x = math.sqrt(1 - tau) * x + math.sqrt(tau) * self.norm(f(x, at), norm)
                case "parallel":
                    h = self.norm(x, first)
                    return x + self.attention(h, at) + self.ffn(h, at)
                case "neox":
                    return x + self.attention(self.norm(x, first), at) + self.ffn(self.norm(x, second), at)
        return x

    def logits(self, tokens: Tensor) -> Tensor:
        x = self.w["embedding.weight"][tokens]
        if self.cfg.norm == "dyt":
            x = x * self.w["embedding_scale"]
        for layer in range(self.cfg.num_layers):
            x = self.block(x, f"blocks.{layer}")
        if self.cfg.residual in ("pre", "res_post", "subln", "deepscale", "layerscale", "parallel", "neox", "mus"):
            x = self.norm(x, "final_norm")
        if self.cfg.residual.startswith("deepscale") and self.cfg.tie_embeddings:
            x = x / math.sqrt((1 - self.cfg.dropout) * self.cfg.hidden_size)
        if self.cfg.residual == "mus":
            x = x / self.cfg.hidden_size
        return x @ self.w["embedding.weight" if self.cfg.tie_embeddings else "head.weight"].t()


VARIANTS = {
    "llama": {},
    "biased and tied": {"norm": "layernorm", "ffn": "relu", "bias": True, "tie_embeddings": True, "qk_norm": True, "num_kv_heads": 1},
    "dyt": {"norm": "dyt", "bias": True},
    "encoder": {"family": "encoder", "ffn": "relu"},
    "bitlinear": {"linear": "bitlinear", "num_kv_heads": 4},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SCHEMES)
def test_forward_against_plain_loops(name: str, variant: str) -> None:
    """Catches a misplaced norm, a coefficient on the wrong summand, a norm or bias that a scheme forbids, and a step that is not told."""
    case = Case(scheme(name, **VARIANTS[variant]), seq_len=5)
    model = build(case, 1)
    generator = torch.Generator().manual_seed(1)
    for w in model.weights:
        w.local.add_(0.3 * torch.randn(w.local.shape, generator=generator, dtype=torch.float64))  # gains and biases away from 1 and 0
    model.at_step(2)
    batch = fake_batch(case, [1, 2])
    reference = Reference(case, {w.name: w.local for w in model.weights}, 2)
    with torch.no_grad():
        torch.testing.assert_close(model.module(batch.tokens), reference.logits(batch.tokens), atol=1e-12, rtol=1e-11)


def test_parallel_blocks_have_what_they_need_only() -> None:
    """Catches a second norm that nothing uses and biases on QKV and norms (arXiv 2302.05442); those of the other products stay."""
    names = {w.name for w in build(Case(scheme("parallel", norm="layernorm", bias=True)), 1).weights}
    assert "blocks.0.attention.q_norm.weight" in names and "blocks.0.ffn_norm.weight" not in names
    assert {n for n in names if n.endswith("bias") and n.startswith("blocks.0")} == {
        f"blocks.0.{n}.bias" for n in ("attention.o", "ffn.up", "ffn.gate", "ffn.down")
    }


def test_bitlinear_rounds_and_lets_gradients_through() -> None:
    """Catches weights that are not three values, inputs beyond 8 bits, and a gradient that is cut by the rounding."""
    torch.manual_seed(0)
    w, x = torch.randn(7, 9, dtype=torch.float64, requires_grad=True), torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    q, u = quantized_weight(w, Statistics()), quantized_input(x, Statistics())
    size = w.abs().mean()
    assert set((q / size).flatten().round(decimals=9).tolist()) == {-1.0, 0.0, 1.0}
    steps = (u * 127 / u.abs().amax(-1, keepdim=True)).detach()
    assert (steps - steps.round()).abs().max() < 1e-9 and steps.abs().max().item() == pytest.approx(127)
    g = torch.randn(3, 7, dtype=torch.float64)
    (u @ q.t()).backward(g)
    torch.testing.assert_close(w.grad, g.t() @ u.detach())  # as of the rounded input, straight through to the unrounded weight
    x2 = x.detach().requires_grad_()
    normed = x2 * torch.rsqrt(x2.square().mean(-1, keepdim=True) + 1e-5)
    normed.backward(g @ q.detach())
    torch.testing.assert_close(x.grad, x2.grad)
