"""Token files in Megatron's format, byte for byte as megatron-core writes them: PREFIX.bin holds tokens, PREFIX.idx their sequences.

idx: 9 bytes "MMIDIDX\\0\\0", uint64 version 1, uint8 dtype code, uint64 sequences, uint64 document marks, then int32 lengths, int64 byte
offsets, int64 document marks (numbers of sequences at which documents begin, the total last). Megatron's multimodal files append an int8
mode per sequence, 0 for text; they are accepted if all is text. A document has one sequence or several; this writer splits a document
only if it has more tokens than an int32 length can hold.
"""

from __future__ import annotations

import os
import struct
from array import array
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megascale.data.facts import is_file
from megascale.data.publish import Publication
from megascale.errors import UsageError

MAGIC = b"MMIDIDX\x00\x00"
CODES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
HEADER = len(MAGIC) + 8 + 1 + 8 + 8
UINT16_VOCABULARY = 65500  # Megatron's limit for two-byte tokens
LONGEST = 2**31 - 1  # most tokens per sequence, whose length is an int32
SLAB = 1 << 20  # index entries checked at a time


def token_dtype(vocab_size: int) -> type[np.generic]:
    """Megatron's dtype for tokens of a vocabulary of this size."""
    return np.uint16 if vocab_size < UINT16_VOCABULARY else np.int32


