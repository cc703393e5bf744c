"""The encoder family: what it sees, what it is asked, and a whole run on several layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megascale.config.load import build_config
from megascale.data.dataset import Corpus, Mixture
from megascale.data.loader import make_batch
from megascale.data.masking import Masking
from megascale.data.vocabulary import resolve_vocabulary
from megascale.errors import UsageError
from megascale.model.attention import attend_all
from megascale.model.ops.attention_tiles import AttentionMask
from tests.layouts import CPU, Case, build, tiny
from tests.ranks import run_ranks
from tests.runs import VOCAB, losses, make_tokens, rows, run, settings


def test_what_is_asked() -> None:
    """Catches another share of hidden, random and kept tokens than BERT's 80/10/10, and a mask that does not follow the sample alone."""
    masking = Masking(3, 0.15, 1000, 1000)
    tokens = np.random.default_rng(0).integers(0, 1000, 200_000)
    seen, asked = masking.corrupt(tokens, 7)
    assert asked.mean() == pytest.approx(0.15, abs=0.003)
    assert (seen[~asked] == tokens[~asked]).all() and seen.max() == 1000
    hidden, kept = seen[asked] == 1000, seen[asked] == tokens[asked]
    assert hidden.mean() == pytest.approx(0.8, abs=0.01) and kept.mean() == pytest.approx(0.1, abs=0.01)
    random = seen[asked][~hidden & ~kept]
    assert np.bincount(random, minlength=1000).max() < 20 and 480 < random.mean() < 520
    again, other = masking.corrupt(tokens, 7), masking.corrupt(tokens, 8)
    assert (again[0] == seen).all() and (again[1] == asked).all() and (other[1] != asked).mean() > 0.2
    assert (Masking(4, 0.15, 1000, 1000).corrupt(tokens, 7)[1] != asked).mean() > 0.2


def test_batches_ask_for_hidden_tokens(tmp_path: Path) -> None:
    """Catches targets that are the next token, and a target that attention may not reach dropped although it is its own."""
    mixture = Mixture([Corpus(make_tokens(tmp_path / "tokens"), 1.0, "t")], 16, 1, VOCAB, "all", 0.0, shuffled=True)
    for packing in ("concat", "documents"):
        numbers, masking = [*range(20), -1], Masking(1, 0.5, VOCAB, VOCAB)
        plain, batch = make_batch(mixture, numbers, packing, CPU), make_batch(mixture, numbers, packing, CPU, masking)
        asked = torch.stack([torch.from_numpy(masking.corrupt(row.numpy(), n)[1]) for n, row in zip(numbers, plain.tokens)])
        asked[-1] = False
        assert batch.valid == int(asked.sum()) > 100 and (batch.targets[~asked] == -1).all()
        assert torch.equal(batch.targets[asked], plain.tokens[asked]) and torch.equal(batch.tokens[~asked], plain.tokens[~asked])
        assert (batch.documents is None) == (packing == "concat")


def test_documents_keep_to_themselves() -> None:
    """Catches an encoder that looks into another document, or back only inside its own."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 4, dtype=torch.float64) for _ in range(3))
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]])
    got = attend_all(q, k, v, AttentionMask(False, documents))
    for part in (slice(0, 3), slice(3, 6)):
        torch.testing.assert_close(got[:, :, part], attend_all(q[:, :, part], k[:, :, part], v[:, :, part], None))
    weights = (q[0, 1, 1] @ k[0, 1, :3].t() / 2).softmax(-1)
    torch.testing.assert_close(got[0, 1, 1], weights @ v[0, 1, :3])
    model, tokens = build(Case(tiny(family="encoder")), 1).module, torch.tensor([[3, 1, 4, 1, 5, 9]])
    both = model(tokens, documents=documents)
    torch.testing.assert_close(both, torch.cat((model(tokens[:, :3]), model(tokens[:, 3:])), 1), atol=1e-12, rtol=1e-12)


@pytest.mark.dist
def test_an_encoder_learns_on_any_layout(tmp_path: Path) -> None:
    """Catches masks that depend on ranks or on the moment of a resume, and an encoder that evaluates on what it saw."""
    make_tokens(tmp_path / "tokens")
    changes = {
        "model__family": "encoder",
        "model__vocab_size": VOCAB + 1,
        "model__residual": "deepnorm",
        "data__valid_fraction": 0.2,
        "data__mask_fraction": 0.3,
        "train__eval_every": 3,
        "train__steps": 12,
        "checkpoint__every": 6,
        "optim__lr": 1e-2,
    }
    straight = settings(tmp_path, **changes)
    assert run_ranks(1, run, straight) == [(0, "done")]
    other = tmp_path / "other"
    other.mkdir()
    values = {**settings(other, **changes, parallel__tp=2, parallel__tp_sequence=True), "data": straight["data"]}
    assert {c for c, _ in run_ranks(2, run, values, 5)} == {75}
    assert {c for c, _ in run_ranks(2, run, {**values, "parallel": {"pp": 2}})} == {0}
    assert max(abs(a - b) / b for a, b in zip(losses(other), losses(tmp_path))) <= 1e-12
    valid = [[r["valid_loss"]["tokens"] for r in rows(f) if "valid_loss" in r] for f in (tmp_path, other)]
    assert valid[0] == pytest.approx(valid[1], rel=1e-12) and valid[0][-1] < valid[0][0]


def test_the_mask_needs_a_place_in_the_vocabulary(tmp_path: Path) -> None:
    """Catches a mask that is also a word: the tokenizer's pieces and one more."""
    from megascale.data.tokenizer import train_sentencepiece

    train_sentencepiece([f"word{i} follows word{i * 7 % 50}" for i in range(400)], 280, tmp_path / "tokens.model")
    make_tokens(tmp_path / "tokens")
    values = settings(tmp_path, model__family="encoder", model__vocab_size=None)
    found = resolve_vocabulary(build_config(values)).model.vocab_size
    assert found is not None
    with pytest.raises(UsageError, match=f"vocab_size is {found - 1} .* has {found - 1} pieces and an encoder needs one more"):
        resolve_vocabulary(build_config(settings(tmp_path, model__family="encoder", model__vocab_size=found - 1)))
