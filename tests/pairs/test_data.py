"""Pairs from text to batches: what is prepared, what a sample is, what span corruption hides; and every mistake as one sentence."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer

from megascale.commands import prepare as prepare_data
from megascale.config.load import build_config
from megascale.config.spans import SENTINELS, longest_window, spans_of
from megascale.data.aligned import read_pairs
from megascale.data.dataset import Corpus, Mixture
from megascale.data.indexed import TokenFile, TokenWriter
from megascale.data.pairs import PairMixture, SpanMixture, pair_batch
from megascale.data.samples import note, open_data
from megascale.data.spans import Corruption, cut_up
from megascale.data.tokenizer import load_tokenizer, train_sentencepiece
from megascale.data.vocabulary import end_token, resolve_vocabulary
from megascale.errors import UsageError
from tests.layouts import CPU
from tests.pairs.files import END, VOCAB, make_pairs, pair_settings

WORDS = [
    a + b + c for a in ("re", "un", "pre", "out") for b in ("read", "writ", "mark", "siz", "dat", "pag") for c in ("ing", "er", "able", "s")
]
SOURCES = [f"{WORDS[i * 7 % 96]} the {WORDS[i * 13 % 96]} of {WORDS[i * 29 % 96]} {i}" for i in range(200)]
TARGETS = [s.replace(" ", "_").upper() for s in SOURCES]


def prepared(*args: str) -> None:
    """tools/prepare_data.py in this process."""
    app = typer.main.get_command(prepare_data.app)
    size = [] if "--tokenizer" in args else ["--vocab-size", "312"]
    app.main(["--workers", "1", *size, *args], standalone_mode=False)


def write_lines(path: Path, lines: list[str]) -> str:
    data = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def text_of(prefix: str, side: str, number: int) -> str:
    tokenizer, file = load_tokenizer(f"{prefix}.{side}.model"), TokenFile(f"{prefix}.{side}")
    tokens = file.read(number)
    assert tokens[-1] == tokenizer.eos_id
    return tokenizer.decode(tokens[:-1])


@pytest.mark.parametrize("kind", ["lines", "jsonl", "separate"])
def test_pairs_keep_together(tmp_path: Path, kind: str) -> None:
    """Catches sides that lose step after a pair with an empty side, and two vocabularies where one was asked for."""
    out, sources, targets = str(tmp_path / "p"), list(SOURCES), list(TARGETS)
    sources[3], targets[5] = " ", ""
    if kind == "jsonl":
        rows = [json.dumps({"en": a, "de": b}) for a, b in zip(sources, targets)]
        prepared(write_lines(tmp_path / "a.jsonl.gz", rows), "--pairs", "--source-key", "en", "--target-key", "de", "--out", out)
    else:
        files = write_lines(tmp_path / "a.txt", sources), write_lines(tmp_path / "b.txt.gz", targets)
        prepared(*files, "--pairs", "--out", out, *(["--separate"] if kind == "separate" else []))
    kept = [i for i in range(len(SOURCES)) if i not in (3, 5)]
    for number, line in enumerate(kept):
        assert text_of(out, "source", number) == SOURCES[line] and text_of(out, "target", number) == TARGETS[line]
    assert len(TokenFile(out + ".source")) == len(TokenFile(out + ".target")) == len(kept)
    models = [Path(f"{out}.{side}.model").read_bytes() for side in ("source", "target")]
    assert (models[0] == models[1]) == (kind != "separate")


def test_mistakes_in_pairs(tmp_path: Path) -> None:
    """Catches tracebacks, half of a result, and messages without the file, the line and the fix."""
    short, long = write_lines(tmp_path / "a.txt", SOURCES[:5]), write_lines(tmp_path / "b.txt", TARGETS[:6])
    out = str(tmp_path / "p")
    train_sentencepiece(SOURCES, 312, tmp_path / "t.model")
    with pytest.raises(UsageError, match=r"a.txt ends before line 6 but .*b.txt does not"):
        prepared(short, long, "--pairs", "--out", out, "--tokenizer", str(tmp_path / "t.model"))
    with pytest.raises(UsageError, match="1 text files were given, but pairs are the lines of two"):
        list(read_pairs([Path(short)], 0, ("source", "target")))
    rows = write_lines(tmp_path / "c.jsonl", ['{"source": "a"}'])
    with pytest.raises(UsageError, match=r"c.jsonl is JSONL but .*a.txt is not"):
        list(read_pairs([Path(short), Path(rows)], 0, ("source", "target")))
    with pytest.raises(UsageError, match="line 1: no JSON object with the key 'target'"):
        list(read_pairs([Path(rows)], 0, ("source", "target")))
    with pytest.raises(UsageError, match="--separate and --source-tokenizer are for sources"):
        prepared(short, "--separate", "--out", out)
    assert not list(tmp_path.glob("p*"))


def mixture(prefix: str, part: str = "all", **changes: Any) -> PairMixture:
    values: dict[str, Any] = {
        "lengths": (10, 12),
        "seed": 3,
        "vocab_sizes": (VOCAB, VOCAB),
        "start": END,
        "valid_fraction": 0.0,
        "shuffled": True,
    }
    return PairMixture([Corpus(prefix, 1.0, "p")], part=part, **{**values, **changes})


def test_what_a_sample_is(tmp_path: Path) -> None:
    """Catches targets that the decoder sees before it is asked, a source of another pair, padding that counts, and an epoch that repeats
    or leaves out a pair.
    """
    pairs = mixture(make_pairs(tmp_path / "p"))
    batch = pairs.batch([5, -1, 9], CPU)
    source, target = pairs.pair(5)
    assert source[-1] == target[-1] == END and (((source[-2::-1] - 1) % (VOCAB - 2) + 2) == target[:-1]).all()
    n = len(target)
    assert batch.source is not None and batch.source[0].tolist() == [*source, *[-1] * (10 - len(source))]
    assert batch.targets[0].tolist() == [*target, *[-1] * (12 - n)] and batch.tokens[0, :n].tolist() == [END, *target[:-1]]
    assert (batch.source[1] == -1).all() and (batch.targets[1] == -1).all() and batch.valid == n + len(pairs.pair(9)[1])
    assert batch.tokens.min() >= 0 and batch.samples.tolist() == [5, -1, 9]
    epochs = [sorted(tuple(pairs.pair(n)[0]) for n in range(80 * e, 80 * e + 80)) for e in (0, 1)]
    assert epochs[0] == epochs[1] == sorted(tuple(TokenFile(str(tmp_path / "p.source")).read(i)) for i in range(80))
    assert [tuple(pairs.pair(n)[0]) for n in range(80)] != [tuple(pairs.pair(n)[0]) for n in range(80, 160)]


def test_long_pairs_are_left_out_and_said(tmp_path: Path) -> None:
    """Catches half a target that is trained as a whole one, and pairs that vanish without a word."""
    pairs = mixture(make_pairs(tmp_path / "p"), lengths=(10, 6))
    assert 0 < len(pairs.files[0]) < 80 and max(len(pairs.pair(n)[1]) for n in range(80)) == 6
    left = 80 - len(pairs.files[0])
    assert note(pairs) == f"{left} of 80 pairs are empty or do not fit into train.source_len 10 and train.seq_len 6: left out"
    assert note(mixture(make_pairs(tmp_path / "p"))) is None
    with pytest.raises(UsageError, match=r"80 pairs in its all part but none fits into train.source_len 1 and train.seq_len 6"):
        mixture(str(tmp_path / "p"), lengths=(1, 6))


def test_sides_that_do_not_belong_together(tmp_path: Path) -> None:
    """Catches a file of one side beside that of another text, and a token that its table has no row for."""
    prefix = make_pairs(tmp_path / "p")
    with pytest.raises(UsageError, match=r"was made with a vocabulary of 40, and model.vocab_size is 30"):
        mixture(prefix, vocab_sizes=(30, VOCAB))
    Path(prefix + ".source.json").unlink()
    with pytest.raises(UsageError, match=r"p.source holds token \d+ but model.vocab_size is 30"):
        [mixture(prefix, vocab_sizes=(30, VOCAB)).pair(n) for n in range(80)]
    with TokenWriter(prefix + ".source", np.uint16) as writer:
        writer.add(np.array([3, END]))
    with pytest.raises(UsageError, match=r"p.source has 1 documents and .*p.target has 80"):
        mixture(prefix)
    with pytest.raises(UsageError, match=r"there is no token file .*nowhere.source.idx"):
        mixture(str(tmp_path / "nowhere"))


def test_vocabularies_of_two_sides(tmp_path: Path) -> None:
    """Catches sources counted with the targets' vocabulary, and marks of spans without rows."""
    files = write_lines(tmp_path / "a.txt", SOURCES), write_lines(tmp_path / "b.txt", TARGETS)
    prepared(*files, "--pairs", "--separate", "--out", str(tmp_path / "p"))
    prepared(*files, "--pairs", "--out", str(tmp_path / "q"), "--vocab-size", "330")

    def model(**changes: Any) -> Any:
        return resolve_vocabulary(build_config(pair_settings(tmp_path, model__vocab_size=None, **changes))).model

    assert model(data__train=str(tmp_path / "q")).vocab_size == 330
    found = model(data__train=str(tmp_path / "p"), model__share_embeddings=False)
    assert (found.vocab_size, found.source_vocab_size) == (312, 312)
    spans = {"data__train": str(tmp_path / "q.source"), "data__objective": "span_corruption", "train__source_len": 20}
    assert model(**spans).vocab_size == 330 + SENTINELS
    with pytest.raises(
        UsageError, match=r"vocab_size is 340 but the tokenizer .* has 330 pieces and span corruption needs 100 more for its marks"
    ):
        resolve_vocabulary(build_config(pair_settings(tmp_path, **spans, model__vocab_size=340)))
    with pytest.raises(UsageError, match=r"model.source_vocab_size is 20 but the tokenizer .*p.source.model has 312"):
        model(data__train=str(tmp_path / "p"), model__share_embeddings=False, model__source_vocab_size=20)


