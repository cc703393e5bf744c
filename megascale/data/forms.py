"""Detects what a file is (text, JSON lines, Parquet or something else) by its bytes and its lower-case ending."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megascale.data.unpack import PACKED, UNREADABLE, Input, packing_of
from megascale.errors import UsageError
from megascale.plugins import with_plugins

HEAD = 8192  # bytes that are examined
LONGEST_FIRST = 1 << 20  # longest first line that is tried as JSON under any ending
JSON_LINES = (".jsonl", ".ndjson", ".jsonlines", ".jl")
PARQUET = (".parquet", ".pq", ".parq")
TABLES = {".csv": "CSV", ".tsv": "TSV"}
NAMES = {"gz": "a gzip file", "zst": "a Zstandard file", "xz": "an xz file", "bz2": "a bzip2 file"}  # by compression
TAR = (".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst")
ARCHIVES = {
    b"PK\x03\x04": "a zip archive or an office document",
    b"%PDF-": "a PDF",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a rar archive",
    b"SQLite format 3\0": "an SQLite database",
    b"ARROW1": "an Arrow file",
    b"MMIDIDX\0\0": "an index of token files",
    b"\x93NUMPY": "a numpy array",
}
UNICODE = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


@dataclass(frozen=True)
class Reader:
    """Reads files of one kind.

    read     `readers.Reading` → its documents as TextBlocks, or "module:function"
    endings  endings of such files, in lower case and before the compression's (.wet in a.wet.gz)
    enters   reading may begin in the middle of an uncompressed file
    """

    read: str | Callable[..., Any]
    endings: tuple[str, ...] = ()
    enters: bool = False


READERS: dict[str, Reader] = {
    "text": Reader("megascale.data.readers:plain_text", enters=True),  # any other ending
    "json": Reader("megascale.data.readers:json_documents", JSON_LINES, enters=True),
    "parquet": Reader("megascale.data.readers:parquet_documents", PARQUET, enters=True),
}


def readers() -> Mapping[str, Reader]:
    """Readers by kind. Raises UsageError if a plugin's row claims an ending of another reader."""
    found = with_plugins("readers", READERS, Reader)
    claimed: dict[str, str] = dict.fromkeys((".json", *PACKED), "megascale")
    for kind, reader in found.items():
        for ending in reader.endings:
            if ending in claimed or not ending.startswith(".") or ending != ending.lower():
                why = f"which {claimed[ending]} reads" if ending in claimed else "but one such as .wet is needed, in lower case"
                raise UsageError(
                    f"the reader {kind} of a plugin claims the ending {ending}, {why}: give it another, or uninstall the plugin"
                )
            claimed[ending] = kind
    return found


@dataclass(frozen=True)
class Form:
    """`packing` as in unpack.py. `why`: for kind other, what it is and the fix. `unusual`: JSON lines under another ending."""

    kind: str  # a key of `readers()`, or "other"
    packing: str = ""
    why: str = ""
    unusual: bool = False


