"""The residual table against its published constants, and how weights start by it."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from megascale.model.block import Context
from megascale.model.residual import Stack, deepnorm, deepscale, ends, layerscale, residual, subln, token_correlations
from tests.layouts import Case, build, tiny

SCHEMES = (
    "pre", "post", "res_post", "deepnorm", "branchnorm", "deepscale", "deepscale_post", "subln", "layerscale", "parallel", "neox",
    "mus",
)  # fmt: skip


def scheme(name: str, **changes: Any) -> Any:
    """A tiny model of a scheme, with the period that BranchNorm needs."""
    return tiny(residual=name, **({"branchnorm_period": 5} if name == "branchnorm" else {}), **changes)


@pytest.mark.parametrize(
    ("stack", "alpha", "beta"),
    [
        (Stack("decoder", 6), 1.8612097182, 0.3799178428),
        (Stack("encoder", 18), 2.4494897428, 0.2886751346),
        (Stack("decoder", 100), 3.7606030931, 0.1880301547),
        (Stack("encoder", 1000), 6.6874030498, 0.1057371263),
        (Stack("encoder", 6, 6), 1.4179381407, 0.4969892408),
        (Stack("encoder", 18, 6), 1.8661115389, 0.3776301605),
        (Stack("encoder", 100, 1000), 3.9444369538, 0.1786566773),
        (Stack("encoder", 1000, 1000), 7.0143110192, 0.1004660327),
        (Stack("decoder", 6, 6), 2.0597671439, 0.3432945240),
        (Stack("decoder", 18, 6), 2.7108060108, 0.2608474300),
        (Stack("decoder", 100, 100), 4.1617914503, 0.1699044245),
        (Stack("decoder", 1000, 18), 7.4008280449, 0.0955442792),
    ],
)
def test_deepnorm_constants(stack: Stack, alpha: float, beta: float) -> None:
    """Catches N and M swapped, TorchScale's 1.15 for 0.87, and the decoder of a pair taken for a decoder alone."""
    assert deepnorm(stack) == pytest.approx((alpha, beta), rel=1e-9)


@pytest.mark.parametrize(
    ("layers", "alone", "decoder", "encoder", "skip", "branch", "branch_of_three"),
    [
        (6, 1.5763586679, 1.7001093370, 1.5472883810, 0.9128709292, 0.4082482905, 0.3333333333),
        (18, 1.8930184728, 1.9972441129, 2.1828574450, 0.9718253158, 0.2357022604, 0.1924500897),
        (100, 2.3018074130, 2.3882592980, 3.1738751152, 0.9949874371, 0.1, 0.0816496581),
        (1000, 2.7569734238, 2.8295525384, 4.5039101137, 0.9994998749, 0.0316227766, 0.0258198890),
    ],
)
def test_subln_and_deepscale_constants(
    layers: int, alone: float, decoder: float, encoder: float, skip: float, branch: float, branch_of_three: float
) -> None:
    """Catches a logarithm of blocks instead of sublayers, and λ² + β² that is not 1."""
    assert subln(Stack("decoder", layers)) == pytest.approx(alone, rel=1e-9)
    assert subln(Stack("decoder", layers, 7)) == pytest.approx(decoder, rel=1e-9)
    assert subln(Stack("encoder", layers, layers)) == pytest.approx(encoder, rel=1e-9)
    assert deepscale(Stack("encoder", layers, 3)) == pytest.approx((skip, branch), rel=1e-8)
    three = deepscale(Stack("decoder", layers, 3))
    assert three[1] == pytest.approx(branch_of_three, rel=1e-8) and three[0] ** 2 + three[1] ** 2 == pytest.approx(1)


def test_layerscale_constants() -> None:
    """Catches an edge on the wrong side."""
    assert [layerscale(n) for n in (6, 18, 19, 24, 25, 100, 1000)] == [0.1, 0.1, 1e-5, 1e-5, 1e-6, 1e-6, 1e-6]


def test_token_correlations() -> None:
    """Catches the recursion without its dropout or its λ²: two sublayers by hand, and 1000 blocks end near the attention's share."""
    p, start = 0.1, 0.221
    found = token_correlations(("attention", "ffn"), p, start)
    r0 = start * 0.9
    r1 = 0 * r0 + 1.0 * 0.9  # one block: β² = 2/2
    r2 = 0.9 * (r1 + (math.sqrt(1 - r1 * r1) - r1 * math.acos(r1)) / math.pi)
    assert found == pytest.approx((r0, r1, r2))
    deep = token_correlations(("attention", "ffn") * 1000, 0.0, start)
    assert all(a <= b for a, b in pairwise(deep)) and 0.5 < deep[-1] < 1.0