def test_the_end_token_is_known_or_asked_for(tmp_path: Path) -> None:
    """Catches a decoder that begins with a token of its own choice."""
    prefix = make_pairs(tmp_path / "p")
    config = build_config(pair_settings(tmp_path, data__train=prefix))
    assert end_token(config) == END
    Path(prefix + ".target.json").unlink()
    with pytest.raises(UsageError, match=r"no file of .*p.target says which token ends a text: set data.tokenizer"):
        end_token(config)


# Span corruption


def test_published_sizes() -> None:
    """Catches T5's arithmetic done otherwise: 512 tokens of source come from 568 of text, and make 114 of target."""
    spans = longest_window(512, 0.15, 3.0)
    assert spans == spans_of(568, 0.15, 3.0)
    assert spans is not None and (spans.source, spans.target, spans.hidden, spans.spans) == (512, 114, 85, 28)
    assert longest_window(2, 0.15, 3.0) is None
    for source_len in range(3, 60):
        for fraction in (0.05, 0.15, 0.5, 0.9):
            found = longest_window(source_len, fraction, 3.0)
            assert found is not None and found.source <= source_len < spans_of(found.tokens + 1, fraction, 3.0).source
            assert 1 <= found.spans <= min(found.hidden, found.tokens - found.hidden)


