"""Files of text → documents, streamed: text, JSON lines and Parquet, plain or compressed (forms.py detects the kind and has the rows).

One document is a text file, a JSON line or a Parquet row. A text file may have any size; JSON lines and Parquet values have a limit.
One rule for all of them: documents that are null or empty are dropped, a byte-order mark at a document's beginning is removed, bytes that
are not UTF-8 become U+FFFD; all three are counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megascale.data.forms import Form, find_key, form_of, readers
from megascale.data.parquet import read_values
from megascale.data.unpack import UNREADABLE, Input, why_unreadable
from megascale.errors import MegascaleError, UsageError
from megascale.plugins import resolve

BLOCK_BYTES = 1 << 18  # long text files are split after a line into blocks of about this size; larger blocks encode more slowly
LONGEST = 64 << 20  # bytes of a JSON line or a Parquet value, by default: reading takes ten times as much memory
WHOLE = 4 << 20  # characters of a JSON line or Parquet row that form one block: encoding takes up to 200 bytes per character
MARK = "\ufeff"
# Messages of Python's parser, and what they mean for JSON lines.
SAID = {
    "Invalid control character at": r"a string contains a raw control character, where \t, \n or \u00XX is to be written",
    "Extra data": "something follows its value, but each line holds one object",
    "Expecting property name enclosed in double quotes": "an object is not complete, or its names are not in double quotes",
}


@dataclass(frozen=True)
class TextBlock:
    """Part of a document of `path`; `last` marks its end.

    `read`: stored (compressed) bytes of the file read since the last block, for progress.
    `damaged`: characters that are not valid Unicode were replaced.
    """

    path: Path
    text: str
    last: bool
    read: int
    damaged: bool


@dataclass
class Tally:
    """Counts of what was changed or dropped: null documents, byte-order marks, files without a document."""

    nulls: int = 0
    marks: int = 0
    empty: int = 0

    def unmarked(self, text: str) -> str:
        """A document's beginning without its byte-order mark."""
        if not text.startswith(MARK):
            return text
        self.marks += 1
        return text[len(MARK) :]


@dataclass(frozen=True)
class Reading:
    """A file and how to read it.

    packing  as in unpack.py: `Input(path, packing)` unpacks it
    start    byte after which to begin, at the next line or row group, for kinds that allow it
    size     approximate bytes per block of a text file
    longest  bytes of a JSON line or a Parquet value
    tally    counts of what was changed or dropped
    """

    path: Path
    packing: str
    text_key: str
    start: int
    size: int
    longest: int
    tally: Tally


def can_enter(path: Path) -> bool:
    """Whether reading may begin in the middle; compressed files must be read from the start."""
    try:
        form = form_of(path, ())
    except OSError:
        return False
    return not form.packing and (form.kind == "other" or readers()[form.kind].enters)


def read_blocks(
    path: Path, text_key: str, start: int = 0, size: int = BLOCK_BYTES, longest: int = LONGEST, tally: Tally | None = None
) -> Iterator[TextBlock]:
    """The documents of one file in order, long ones in blocks, for text files of about `size` bytes. Other arguments as in `Reading`.

    Raises UsageError naming file and line for invalid input.
    """
    form = Form("text")
    try:
        form = form_of(path, (text_key,))
        if form.kind == "other":
            raise UsageError(f"{path} {form.why}")
        read = resolve(readers()[form.kind].read, f"the reader {form.kind}")
        yield from read(Reading(path, form.packing, text_key, start, size, longest, tally or Tally()))
    except UNREADABLE as error:
        raise UsageError(f"{path} cannot be read: {why_unreadable(path, form.packing, error)}") from None


def documents(reading: Reading, texts: Callable[[IO[bytes], str], Iterable[str | None]]) -> Iterator[TextBlock]:
    """Documents for a reader of another package: `texts` yields the texts of an unpacked file, given the key of the text. Nulls, marks and
    invalid characters follow the same rules as in all readers.

    Raises UsageError naming the file if `texts` fails.
    """
    with Input(reading.path, reading.packing) as source:
        found = iter(texts(source.bytes, reading.text_key))
        while True:
            try:
                text = next(found)
            except StopIteration:
                return
            except (MegascaleError, *UNREADABLE):
                raise
            except Exception as error:
                raise UsageError(f"{reading.path} cannot be read: its reader says {type(error).__name__}: {error}") from None
            if text is None:
                reading.tally.nulls += 1
            whole = reading.tally.unmarked(text or "")
            if whole:
                valid = _without_surrogates(whole)
                yield from _in_blocks(TextBlock(reading.path, valid, True, source.taken(), valid is not whole))


def json_documents(reading: Reading) -> Iterator[TextBlock]:
    for block in json_lines(reading.path, reading.packing, reading.text_key, reading.start, reading.longest, reading.tally):
        yield from _in_blocks(block)


def parquet_documents(reading: Reading) -> Iterator[TextBlock]:
    for block in _rows(reading.path, reading.text_key, reading.start, reading.longest, reading.tally):
        yield from _in_blocks(block)


