"""MoEUT against its formulas, written out without sharing, and on every layout that takes it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megascale.config.load import load_config
from megascale.config.schema import Model, Parallel
from megascale.config.support import check
from megascale.model.decoder import Decoder
from megascale.model.shape import Shape
from megascale.model.spec import specs_of
from megascale.train.estimate.dry_run import describe_run
from tests.layouts import Case, build, fake_batch, tiny
from tests.test_layouts import assert_equal

HEADS, SIZE, GROUP, REPEATS, E_FFN, E_ATT = 3, 8, 2, 3, 5, 4
AUX, ATT_AUX = 0.3, 0.2


def repeated(**keys: Any) -> Model:
    moe = {"num_experts": E_FFN, "top_k": 2, "ffn_size": 6, "router": "sigma", "balance": "entropy", "aux_loss": AUX, "z_loss": 0.0}
    moeut = {"group_size": GROUP, "attention_experts": E_ATT, "attention_aux_loss": ATT_AUX}
    sizes = {"num_layers": GROUP * REPEATS, "num_heads": HEADS, "num_kv_heads": HEADS, "head_dim": SIZE, "norm": "layernorm", "ffn": "relu"}
    return tiny(**{**sizes, "moe": {**moe, **keys}, "moeut": moeut})


def turn(x: Tensor, position: int) -> Tensor:
    """RoPE on the first half of a head's channels."""
    half = SIZE // 2
    out = x.clone()
    for i in range(half // 2):
        angle = position * 10000.0 ** (-2 * i / half)
        a, b = x[i], x[i + half // 2]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + half // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def reference(weights: list[dict[str, Tensor]], tokens: Tensor, embedding: Tensor, final: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [s, V] of one sequence and its entropy losses; `weights` of every layer in order, none of them shared."""
    x = embedding[tokens]
    s, d = x.shape
    selections: dict[tuple[int, str], list[Tensor]] = {}
    for number, w in enumerate(weights):
        layer = number % GROUP
        n = F.layer_norm(x, (d,), w["attention_norm.weight"])
        q, k = ((n @ w[f"attention.{p}.weight"].t()).view(s, HEADS, SIZE) for p in "qk")
        chosen = {}
        for kind in ("value", "out"):
            logits = (n @ w[f"attention.{kind}_selector"].t()).view(s, HEADS, E_ATT)
            selections.setdefault((layer, kind), []).append(logits)
            chosen[kind] = logits.sigmoid().topk(2, -1)
        y = []
        for t in range(s):
            total = x.new_zeros(d)
            for h in range(HEADS):
                scores, values = [], []
                for u in range(t + 1):
                    scores.append(turn(q[t, h], t) @ turn(k[u, h], u) * SIZE**-0.5)
                    gates, experts = chosen["value"].values[u, h], chosen["value"].indices[u, h].tolist()
                    values.append(sum(g * (w["attention.v.weight"][h * E_ATT + e] @ x[u]) for g, e in zip(gates, experts)))
                result = torch.softmax(torch.stack(scores), 0) @ torch.stack(values)
                gates, experts = chosen["out"].values[t, h], chosen["out"].indices[t, h].tolist()
                total = total + sum(g * (w["attention.o.weight"][h * E_ATT + e] @ result) for g, e in zip(gates, experts))
            y.append(total)
        x = x + torch.stack(y)
        logits = F.layer_norm(x, (d,), w["ffn_norm.weight"]) @ w["ffn.router.weight"].t()
        selections.setdefault((layer, "ffn"), []).append(logits)
        gates, experts = logits.sigmoid().topk(2, -1)
        update = []
        for t in range(s):
            parts = [
                g * (w["ffn.experts.down.weight"][e] @ (w["ffn.experts.up.weight"][e] @ x[t]).relu())
                for g, e in zip(gates[t], experts[t].tolist())
            ]
            update.append(parts[0] + parts[1])
        x = x + torch.stack(update)
    loss = x.new_zeros(())
    for (_, kind), logits in selections.items():
        p = torch.stack(logits).softmax(-1).flatten(0, 1).mean(0)  # over repeats and tokens
        negative_entropy = (p * p.log()).sum(-1).mean()  # over heads, where there are some
        loss = loss + (AUX if kind == "ffn" else ATT_AUX) * negative_entropy
    return F.layer_norm(x, (d,), final) @ head.t(), loss


def test_against_an_unshared_reference() -> None:
    """Catches a norm on values or expert inputs, heads that share experts, RoPE on all channels, gates that are normalized, an entropy a
    repeat instead of one over all, and a gradient that is not the sum over the layers that share a weight.
    """
    case = Case(repeated(), seq_len=6)
    model = build(case, 1)
    batch = fake_batch(case, [4])
    places = case.seq_len
    value = model.module(batch.tokens, batch.targets, scale=1 / places)
    value.backward()
    p = {w.name: w.local.clone() for w in model.weights}
    layers = [
        {n.removeprefix(f"blocks.{i % GROUP}."): t.clone().requires_grad_() for n, t in p.items() if n.startswith(f"blocks.{i % GROUP}.")}
        for i in range(GROUP * REPEATS)
    ]
    logits, aux = reference(layers, batch.tokens[0], p["embedding.weight"], p["final_norm.weight"], p["head.weight"])
    torch.testing.assert_close(model.module(batch.tokens)[0], logits.detach(), rtol=1e-11, atol=1e-11)
    loss = F.cross_entropy(logits, batch.targets[0])
    assert value.item() == pytest.approx(loss.item(), rel=1e-12)
    (loss + aux).backward()
    for w in model.weights:
        if w.name.startswith("blocks."):
            _, block, name = w.name.split(".", 2)
            want = sum(layer[name].grad for i, layer in enumerate(layers) if i % GROUP == int(block))
            torch.testing.assert_close(w.local_grad, want, rtol=1e-9, atol=1e-11)


LAYOUTS: dict[str, tuple[int, Parallel]] = {
    "recompute": (1, Parallel(recompute="full")),
    "zero3": (2, Parallel(dp_shard=2)),
    "zero2, selective": (2, Parallel(dp_shard=2, reshard_after_forward=False, recompute="selective")),
    "ddp": (2, Parallel(engine="ddp")),
    "hsdp x ep": (4, Parallel(dp_shard=2, dp_replicate=2, ep=2)),
    "ring": (2, Parallel(cp=2)),
    "ulysses x ep": (4, Parallel(cp=2, cp_method="ulysses", ep=2)),
    "ep x edp": (4, Parallel(ep=2, recompute="full")),
    "tp": (2, Parallel(tp=2)),
    "tp x zero3 x ep": (4, Parallel(tp=2, ep=2)),
    "tp sequence x ulysses": (4, Parallel(tp=2, tp_sequence=True, cp=2, cp_method="ulysses", recompute="selective")),
    "whole experts over tp and cp": (4, Parallel(tp=2, tp_sequence=True, etp=1, cp=2, ep=4)),
}


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_one_process(layout: str) -> None:
    """Catches a weight of several layers whose gradient is reduced before all of them have added to it."""
    ranks, parallel = LAYOUTS[layout]
    model = repeated(num_experts=4) if parallel.ep > 1 else repeated()
    if parallel.tp > 1:  # heads that tp divides
        model = model.model_copy(update={"num_heads": 4, "num_kv_heads": 4})
    assert_equal(Case(model.model_copy(update={"dropout": 0.1}), parallel, packed=True), ranks)


def test_its_start() -> None:
    """Catches deviations that do not follow depth and width, and selectors whose rows differ in length."""
    model = build(Case(repeated()), 1)
    p = {w.name.removeprefix("blocks.0."): w for w in model.weights}
    scale, d = math.sqrt(2 / (GROUP * REPEATS)), 24
    want = {
        "attention.q.weight": scale / math.sqrt(d),
        "attention.v.weight": scale / math.sqrt(d),
        "attention.o.weight": scale / math.sqrt(HEADS * SIZE),
        "ffn.experts.up.weight": scale / math.sqrt(d),
        "ffn.experts.down.weight": scale / math.sqrt(E_FFN * 6),
    }
    assert {n: p[n].placement.spec.std for n in want} == pytest.approx(want)
    for name in ("attention.value_selector", "attention.out_selector", "ffn.router.weight"):
        assert p[name].local.norm(dim=1).tolist() == pytest.approx([scale] * len(p[name].local), rel=1e-6)  # std·√d


@pytest.mark.parametrize(("name", "size"), [("44m", 44e6), ("1.04b", 1040e6)])
def test_published_sizes(name: str, size: float) -> None:
    """Catches experts that are forgotten or shared where the paper does not share them; a token meets few of them, many times."""
    config = check(load_config(f"configs/moeut-{name}.yaml"), 1)
    report = describe_run(config, 1)
    assert report["parameters"] == pytest.approx(size, rel=0.01)
    model = Decoder(config.model, Shape(8, torch.float32, torch.float32))
    used = specs_of(model)["blocks.0.ffn.experts.up.weight"].uses
    assert config.model.moe is not None and config.model.moeut is not None
    layers = config.model.num_layers / config.model.moeut.group_size
    assert used == pytest.approx(config.model.moe.top_k / config.model.moe.num_experts * layers)
