"""Multi-token prediction at work: how often its tokens would be accepted, on every layout, and text that drafts leave as it is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megascale.config.schema import Model, Parallel
from megascale.data.loader import sample_numbers
from megascale.errors import UsageError
from megascale.generation.run import Sampling, generate
from megascale.generation.speculate import Counts, Drafter, Texts
from megascale.model.ahead import targets_ahead
from megascale.model.decoder import Decoder
from megascale.parallel.model import ParallelModel
from megascale.train.build import build_engine
from megascale.train.log.module_metrics import MetricsOverRanks
from tests.layouts import CPU, Case, build, fake_batch, tiny
from tests.ranks import run_ranks
from tests.runs import make_tokens, rows, run, settings

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9, 3], [2]]
MODELS: dict[str, Model] = {
    "rope": tiny(mtp_depth=3, num_kv_heads=1),
    "learned": tiny(mtp_depth=1, position="learned", tie_embeddings=True, residual="post", embedding_norm=True),
    "alibi": tiny(mtp_depth=2, position="alibi", sliding_window=4),
    "scores": tiny(
        mtp_depth=2, attention_scale=9.0, attention_softcap=0.5, attention_sink="learned", attention_gate="head", logit_softcap=3.0
    ),
    "kinds": tiny(
        num_layers=3,
        mtp_depth=2,
        attention="latent",
        latent={"kv_rank": 8, "rope_dim": 4},
        kinds={"near": {"sliding_window": 3}, "mixed": {"moe": {"num_experts": 4, "ffn_size": 16}}},
        pattern=["near"],
        pattern_last=["mixed"],
    ),
    "states": tiny(
        num_layers=3,
        mtp_depth=2,
        kinds={
            "state": {
                "attention": "gated_delta",
                "delta": {"key_heads": 2, "value_heads": 4, "key_dim": 4, "value_dim": 6, "conv_size": 3},
            },
            "pairs": {},
        },
        pattern=["state"],
        pattern_first=["pairs"],
    ),
}


def trained(name: str) -> ParallelModel:
    model = build(Case(MODELS[name], seq_len=64), 1)
    model.train(False)
    return model


@torch.no_grad()
def draft(model: Decoder, tokens: list[int], k: int) -> int:
    """The token that module k predicts after `tokens`, of which the last k are its tokens ahead; without a cache."""
    streams: list[Tensor] = []
    enter = model.enter_head
    model.enter_head = lambda x: (streams.append(x), enter(x))[1]  # type: ignore[assignment, func-returns-value, method-assign]
    model(torch.tensor([tokens[:-k]]))
    del model.enter_head
    x, last = streams[0], model.cfg.at_layer(model.cfg.num_layers - 1)
    mask = model.attention_mask(last, None, x.shape[1], CPU)
    for j in range(1, k + 1):
        ahead: Any = model.mtp[str(j - 1)]
        behind = torch.tensor([tokens[j : len(tokens) - k + j]])
        (context,) = model.contexts(range(2 + j, 3 + j), behind, lambda _: mask, None, None, None)
        x = ahead(x, model.embedded(behind, model.embedding), context)
    return int(torch.nn.functional.linear(enter(ahead.norm(x))[0, -1], model.head_weight())[: model.predicted].argmax())


def drafts_of(model: Decoder, text: list[int], drafts: int) -> list[int]:
    """What the modules draft behind a text, each behind the drafts of those before it."""
    found = list(text)
    for k in range(1, drafts + 1):
        found.append(draft(model, found, k))
    return found[len(text) :]


@pytest.mark.parametrize("name", MODELS)
def test_drafts_change_no_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rejected tokens that are seen later, a row whose rejections move another's tokens, what a module keeps of tokens that were
    drafts, and a text that goes beyond its limit or its end.
    """
    model, drafts = trained(name), MODELS[name].mtp_depth
    other = trained(name).model  # whose attention keeps nothing
    assert isinstance(other, Decoder)
    want = generate(model, PROMPTS, Sampling(13, drafts=0))
    ends: frozenset[int] = frozenset()
    own, oracle = Drafter.draft, torch.Generator().manual_seed(3)

    def checked(self: Drafter, texts: Texts, *rest: Any) -> None:
        """Drafts as they are without a cache; then most of them are replaced by what the model will say."""
        own(self, texts, *rest)
        for i, (row, n, limit) in enumerate(zip(texts.tokens.tolist(), texts.length.tolist(), texts.limit.tolist())):
            if n < limit and row[n - 1] not in ends:
                assert row[n : n + drafts] == drafts_of(other, row[:n], drafts)
                known = (PROMPTS[i] + want[i])[n : n + drafts]
                right = torch.rand(len(known), generator=oracle) < 0.7
                for j, token in enumerate(known):
                    texts.tokens[i, n + j] = token if right[j] else (token + 1) % 37

    monkeypatch.setattr(Drafter, "draft", checked)
    counts = Counts()
    assert generate(model, PROMPTS, Sampling(13), counts) == want
    assert 0 < counts.accepted < counts.drafted and counts.passes < 13
    (alone,) = generate(model, PROMPTS[:1], Sampling(13), alone_counts := Counts())
    assert alone == want[0] and alone_counts.accepted + alone_counts.passes == 13
    ends = frozenset({want[0][6], want[2][3]})
    assert generate(model, PROMPTS, Sampling(13, ends=ends)) == generate(model, PROMPTS, Sampling(13, ends=ends, drafts=0))