def plain_text(reading: Reading) -> Iterator[TextBlock]:
    """A text file is one document."""
    with Input(reading.path, reading.packing, reading.start) as source:
        data = source.bytes.read(reading.size)
        first = reading.start == 0
        while data:
            after = source.bytes.read(reading.size)
            end = _cut(data) if after else len(data)
            text, damaged = decode(data[:end])
            data = data[end:] + after
            if first:
                text, first = reading.tally.unmarked(text), False
            if text or data:
                yield TextBlock(reading.path, text, not data, source.taken(), damaged)


def _cut(data: bytes) -> int:
    """The position at which to end a block: after its last line, else before its last character, which may be incomplete."""
    line = data.rfind(b"\n") + 1
    if line:
        return line
    for back in range(1, min(4, len(data))):
        if data[-back] & 0xC0 != 0x80:
            return len(data) - back
    return len(data)


def lines_of(bytes_: IO[bytes], where: str, longest: int) -> Iterator[bytes]:
    """Lines of at most `longest` bytes. Raises UsageError for a longer one, before it is in memory."""
    number = 0
    while line := bytes_.readline(longest + 1):
        number += 1
        if len(line) > longest:
            raise UsageError(
                f"{where} {number} has more than {longest} bytes: split it, or raise --longest-line, which takes ten times as much memory"
            )
        yield line


def json_lines(path: Path, packing: str, text_key: str, start: int, longest: int, tally: Tally, empty: bool = False) -> Iterator[TextBlock]:
    """Each document as one block. `empty`: also yield empty documents, and nulls as None."""
    place = f"{path}, line" if start == 0 else f"{path}, after byte {start}, line"
    with Input(path, packing, start) as source:
        for number, raw in enumerate(lines_of(source.bytes, place, longest), 1):
            line, damaged = decode(raw)
            line = line.removeprefix(MARK) if number > 1 or start else tally.unmarked(line)
            if not line.strip():
                continue
            text = parse_line(line, text_key, f"{place} {number}")
            del line, raw
            if text is None:
                tally.nulls += 1
            text = tally.unmarked(text or "")
            if text or empty:
                whole = _without_surrogates(text)
                yield TextBlock(path, whole, True, source.taken(), damaged or whole is not text)


def parse_line(line: str, key: str, where: str) -> str | None:
    """The text under `key` of an object in JSON; None for null. Raises UsageError with what is wrong with the line."""
    shown = f"({line.strip()[:60]!r})"
    try:
        value = json.loads(line)
    except RecursionError:
        raise UsageError(f"{where}: no JSON object: it is nested too deeply {shown}; leave the line out") from None
    except json.JSONDecodeError as error:
        said = "it has zero bytes, as a crash or a full disk leaves them" if "\0" in line else SAID.get(error.msg, error.msg)
        why = f"{said}, at character {error.pos + 1}"
        raise UsageError(f"{where}: no JSON object: {why} {shown}; fix the line") from None
    except ValueError:
        raise UsageError(f"{where}: it holds a number of more digits than Python reads {shown}; shorten it, or write it as text") from None
    if not isinstance(value, dict):
        kind = "an array" if isinstance(value, list) else f"a {type(value).__name__}"
        raise UsageError(f"{where}: no JSON object but {kind} {shown}; an object per line is needed") from None
    try:
        text = find_key(value, key)
    except KeyError:
        keys = ", ".join(value)[:80]
        raise UsageError(f"{where}: no JSON object with the key {key!r}, it has {keys or 'none'}; name the key with --text-key") from None
    if text is not None and not isinstance(text, str):
        raise UsageError(f"{where}: {key!r} is a {type(text).__name__}, but text is needed")
    return text


def _rows(path: Path, text_key: str, start: int, longest: int, tally: Tally) -> Iterator[TextBlock]:
    read = 0
    for row in read_values(path, text_key, start):
        read += row.read
        if row.value is None:
            tally.nulls += 1
            continue
        if len(row.value) > longest:
            raise UsageError(
                f"{path}, row {row.number} has {len(row.value)} bytes under {text_key!r} but {longest} are the most: split it, or raise "
                "--longest-line, which takes ten times as much memory"
            )
        text, damaged = decode(row.value)
        text = tally.unmarked(text)
        if text:
            yield TextBlock(path, text, True, read, damaged)
            read = 0


def _in_blocks(block: TextBlock) -> Iterator[TextBlock]:
    """A document as one block up to WHOLE characters; a longer one is split like text files: after a line, else before a space."""
    text = block.text
    if len(text) <= WHOLE:
        yield block
        return
    start = 0
    while start < len(text):
        end = start + BLOCK_BYTES
        if end < len(text):
            line, space = text.rfind("\n", start, end) + 1, text.rfind(" ", start + 1, end)
            end = line or (space if space > 0 else end)
        yield TextBlock(block.path, text[start:end], end >= len(text), block.read if start == 0 else 0, block.damaged)
        start = end


def decode(data: bytes) -> tuple[str, bool]:
    """The text, and whether invalid UTF-8 became replacement characters."""
    try:
        return data.decode("utf-8"), False
    except UnicodeDecodeError:
        return data.decode("utf-8", "replace"), True


def _without_surrogates(text: str) -> str:
    r"""JSON can spell halves of characters (\ud800), which no tokenizer accepts; replaces them."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
