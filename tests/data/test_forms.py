"""Detection of file kinds, and one rule for nulls, byte-order marks and damage in all of them."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megascale.data.forms import form_of
from megascale.data.readers import Tally, read_blocks
from megascale.errors import UsageError
from tests.data.test_readers import texts

INPUTS = Path(__file__).parent / "inputs"
DOCUMENTS = ["hello world", "second line"]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst", ".ZST", ".xz", ".bz2", ".renamed"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.JSONL", "a.jsonlines", "a.jl", "a.ndjson", "part-00000", "a.txt"])
def test_json_lines_under_any_name_and_packing(tmp_path: Path, name: str, ending: str) -> None:
    """Catches braces, keys and addresses as text, for the name that C4, Dolma or Spark give their files."""
    pack = {".gz": gzip.compress, ".zst": zstandard.compress, ".ZST": zstandard.compress, ".xz": lzma.compress, ".bz2": bz2.compress}
    pack[".renamed"] = gzip.compress
    path = tmp_path / (name + ("" if ending == ".renamed" else ending))
    path.write_bytes(pack.get(ending, bytes)((INPUTS / "a.json").read_bytes()))
    assert texts(path) == DOCUMENTS
    assert form_of(path, ("text",)).unusual == (name in ("part-00000", "a.txt"))


def test_text_that_only_begins_like_json_is_text(tmp_path: Path) -> None:
    """Catches source code and configurations under other endings taken for JSON lines."""
    for name, content in (("a.txt", '{"text": 1,\n"b": 2}\n'), ("b.md", '{"body": "a"}\n'), ("c.py", "{1, 2}\n"), ("d.txt", '["text"]\n')):
        (tmp_path / name).write_text(content)
        assert texts(tmp_path / name) == [content]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b'{\n "text": "a"\n}\n', r"JSON over several lines.*jq -c \. FILE"),
        ("a.json", b'[{"text": "a"}]', r"is a JSON array.*jq -c '\.\[\]' FILE"),
        ("a.jsonl", b'\xef\xbb\xbf [{"text": "a"},\n{"text": "b"}]', "is a JSON array"),
        ("a.json", b"3\n", "is not JSON lines"),
        ("a.json", b'{"body": "a"}\n', "with the keys body but no 'text': name the key with --text-key"),
        ("a.csv", b"text,url\na,b\n", "is CSV: make JSON lines"),
        ("a.TSV.gz", gzip.compress(b"text\turl\n", mtime=0), "is TSV: make JSON lines"),
        ("a.pdf", b"%PDF-1.4", "is a PDF"),
        ("a.docx", b"PK\x03\x04abc", "is a zip archive or an office document"),
        ("a.txt", "größe".encode("utf-16"), "is UTF-16: convert it with iconv -f UTF-16 -t UTF-8"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-32"), "is UTF-32"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16-le"), "it has zero bytes.*iconv -f UTF-16"),
        ("a.txt.gz", gzip.compress("größe".encode("utf-16-le"), mtime=0), "it has zero bytes"),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0), "is packed Parquet"),
        ("a.idx", b"MMIDIDX\x00\x00", "is an index of token files"),
    ],
)
def test_other_kinds_are_named_with_the_fix(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    """Catches tables, archives and other encodings as tokens."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=rf"{name} .*{words}"):
        texts(tmp_path / name)


def test_archives_are_named(tmp_path: Path) -> None:
    """Catches thousands of tokens of tar headers, also where the name says nothing of it."""
    for name in ("a.tar.gz", "a.tgz", "a.txt.gz", "a"):
        shutil.copy(INPUTS / "a.tar.gz", tmp_path / name)
        with pytest.raises(UsageError, match="is a tar archive: unpack it"):
            texts(tmp_path / name)


