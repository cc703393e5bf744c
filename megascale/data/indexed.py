"""Token files in Megatron's format, byte for byte what megatron-core writes: PREFIX.bin holds tokens, PREFIX.idx where each sequence lies.

idx: 9 bytes "MMIDIDX\\0\\0", uint64 version 1, uint8 dtype code, uint64 sequences, uint64 document marks, then int32 lengths, int64 byte
offsets, int64 document marks (numbers of sequences at which documents begin, the total last).
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

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


def token_dtype(vocab_size: int) -> type[np.generic]:
    """The dtype that Megatron stores tokens of such a vocabulary in."""
    return np.uint16 if vocab_size < UINT16_VOCABULARY else np.int32


class TokenFile:
    """Read access to PREFIX.bin and PREFIX.idx, memory-mapped; one sequence is one document here.

    Raises UsageError for files that are missing, foreign or truncated, with both sizes.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        idx, bin_ = Path(self.prefix + ".idx"), Path(self.prefix + ".bin")
        for path in (idx, bin_):
            if not path.is_file():
                raise UsageError(
                    f"there is no token file {path}: make it with tools/prepare_data.py INPUT --out {self.prefix}, or correct the path "
                    "(it is a prefix, without .bin)"
                )
        with idx.open("rb") as file:
            head = file.read(HEADER)
        if len(head) < HEADER or head[: len(MAGIC)] != MAGIC:
            raise UsageError(f"{idx} is not a token index: it begins with {head[:9]!r} instead of {MAGIC!r}")
        version, code, count, marks = struct.unpack("<QBQQ", head[len(MAGIC) :])
        if version != 1 or code not in CODES:
            raise UsageError(f"{idx} has format version {version} and dtype code {code}; this reader knows version 1 and codes 1 to 8")
        wanted = HEADER + count * 12 + marks * 8
        if idx.stat().st_size != wanted:
            raise UsageError(
                f"{idx} has {idx.stat().st_size} bytes and its header promises {wanted}: it is truncated or damaged; make it again"
            )
        raw = np.memmap(idx, mode="r", dtype=np.uint8)
        self.dtype = np.dtype(CODES[code])
        self.lengths: NDArray[np.int32] = raw[HEADER : HEADER + 4 * count].view(np.int32)
        self.offsets: NDArray[np.int64] = np.frombuffer(raw, np.int64, count, HEADER + 4 * count)
        self.documents: NDArray[np.int64] = np.frombuffer(raw, np.int64, marks, HEADER + 12 * count)
        need = int(self.offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if count else 0
        have = bin_.stat().st_size
        if have < need:
            raise UsageError(f"{bin_} has {have} bytes and its index needs {need}: it is truncated; copy or make it again")
        self.tokens: NDArray[np.generic] = np.memmap(bin_, mode="r", dtype=self.dtype) if have else np.zeros(0, self.dtype)

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, number: int, start: int = 0, length: int | None = None) -> NDArray[np.generic]:
        """Tokens [start, start+length) of one sequence, a view of the file."""
        first = int(self.offsets[number]) // self.dtype.itemsize + start
        return self.tokens[first : first + (int(self.lengths[number]) - start if length is None else length)]


class TokenWriter:
    """Writes documents one by one; the files appear under their names only when all of them are written."""

    def __init__(self, prefix: str | Path, dtype: type[np.generic]) -> None:
        self.prefix, self.dtype = str(prefix), np.dtype(dtype)
        self._lengths: list[int] = []
        self._paths = {end: Path(f"{self.prefix}.{end}") for end in ("bin", "idx")}
        self._paths["bin"].parent.mkdir(parents=True, exist_ok=True)
        self._partial = {end: path.with_name(f".{path.name}.partial") for end, path in self._paths.items()}
        self._file = self._partial["bin"].open("wb")

    def add(self, tokens: NDArray[np.generic]) -> None:
        """Appends one document."""
        self._file.write(tokens.astype(self.dtype, copy=False).tobytes())
        self._lengths.append(len(tokens))

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        if kind is not None:
            self._partial["bin"].unlink(missing_ok=True)
            return
        lengths = np.array(self._lengths, dtype=np.int32)
        offsets = np.zeros(len(lengths), dtype=np.int64)
        np.cumsum(lengths[:-1].astype(np.int64) * self.dtype.itemsize, out=offsets[1:]) if len(lengths) > 1 else None
        code = next(c for c, d in CODES.items() if np.dtype(d) == self.dtype)
        with self._partial["idx"].open("wb") as file:
            file.write(MAGIC + struct.pack("<QBQQ", 1, code, len(lengths), len(lengths) + 1))
            for array in (lengths, offsets, np.arange(len(lengths) + 1, dtype=np.int64)):
                file.write(array.tobytes())
        for end in ("bin", "idx"):
            os.replace(self._partial[end], self._paths[end])
