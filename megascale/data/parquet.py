"""A column of text in a Parquet file, value by value in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from megascale.errors import UsageError

ROWS = 256  # per batch
BATCH_BYTES = 16 << 20  # per batch: fewer rows if they are long


class Value(NamedTuple):
    """The bytes of a row's text, or None for null. `read`: stored bytes of the file that it accounts for, for progress."""

    number: int
    value: bytes | None
    read: int


def read_values(path: Path, text_key: str, start: int) -> Iterator[Value]:
    """`start`: reading begins at the row group at this byte. Raises UsageError if the column is absent or not text."""
    size = path.stat().st_size
    with pyarrow.parquet.ParquetFile(path) as table:
        parts, leaf = _find(path, table, text_key)
        kind, metadata = _kind(table.schema_arrow, parts), table.metadata
        if not _is_text(kind):
            raise UsageError(f"{path}, row 1: the column {text_key!r} holds {kind}, but text is needed")
        coded = any("DICTIONARY" in e for g in range(metadata.num_row_groups) for e in metadata.row_group(g).column(leaf).encodings)
    # Keep dictionary encoding: a value that a thousand rows share is in memory once.
    names = [".".join(parts)] if coded and pyarrow.types.is_string(kind) else []
    row = told = 0
    with pyarrow.parquet.ParquetFile(path, read_dictionary=names) as table:
        groups, rows = table.num_row_groups, table.metadata.num_rows
        for group in range(start * groups // max(1, size), groups):
            facts = table.metadata.row_group(group)
            mean = facts.column(leaf).total_uncompressed_size // max(1, facts.num_rows)
            at_a_time = max(1, min(ROWS, BATCH_BYTES // max(1, mean)))
            # One thread: the tool forks workers, which is unsafe while other threads hold locks.
            for batch in table.iter_batches(at_a_time, [group], [".".join(parts)], use_threads=False):
                for value in _values(batch.column(0), parts[1:]):
                    row += 1
                    done = size * row // rows
                    yield Value(row, value, done - told)
                    told = done


def _find(path: Path, table: Any, key: str) -> tuple[list[str], int]:
    """The path of names to a column, and its number; a name with dots takes precedence over a path."""
    names = table.schema_arrow.names
    schema = table.metadata.schema
    paths = [schema.column(i).path for i in range(len(schema))]
    if key in names and key in paths:
        return [key], paths.index(key)
    if key in paths:
        return key.split("."), paths.index(key)
    if key in names:
        kind = table.schema_arrow.field(key).type
        raise UsageError(f"{path}, row 1: the column {key!r} holds {kind}, but text is needed: name a part of it, such as {key}.text")
    raise UsageError(f"{path} has the columns {', '.join(paths)[:300]} but no {key!r}: name one with --text-key")


def _kind(schema: Any, parts: list[str]) -> Any:
    kind = schema.field(parts[0]).type
    for part in parts[1:]:
        if not pyarrow.types.is_struct(kind):  # not a list, which may have many values per row
            return kind
        kind = kind.field(part).type
    return kind.value_type if pyarrow.types.is_dictionary(kind) else kind


def _is_text(kind: Any) -> bool:
    types = pyarrow.types
    view = getattr(types, "is_string_view", lambda _: False)
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind) or view(kind))


def _values(column: Any, below: list[str]) -> Iterator[bytes | None]:
    if below:
        column = pyarrow.compute.struct_field(column, below)
    if pyarrow.types.is_dictionary(column.type):
        dictionary = _as_bytes(column.dictionary)
        for place in column.indices.to_pylist():
            yield None if place is None else dictionary[place].as_py()
    else:
        for value in _as_bytes(column):
            yield value.as_py()


def _as_bytes(column: Any) -> Any:
    """The values as binary, since they may not be valid UTF-8."""
    if pyarrow.types.is_null(column.type):
        return column
    if pyarrow.types.is_large_string(column.type):
        return column.cast(pyarrow.large_binary())
    if pyarrow.types.is_string(column.type):
        return column.cast(pyarrow.binary())
    return column.cast(pyarrow.binary_view())