def form_of(path: Path, keys: tuple[str, ...]) -> Form:
    """`keys`: JSON keys of the text. A damaged compressed file has the form of its ending; reading it reports the damage.

    Raises OSError if the file cannot be opened.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        return Form("other", why="is not a file but a pipe, a device or the like: give a file")
    name = path.name.lower()
    packing = next((p for end, p in PACKED.items() if name.endswith(end)), "")
    with path.open("rb") as file:
        head = file.read(HEAD)
    mistaken = f"is named like {NAMES.get(packing, 'a Parquet file')} but is not one: rename it, or leave it out"
    if packing:
        name = name.rsplit(".", 1)[0]
    else:
        packing = packing_of(head)
    if packing:
        begin, head = head, _unpacked(path, packing)
        if begin and not head and packing_of(begin) != packing:
            return Form("other", packing, mistaken)
    for kind, reader in readers().items():
        if kind not in READERS and name.endswith(reader.endings):
            return Form(kind, packing)
    ending = next((e for e in (*JSON_LINES, ".json", *PARQUET, *TABLES, *TAR) if name.endswith(e)), "")
    why = _other(head, ending, packing)
    if why:
        return Form("other", packing, why)
    if ending in PARQUET and head and not head.startswith(b"PAR1"):
        return Form("other", why=mistaken)
    if ending in PARQUET or head.startswith(b"PAR1"):
        return Form("parquet")
    return _text_or_json(path, packing, head, ending, keys)


def _unpacked(path: Path, packing: str) -> bytes:
    try:
        with Input(path, packing) as source:
            return source.bytes.read(HEAD)
    except UNREADABLE:
        return b""


def _other(head: bytes, ending: str, packing: str) -> str:
    """Describes a file that cannot be read, with the fix; empty if it may be readable."""
    if ending in TAR or head[257:262] == b"ustar":
        return "is a tar archive: unpack it, and give the files in it"
    for magic, what in ARCHIVES.items():
        if head.startswith(magic):
            return f"is {what}: give the text in it, as text, JSON lines or Parquet"
    if packing and (ending in PARQUET or head.startswith(b"PAR1")):
        return "is packed Parquet, which packs by itself: unpack it"
    for mark, what in UNICODE.items():
        if head.startswith(mark):
            return f"is {what}: convert it with iconv -f {what} -t UTF-8"
    lines = ending in (*JSON_LINES, ".json") and head[:1] == b"{" and head[1:2] != b"\0"  # reading it will name the line
    if b"\0" in head and not lines and not head.startswith(b"PAR1"):
        return "is not text, it has zero bytes: leave it out, or give the text that is in it (UTF-16 has them: iconv -f UTF-16 -t UTF-8)"
    if ending in TABLES:
        return f"is {TABLES[ending]}: make JSON lines or Parquet of it, with a column of text (pandas: read_csv, to_json(lines=True))"
    return ""


def _text_or_json(path: Path, packing: str, head: bytes, ending: str, keys: tuple[str, ...]) -> Form:
    begin = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if ending in (*JSON_LINES, ".json") and begin == b"[":
        return Form("other", packing, "is a JSON array, but an object per line is needed: jq -c '.[]' FILE > FILE.jsonl makes them")
    if ending in JSON_LINES or (ending == ".json" and not begin):
        return Form("json", packing)
    if begin != b"{":
        if ending == ".json":
            return Form("other", packing, "is not JSON lines: an object per line is needed")
        return Form("text", packing)
    first = _first_value(path, packing)
    if isinstance(first, dict) and all(has_key(first, key) for key in keys):
        return Form("json", packing, unusual=ending != ".json")
    if ending == ".json" and isinstance(first, dict):
        missing = next(key for key in keys if not has_key(first, key))
        return Form("other", packing, f"is JSON with the keys {', '.join(first)[:80]} but no {missing!r}: name the key with --text-key")
    if ending == ".json" and first is not TOO_LONG:
        return Form("other", packing, "is JSON over several lines, but an object per line is needed: jq -c . FILE > FILE.jsonl makes them")
    return Form("json" if ending == ".json" else "text", packing)


TOO_LONG = object()


def _first_value(path: Path, packing: str) -> Any:
    """The JSON value of the first non-blank line; None if there is none, TOO_LONG if the line is too long to try."""
    try:
        with Input(path, packing) as source:
            line = b"\n"
            while line and not line.strip():
                line = source.bytes.readline(LONGEST_FIRST).removeprefix(b"\xef\xbb\xbf")
        if len(line) >= LONGEST_FIRST - 3:
            return TOO_LONG
        return json.loads(line.decode("utf-8", "replace"))
    except (*UNREADABLE, ValueError, RecursionError):
        return None


def find_key(value: Any, key: str) -> Any:
    """`value[key]`, else the value at the path of a dotted key. Raises KeyError."""
    if not isinstance(value, dict):
        raise KeyError(key)
    if key in value:
        return value[key]
    head, _, rest = key.partition(".")
    if not rest:
        raise KeyError(key)
    return find_key(value[head], rest)


def has_key(value: Any, key: str) -> bool:
    try:
        find_key(value, key)
    except KeyError:
        return False
    return True