@pytest.mark.parametrize("ffn", ["relu", "gelu", "swiglu"])
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("name", SCHEMES)
def test_starts_by_role(name: str, kv_heads: int, ffn: str) -> None:
    """Catches a gain on query, key or gate, Xavier on the fused or the whole shape under grouped queries, and DeepScaleLM's σ per layer.

    Expected deviations are written out here once more; 4096 draws and more each stay within 8 % of theirs, 4 standard errors of the
    smallest.
    """
    L, d, f, p = 3, 96, 160, 0.1
    cfg = scheme(name, num_layers=L, hidden_size=d, num_kv_heads=kv_heads, ffn_size=f, ffn=ffn, dropout=p, init_std=0.02, vocab_size=50)
    model = build(Case(cfg), 1)
    kv = kv_heads * 24
    shapes = {
        "query": (d, d), "key": (kv, d), "value": (kv, d), "attention_out": (d, d), "up": (f, d), "gate": (f, d), "down": (d, f),
    }  # fmt: skip
    moment = {"relu": 0.5, "gelu": 0.426, "swiglu": 0.356}[ffn]
    r = [0.221 * 0.9]
    for _ in range(L):
        for out in (lambda r: 0.9, lambda r: 0.9 * (r + (math.sqrt(1 - r * r) - r * math.acos(r)) / math.pi)):
            r.append((1 - 1 / L) * r[-1] + 1 / L * out(r[-1]))

    def expected(role: str, layer: int) -> float:
        out, width = shapes[role]
        xavier = math.sqrt(2 / (out + width))
        if name in ("pre", "parallel", "neox"):
            return 0.02 / math.sqrt(2 * L) if role in ("attention_out", "down") else 0.02
        if name in ("post", "res_post", "layerscale"):
            return 0.02
        if name == "mus":
            return 1.0
        if name == "branchnorm":
            return xavier
        if name in ("deepnorm", "subln"):
            gain = (8 * L) ** -0.25 if name == "deepnorm" else math.sqrt(math.log(2 * L))
            return xavier * (gain if role in ("value", "attention_out", "up", "down") else 1)
        if role in ("query", "key", "gate"):
            return 1 / math.sqrt(d)
        if role in ("value", "attention_out"):
            return math.sqrt(math.sqrt((1 - p) / r[2 * layer]) / d)
        if ffn == "gelu":
            return 1 / math.sqrt(d) if role == "up" else math.sqrt((1 - p) / (f * moment))
        return ((1 - p) / (d * f * moment)) ** 0.25

    for w in model.weights:
        spec = w.placement.spec
        if spec.role in shapes:
            layer = int(w.name.split(".")[1])
            assert spec.shape == shapes[spec.role]
            assert spec.std == pytest.approx(expected(spec.role, layer), rel=1e-9), w.name
            assert w.local.std().item() == pytest.approx(spec.std, rel=0.08) and abs(w.local.mean().item()) < 0.1 * spec.std
        if spec.role == "norm":
            assert (w.local == spec.mean).all()


@pytest.mark.parametrize(("tied", "position", "tables"), [(False, "rope", 1), (True, "learned", 2)])
def test_deepscale_ends(tied: bool, position: str, tables: int) -> None:
    """Catches logits whose variance grows with the width, and tables whose sum has more than 1 − p."""
    cfg = scheme("deepscale_post", dropout=0.1, tie_embeddings=tied, position=position)
    found = ends(cfg)
    assert found.embedding**2 * tables == pytest.approx(0.9) and not cfg.residual_row.final_norm
    logits_variance = cfg.hidden_size * (found.hidden_factor * (found.embedding if tied else found.head)) ** 2
    assert logits_variance == pytest.approx(1)


def test_rows_are_told_apart() -> None:
    """Catches a row that forgets a property: no two schemes say the same of the third of five blocks."""
    rows = [replace_starts(residual(scheme(name, num_layers=5), Stack("decoder", 5), 2)) for name in SCHEMES]
    assert len(set(rows)) == len(rows)


def replace_starts(row: Any) -> str:
    return repr(replace(row, starts=replace(row.starts, gains=dict(sorted(row.starts.gains.items())))))


def test_coefficients_are_kept_exactly() -> None:
    """Catches λ of a thousand layers stored in bf16, where it is 1, or applied in it."""
    cfg = scheme("deepscale", num_layers=1000)
    row = residual(cfg, Stack("decoder", 1000), 0)
    one = scheme("deepscale", num_layers=2)
    model = build(Case(one, precision="bf16"), 1)
    assert {s.name for s in model.states} == {f"blocks.{i}.{name}" for i in range(2) for name in ("skip", "branch")}
    assert all(s.tensor.dtype == torch.float32 for s in model.states)
    block = model.model.blocks["0"]
    block.skip.fill_(row.skip)  # type: ignore[union-attr, operator]
    block.branch.fill_(row.branch)  # type: ignore[union-attr, operator]
    x, y = torch.randn(1, 4096, 24).bfloat16(), torch.randn(1, 4096, 24).bfloat16()
    context = Context(None, None, None, None, None)
    for _ in range(100):
        x = block._add(x, y, context)  # type: ignore[operator]
        y = y[:, torch.randperm(4096)]
    # One hundred of 2000 steps towards unit variance leave it; with λ rounded to 1 the variance would be 1.1.
    assert x.dtype == torch.bfloat16 and x.float().var().item() == pytest.approx(1.0, abs=0.04)
