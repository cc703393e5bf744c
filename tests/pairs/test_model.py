"""The encoder–decoder against plain loops: masks, stages, and beam search against all possible targets."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megascale.config.schema import Model, Parallel
from megascale.config.stages import pair_costs, split_unequal, stage_parts
from megascale.generation.beam import beam_search
from megascale.measure.compute import flops_per_token
from megascale.model.block import key_padding_mask
from megascale.model.encoder_decoder import EncoderDecoder
from megascale.model.relative import buckets
from megascale.model.residual import Stack, residual, token_correlations
from tests.depth.test_table import scheme
from tests.layouts import Case, build, fake_batch
from tests.pairs.test_layouts import MODELS, pair


def made(model: Model) -> EncoderDecoder:
    found = build(Case(model), 1).model
    assert isinstance(found, EncoderDecoder)
    found.train(False)
    return found


def plain_attention(weights: dict[str, Tensor], name: str, q_from: Tensor, k_from: Tensor, sees: Any) -> Tensor:
    """One head after the other, one query after the other, over the keys that `sees(query)` lists. No positions."""
    e, group, out = 6, 2, []
    q, k, v = (x @ weights[f"{name}.{part}.weight"].t() for part, x in (("q", q_from), ("k", k_from), ("v", k_from)))
    for i in range(len(q_from)):
        heads = []
        for h in range(4):
            mine, keys = slice(h * e, h * e + e), sees(i)
            g = slice(h // group * e, h // group * e + e)
            scores = torch.stack([q[i, mine] @ k[j, g] / math.sqrt(e) for j in keys]).softmax(0)
            heads.append(sum(s * v[j, g] for s, j in zip(scores, keys)))
        out.append(torch.cat(heads))  # type: ignore[arg-type]
    return torch.stack(out) @ weights[f"{name}.o.weight"].t()


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


@pytest.mark.parametrize("scheme_name", ["pre", "deepnorm"])
def test_against_plain_loops(scheme_name: str) -> None:
    """Catches keys of the wrong stream, positions in attention to the memory, a memory that is not normalized under pre-norm, padding that
    is seen, and the encoder's and decoder's coefficients mixed up.
    """
    cfg = pair(residual=scheme_name, position="learned", ffn="relu")
    model, batch = made(cfg), fake_batch(Case(cfg), [3])
    w = {n: p.detach() for n, p in model.named_parameters()}
    assert batch.source is not None
    length = int((batch.source >= 0).sum())
    assert 1 < length < batch.source.shape[1]
    alpha = {"encoder": 0.81 * (3**4 * 2) ** (1 / 16), "blocks": (3 * 2) ** 0.25}

    def join(x: Tensor, y: Any, side: str, name: str) -> Tensor:
        gain = w[f"{name}.weight"]
        return x + y(norm(x, gain)) if scheme_name == "pre" else norm(alpha[side] * x + y(x), gain)

    def ffn(name: str) -> Any:
        return lambda h: (h @ w[f"{name}.ffn.up.weight"].t()).relu() @ w[f"{name}.ffn.down.weight"].t()

    source, tokens = batch.source[0, :length], batch.tokens[0]
    read = w["embedding.weight"][source] + w["source_position.weight"][:length]
    for i in range(3):
        name = f"encoder.{i}"
        everything = lambda _: range(length)  # noqa: E731
        read = join(read, lambda h: plain_attention(w, f"{name}.attention", h, h, everything), "encoder", f"{name}.attention_norm")  # noqa: B023
        read = join(read, ffn(name), "encoder", f"{name}.ffn_norm")
    if scheme_name == "pre":
        read = norm(read, w["encoder_norm.weight"])
    x = w["embedding.weight"][tokens] + w["position.weight"]
    for i in range(2):
        name = f"blocks.{i}"
        past = lambda q: range(q + 1)  # noqa: E731
        x = join(x, lambda h: plain_attention(w, f"{name}.attention", h, h, past), "blocks", f"{name}.attention_norm")  # noqa: B023
        x = join(x, lambda h: plain_attention(w, f"{name}.cross", h, read, lambda _: range(length)), "blocks", f"{name}.cross_norm")  # noqa: B023
        x = join(x, ffn(name), "blocks", f"{name}.ffn_norm")
    if scheme_name == "pre":
        x = norm(x, w["final_norm.weight"])
    logits = x @ w["head.weight"].t()
    torch.testing.assert_close(model(batch.tokens, source=batch.source)[0], logits, atol=1e-11, rtol=1e-11)
    wanted = batch.targets[0]
    loss = -sum(logits.log_softmax(-1)[i, t] for i, t in enumerate(wanted.tolist()) if t >= 0)
    torch.testing.assert_close(model(batch.tokens, batch.targets, source=batch.source).double(), loss, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_seen(name: str) -> None:
    """Catches a target that sees its future, a source cut short for its own tokens, and one sample's source in another's target."""
    if name in ("experts", "bitlinear"):
        pytest.skip("what a token chooses or is rounded to follows more than what it sees")
    model, batch = made(MODELS[name]), fake_batch(Case(MODELS[name]), [3, 4])
    model.at_step(3)
    assert batch.source is not None
    before = model(batch.tokens, source=batch.source)
    tokens, source = batch.tokens.clone(), batch.source.clone()
    tokens[0, 5] = (tokens[0, 5] + 1) % 29
    moved = (model(tokens, source=source) - before).abs().amax(-1)
    assert (moved[0, :5] == 0).all() and (moved[0, 5:] > 0).all() and (moved[1] == 0).all()
    source[0, 0] = (source[0, 0] + 1) % 29
    moved = (model(batch.tokens, source=source) - before).abs().amax(-1)
    assert (moved[0] > 0).all() and (moved[1] == 0).all()


def test_an_empty_place_is_no_number_and_counts_nowhere() -> None:
    """Catches a softmax over no keys, which not every kernel of torch makes zero: it would poison every gradient of the batch."""
    seen = key_padding_mask(torch.tensor([[True, False], [False, False]])).valid
    assert seen is not None and seen.tolist() == [[True, False], [True, False]]
    model, batch = made(MODELS["llama"]), fake_batch(Case(MODELS["llama"]), [3, -1])
    alone = fake_batch(Case(MODELS["llama"]), [3])
    loss = model(batch.tokens, batch.targets, source=batch.source)
    torch.testing.assert_close(loss, model(alone.tokens, alone.targets, source=alone.source))
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_deepscale_averages_the_memory() -> None:
    """Catches the stream's own token correlation for that of the memory, which is another."""
    cfg = scheme("deepscale", family="encoder_decoder", encoder_layers=6, num_layers=2)
    row = residual(cfg, Stack("decoder", 2, 6), 1)
    r = token_correlations(("attention", "ffn") * 6, 0.0, cfg.token_correlation)[-1]
    assert row.cross is not None and row.cross.gains["value"] == pytest.approx(r**-0.25)
    assert row.cross.gains["value"] != row.starts.gains["value"]
    assert residual(cfg, Stack("encoder", 6, 2), 1).cross is None