def test_long_prompts_are_drafted_from_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a module that skips a part of the prompt, or runs over it twice."""
    model = trained("rope")
    want = generate(model, PROMPTS, Sampling(9), counts := Counts())
    monkeypatch.setattr("megascale.generation.run.part_length", lambda *_: 3)
    assert generate(model, PROMPTS, Sampling(9), again := Counts()) == want and again == counts


def cut() -> list[list[int]]:
    model = build(Case(MODELS["rope"], Parallel(tp=2, dp_shard=1), seq_len=64), 2)
    model.train(False)
    return generate(model, PROMPTS, Sampling(8))


@pytest.mark.dist
def test_tensor_ranks_draft_alike() -> None:
    """Catches a rank that drafts from its own part of the vocabulary."""
    want = generate(trained("rope"), PROMPTS, Sampling(8))
    assert run_ranks(2, cut) == [want, want]


def test_refusals() -> None:
    """Catches drafts that would change how tokens are drawn, and more drafts than there are modules."""
    model = trained("learned")
    for how, said in ((Sampling(4, 1.0, drafts=1), "--temperature is 1"), (Sampling(4, drafts=2), "has 1 modules")):
        with pytest.raises(UsageError, match=said):
            generate(model, PROMPTS, how)
    assert generate(model, PROMPTS, Sampling(4, 1.0)) == generate(model, PROMPTS, Sampling(4, 1.0, drafts=0))


def evaluated(case: Case) -> dict[str, Any]:
    """The row of multi-token prediction after an evaluation."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    model = build(case, ranks)
    engine, metrics = build_engine(model, case.config, CPU), MetricsOverRanks(model)
    model.train(False)
    numbers = sample_numbers(0, case.batch, case.micro_batch, model.mesh.data_rank, model.mesh.data_size)
    engine.evaluate([fake_batch(case, n) for n in numbers])
    _, sums = metrics.vectors(metrics.flush(), CPU, False)
    if ranks > 1:
        dist.all_reduce(sums)
    return metrics.row(sums, False)["mtp"]


LAYOUTS: dict[str, tuple[int, Parallel]] = {
    "tp sequence x pp": (4, Parallel(tp=2, tp_sequence=True, pp=2)),
    "ring x dp": (4, Parallel(cp=2, dp_shard=2)),
    "ulysses, layered": (2, Parallel(cp=2, cp_method="ulysses", accumulation="layered")),
    "zbv": (2, Parallel(pp=2, pp_schedule="zbv")),
}


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_acceptance_is_the_same_on_every_layout(layout: str) -> None:
    """Catches tokens compared with a neighbour's of another rank's part of the sequence, and a vocabulary's largest logit per rank."""
    ranks, parallel = LAYOUTS[layout]
    case = Case(tiny(mtp_depth=2, num_layers=4, num_kv_heads=4, vocab_size=7), packed=True, batch=8)
    want = evaluated(case)
    assert min(want["acceptance"]) > 0 and max(want["acceptance"]) < 1
    case = Case(case.model, parallel, packed=True, batch=8)
    assert run_ranks(ranks, evaluated, case)[0]["acceptance"] == pytest.approx(want["acceptance"], rel=1e-12)


def test_acceptance_counts_what_speculation_would_accept() -> None:
    """Catches a draft that is compared with the token after or before the one it is for, and drafts across documents."""
    case = Case(tiny(mtp_depth=2, vocab_size=5), packed=False, batch=2, micro_batch=2)
    built = build(case, 1)
    built.train(False)
    model, batch = built.model, fake_batch(case, [0, 1])
    assert isinstance(model, Decoder)
    with torch.no_grad():
        model(batch.tokens, batch.targets)
        own = model(batch.tokens)[..., :5].argmax(-1)
        for k in (1, 2):
            same = []
            for row, said in zip(batch.tokens.tolist(), own.tolist()):
                # The draft behind tokens …i, given the k tokens after them, against what the model says after those.
                same += [draft(model, row[: i + 1 + k], k) == said[i + k] for i in range(12 - k)]
            metrics: Any = model.mtp[str(k - 1)]
            totals = metrics.metrics.flush()
            assert int(totals["drafts"]) == int((targets_ahead(batch.targets, None, k) >= 0).sum()) == 2 * (12 - k)
            assert int(totals["accepted"]) == sum(same)


def test_rows_of_evaluated_steps_have_it(tmp_path: Any) -> None:
    """Catches an evaluation that leaves its counts to a later step, or that is counted in training."""
    make_tokens(tmp_path / "tokens")
    values = settings(tmp_path, model__mtp_depth=1, train__eval_every=3, train__eval_steps=2, data__valid_fraction=0.2)
    assert run_ranks(1, run, values) == [(0, "done")]
    found = {r["step"]: r["mtp"] for r in rows(tmp_path)}
    assert [step for step, row in found.items() if "acceptance" in row] == [3, 6]
    assert all(0 <= row["acceptance"][0] <= 1 for step, row in found.items() if step in (3, 6))
    assert all(math.isfinite(row["loss"][0]) for row in found.values())
