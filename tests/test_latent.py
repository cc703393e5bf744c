"""Multi-head latent attention: against plain sums over heads, on every axis, and from its cache."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megascale.config.load import build_config
from megascale.config.schema import Parallel
from megascale.config.support import check
from megascale.generation.cache import CacheLayer, remembering
from megascale.generation.run import Sampling, generate
from megascale.model.attention_latent import LatentAttention
from tests.layouts import Case, build, tiny
from tests.test_layouts import assert_equal

LATENT: dict[str, Any] = {
    "attention": "latent",
    "num_kv_heads": 4,
    "head_dim": 6,
    "latent": {"kv_rank": 10, "query_rank": 14, "rope_dim": 4, "value_dim": 5},
}
MODEL = tiny(**LATENT, rope_interleaved=True)
WIDE = tiny(**{**LATENT, "latent": {"kv_rank": 7, "rope_dim": 2, "value_dim": 11}}, norm="layernorm", bias=True, attention_scale=0.4)
LAYOUTS: dict[str, tuple[int, Parallel]] = {
    "tp": (2, Parallel(tp=2)),
    "ring": (2, Parallel(cp=2)),
    "ulysses x layered": (2, Parallel(cp=2, cp_method="ulysses", accumulation="layered")),
    "zbv": (2, Parallel(pp=2, pp_schedule="zbv")),
}


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_axis_equals_one_process(layout: str) -> None:
    """Catches latents whose gradient is not summed over the heads of all ranks, and padded channels that an exchange cuts."""
    ranks, parallel = LAYOUTS[layout]
    assert_equal(Case(WIDE if layout == "tp" else MODEL, parallel, packed=True, steps=2), ranks)


def rotated(x: Tensor, position: int, theta: float) -> Tensor:
    """Neighbouring channels of x [p] turned by the angles of a position."""
    out = x.clone()
    for i in range(len(x) // 2):
        angle = position * theta ** (-2 * i / len(x))
        a, b = x[2 * i].item(), x[2 * i + 1].item()
        out[2 * i], out[2 * i + 1] = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
    return out


def test_against_loops() -> None:
    """Catches a head that reads another's rows, a scale that leaves the rotary channels out, and keys that are not shared."""
    model = build(Case(MODEL), 1).model
    attention = model.get_submodule("blocks.0.attention")
    assert isinstance(attention, LatentAttention) and attention.q_down is not None and attention.q_norm is not None
    x = torch.randn(1, 7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotary = model.angles(MODEL, torch.zeros(1, 7, dtype=torch.int64), None)  # type: ignore[operator]
    w = {n: p.detach() for n, p in attention.named_parameters()}

    def norm(v: Tensor, gain: Tensor) -> Tensor:
        return v / (v.square().mean() + 1e-5).sqrt() * gain

    expected = torch.zeros(7, 24, dtype=torch.float64)
    for s in range(7):
        joined = []
        for h in range(4):
            query = (w["q.weight"] @ norm(w["q_down.weight"] @ x[0, s], w["q_norm.weight"]))[10 * h : 10 * h + 10]
            query = torch.cat((query[:6], rotated(query[6:], s, MODEL.rope_theta)))
            scores, values = [], []
            for t in range(s + 1):
                both = w["kv_down.weight"] @ x[0, t]
                latent = norm(both[:10], w["kv_norm.weight"])
                key = torch.cat(((w["k.weight"] @ latent)[6 * h : 6 * h + 6], rotated(both[10:], t, MODEL.rope_theta)))
                scores.append(query @ key / math.sqrt(10))
                values.append((w["v.weight"] @ latent)[5 * h : 5 * h + 5])
            joined.append(torch.softmax(torch.stack(scores), 0) @ torch.stack(values))
        expected[s] = w["o.weight"] @ torch.cat(joined)
    torch.testing.assert_close(attention(x, rotary, None)[0].detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("model", [MODEL, WIDE])
def test_the_cache_holds_latents_alone(model: Any) -> None:
    """Catches products left out when they are applied to queries and results instead of keys, and a cache that keeps more than a latent."""
    built = build(Case(model, seq_len=24), 1)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    (found,) = generate(built, [prompt], Sampling(most=8))
    built.train(False)
    tokens = torch.tensor([[*prompt, *found]])
    whole = built.model(tokens)
    for i, token in enumerate(found):
        assert int(whole[0, len(prompt) - 1 + i, : model.vocab_size].argmax()) == token
    place = CacheLayer(torch.empty(1, 0, dtype=torch.int64), 16)
    attention = built.model.get_submodule("blocks.0.attention")
    with torch.no_grad(), remembering(built.model, place, lambda _: None):
        place.add(torch.arange(16)[None])
        torch.testing.assert_close(built.model(tokens), whole.detach(), rtol=0, atol=1e-12)
        keys, values = attention.attend.rows[0]  # type: ignore[union-attr, operator]
        assert keys.data.shape[1] * keys.data.shape[3] == model.attention_row.cached(model, 4) and values.data is None
    assert not attention.absorbed


def test_parameters_of_deepseek_v3() -> None:
    """Catches weights that the formula counts and the model lacks: attention of one layer of DeepSeek-V3 has 187.1M."""
    sizes = {"kv_rank": 512, "query_rank": 1536, "rope_dim": 64, "value_dim": 128}
    section = {"num_layers": 1, "hidden_size": 7168, "num_heads": 128, "head_dim": 128, "attention": "latent", "latent": sizes}
    config = check(
        build_config({"model": {**section, "vocab_size": 129280}, "train": {"steps": 1}, "data": {"train": "x"}}),
        1,
    )
    assert config.model.attention_row.weights(config.model) == 187_105_280
    assert config.model.attention_row.cached is not None
    assert config.model.attention_row.cached(config.model, 128) == 576  # grouped attention with 128 heads keeps 32,768
