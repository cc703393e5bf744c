"""Files of text: read whole or refused, in bounded memory."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megascale.data.forms import form_of
from megascale.data.prepare import sample_texts
from megascale.data.readers import read_blocks
from megascale.data.walk import find_files
from megascale.errors import UsageError


def texts(path: Path) -> list[str]:
    """The documents of a file, their blocks put together."""
    documents, under_way = [], ""
    for block in read_blocks(path, "text"):
        under_way += block.text
        if block.last:
            documents.append(under_way)
            under_way = ""
    assert under_way == ""
    return documents


@given(st.text(st.sampled_from("aé∑🙂\n\r "), min_size=1, max_size=60), st.integers(4, 12))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
def test_blocks_add_up_to_the_file(tmp_path: Path, text: str, size: int) -> None:
    """Catches characters cut in two or lost between blocks, and a document that ends too early or twice."""
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    blocks = list(read_blocks(path, "text", size=size))
    assert "".join(b.text for b in blocks) == text
    assert [b.last for b in blocks] == [False] * (len(blocks) - 1) + [True]
    assert sum(b.read for b in blocks) == path.stat().st_size
    assert not any(b.damaged for b in blocks)


def test_lines_longer_than_a_block_are_cut(tmp_path: Path) -> None:
    """Catches a reader that holds a whole file because it has no line end."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 10_000)
    assert max(len(b.text) for b in read_blocks(path, "text", size=100)) <= 200


def test_several_frames_are_read_to_the_end(tmp_path: Path) -> None:
    """Catches a reader that stops after the first Zstandard frame or gzip member, as parallel packers and `cat` write them."""
    parts = [b"a\n" * 300_000, b"b\n" * 10]
    for end, pack in ((".zst", zstandard.compress), (".gz", gzip.compress)):
        path = tmp_path / f"a.txt{end}"
        path.write_bytes(b"".join(pack(p) for p in parts))
        assert texts(path) == [b"".join(parts).decode()]


@pytest.mark.parametrize("end", [".zst", ".gz"])
def test_packed_files_cut_short_are_refused(tmp_path: Path, end: str) -> None:
    """Catches text that is lost in silence because a download stopped halfway."""
    whole = (zstandard.compress if end == ".zst" else gzip.compress)(bytes(range(1, 128)) * 5000)
    path = tmp_path / f"a.txt{end}"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"a\.txt\.\w+ cannot be read"):
        texts(path)


def test_damage_inside_a_gzip_file_is_refused(tmp_path: Path) -> None:
    """Catches zlib's own error, which is no OSError, as a traceback."""
    whole = bytearray(gzip.compress(bytes(range(128)) * 50))
    whole[20:40] = b"\xff" * 20
    (tmp_path / "a.txt.gz").write_bytes(whole)
    with pytest.raises(UsageError, match="cannot be read"):
        texts(tmp_path / "a.txt.gz")


def test_documents_without_text_are_left_out_everywhere(tmp_path: Path) -> None:
    """Catches formats that count documents differently, and halves of characters that no tokenizer takes."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": ""}\n{"text": "\\ud800b"}\n')
    assert texts(tmp_path / "a.jsonl") == ["a", "�b"]
    assert [b.damaged for b in read_blocks(tmp_path / "a.jsonl", "text")] == [False, True]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "", "b"]}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == ["a", "b"]
    (tmp_path / "a.txt").write_bytes(b"")
    assert texts(tmp_path / "a.txt") == []


def test_bytes_that_are_not_utf8_are_replaced_and_reported(tmp_path: Path) -> None:
    """Catches one odd file that ends hours of work, and damage that nobody hears of."""
    (tmp_path / "a.txt").write_bytes(b"caf\xe9\n")
    block = next(read_blocks(tmp_path / "a.txt", "text"))
    assert (block.text, block.damaged) == ("caf�\n", True)


def test_parquet_columns_that_hold_no_text(tmp_path: Path) -> None:
    """Catches numbers that reach the tokenizer."""
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"row 1: the column 'text' holds int"):
        texts(tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="has the columns text but no 'body'"):
        list(read_blocks(tmp_path / "a.parquet", "body"))


def test_folders_are_sorted_and_exclusions_are_relative(tmp_path: Path) -> None:
    """Catches an order that depends on the disk, and an input that is refused for a folder above it."""
    root = tmp_path / "skip" / "in"
    for name in ("b.py", "sub/a.py", "skip/c.py", "a.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    assert [str(p.relative_to(root)) for p in find_files([root], "*.py", ["skip"])] == ["b.py", "sub/a.py"]
    with pytest.raises(UsageError, match="there is no input"):
        find_files([tmp_path / "none"], "*")
    with pytest.raises(UsageError, match=r"no file that matches --pattern '\*\.rs'"):
        find_files([root], "*.rs")


def test_the_sample_reaches_over_the_whole_input(tmp_path: Path) -> None:
    """Catches a tokenizer that is trained on the first files, or the beginning of the one file, alone."""
    files = []
    for i in range(400):
        files.append(tmp_path / f"{i:03}.txt")
        files[-1].write_text(f"file {i}\n" * 100)
    sample = "".join(sample_texts(files, "text", 40_000))
    found = {int(w) // 40 for w in sample.split() if w.isdigit()}
    assert found == set(range(10)) and 20_000 < len(sample) <= 40_000
    (tmp_path / "one.jsonl").write_text("".join(json.dumps({"text": f"{i} " * 100}) + "\n" for i in range(10_000)))
    passages = list(sample_texts([tmp_path / "one.jsonl"], "text", 20 << 16))
    assert {int(p.split()[0]) // 1000 for p in passages} == set(range(10)) and sum(map(len, passages)) <= 20 << 16


def test_pictures_are_no_text(tmp_path: Path) -> None:
    """Catches a folder's pictures and archives becoming tokens, and packed text taken for one of them."""
    packed = gzip.compress(b"text")
    for name, data, kind in (("a.png", b"\x89PNG\r\n\0\0", "other"), ("b.md", "Größe".encode(), "text"), ("c.txt.gz", packed, "text")):
        (tmp_path / name).write_bytes(data)
        assert form_of(tmp_path / name, ("text",)).kind == kind
