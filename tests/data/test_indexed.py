"""Token files: Megatron's bytes, and damage noticed."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megascale.data.indexed import TokenFile, TokenWriter, token_dtype
from megascale.errors import UsageError

documents = st.lists(st.lists(st.integers(0, 60000), min_size=1, max_size=20), min_size=1, max_size=8)


def write(prefix: Path, docs: list[list[int]], vocab: int = 65000) -> None:
    with TokenWriter(prefix, token_dtype(vocab)) as writer:
        for doc in docs:
            writer.add(np.array(doc))


def by_hand(docs: list[list[int]], code: int, form: str) -> tuple[bytes, bytes]:
    """The format written with nothing but struct."""
    width = struct.calcsize(form)
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(docs), len(docs) + 1)
    lengths = b"".join(struct.pack("<i", len(d)) for d in docs)
    offsets, at = b"", 0
    for d in docs:
        offsets += struct.pack("<q", at)
        at += len(d) * width
    marks = b"".join(struct.pack("<q", i) for i in range(len(docs) + 1))
    return b"".join(struct.pack("<" + form, t) for d in docs for t in d), head + lengths + offsets + marks


@given(documents, st.sampled_from([(65000, 8, "H"), (70000, 4, "i")]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
def test_bytes_and_round_trip(tmp_path: Path, docs: list[list[int]], kind: tuple[int, int, str]) -> None:
    """Catches any byte that differs from the format, and a reader that reads other tokens than were written."""
    vocab, code, form = kind
    write(tmp_path / "x", docs, vocab)
    assert ((tmp_path / "x.bin").read_bytes(), (tmp_path / "x.idx").read_bytes()) == by_hand(docs, code, form)
    file = TokenFile(tmp_path / "x")
    assert [file.read(i).tolist() for i in range(len(file))] == docs


def test_bytes_of_megatron_core(tmp_path: Path) -> None:
    """Catches a misreading of the format that our writer and our reference share."""
    builder = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="needs megatron-core: pip install '.[megatron]'")
    docs = [[1, 2, 3], [4, 5, 6, 7, 8], [5, 6]]
    theirs = builder.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.uint16)
    import torch

    for doc in docs:
        theirs.add_document(torch.tensor(doc), [3, len(doc) - 3] if len(doc) > 3 else [len(doc)])
    theirs.finalize(str(tmp_path / "m.idx"))
    with TokenWriter(tmp_path / "x", np.uint16, longest=3) as writer:
        for doc in docs:
            writer.add(np.array(doc))
    for end in ("bin", "idx"):
        assert (tmp_path / f"x.{end}").read_bytes() == (tmp_path / f"m.{end}").read_bytes()


@given(documents, st.integers(1, 5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
def test_documents_of_several_sequences(tmp_path: Path, docs: list[list[int]], longest: int) -> None:
    """Catches sequences taken for documents, in long documents and in files that Megatron's tools cut into sentences."""
    with TokenWriter(tmp_path / "x", np.uint16, longest) as writer:
        for doc in docs:
            for token in doc:
                writer.extend(np.array([token]))
            writer.end_document()
    file = TokenFile(tmp_path / "x")
    assert [file.read(i).tolist() for i in range(len(file))] == docs
    assert file.lengths.tolist() == [len(d) for d in docs]
    assert struct.unpack_from("<Q", (tmp_path / "x.idx").read_bytes(), 18)[0] == sum(-(-len(d) // longest) for d in docs)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: (p / "x.bin").unlink(), "no token file"),
        (lambda p: (p / "x.idx").unlink(), "no token file"),
        (lambda p: (p / "x.bin").write_bytes(b"12"), "2 bytes but its index needs 8: it is truncated"),
        (lambda p: (p / "x.bin").write_bytes(bytes(9)), "9 bytes but its index needs 8: they do not belong together"),
        (lambda p: (p / "x.idx").write_bytes((p / "x.idx").read_bytes()[:20]), "not a token index"),
        (
            lambda p: (p / "x.idx").write_bytes((p / "x.idx").read_bytes()[:-8] + bytes(8)),
            "2 sequences and documents that reach over 0 to 0",
        ),
        (lambda p: (p / "x.idx").write_bytes((p / "x.idx").read_bytes()[:-3]), "truncated"),
        (lambda p: (p / "x.idx").write_bytes(b"PK" + bytes(60)), "not a token index"),
        (lambda p: (p / "x.idx").write_bytes(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 2, 8, 0, 1)), "version 2"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: object, words: str) -> None:
    """Catches silent reading of files that were cut short by a full disk or a broken copy."""
    write(tmp_path / "x", [[1, 2, 3], [4]])
    damage(tmp_path)  # type: ignore[operator]
    with pytest.raises(UsageError, match=words):
        TokenFile(tmp_path / "x")


def test_a_file_that_cannot_be_mapped_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches "a file: Too many open files", which numpy makes of the fortieth source."""
    write(tmp_path / "t", [[1, 2]])
    monkeypatch.setattr(np, "memmap", lambda *a, **k: (_ for _ in ()).throw(OSError(24, "Too many open files")))
    with pytest.raises(OSError, match=r"Too many open files: '.*t.idx'"):
        TokenFile(tmp_path / "t")


def test_nothing_appears_when_writing_fails(tmp_path: Path) -> None:
    """Catches half-written files under their final names."""

    def interrupted() -> None:
        with TokenWriter(tmp_path / "x", np.uint16) as writer:
            writer.add(np.array([1]))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "x", [[1, 2]])
    before = [(tmp_path / f"x.{end}").read_bytes() for end in ("bin", "idx")]
    with pytest.raises(RuntimeError):
        interrupted()
    assert [(tmp_path / f"x.{end}").read_bytes() for end in ("bin", "idx")] == before
    assert len(list(tmp_path.iterdir())) == 2


def test_no_documents(tmp_path: Path) -> None:
    """Catches a crash on empty arrays."""
    write(tmp_path / "x", [])
    assert len(TokenFile(tmp_path / "x")) == 0
