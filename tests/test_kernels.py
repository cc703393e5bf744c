"""The choice of the norm kernel, with fake modules for NVIDIA's packages."""

from __future__ import annotations

import sys
import types
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megascale.config.schema import Moe, Moeut
from megascale.errors import UsageError
from megascale.model import norms
from megascale.model.layers import Norm
from megascale.model.ops import norm_kernels
from tests.layouts import Case, build, fake_batch, tiny

CPU = torch.device("cpu")


def stand_in(calls: list[str]) -> dict[str, Any]:
    """A module that has NVIDIA apex's symbols."""
    package, normalization, module = (types.ModuleType(n) for n in ("apex", "apex.normalization", "apex.normalization.fused_layer_norm"))

    def fused(x: torch.Tensor, weight: torch.Tensor, shape: Any, eps: float) -> torch.Tensor:
        calls.append("fused")
        return F.rms_norm(x, shape, weight, eps)

    module.fused_rms_norm_affine = fused  # type: ignore[attr-defined]
    return {m.__name__: m for m in (package, normalization, module)}


def test_kernels_are_chosen_by_symbol(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches PyPI's `apex`, another project, being taken for NVIDIA's, and a choice that falls back in silence."""
    calls: list[str] = []
    cuda = torch.device("cuda")
    assert norm_kernels.choose_kernels("auto", "rmsnorm", CPU).source == "torch"
    with pytest.raises(UsageError, match="needs a CUDA device"):
        norm_kernels.choose_kernels("apex", "rmsnorm", CPU)
    with pytest.raises(UsageError, match="has no fused_rms_norm_affine here"):
        norm_kernels.choose_kernels("apex", "rmsnorm", cuda)
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))  # PyPI's has no such module
    with pytest.raises(UsageError, match="has no fused_rms_norm_affine here"):
        norm_kernels.choose_kernels("apex", "rmsnorm", cuda)
    for name, module in stand_in(calls).items():
        monkeypatch.setitem(sys.modules, name, module)
    choice = norm_kernels.choose_kernels("apex", "rmsnorm", cuda)
    x, w = torch.randn(3, 4), torch.ones(4)
    torch.testing.assert_close(choice.norm(x, w, None, 1e-5), norms.rmsnorm(x, w, None, 1e-5))
    assert (choice.source, calls) == ("apex", ["fused"])


def test_every_norm_of_a_model_calls_the_chosen_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a norm that the pass misses: of queries and keys, of a feed-forward, after the embedding, before the head, in a repeated
    group.
    """
    called: list[int] = []

    def kernel(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        called.append(weight.numel())
        return norms.rmsnorm(x, weight, bias, eps)

    monkeypatch.setattr("megascale.train.build.choose_kernels", lambda *chosen: SimpleNamespace(norm=kernel))
    moe = Moe(num_experts=2, top_k=1, ffn_size=8, router="sigma", balance="entropy")
    for cfg in (
        tiny(residual="subln", qk_norm=True, embedding_norm=True, num_layers=1),
        tiny(moe=moe, moeut=Moeut(attention_experts=2), num_kv_heads=4),
    ):
        case = Case(cfg)
        model = build(case, 1)
        called.clear()
        model.module(fake_batch(case, [1]).tokens)
        held = [m for m in model.module.modules() if isinstance(m, Norm)]
        assert held and set(called) == {n.dim for n in held} and len(called) >= len(held)


class StandInNorm(nn.Module):
    """Transformer Engine's norm modules as far as we use them: made with a size, an eps and a device, called with one tensor."""

    made: ClassVar[list[tuple[int, float, str]]] = []
    biased = False

    def __init__(self, size: int, eps: float, device: str) -> None:
        super().__init__()
        self.made.append((size, eps, device))
        self.eps = eps
        self.weight = nn.Parameter(torch.full((size,), torch.nan, device=device))
        self.bias = nn.Parameter(torch.full((size,), torch.nan, device=device)) if self.biased else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.bias is not None:
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class StandInLayerNorm(StandInNorm):
    biased = True


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("bias", [None, torch.randn(4)])
def test_transformer_engines_norms(norm: str, bias: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches weights of the module's own in place of ours, a bias that is lost, gradients that miss our weight, and a module per call."""
    StandInNorm.made.clear()
    package, module = types.ModuleType("transformer_engine"), types.ModuleType("transformer_engine.pytorch")
    module.RMSNorm, module.LayerNorm = StandInNorm, StandInLayerNorm  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)
    choice = norm_kernels.choose_kernels("te", norm, torch.device("cuda"))
    own = {"rmsnorm": norms.rmsnorm, "layernorm": norms.layernorm}[norm]
    bias = bias if norm == "layernorm" else None
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    for _ in range(2):
        grads = [torch.autograd.grad(f(x, weight, bias, 1e-5).square().sum(), (x, weight)) for f in (choice.norm, own)]
        torch.testing.assert_close(*grads)
    assert (choice.source, StandInNorm.made) == ("te", [(4, 1e-5, "meta")])