def joined(source: np.ndarray, target: np.ndarray, first_mark: int) -> list[int]:
    """The text again: each mark of the source replaced by what follows it in the target."""
    hidden: dict[int, list[int]] = {}
    for token in target[:-1]:
        if token >= first_mark:
            hidden[int(token)] = []
        else:
            hidden[next(reversed(hidden))].append(int(token))
    return [x for token in source[:-1] for x in (hidden[int(token)] if token >= first_mark else [int(token)])]


def test_source_and_target_make_the_text() -> None:
    """Catches a token lost or told twice, marks in another order than T5's, and gaps that do not follow seed and sample alone."""
    sizes, vocab = spans_of(60, 0.3, 2.5), 130
    corruption = Corruption(5, sizes, vocab, END)
    text = np.random.default_rng(1).integers(2, 30, 60)
    places = np.zeros(60)
    for sample in range(200):
        source, target = corruption.corrupt(text, sample)
        assert len(source) == sizes.source and len(target) == sizes.target and source[-1] == target[-1] == END
        marks = [int(t) for t in source if t >= 30]
        assert marks == [129 - i for i in range(sizes.spans)] == [int(t) for t in target if t >= 30]
        assert joined(source, target, 30) == text.tolist()
        shown = np.zeros(60, bool)
        at = 0
        for token in source[:-1]:
            if token >= 30:
                at += next(len(run) for mark, run in runs_of(target) if mark == token)
            else:
                shown[at] = True
                at += 1
        places += ~shown
    assert (places[5:55] > 20).all(), "gaps come everywhere"
    again = corruption.corrupt(text, 7)
    assert all((a == b).all() for a, b in zip(again, Corruption(5, sizes, vocab, END).corrupt(text, 7)))
    assert any((a != b).any() for a, b in zip(again, Corruption(6, sizes, vocab, END).corrupt(text, 7)))


