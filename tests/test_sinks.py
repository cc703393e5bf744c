"""Sinks, off-by-one softmax, capped scores and logits, and gated results: against plain loops, on every axis, and from a cache."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megascale.config.load import build_config
from megascale.config.schema import Model, Optim, Parallel
from megascale.config.support import check
from megascale.errors import UsageError
from megascale.generation.run import Sampling, generate
from megascale.model.attention import attend, attend_all
from megascale.model.attention_latent import LatentAttention
from megascale.model.families import build_part
from megascale.model.loss import cross_entropy_sum
from megascale.model.ops import attention_tiles
from megascale.model.ops.attention_flex import flex_attention, with_blocks
from megascale.model.ops.attention_tiles import AttentionMask
from megascale.model.shape import shape_of
from megascale.model.spec import specs_of
from tests.layouts import CPU, Case, build, fake_batch, tiny, train
from tests.ranks import run_ranks
from tests.test_latent import LATENT, rotated
from tests.test_layouts import assert_same
from tests.test_sequence import plain

LENGTH, HEADS, KV_HEADS, SIZE = 19, 4, 2, 6
DOCUMENTS = torch.tensor([[0] * 7 + [1] * 12, [0] * 15 + [1] * 4])
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
MASKS: dict[str, AttentionMask] = {
    "sinks": AttentionMask(),
    "cap": AttentionMask(softcap=0.8),
    "documents": AttentionMask(documents=DOCUMENTS),
    "all": AttentionMask(documents=DOCUMENTS, window=5, slopes=SLOPES, softcap=0.8),
    "both ways": AttentionMask(False),
    "both ways, all": AttentionMask(False, DOCUMENTS, softcap=0.8),
}


def tensors() -> list[Tensor]:
    """q, k, v, sinks, and a gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    drawn = [2 * torch.randn(2, h, LENGTH, SIZE, generator=generator, dtype=torch.float64) for h in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return [*(x.requires_grad_() for x in drawn[:3]), torch.tensor([-1.0, 0.0, 0.7, 3.0]).double().requires_grad_(), drawn[3]]


def by_loops(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """One query after the other, one head after the other."""
    rows = []
    for b in range(q.shape[0]):
        for h in range(HEADS):
            for i in range(LENGTH):
                seen = [j for j in range(LENGTH) if j <= i or not mask.causal]
                seen = [j for j in seen if mask.documents is None or mask.documents[b, i] == mask.documents[b, j]]
                seen = [j for j in seen if mask.window is None or i - j < mask.window]
                scores = k[b, h // 2, seen] @ q[b, h, i] / math.sqrt(SIZE)
                if mask.softcap is not None:
                    scores = mask.softcap * torch.tanh(scores / mask.softcap)
                if mask.slopes is not None:
                    scores = scores - mask.slopes[h] * (i - torch.tensor(seen))
                weights = scores.exp()
                below = weights.sum() + (0.0 if mask.sinks is None else mask.sinks[h].exp())
                rows.append(weights @ v[b, h // 2, seen] / below)
    return torch.stack(rows).view(q.shape)


@pytest.mark.parametrize("name", MASKS)
def test_attention_is_the_loop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a sink that is added before scores are merged twice, one of another head, its gradient with the wrong sign, a cap without its
    slope or on biases too, and masks that the sinks' kernel forgets.
    """
    monkeypatch.setattr(attention_tiles, "SCORES", 1 << 9)  # several tiles
    *inputs, d_out = tensors()
    mask = MASKS[name]._replace(sinks=inputs[3])
    got = (attend if mask.causal else attend_all)(*inputs[:3], mask)
    expected = by_loops(*inputs[:3], mask)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(plain(*inputs[:3], mask), expected, rtol=0, atol=1e-12)  # what longer tests compare with
    for a, b in zip(torch.autograd.grad(got, inputs, d_out), torch.autograd.grad(expected, inputs, d_out)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("name", ["all", "cap"])
def test_flex_attention_is_plain_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches sinks that GPUs weigh by another sum than that of visible keys, and whose gradient leaves the kernel's log-sum-exp out."""
    import torch.nn.attention.flex_attention as module

    monkeypatch.setattr(module, "_validate_device", lambda *_: None)  # it refuses CPUs where gradients are wanted
    *inputs, d_out = tensors()
    mask = with_blocks(MASKS[name], LENGTH, d_out.device)._replace(sinks=inputs[3])
    got, expected = flex_attention(*inputs[:3], mask), plain(*inputs[:3], mask)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad(got, inputs, d_out), torch.autograd.grad(expected, inputs, d_out)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mask", [AttentionMask(), AttentionMask(softcap=2.0)])
def test_memory_grows_with_the_length_only(mask: AttentionMask) -> None:
    """Catches scores of [s, s] that are kept for the backward pass."""
    kept: list[int] = []
    for length in (300, 1200):
        sizes: list[int] = []
        q, k, v = (torch.randn(1, HEADS, length, SIZE, requires_grad=True) for _ in range(3))
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: (sizes.append(x.numel()), x)[1], lambda x: x):
            attend(q, k, v, mask._replace(sinks=torch.zeros(HEADS, requires_grad=True)))
        kept.append(sum(sizes))
    assert kept[1] <= 4 * kept[0]


@pytest.mark.parametrize("gate", ["channel", "head"])
@pytest.mark.parametrize("latent", [False, True])
def test_gates_against_loops(gate: str, latent: bool) -> None:
    """Catches a gate that reads another head's rows, is applied after the output product, or reads another input."""
    extra = {"attention_gate": gate, "attention_sink": "zero", "attention_softcap": 1.5, "bias": True, "norm": "layernorm"}
    cfg = tiny(**(LATENT if latent else {}), **extra)
    attention: Any = build(Case(cfg), 1).model.get_submodule("blocks.0.attention")
    x = torch.randn(1, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in attention.parameters():
            p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(p.numel())))
    w = {n: p.detach() for n, p in attention.named_parameters()}
    channels = 5 if latent else 6
    expected = []
    for s in range(5):
        joined = []
        for h in range(4):
            scores, values = heads_by_loop(attention, w, cfg, x[0], s, h)
            weights = (1.5 * torch.tanh(torch.stack(scores) / 1.5)).exp()
            result = weights @ torch.stack(values) / (1 + weights.sum())
            rows = slice(h * channels, (h + 1) * channels) if gate == "channel" else slice(h, h + 1)
            joined.append(result * torch.sigmoid(w["gate.weight"][rows] @ x[0, s] + w["gate.bias"][rows]))
        expected.append(w["o.weight"] @ torch.cat(joined) + w["o.bias"])
    model = build(Case(cfg), 1).model
    rotary = model.angles(cfg, torch.zeros(1, 5, dtype=torch.int64), None)  # type: ignore[operator]
    mask = model.attention_mask(cfg, None, 5, x.device)  # type: ignore[operator]
    torch.testing.assert_close(attention(x, rotary, mask)[0].detach(), torch.stack(expected), rtol=0, atol=1e-12)


def heads_by_loop(attention: Any, w: dict[str, Tensor], cfg: Model, x: Tensor, s: int, h: int) -> tuple[list[Tensor], list[Tensor]]:
    """Scores of query s of head h, and the values it sees."""
    scores, values = [], []
    for t in range(s + 1):
        if isinstance(attention, LatentAttention):
            assert attention.q_down is not None and attention.q_norm is not None
            both = (attention.q(attention.q_norm(attention.q_down(x[s]))), attention.kv_down(x[t]))
            query, (latent, key) = both[0][10 * h : 10 * h + 10], both[1].split((10, 4))
            query = torch.cat((query[:6], halves(query[6:], s, cfg.rope_theta)))
            latent = attention.kv_norm(latent)
            key = torch.cat((attention.k(latent)[6 * h : 6 * h + 6], halves(key, t, cfg.rope_theta)))
            scores.append(query @ key / math.sqrt(10))
            values.append(attention.v(latent)[5 * h : 5 * h + 5])
        else:
            g = h // 2
            query = halves((w["q.weight"] @ x[s] + w["q.bias"])[6 * h : 6 * h + 6], s, cfg.rope_theta)
            key = halves((w["k.weight"] @ x[t] + w["k.bias"])[6 * g : 6 * g + 6], t, cfg.rope_theta)
            scores.append(query @ key / math.sqrt(6))
            values.append((w["v.weight"] @ x[t] + w["v.bias"])[6 * g : 6 * g + 6])
    return [y.detach() for y in scores], [y.detach() for y in values]


def halves(x: Tensor, position: int, theta: float) -> Tensor:
    """x turned in pairs half a head apart."""
    x = x.detach()
    turned = rotated(x.view(2, -1).t().flatten(), position, theta)
    return turned.view(-1, 2).t().flatten()


MIXED: dict[str, Any] = {
    "num_layers": 4,
    "logit_softcap": 3.0,
    "kinds": {
        "near": {"sliding_window": 5, "attention_gate": "head", "attention_sink": "zero", "attention_softcap": 1.5},
        "far": {"attention_sink": "learned", "attention_gate": "channel"},
        "wide": {**LATENT, "attention_sink": "learned", "attention_gate": "channel", "attention_softcap": 2.0},
        "slopes": {"position": "alibi", "attention_sink": "learned", "attention_softcap": 1.0},
    },
    "pattern": ["near", "far", "wide", "slopes"],
}
OPTIM = Optim(lr=0.005)  # sinks start alike in all heads: they must move apart
PACKED = Case(tiny(**MIXED), optim=OPTIM, packed=True, steps=2)
PLAIN = replace(PACKED, model=tiny(**MIXED, tie_embeddings=True, mtp_depth=1), packed=False)
UNIT = replace(PACKED, model=tiny(residual="mus", attention_gate="head", attention_sink="learned"), optim=Optim(lr=0.005, weight_decay=0.0))
ROUNDED = replace(PACKED, model=tiny(linear="bitlinear", attention_gate="channel", attention_softcap=1.0, num_kv_heads=4))
BOTH_WAYS = replace(PACKED, model=tiny(family="encoder", attention_sink="learned", attention_softcap=1.0, logit_softcap=2.0))
CASES: dict[str, tuple[Case, Parallel]] = {
    "tp": (PACKED, Parallel(tp=2)),
    "tp sequence x selective": (PLAIN, Parallel(tp=2, tp_sequence=True, recompute="selective")),
    "ring": (PACKED, Parallel(cp=2, recompute="full")),
    "plain ring": (PLAIN, Parallel(cp=2)),
    "ulysses x layered": (PACKED, Parallel(cp=2, cp_method="ulysses", accumulation="layered")),
    "zbv": (PLAIN, Parallel(pp=2, pp_schedule="zbv")),
    "pp x nested": (PACKED, Parallel(pp=2, recompute="nested")),
    "unit scaling on tp": (UNIT, Parallel(tp=2)),
    "bitlinear on tp": (ROUNDED, Parallel(tp=2)),
    "encoder on a ring": (BOTH_WAYS, Parallel(cp=2)),
}


def trained(cases: list[Case]) -> list[dict[str, Any]]:
    """One world for all."""
    return [train(case) for case in cases]


@pytest.mark.dist
def test_every_axis_equals_one_process() -> None:
    """Catches sinks and gates that are not cut by heads, sinks of other heads within Ulysses, their gradient summed over fewer ranks than
    share the queries, and a cap that a sharded vocabulary or a module of multi-token prediction forgets.
    """
    different = list({repr(case): case for case, _ in CASES.values()}.values())
    singles = dict(zip(map(repr, different), run_ranks(1, trained, different)[0]))
    cases = [replace(case, parallel=parallel) for case, parallel in CASES.values()]
    for name, case, got in zip(CASES, cases, run_ranks(2, trained, cases)[0]):
        try:
            assert_same(got, singles[repr(replace(case, parallel=Parallel()))], case)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
    sinks = singles[repr(PACKED)]["weight"]["blocks.1.attention.sinks"]
    assert sinks.std() > 0  # heads differ, or a wrong head would not show


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    "parallel",
    [
        Parallel(tp=2, cp=2),
        Parallel(cp=4, cp_ulysses=2),
        Parallel(tp=2, tp_sequence=True, pp=2, recompute="selective"),
        Parallel(cp=2, pp=2, pp_schedule="zbv"),
    ],
)
def test_products_of_axes(parallel: Parallel) -> None:
    """Catches what one axis leaves right and two do not."""
    for case in (PACKED, PLAIN):
        got = run_ranks(4, train, replace(case, parallel=parallel))[0]
        assert_same(got, run_ranks(1, train, case)[0], case)


def test_a_block_is_one_graph() -> None:
    """Catches sinks, caps and gates that the compiler breaks a block at, or computes otherwise."""
    model: Any = build(PACKED, 1).model
    batch = fake_batch(PACKED, [0, 1])
    mask_of = lambda m: model.attention_mask(m, batch.documents, PACKED.seq_len, CPU)  # noqa: E731
    contexts = model.contexts(range(4), batch.tokens, mask_of, batch.positions, None, None)
    x, d_out = torch.randn(2, 2, PACKED.seq_len, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for (name, block), context in list(zip(model.units(), contexts))[::2]:
        found = []
        for forward in (block.forward, torch.compile(block.forward, backend="aot_eager", fullgraph=True, dynamic=False)):
            y = forward(x.requires_grad_(), context)
            found.append([y, *torch.autograd.grad(y, [x, *block.parameters()], d_out)])
        for a, b in zip(*found):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("latent", [False, True])
def test_generation(latent: bool) -> None:
    """Catches a cache without sinks or cap, or that caps scores after its mask: cached tokens equal those of whole passes."""
    options = {"attention_sink": "learned", "attention_softcap": 1.0, "attention_gate": "channel", "logit_softcap": 2.0}
    kind = {"attention": "grouped", "num_kv_heads": 2, "latent": None, "sliding_window": 4, "position": "alibi", "head_dim": 6}
    cfg = tiny(**(LATENT if latent else {}), **options, kinds={"a": {}, "b": kind}, pattern=["a", "b"])
    built = build(Case(cfg, seq_len=24), 1)
    with torch.no_grad():
        for name, p in built.model.named_parameters():
            if name.endswith("sinks"):
                p.copy_(torch.tensor([-1.0, 0.5, 1.0, 3.0]))
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7]]
    found = generate(built, prompts, Sampling(most=8))
    built.train(False)
    for prompt, tokens in zip(prompts, found):
        whole = built.model(torch.tensor([[*prompt, *tokens]]))
        assert whole.abs().max() <= 2.0
        for i, token in enumerate(tokens):
            assert int(whole[0, len(prompt) - 1 + i, : cfg.vocab_size].argmax()) == token


@pytest.mark.parametrize("compiled", [False, True])
def test_capped_loss(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a cap without its slope, one in some chunks only, and one that lifts the rows beyond the vocabulary."""
    monkeypatch.setattr("megascale.model.loss.CPU_ELEMENTS", 11)
    monkeypatch.setattr("megascale.model.loss.CPU_ROWS", 5)
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in ((13, 6), (11, 6), (11,)))
    targets = torch.arange(13) % 9 - 1
    got = cross_entropy_sum(x, w, targets, 0.25, 0, 9, None, "aot_eager" if compiled else None, b, cap=1.5)
    logits = 1.5 * torch.tanh((x @ w.t() + b)[:, :9] / 1.5)
    expected = 0.25 * F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)
    for a, e in zip(torch.autograd.grad(got, (x, w, b)), torch.autograd.grad(expected, (x, w, b))):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-13)


def test_sinks_do_not_decay_and_gates_do() -> None:
    """Catches sinks that are pulled to zero or start elsewhere than at the off-by-one softmax, and a gate that is no hidden product."""
    specs = specs_of(build_part(PACKED.model, shape_of(PACKED.config)))
    sinks, gate = specs["blocks.1.attention.sinks"], specs["blocks.1.attention.gate.weight"]
    assert not sinks.decays and sinks.std == 0.0 and sinks.shape == (4,) and sinks.cut == 0
    assert gate.decays and gate.shape == (24, 24) and specs["blocks.0.attention.gate.weight"].shape == (4, 24)
    assert "blocks.0.attention.sinks" not in specs
    fast: Any = build(Case(tiny(residual="mus", attention_gate="channel"), precision="bf16", fp8="static"), 1).model
    assert fast.blocks["0"].attention.gate.fp8 == "static" and fast.blocks["0"].attention.gate.weight.shape == (24, 24)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_softcap": 0}, "model.attention_softcap"),
        ({"logit_softcap": -1.0}, "model.logit_softcap"),
        ({"attention_sink": "one"}, "model.attention_sink"),
        ({"family": "encoder_decoder", "attention_gate": "head"}, "text models with one stack"),
        ({"hidden_size": 64, "ffn_size": 64, "attention_gate": "head", "fp8": "dynamic"}, "attention_gate channel"),
        ({"kinds": {"a": {"logit_softcap": 1.0}}, "pattern": ["a"]}, "model.kinds.a.logit_softcap"),
    ],
)
def test_refusals(changes: dict[str, Any], words: str) -> None:
    """Catches a key that is taken and not followed."""
    fp8 = changes.get("fp8", "false")
    values = {**tiny(head_dim=16).model_dump(mode="json"), **{k: v for k, v in changes.items() if k != "fp8"}}
    with pytest.raises(UsageError, match=words):
        check(build_config({"model": values, "train": {"steps": 1, "seq_len": 8}, "data": {"train": "x"}, "precision": {"fp8": fp8}}), 1)
