"""Held-out data: whole documents if that gives both parts a sample, else the tail of the tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import typer

from megascale.commands import prepare as prepare_data
from megascale.config.load import load_config
from megascale.data.dataset import Corpus, Mixture
from megascale.data.indexed import TokenWriter
from megascale.data.order import split_documents
from megascale.data.samples import note, open_data
from megascale.data.split import split_source
from megascale.data.vocabulary import resolve_vocabulary
from megascale.errors import UsageError


def write(prefix: Path, lengths: list[int]) -> Corpus:
    """Documents whose tokens count up over the whole file."""
    with TokenWriter(prefix, np.uint16) as writer:
        at = 0
        for length in lengths:
            writer.add(np.arange(at, at + length))
            at += length
    return Corpus(str(prefix), 1.0, prefix.name)


def opened(source: Corpus, part: str, fraction: float = 0.05, seq_len: int = 16) -> Mixture:
    return Mixture([source], seq_len, 1, 65000, part, fraction, shuffled=False)


def read(mixture: Mixture) -> list[int]:
    stream = mixture.streams[0]
    return stream.read(0, len(stream))[0].tolist()


@pytest.mark.parametrize("lengths", [[1000], [990, 10], [0, 1000, 0]])
def test_a_few_documents_are_split_by_tokens(tmp_path: Path, lengths: list[int]) -> None:
    """Catches input.txt, one document, that cannot be trained on with a shipped config since nothing can be held out; and held-out tokens
    that are trained on too, or lost.
    """
    source = write(tmp_path / "x", lengths)
    train, valid = opened(source, "train"), opened(source, "valid")
    assert read(train) == list(range(950)) and read(valid) == list(range(950, 1000))
    assert "the last tokens are held out" in (train.note() or "")
    window = (len(valid.streams[0]) - 1) // 16 - 1
    assert valid.sample(window)[0].tolist() == list(range(950 + window * 16, 950 + window * 16 + 17))


def test_the_held_out_tail_has_at_least_one_sample(tmp_path: Path) -> None:
    """Catches a small file of which the fraction is shorter than a sample, and a training part that is left with less than one."""
    assert len(opened(write(tmp_path / "x", [100]), "valid").streams[0]) == 17
    assert len(opened(write(tmp_path / "y", [34]), "train").streams[0]) == 17
    with pytest.raises(UsageError, match=r"x has 33 tokens .*one sample of train.seq_len 16 needs 17 .*two parts"):
        opened(write(tmp_path / "x", [33]), "valid")
    assert read(opened(write(tmp_path / "x", [33]), "train")) == list(range(33))  # as ever: nobody asked for the other part
    assert len(opened(write(tmp_path / "z", [40]), "train", fraction=0.9).streams[0]) == 17


@pytest.mark.parametrize(("count", "length", "fraction"), [(2, 17, 0.05), (40, 20, 0.05), (1000, 3, 0.02), (30, 17, 0.001)])
def test_what_splits_by_documents_keeps_its_split(tmp_path: Path, count: int, length: int, fraction: float) -> None:
    """Catches another choice for corpora that could be split by documents all along: their losses must not change."""
    source = write(tmp_path / "x", [length] * count)
    parts = [opened(source, part, fraction) for part in ("train", "valid")]
    for mixture, numbers in zip(parts, split_documents(count, fraction)):
        assert mixture.streams[0].documents.tolist() == numbers.tolist() and mixture.note() is None
        assert read(mixture) == [t for d in numbers for t in range(d * length, (d + 1) * length)]


def test_the_split_is_a_function_of_lengths() -> None:
    """Catches a split by tokens where nothing is to be held out, and one that needs int32 for its sums."""
    lengths = np.full(3, 2**30, np.int32)
    assert not split_source(lengths[:1], 0.0, 17).by_tokens
    assert split_source(lengths[:1], 0.5, 17).train.end == 2**29
    assert not split_source(lengths, 0.5, 17).by_tokens


@pytest.mark.parametrize("config", ["configs/llama-1m.yaml", "configs/quickstart.yaml"])
def test_one_text_file_trains_with_a_shipped_config(tmp_path: Path, config: str) -> None:
    """Catches what every newcomer does, input.txt prepared without options and named as data.train, ending in a message."""
    words = ["first", "citizen", "before", "we", "proceed", "any", "further", "hear", "me", "speak"]
    lines = [" ".join(words[(i * j + j) % 10] + str((i * 7 + j) % 13) for j in range(9)) for i in range(400)]
    (tmp_path / "input.txt").write_text("\n".join(lines))
    command = [str(tmp_path / "input.txt"), "--out", str(tmp_path / "mine"), "--workers", "1"]
    typer.main.get_command(prepare_data.app).main(command, standalone_mode=False)
    read = resolve_vocabulary(load_config(config, [f"data.train={tmp_path / 'mine'}"]))
    train, valid = open_data(read)
    assert "the last tokens are held out" in (note(train) or "")
    for samples in (train, valid["mine"]):
        assert isinstance(samples, Mixture) and len(samples.sample(0)[0]) == read.train.seq_len + 1
