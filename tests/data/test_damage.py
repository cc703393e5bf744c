"""The inside of an index and the facts beside it: believed only where they can be true."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from megascale.data import indexed
from megascale.data.dataset import Corpus, Mixture, check_source
from megascale.data.facts import source_facts
from megascale.data.indexed import HEADER, MAGIC, TokenFile, TokenWriter
from megascale.data.megatron_order import draw
from megascale.data.tokenizer import beside, load_tokenizer
from megascale.data.walk import find_files
from megascale.errors import UsageError

DOCUMENTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
LENGTHS, OFFSETS, MARKS = HEADER, HEADER + 4 * 4, HEADER + 12 * 4


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    with TokenWriter(tmp_path / "x", np.uint16) as writer:
        for document in DOCUMENTS:
            writer.add(np.array(document))
    return tmp_path / "x"


def put(prefix: Path, place: int, form: str, *values: int) -> None:
    data = bytearray(Path(f"{prefix}.idx").read_bytes())
    struct.pack_into(form, data, place, *values)
    Path(f"{prefix}.idx").write_bytes(data)


@pytest.mark.parametrize("slab", [1, 3, 1 << 20])
@pytest.mark.parametrize(
    ("place", "form", "values", "words"),
    [
        (LENGTHS + 4, "<i", (-1,), "sequence 1 has -1 tokens"),
        (LENGTHS, "<ii", (4, 0), "sequence 1 begins at byte 6, but those before it end at byte 8"),
        (LENGTHS, "<i", (2**31 - 1,), "sequence 1 begins at byte 6, but those before it end at byte 4294967294"),
        (LENGTHS + 4, "<ii", (-(2**31), 2**31 - 1), "sequence 1 has -2147483648 tokens"),
        (OFFSETS, "<q", (2,), "sequence 0 begins at byte 2"),
        (OFFSETS + 8, "<q", (-6,), "sequence 1 begins at byte -6"),
        (OFFSETS + 16, "<q", (7,), "sequence 2 begins at byte 7, but those before it end at byte 8"),
        (OFFSETS + 16, "<q", (2**40,), "sequence 2 begins at byte 1099511627776"),
        (OFFSETS + 8, "<qq", (8, 6), "sequence 1 begins at byte 8"),
        (MARKS + 8, "<q", (3,), "document 1 begins at sequence 3 and the next at 2"),
        (MARKS + 8, "<q", (-1,), "document 0 begins at sequence 0 and the next at -1"),
        (MARKS + 24, "<q", (2**62,), "document 3 begins at sequence 4611686018427387904 and the next at 4"),
        (MARKS, "<q", (1,), "documents that reach over 1 to 4"),
        (len(MAGIC) + 8, "<B", (7,), "holds float32, but tokens are integers"),
    ],
)
def test_an_index_that_cannot_be_true_is_refused(
    prefix: Path, place: int, form: str, values: tuple[int, ...], words: str, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches other tokens, cut documents or an IndexError where an index is believed, wherever the slabs of the check begin."""
    monkeypatch.setattr(indexed, "SLAB", slab)
    file = TokenFile(prefix)
    assert [file.read(i).tolist() for i in range(len(file))] == DOCUMENTS
    del file
    put(prefix, place, form, *values)
    with pytest.raises(UsageError, match=words):
        TokenFile(prefix)


def test_a_multimodal_index_is_read_where_all_is_text(prefix: Path) -> None:
    """Catches the files of Megatron's multimodal writer called truncated, and pictures taken for tokens."""
    index = Path(f"{prefix}.idx").read_bytes()
    Path(f"{prefix}.idx").write_bytes(index + bytes(4))
    file = TokenFile(prefix)
    assert [file.read(i).tolist() for i in range(len(file))] == DOCUMENTS
    del file
    Path(f"{prefix}.idx").write_bytes(index + b"\0\0\1\0")
    with pytest.raises(UsageError, match="sequence 2 is of mode 1"):
        TokenFile(prefix)


def test_tokens_below_zero_are_refused(tmp_path: Path) -> None:
    """Catches an IndexError deep in the embedding, or its last row taken."""
    with TokenWriter(tmp_path / "x", np.int32) as writer:
        writer.add(np.array([1, 2, -3, 4, 5]))
    with pytest.raises(UsageError, match="holds token -3, but token ids start at 0"):
        Mixture([Corpus(str(tmp_path / "x"), 1.0, "x")], 4, 1, 10, "all", 0.0, shuffled=False).sample(0)


def test_an_order_of_megatron_is_bounded() -> None:
    """Catches gigabytes for an order over millions of empty documents."""
    lengths = np.zeros(100_000, np.int32)
    lengths[0] = 20
    with pytest.raises(UsageError, match="keeps every document of every epoch in memory"):
        draw(lengths, np.arange(100_000, dtype=np.int32), 16, 1_000_000, 1, "x")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"unigram_entropy": "x"}', r"unigram_entropy is 'x', and a finite number is needed"),
        ('{"unigram_entropy": NaN}', r"unigram_entropy is 'nan'"),
        ('{"vocab_size": 1e400}', r"vocab_size is 'inf', and a number of pieces is needed"),
        ('{"vocab_size": true}', r"vocab_size is 'True'"),
        ('{"vocab_size": 0}', r"vocab_size is '0'"),
        ('{"eos_id": -1}', r"eos_id is '-1', and the number of a piece is needed"),
        ('{"tokenizer_fingerprint": [1]}', r"tokenizer_fingerprint is '\[1\]', and text is needed"),
        ('{"run_length": 2.5}', r"run_length is '2.5'"),
        ('{"mean": ["a"]}', r"mean is .*a list of finite numbers is needed"),
        ('{"vocab_size": ' + "9" * 5000 + "}", r"x\.json (cannot be read|: vocab_size)"),
        ("[" * 100_000, r"x\.json is nested too deeply"),
        ("[1]", r"x\.json holds a list, not an object"),
        ("{", r"x\.json cannot be read"),
        ("\udcff", r"x\.json cannot be read"),
    ],
)
def test_facts_that_cannot_be_used_are_named(tmp_path: Path, content: str, words: str) -> None:
    """Catches tracebacks in the middle of a start for a PREFIX.json written by hand or by something else."""
    (tmp_path / "x.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match=words):
        check_source(Corpus(str(tmp_path / "x"), 1.0, "x"), 100)


def test_facts_that_are_absent_are_no_mistake(tmp_path: Path) -> None:
    """Catches token files from elsewhere, or with nulls for what is not known, that are refused; and a folder under the name."""
    assert source_facts(str(tmp_path / "none")) == {}
    (tmp_path / "x.json").write_text(json.dumps({"vocab_size": 7, "unigram_entropy": None, "more": {"a": 1}}))
    assert source_facts(str(tmp_path / "x")) == {"vocab_size": 7, "more": {"a": 1}}
    (tmp_path / "y.json").mkdir()
    with pytest.raises(UsageError, match=r"y\.json is not a file"):
        source_facts(str(tmp_path / "y"))


@pytest.mark.parametrize("prefix", ["x" * 300, "a\0b", "y/" * 3000, "\ud800"])
def test_what_can_be_no_path_is_a_file_that_is_not_there(prefix: str) -> None:
    """Catches tracebacks of the system for names that no file can have."""
    with pytest.raises(UsageError, match="there is no token file"):
        TokenFile(prefix)
    with pytest.raises(UsageError, match="there is no tokenizer"):
        load_tokenizer(prefix)
    with pytest.raises(UsageError, match="there is no input"):
        find_files([Path(prefix)], "*")
    assert beside(prefix) is None