def test_stages_of_two_stacks() -> None:
    """Catches stages that count layers where the two kinds cost differently, and a stage between the ends without layers."""
    for costs, stages, before, after in (
        ([1.0] * 3 + [2.0] * 3, 3, 0.0, 0.0),
        ([1.0] * 4 + [3.5] * 2, 4, 1.0, 5.0),
        ([2.0, 1.0, 1.0], 2, 0.0, 9.0),
        ([1.0] * 6, 3, 4.0, 0.0),
    ):
        found = split_unequal(costs, stages, before, after)
        dearest = []
        for cuts in itertools.combinations_with_replacement(range(len(costs) + 1), stages - 1):
            ends = [0, *cuts, len(costs)]
            loads = [sum(costs[a:b]) for a, b in itertools.pairwise(ends)]
            loads[0], loads[-1] = loads[0] + before, loads[-1] + after
            if all(a < b for a, b in itertools.pairwise(ends[1:-1])):
                dearest.append(max(loads))
        loads = [sum(costs[r.start : r.stop]) for r in found]
        loads[0], loads[-1] = loads[0] + before, loads[-1] + after
        assert max(loads) == min(dearest) and all(len(r) for r in found[1:-1])
        assert [i for r in found for i in r] == list(range(len(costs)))
    parts = stage_parts(pair(encoder_layers=8, num_layers=8), Parallel(pp=4), 12, 48)
    assert parts[-1].of_stack(0, 8) == range(8, 8) and parts[0].of_stack(8, 8) == range(0)
    assert sum(len(p.of_stack(0, 8)) for p in parts) == sum(len(p.of_stack(8, 8)) for p in parts) == 8