def runs_of(target: np.ndarray) -> list[tuple[int, list[int]]]:
    found: list[tuple[int, list[int]]] = []
    for token in target[:-1]:
        if token >= 30:
            found.append((int(token), []))
        else:
            found[-1][1].append(int(token))
    return found


def test_cuts_are_even() -> None:
    """Catches lengths of zero, and a cut that prefers some lengths: four tokens in two parts are 1+3, 2+2 and 3+1 equally often."""
    found = [tuple(cut_up(4, 2, np.uint64(7919 * i))) for i in range(3000)]
    counts = [found.count(x) for x in ((1, 3), (2, 2), (3, 1))]
    assert sum(counts) == 3000 and min(counts) > 900
    assert cut_up(1, 1, np.uint64(3)).tolist() == [1] and cut_up(5, 5, np.uint64(3)).tolist() == [1] * 5


def test_windows_of_a_text(tmp_path: Path) -> None:
    """Catches a window that is longer or shorter than the sizes say, and text without rows for its marks."""
    prefix = make_pairs(tmp_path / "p") + ".source"
    values = pair_settings(tmp_path, data__train=prefix, data__objective="span_corruption", model__vocab_size=140)
    samples, _ = open_data(build_config(values))
    assert isinstance(samples, SpanMixture) and isinstance(samples.text, Mixture)
    sizes = samples.corruption.sizes
    source, target = samples.pair(4)
    assert joined(source, target, 40) == samples.text.sample(4)[0][: sizes.tokens].tolist()
    batch = samples.batch([4, -1], CPU)
    assert torch.equal(batch.targets[0][: len(target)], torch.from_numpy(target)) and batch.valid == sizes.target
    given = build_config({**values, "data": {**values["data"], "mark_token": 137, "start_token": 0}})
    other, _ = open_data(given)
    assert isinstance(other, SpanMixture)
    got = other.batch([4], CPU)
    assert got.tokens[0, 0] == 0 and got.targets[0, 0] == 137 == batch.targets[0, 0] - 2 and batch.tokens[0, 0] == END
    for changes, words in (({"mark_token": 99}, "leave no token for text"), ({"start_token": 140}, "start_token is 140 but the voc")):
        with pytest.raises(UsageError, match=words):
            resolve_vocabulary(build_config({**values, "data": {**values["data"], **changes}}))
    same = pair_batch([(source, target)], [4], (10, 12), END, CPU)
    assert same.source is not None and batch.source is not None and torch.equal(same.source[0], batch.source[0])
