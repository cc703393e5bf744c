"""Files of text → documents, streamed: text, JSONL and Parquet, plain or packed with gzip or Zstandard."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import pyarrow.parquet
import zstandard

from megascale.errors import UsageError

BLOCK_CHARACTERS = 1 << 20  # long texts travel in blocks of about this size, cut after a line
PACKED = (".gz", ".zst")


@dataclass(frozen=True)
class Block:
    """Part of a document; `last` marks its end. `source_bytes`: how much of the input file it took."""

    text: str
    last: bool
    source_bytes: int


def find_files(inputs: list[Path], pattern: str) -> list[Path]:
    """The inputs themselves, folders replaced by the files below that match `pattern`, in sorted order. Raises UsageError."""
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            below = sorted(p for p in path.rglob(pattern) if p.is_file() and "site-packages" not in p.parts)
            if not below:
                raise UsageError(f"the folder {path} has no file that matches --pattern {pattern!r}")
            files += below
        elif path.is_file():
            files.append(path)
        else:
            raise UsageError(f"there is no input {path}")
    return files


def read_blocks(path: Path, text_key: str) -> Iterator[Block]:
    """The documents of one file in order. Raises UsageError naming file and line for input that is not what its ending says."""
    kind = path.with_suffix("").suffix if path.suffix in PACKED else path.suffix
    try:
        if kind == ".parquet":
            yield from _parquet(path, text_key)
        elif kind in (".jsonl", ".ndjson"):
            yield from _json_lines(path, text_key)
        else:
            yield from _plain(path)
    except (OSError, EOFError, zstandard.ZstdError, pyarrow.ArrowException) as error:
        raise UsageError(f"{path} cannot be read: {' '.join(str(error).split())}") from None


def _plain(path: Path) -> Iterator[Block]:
    with _open(path) as file:
        text = file.read(BLOCK_CHARACTERS)
        while text:
            text += file.readline() if len(text) == BLOCK_CHARACTERS else ""
            after = file.read(BLOCK_CHARACTERS)
            yield Block(text, not after, len(text))
            text = after


def _json_lines(path: Path, text_key: str) -> Iterator[Block]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[text_key]
            except (ValueError, KeyError, TypeError):
                raise UsageError(
                    f"{path}, line {number}: no JSON object with the key {text_key!r} ({line.strip()[:60]!r}); name the key with --text-key"
                ) from None
            if not isinstance(text, str):
                raise UsageError(f"{path}, line {number}: {text_key!r} is a {type(text).__name__}, and text is needed")
            yield Block(text, True, len(line))


def _parquet(path: Path, text_key: str) -> Iterator[Block]:
    with pyarrow.parquet.ParquetFile(path) as table:
        if text_key not in table.schema_arrow.names:
            raise UsageError(f"{path} has the columns {', '.join(table.schema_arrow.names)} and no {text_key!r}: name one with --text-key")
        for batch in table.iter_batches(batch_size=256, columns=[text_key]):
            for text in batch.column(0).to_pylist():
                if text:
                    yield Block(text, True, len(text))


def _open(path: Path) -> IO[str]:
    """Text of a possibly packed file; bytes that are not UTF-8 become replacement characters."""
    if path.suffix == ".zst":
        raw: IO[bytes] = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), closefd=True)  # type: ignore[assignment]
    else:
        raw = cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")  # noqa: SIM115
    return io.TextIOWrapper(raw, encoding="utf-8", errors="replace", newline="")