def test_flops_of_a_target_token() -> None:
    """Catches an encoder counted per token of the target where sources are longer: six times the weights in products, and attention."""
    cfg = pair(encoder_layers=2, num_layers=2, num_kv_heads=4)
    d, f, s, t = 24, 32, 10, 40
    own, cross = 4 * d * d + 3 * d * f, (2 * d * d, 2 * d * d)
    forward = (
        2 * t * (2 * own + 4 * d * t)
        + 2 * (s * (2 * own + 2 * d * s) + 2 * s * cross[0] + 2 * t * cross[1] + 4 * d * s * t)
        + 2 * s * d * 37
    )
    assert flops_per_token(cfg, {}, s, t) == pytest.approx(3 * forward / s)
    assert pair_costs(cfg, s, t)[2] == 2 * s * d * 37


def all_targets(model: EncoderDecoder, source: Tensor, end: int, longest: int, vocab: int) -> dict[tuple[int, ...], float]:
    """Log-probability of every target of at most `longest` tokens with the end, from the model's loss."""
    found = {}
    for n in range(longest):
        for words in itertools.product([i for i in range(vocab) if i != end], repeat=n):
            tokens, targets = torch.tensor([[end, *words]]), torch.tensor([[*words, end]])
            with torch.no_grad():
                found[words] = -model(tokens, targets, source=source).item()
    return found


def test_a_wide_beam_finds_the_best_target() -> None:
    """Catches hypotheses that take another's past, an end token that goes on, scores that are not the model's, and penalties by the wrong
    length: a beam as wide as there are targets is exhaustive.
    """
    cfg = pair(vocab_size=5, encoder_layers=1, num_layers=1)
    model = made(cfg)
    sources = torch.tensor([[1, 3, 2, -1], [4, 4, 0, 2]])
    lengths = set()
    for penalty, end in ((0.0, 0), *((2.0, end) for end in range(5))):
        found = beam_search(model, sources, end, 3, width=64, length_penalty=penalty)
        for source, got in zip(sources, found):
            every = all_targets(model, source[None], end, 3, 5)
            best = max(every, key=lambda words: every[words] / (len(words) + 1) ** penalty)
            assert tuple(got.tokens) == best
            assert got.score == pytest.approx(every[best] / (len(best) + 1) ** penalty, rel=1e-9)
            lengths.add(len(best))
    assert 2 in lengths, "a past of two tokens, of which one may be another hypothesis's"


def test_greedy_takes_the_likeliest_token() -> None:
    """Catches a narrow beam that looks at more than one continuation, and a limit that is not kept."""
    cfg = pair(residual="deepnorm")
    model, batch = made(cfg), fake_batch(Case(cfg), [0, 1, 2])
    assert batch.source is not None
    for source, got in zip(batch.source, beam_search(model, batch.source, 36, 7)):
        words = [36]
        while len(words) < 8:
            words.append(int(model(torch.tensor([words]), source=source[None])[0, -1].argmax()))
            if words[-1] == 36:
                break
        assert got.tokens == [x for x in words[1:] if x != 36]


