"""FP8 with measured scales: torchao's products in our linears. Skipped where the extra is missing."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from megascale.config.load import build_config
from megascale.config.schema import Parallel
from megascale.errors import UsageError
from megascale.precision.dynamic import Recipe, dynamic_linear
from megascale.train.build import check_torch
from megascale.train.log.announce import cast_note, fp8_experts_note
from tests.layouts import Case, tiny, train
from tests.ranks import run_ranks

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs the extra torchao")


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is there")
def test_a_missing_package_is_named() -> None:
    """Catches an ImportError in the middle of the first step."""
    values = {
        "model": {"num_layers": 1, "hidden_size": 64, "num_heads": 4},
        "train": {"steps": 1},
        "data": {"train": "x"},
        "precision": {"fp8": "dynamic"},
    }
    with pytest.raises(UsageError, match="pip install torchao"):
        check_torch(build_config(values))


@needs_torchao
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_products_within_rounding(recipe: Recipe) -> None:
    """Catches factors that are not scaled (values of 1e-4 would vanish) and a gradient of the wrong factor. e4m3 rounds by 2.7 %, e5m2 by
    5.3 % (root mean square), two factors of a product by √2 of that at most.
    """
    torch.manual_seed(0)
    x, w = (1e-4 * torch.randn(4, 32, 64)).requires_grad_(), (1e3 * torch.randn(48, 64)).requires_grad_()
    y, g = dynamic_linear(x, w, recipe), torch.randn(4, 32, 48)
    y.backward(g)
    assert x.grad is not None and w.grad is not None
    expected = ((y, x @ w.t()), (x.grad, g @ w), (w.grad, g.flatten(0, 1).t() @ x.flatten(0, 1)))
    for found, exact in expected:
        assert ((found - exact).norm() / exact.norm()).item() < 0.08


@needs_torchao
@pytest.mark.dist
@pytest.mark.parametrize(("ranks", "parallel"), [(2, Parallel(dp_shard=2)), (2, Parallel(tp=2)), (2, Parallel(pp=2))])
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_layouts_within_a_band(ranks: int, parallel: Parallel, recipe: Recipe) -> None:
    """Catches a layout that measures nothing or loses a product. A rank's largest value is not the whole tensor's, so scales differ, and
    losses by up to 1.1 % (tensor ranks under `tensorwise`).
    """
    case = Case(tiny(hidden_size=64, ffn_size=96, vocab_size=50), parallel, precision="fp32", fp8=recipe, seq_len=16, keep_tensors=False)
    alone = Case(case.model, Parallel(), precision="fp32", fp8=recipe, seq_len=16, keep_tensors=False)
    got, reference = run_ranks(ranks, train, case)[0]["loss"], run_ranks(1, train, alone)[0]["loss"]
    exact = run_ranks(1, train, Case(case.model, precision="fp32", seq_len=16, keep_tensors=False))[0]["loss"]
    assert max(abs(a - b) / b for a, b in zip(got, reference)) < 2e-2
    assert reference != exact  # it did round


def test_uncompiled_casts_on_a_gpu_are_told() -> None:
    """Catches FP8 that is slower than bf16 without a word, and a warning where nothing can be done about it."""
    plain = build_config(
        {
            "model": {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "vocab_size": 64, "residual": "mus", "ffn": "gelu"},
            "train": {"steps": 1},
            "data": {"train": "x"},
            "precision": {"fp8": True},
        }
    )
    assert "parallel.compile" in (cast_note(plain, "NVIDIA H100") or "")
    compiled = plain.model_copy(update={"parallel": plain.parallel.model_copy(update={"compile": True})})
    assert cast_note(plain, "cpu") is None and cast_note(compiled, "NVIDIA H100") is None


def test_fp8_experts_are_said_to_be_experimental() -> None:
    """Catches a run that expects of FP8 experts what only their forward product gives."""
    sizes = {"num_layers": 1, "hidden_size": 64, "num_heads": 4, "vocab_size": 64, "residual": "mus", "ffn": "gelu"}
    values: dict[str, Any] = {"model": {**sizes, "moe": {}}, "train": {"steps": 1}, "data": {"train": "x"}, "precision": {"fp8": True}}
    experts, dense = build_config(values), build_config({**values, "model": sizes})
    assert "experimental" in (fp8_experts_note(experts, "NVIDIA H100") or "")
    assert fp8_experts_note(experts, "cpu") is None and fp8_experts_note(dense, "NVIDIA H100") is None
