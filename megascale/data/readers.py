"""Files of text → documents, streamed: text, JSONL and Parquet, plain or packed with gzip or Zstandard.

One document is a text file, a JSONL line or a Parquet row. A text file may be of any size; a JSONL line and a Parquet row group must fit in
memory. Documents without a character are left out.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any, cast

import pyarrow
import pyarrow.parquet
import zstandard

from megascale.errors import UsageError

BLOCK_BYTES = 1 << 18  # long text files travel in blocks of about this size, cut after a line; larger ones are encoded slower
PACKED = (".gz", ".zst")
UNREADABLE = (OSError, EOFError, zlib.error, UnicodeDecodeError, zstandard.ZstdError, pyarrow.ArrowException)


@dataclass(frozen=True)
class Block:
    """Part of a document of `path`; `last` marks its end.

    `read`: stored bytes of the file (packed, where it is packed) that were read since the block before, for progress.
    `damaged`: characters that are not valid Unicode were replaced.
    """

    path: Path
    text: str
    last: bool
    read: int
    damaged: bool


def find_files(inputs: list[Path], pattern: str, exclude: Sequence[str] = ()) -> list[Path]:
    """The inputs themselves, folders replaced by the files below that match `pattern`, in sorted order.

    `exclude`: names of folders that are not entered, unless they are the input. Raises UsageError for an input that is not there.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            below = sorted(p for p in path.rglob(pattern) if p.is_file() and not set(p.relative_to(path).parts[:-1]) & set(exclude))
            if not below:
                raise UsageError(f"the folder {path} has no file that matches --pattern {pattern!r}")
            files += below
        elif path.is_file():
            files.append(path)
        else:
            raise UsageError(f"there is no input {path}: correct the path")
    return files


def is_text(path: Path) -> bool:
    """False where the beginning has a zero byte, as in pictures, archives and programs; packed files and Parquet are not judged."""
    if path.suffix in (*PACKED, ".parquet"):
        return True
    with path.open("rb") as file:
        return b"\0" not in file.read(8192)


def can_enter(path: Path) -> bool:
    """Whether reading may begin in the middle; packed files have to be read from the front."""
    return path.suffix not in PACKED


def read_blocks(path: Path, text_key: str, start: int = 0, size: int = BLOCK_BYTES) -> Iterator[Block]:
    """The documents of one file in order, long text files in blocks of about `size` bytes.

    `start`: for a file that can be entered, the byte after which to begin, at the next line or from the row group that lies there.
    Raises UsageError naming file and line for input that is not what its ending says.
    """
    kind = path.with_suffix("").suffix if path.suffix in PACKED else path.suffix
    try:
        if kind == ".parquet":
            yield from _parquet(path, text_key, start)
        elif kind in (".jsonl", ".ndjson"):
            yield from _json_lines(path, text_key, start)
        else:
            yield from _plain(path, start, size)
    except UNREADABLE as error:
        raise UsageError(f"{path} cannot be read: {' '.join(str(error).split())}; make or copy it again, or leave it out") from None


class _Input:
    """The unpacked bytes of a file, and how far its stored bytes have been read."""

    def __init__(self, path: Path, start: int) -> None:
        self._raw = path.open("rb")
        self._told = start
        self.bytes: IO[bytes] = self._raw
        if path.suffix == ".gz":
            self.bytes = cast(IO[bytes], gzip.GzipFile(fileobj=self._raw))
        elif path.suffix == ".zst":
            self.bytes = io.BufferedReader(_Zstandard(self._raw), BLOCK_BYTES)
        elif start > 0:
            self._raw.seek(start - 1)
            self._raw.readline()

    def taken(self) -> int:
        """Stored bytes read since the last call."""
        before, self._told = self._told, self._raw.tell()
        return self._told - before

    def __enter__(self) -> _Input:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()


class _Zstandard(io.RawIOBase):
    """Frames of Zstandard one after the other. The package's own reader ends silently where a file was cut short; this one does not."""

    STEP = 8192  # packed bytes at a time; even the most repetitive text unpacks to no more than 256 MiB from them

    def __init__(self, raw: IO[bytes]) -> None:
        super().__init__()
        self._raw, self._packed, self._ready, self._inside = raw, b"", memoryview(b""), False
        self._frame = zstandard.ZstdDecompressor().decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._packed or self._raw.read(self.STEP)
            if not packed:
                if self._inside:
                    raise EOFError("it ends in the middle of a Zstandard frame")
                return 0
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = memoryview(self._frame.decompress(packed))
            self._packed, self._inside = self._frame.unused_data, not self._frame.eof
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _plain(path: Path, start: int, size: int) -> Iterator[Block]:
    with _Input(path, start) as source:
        data = source.bytes.read(size)
        while data:
            after = source.bytes.read(size)
            end = _cut(data) if after else len(data)
            text, damaged = _decode(data[:end])
            data = data[end:] + after
            yield Block(path, text, not data, source.taken(), damaged)