def test_pipes_are_refused_at_once(tmp_path: Path) -> None:
    """Catches a preparation that waits for ever for somebody to write into a pipe."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("needs named pipes")
    os.mkfifo(tmp_path / "a.txt")
    for path in (tmp_path / "a.txt", Path("/dev/zero")):
        if path.exists():
            with pytest.raises(UsageError, match="is not a file but a pipe, a device"):
                texts(path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ctrl.jsonl", r"line 1: no JSON object: a string contains a raw control character, where \\t"),
        ("bigint.jsonl", r"line 1: it holds a number of more digits than Python reads"),
        ("array.jsonl", "is a JSON array"),
        ("nulltail.jsonl", r"line 3: no JSON object: it has zero bytes, as a crash or a full disk leaves them"),
        ("trail.jsonl.gz", "cannot be read: bytes follow its last gzip member"),
    ],
)
def test_messages_say_what_is_wrong(name: str, words: str) -> None:
    """Catches one message for everything, which sends people looking for a key that is there."""
    with pytest.raises(UsageError, match=rf"{name}.*{words}"):
        texts(INPUTS / name)


def test_lines_that_are_no_object(tmp_path: Path) -> None:
    """Catches a message that does not say where, or a traceback for a value that has no keys."""
    for line, words in (
        ('["a"]', "no JSON object but an array"),
        ("3", "no JSON object but a int"),
        ('{"text": "b"} {"text": "c"}', "something follows its value"),
        ('{"text": "b"', "no JSON object: Expecting"),
        ('{"a": {"text": "b"}}', r"with the key 'text', it has a; name the key with --text-key"),
        ('{"text": ["b"]}', "'text' is a list"),
        ("[" * 100_000, "nested too deeply"),
    ):
        (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line + "\n")
        with pytest.raises(UsageError, match=f"a.jsonl, line 2: .*{words}"):
            texts(tmp_path / "a.jsonl")


def test_long_windows_of_zstandard_are_read() -> None:
    """Catches the dumps of Pushshift refused, with advice to copy them again."""
    assert len(texts(INPUTS / "long28.jsonl.zst")) == 10


def test_one_rule_for_nulls_marks_and_damage(tmp_path: Path) -> None:
    """Catches one null that ends a run of hours in one format and passes in another, marks that become tokens, and damage that is an error
    in one format and replaced in another.
    """
    values = [b"a", None, b"\xef\xbb\xbfb", b"", b"\xef\xbb\xbf", b"caf\xe9"]
    wanted = ["a", "b", "caf\ufffd"]
    column = pyarrow.array(values, pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    lines = [b'{"text": ' + (b"null" if v is None else b'"' + v + b'"') + b"}\n" for v in values]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    for name in ("a.parquet", "a.jsonl"):
        tally = Tally()
        blocks = list(read_blocks(tmp_path / name, "text", tally=tally))
        assert [b.text for b in blocks] == wanted and [b.damaged for b in blocks] == [False, False, True]
        assert tally == Tally(nulls=1, marks=2)
    tally = Tally()
    for i, value in enumerate(v for v in values if v is not None):
        (tmp_path / f"{i}.txt").write_bytes(value)
    found = [b for i in range(5) for b in read_blocks(tmp_path / f"{i}.txt", "text", tally=tally)]
    assert [b.text for b in found] == wanted and tally == Tally(marks=2)
    tally = Tally()
    assert [b.text for b in read_blocks(INPUTS / "bom.jsonl", "text", tally=tally)] == DOCUMENTS and tally.marks == 1
    assert len(list(read_blocks(INPUTS / "badutf8.parquet", "text"))) == 2


def test_a_mark_is_dropped_where_a_document_begins_only(tmp_path: Path) -> None:
    """Catches marks taken out of the middle of a long text, where they are characters, wherever its blocks begin."""
    (tmp_path / "a.txt").write_text("\ufeffa\n\ufeffb\n\ufeffc\n")
    assert "".join(b.text for b in read_blocks(tmp_path / "a.txt", "text", size=5)) == "a\n\ufeffb\n\ufeffc\n"


def test_nested_keys(tmp_path: Path) -> None:
    """Catches a text below another key that cannot be named, and a name with a dot in it that no longer can."""
    (tmp_path / "a.jsonl").write_text('{"meta": {"text": "a"}}\n{"meta.text": "b", "meta": {"text": "c"}}\n{"meta": {"text": null}}\n')
    assert [b.text for b in read_blocks(tmp_path / "a.jsonl", "meta.text")] == ["a", "b"]
    with pytest.raises(UsageError, match=r"no JSON object with the key 'meta\.body'"):
        list(read_blocks(tmp_path / "a.jsonl", "meta.body"))
    assert [b.text for b in read_blocks(INPUTS / "nested.parquet", "meta.text")]
    with pytest.raises(UsageError, match=r"the column 'meta' holds struct.*name a part of it, such as meta\.text"):
        list(read_blocks(INPUTS / "nested.parquet", "meta"))
    pyarrow.parquet.write_table(pyarrow.table({"a.b": ["x"], "l": [["x"]], "s": [None]}), tmp_path / "a.pq")
    assert [b.text for b in read_blocks(tmp_path / "a.pq", "a.b")] == ["x"]
    assert list(read_blocks(tmp_path / "a.pq", "s")) == []
    for key in ("l", "l.list.element"):
        with pytest.raises(UsageError, match="holds list"):
            list(read_blocks(tmp_path / "a.pq", key))


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary", "string_view", "nested", "nested_dictionary"])
@pytest.mark.parametrize("coded", [True, False])
def test_every_kind_of_string_column(tmp_path: Path, kind: str, coded: bool) -> None:
    """Catches a type of text, or a way to store it, that is refused, reordered or loses its nulls."""
    values = ["a", None, "ü", "a", "", "b" * 300] * 100
    column = pyarrow.array(values)
    if kind == "string_view" and not hasattr(pyarrow, "string_view"):
        pytest.skip("needs a pyarrow with string_view")
    if kind in ("large_string", "string_view"):
        column = column.cast(getattr(pyarrow, kind)())
    if kind.endswith("dictionary"):
        column = column.dictionary_encode()
    key = "text"
    if kind.startswith("nested"):
        column, key = pyarrow.StructArray.from_arrays([column], ["text"]), "meta.text"
    name = key.split(".")[0]
    path = tmp_path / "A.PARQUET"
    pyarrow.parquet.write_table(pyarrow.table({name: column}), path, use_dictionary=coded, row_group_size=250)
    assert [b.text for b in read_blocks(path, key)] == [v for v in values if v]


def test_a_long_line_is_refused_before_it_is_in_memory(tmp_path: Path) -> None:
    """Catches a packed file of some kilobytes whose one line takes gigabytes."""
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "' + b"b" * 5000 + b'"}\n'))
    assert [len(b.text) for b in read_blocks(tmp_path / "a.jsonl.gz", "text")] == [1, 5000]
    with pytest.raises(UsageError, match=r"a\.jsonl\.gz, line 2 has more than 1000 bytes: split it, or raise --longest-line"):
        list(read_blocks(tmp_path / "a.jsonl.gz", "text", longest=1000))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b" * 5000]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"a\.parquet, row 2 has 5000 bytes under 'text' but 1000 are the most"):
        list(read_blocks(tmp_path / "a.parquet", "text", longest=1000))


def test_long_documents_travel_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches one document that is encoded whole, however long, and characters lost where it is cut."""
    monkeypatch.setattr("megascale.data.readers.WHOLE", 50)
    monkeypatch.setattr("megascale.data.readers.BLOCK_BYTES", 20)
    found = ["short\n" * 8, "lines\nof words\n" * 30, "w" * 77, "words " * 30]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in found))
    assert texts(tmp_path / "a.jsonl") == found
    blocks = list(read_blocks(tmp_path / "a.jsonl", "text"))
    assert blocks[0].text == found[0] and max(len(b.text) for b in blocks[1:]) <= 20
    assert sum(b.read for b in blocks) == (tmp_path / "a.jsonl").stat().st_size
    assert all(b.text.endswith("\n") for b in blocks if "lines" in b.text)


def test_a_value_that_many_rows_share_is_in_memory_once(tmp_path: Path) -> None:
    """Catches 500 bytes of Parquet that become gigabytes: a dictionary that is written out for a batch of rows."""
    count, value = 2000, "long text " * 100_000
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count, pyarrow.int32()), [value])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet", store_schema=False)
    before = pyarrow.total_allocated_bytes()
    for number, block in enumerate(read_blocks(tmp_path / "a.parquet", "text")):
        assert len(block.text) == len(value) and pyarrow.total_allocated_bytes() - before < 50 << 20
        if number == 600:
            break