def distance_bucket(back: int, number: int, furthest: int, causal: bool) -> int:
    """T5's rule for one query and key, `back` places before it."""
    later = 0
    if not causal:
        number //= 2
        later, back = (number if back < 0 else 0), abs(back)
    exact = number // 2
    if back < exact:
        return later + max(back, 0)
    return later + min(number - 1, exact + int(math.log(back / exact) / math.log(furthest / exact) * (number - exact)))


def test_biases_by_distance_against_plain_loops() -> None:
    """Catches a sign of the distance, halves of the buckets swapped, a table of the other stack, a bias in attention to the memory, a scale
    of 1/√e that is left in, and a head's factor that is not.
    """
    cfg = pair(
        position="relative", relative_buckets=8, relative_distance=7, attention_scale=0.9, head_scale=0.25, num_kv_heads=4,
        ffn="geglu_tanh", encoder_layers=2, num_layers=2,
    )  # fmt: skip
    model, batch = made(cfg), fake_batch(Case(cfg), [3])
    w = {n: p.detach() for n, p in model.named_parameters()}
    assert batch.source is not None
    source, tokens = batch.source[0][batch.source[0] >= 0], batch.tokens[0]

    def attention(name: str, q_from: Tensor, k_from: Tensor, table: Tensor | None, causal: bool) -> Tensor:
        q, k, v = (x @ w[f"{name}.{part}.weight"].t() for part, x in (("q", q_from), ("k", k_from), ("v", k_from)))
        out = torch.zeros_like(q)
        for h, i in itertools.product(range(4), range(len(q))):
            at = slice(6 * h, 6 * h + 6)
            keys = range(i + 1) if causal else range(len(k))
            far = [0.0 if table is None else table[distance_bucket(i - j, 8, 7, causal), h] for j in keys]
            scores = torch.stack([0.9 * q[i, at] @ k[j, at] + b for j, b in zip(keys, far)]).softmax(0)
            out[i, at] = scores @ v[: len(keys), at]
        return out @ w[f"{name}.o.weight"].t()

    def ffn(x: Tensor, name: str) -> Tensor:
        h = norm(x, w[f"{name}.ffn_norm.weight"])
        gate = torch.nn.functional.gelu(h @ w[f"{name}.ffn.gate.weight"].t(), approximate="tanh")
        return x + (gate * (h @ w[f"{name}.ffn.up.weight"].t())) @ w[f"{name}.ffn.down.weight"].t()

    read, x = w["embedding.weight"][source], w["embedding.weight"][tokens]
    for name in ("encoder.0", "encoder.1"):
        h = norm(read, w[f"{name}.attention_norm.weight"])
        read = ffn(read + attention(f"{name}.attention", h, h, w["source_relative.weight"], False), name)
    read = norm(read, w["encoder_norm.weight"])
    for name in ("blocks.0", "blocks.1"):
        h = norm(x, w[f"{name}.attention_norm.weight"])
        x = x + attention(f"{name}.attention", h, h, w["relative.weight"], True)
        x = ffn(x + attention(f"{name}.cross", norm(x, w[f"{name}.cross_norm.weight"]), read, None, False), name)
    logits = 0.25 * norm(x, w["final_norm.weight"]) @ w["head.weight"].t()
    torch.testing.assert_close(model(batch.tokens, source=batch.source)[0], logits, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize(("number", "furthest"), [(32, 128), (8, 7), (6, 20), (4, 3)])
def test_buckets_are_those_of_t5(number: int, furthest: int) -> None:
    """Catches another border between buckets than the published code has, which every pretrained table was made with."""
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5", reason="transformers is not installed: pip install 'megascale[hf]'")
    back = torch.arange(-300, 301)
    for causal in (False, True):
        want = t5.T5Attention._relative_position_bucket(-back, bidirectional=not causal, num_buckets=number, max_distance=furthest)
        assert torch.equal(buckets(back, number, furthest, causal), want)