def _cut(data: bytes) -> int:
    """Where a block may end: after its last line, or else in front of its last character, which may go on in the next block."""
    line = data.rfind(b"\n") + 1
    if line:
        return line
    for back in range(1, min(4, len(data))):
        if data[-back] & 0xC0 != 0x80:
            return len(data) - back
    return len(data)


def _json_lines(path: Path, text_key: str, start: int, empty: bool = False) -> Iterator[Block]:
    """`empty`: documents without a character too."""
    place = "line" if start == 0 else f"after byte {start}, line"
    with _Input(path, start) as source:
        for number, raw in enumerate(source.bytes, 1):
            line, damaged = _decode(raw)
            if not line.strip():
                continue
            try:
                text = json.loads(line)[text_key]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UsageError(
                    f"{path}, {place} {number}: no JSON object with the key {text_key!r} ({line.strip()[:60]!r}); "
                    "mend the line, or name the key with --text-key"
                ) from None
            if not isinstance(text, str):
                raise UsageError(f"{path}, {place} {number}: {text_key!r} is a {type(text).__name__}, and text is needed")
            if text or empty:
                whole = _without_surrogates(text)
                yield Block(path, whole, True, source.taken(), damaged or whole is not text)


def _parquet(path: Path, text_key: str, start: int) -> Iterator[Block]:
    size = path.stat().st_size
    with pyarrow.parquet.ParquetFile(path) as table:
        if text_key not in table.schema_arrow.names:
            raise UsageError(f"{path} has the columns {', '.join(table.schema_arrow.names)} and no {text_key!r}: name one with --text-key")
        rows, groups = table.metadata.num_rows, table.num_row_groups
        first = start * groups // max(1, size)
        row = told = 0
        # One thread: the tool forks its workers, which must not happen while other threads hold locks.
        for batch in table.iter_batches(256, list(range(first, groups)), [text_key], use_threads=False):
            for text in batch.column(0).to_pylist():
                row += 1
                if text is not None and not isinstance(text, str):
                    raise UsageError(f"{path}, row {row}: the column {text_key!r} holds {type(text).__name__}, and text is needed")
                if text:
                    done = size * row // rows
                    yield Block(path, text, True, done - told, False)
                    told = done


def read_pairs(inputs: list[Path], side: int, keys: tuple[str, str]) -> Iterator[Block]:
    """One side, 0 sources and 1 targets, of aligned text: lines of two text files, or two keys of JSONL lines. Each is a document.

    A pair with an empty side is left out on both. Raises UsageError where there are more lines in one file than in the other, or an input
    is of another kind.
    """
    kinds = {path: (path.with_suffix("").suffix if path.suffix in PACKED else path.suffix) for path in inputs}
    as_json = [path for path, kind in kinds.items() if kind in (".jsonl", ".ndjson")]
    if as_json and len(as_json) < len(inputs):
        raise UsageError(f"{as_json[0]} is JSONL and {next(p for p in inputs if p not in as_json)} is not: give one kind")
    if not as_json and len(inputs) != 2:
        raise UsageError(f"{len(inputs)} text files were given, and pairs are the lines of two: sources first, then targets")
    try:
        if as_json:
            for path in inputs:
                yield from _json_pairs(path, side, keys)
        else:
            yield from _line_pairs(inputs, side)
    except UNREADABLE as error:
        names = " or ".join(map(str, inputs))
        raise UsageError(f"{names} cannot be read: {' '.join(str(error).split())}; make or copy it again") from None


def _line_pairs(inputs: list[Path], side: int) -> Iterator[Block]:
    with _Input(inputs[0], 0) as first, _Input(inputs[1], 0) as second:
        sources = (first, second)
        for number, lines in enumerate(zip_longest(*(s.bytes for s in sources)), 1):
            if None in lines:
                ended = lines.index(None)
                raise UsageError(
                    f"{inputs[ended]} ends before line {number} and {inputs[1 - ended]} goes on: pairs need as many lines in both"
                )
            texts = [_decode(line) for line in lines]
            if all(text.strip() for text, _ in texts):
                text, damaged = texts[side]
                yield Block(inputs[side], text.rstrip("\r\n"), True, sources[side].taken(), damaged)


def _json_pairs(path: Path, side: int, keys: tuple[str, str]) -> Iterator[Block]:
    both = [_json_lines(path, key, 0, empty=True) for key in keys]
    for blocks in zip(*both):
        if all(b.text.strip() for b in blocks):
            yield blocks[side]


def _decode(data: bytes) -> tuple[str, bool]:
    """The text, and whether bytes that are not UTF-8 became replacement characters."""
    try:
        return data.decode("utf-8"), False
    except UnicodeDecodeError:
        return data.decode("utf-8", "replace"), True


def _without_surrogates(text: str) -> str:
    r"""JSON can spell halves of characters (\ud800), which no tokenizer takes; `text` itself where there are none."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