class TokenFile:
    """Read access to the documents of PREFIX.bin and PREFIX.idx, memory-mapped.

    `lengths` [documents]: per document. Raises UsageError for files that are missing, foreign, truncated or damaged, with both numbers.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        idx, bin_ = Path(self.prefix + ".idx"), Path(self.prefix + ".bin")
        for path in (idx, bin_):
            if not is_file(path):
                raise UsageError(
                    f"there is no token file {str(path)[:300]}: make it with megascale prepare INPUT --out {self.prefix[:300]}, or "
                    "correct the path (it is a prefix, without .bin)"
                )
        try:
            with idx.open("rb") as file:
                head = file.read(HEADER)
            bin_.open("rb").close()
        except OSError as error:
            raise UsageError(f"the token files {self.prefix} cannot be read ({error.strerror}: {error.filename}): fix that") from None
        if len(head) < HEADER or head[: len(MAGIC)] != MAGIC:
            raise UsageError(
                f"{idx} is not a token index: it begins with {head[:9]!r} instead of {MAGIC!r}; give the prefix of token files"
            )
        version, code, count, marks = struct.unpack("<QBQQ", head[len(MAGIC) :])
        if version != 1 or code not in CODES:
            raise UsageError(
                f"{idx} has format version {version} and dtype code {code}, but this reader knows version 1 and codes {sorted(CODES)}: "
                "make it again"
            )
        self.dtype = np.dtype(CODES[code])
        if self.dtype.kind not in "iu":
            raise UsageError(f"{idx} says that {bin_} holds {self.dtype}, but tokens are integers: make both again")
        size, wanted = idx.stat().st_size, HEADER + count * 12 + marks * 8
        if size not in (wanted, wanted + count):  # multimodal indexes of Megatron end with one byte per sequence, its mode
            raise UsageError(f"{idx} has {size} bytes but its header promises {wanted}: it is truncated or damaged; make it again")
        raw = map_file(idx, np.uint8)
        lengths = np.frombuffer(raw, np.int32, count, HEADER)
        offsets = np.frombuffer(raw, np.int64, count, HEADER + 4 * count)
        first = np.frombuffer(raw, np.int64, marks, HEADER + 12 * count)
        if size != wanted and (modes := np.flatnonzero(raw[wanted:])).size:
            raise UsageError(
                f"{idx} says that sequence {modes[0]} is of mode {raw[wanted + modes[0]]}, but only text (0) is read: leave out the rest"
            )
        if marks < 1 or first[0] != 0 or first[-1] != count:
            said = f"{first[0]} to {first[-1]}" if marks else "none"
            raise UsageError(f"{idx} has {count} sequences and documents that reach over {said}: it is damaged; make it again")
        need = check_layout(idx, lengths, offsets, self.dtype.itemsize)
        check_marks(idx, first)
        have = bin_.stat().st_size
        if have != need:
            reason = "it is truncated" if have < need else "they do not belong together"
            raise UsageError(f"{bin_} has {have} bytes but its index needs {need}: {reason}; copy or make both again")
        self.tokens: NDArray[np.generic] = map_file(bin_, self.dtype) if have else np.zeros(0, self.dtype)
        self.lengths: NDArray[np.integer] = lengths
        self._offsets = offsets
        if marks != count + 1:  # some documents have several sequences in a row, or none
            ends = np.append(offsets, need)
            self._offsets = ends[first[:-1]]
            self.lengths = (ends[first[1:]] - self._offsets) // self.dtype.itemsize

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, number: int, start: int = 0, length: int | None = None) -> NDArray[np.generic]:
        """Tokens [start, start+length) of one document, a view of the file."""
        first = int(self._offsets[number]) // self.dtype.itemsize + start
        return self.tokens[first : first + (int(self.lengths[number]) - start if length is None else length)]


def map_file(path: Path, dtype: DTypeLike) -> NDArray[Any]:
    """Maps the file. Raises OSError with its name, which numpy omits if too many files are open."""
    try:
        return np.memmap(path, mode="r", dtype=dtype)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def check_layout(path: Path, lengths: NDArray[np.int32], offsets: NDArray[np.int64], itemsize: int) -> int:
    """The total bytes of the sequences, which must follow one another without gaps, as every writer stores them: overflowed, negative or
    foreign numbers would silently read other tokens. Memory of one slab, about 10 ns per sequence. Raises UsageError.
    """
    at = 0
    for start in range(0, len(lengths), SLAB):
        slab, where = lengths[start : start + SLAB].astype(np.int64), offsets[start : start + SLAB]
        if (wrong := np.flatnonzero(slab < 0)).size:
            raise UsageError(f"{path} says that sequence {start + wrong[0]} has {slab[wrong[0]]} tokens: it is damaged; make it again")
        ends = at + np.cumsum(slab) * itemsize
        begins = np.concatenate(([at], ends[:-1]))
        if (wrong := np.flatnonzero(where != begins)).size:
            raise UsageError(
                f"{path} says that sequence {start + wrong[0]} begins at byte {where[wrong[0]]}, but those before it end at byte "
                f"{begins[wrong[0]]}: it is damaged, or its writer's numbers were too small; make it again"
            )
        at = int(ends[-1])
    return at


def check_marks(path: Path, marks: NDArray[np.int64]) -> None:
    """Raises UsageError if documents do not follow one another. The first mark is 0 and the last one the number of sequences."""
    for start in range(0, len(marks) - 1, SLAB):
        slab = marks[start : start + SLAB + 1]
        if (wrong := np.flatnonzero(slab[1:] < slab[:-1])).size:
            place = int(wrong[0])
            raise UsageError(
                f"{path} says that document {start + place} begins at sequence {slab[place]} and the next at {slab[place + 1]}: it is "
                "damaged; make it again"
            )


class TokenWriter:
    """Writes documents one by one. The files appear under their names only when all are written: at the end of the block, or together with
    other files if a `publication` is given.

    Tokens go to disk at once; 12 bytes per document stay in memory.
    """

    def __init__(self, prefix: str | Path, dtype: type[np.generic], longest: int = LONGEST, publication: Publication | None = None) -> None:
        self.prefix, self.dtype, self.longest = str(prefix), np.dtype(dtype), longest
        self._lengths, self._marks, self._open = array("i"), array("q", [0]), 0
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        self._own = publication is None
        self._files = publication or Publication()
        self._partial = {end: self._files.stage(Path(f"{self.prefix}.{end}")) for end in ("bin", "idx")}
        self._file = self._partial["bin"].open("wb")

    def add(self, tokens: NDArray[np.generic]) -> None:
        """Appends one document."""
        self.extend(tokens)
        self.end_document()

    def extend(self, tokens: NDArray[np.generic]) -> None:
        """Appends to the current document."""
        self._file.write(tokens.astype(self.dtype, copy=False).tobytes())
        self._open += len(tokens)

    def end_document(self) -> None:
        while self._open > self.longest:
            self._lengths.append(self.longest)
            self._open -= self.longest
        self._lengths.append(self._open)
        self._marks.append(len(self._lengths))
        self._open = 0

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
                if self._own:
                    self._files.publish()
        finally:
            with suppress(OSError):  # a full disk fails here again, but the files must still be deleted
                self._file.close()
            if self._own:
                self._files.discard()

    def _finish(self) -> None:
        """Finishes both files and flushes them to disk."""
        lengths = np.frombuffer(self._lengths, np.int32)
        offsets = np.zeros(len(lengths), np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
        offsets *= self.dtype.itemsize
        code = next(c for c, d in CODES.items() if np.dtype(d) == self.dtype)
        with self._partial["idx"].open("wb") as file:
            file.write(MAGIC + struct.pack("<QBQQ", 1, code, len(lengths), len(self._marks)))
            for part in (lengths, offsets, np.frombuffer(self._marks, np.int64)):
                file.write(part.tobytes())
            file.flush()
            os.fsync(file.fileno())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
