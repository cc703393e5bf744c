"""The unpacked bytes of files that are plain or compressed with gzip, Zstandard, xz or bzip2."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import IO, Any, cast

import pyarrow
import zstandard

PACKED = {".gz": "gz", ".zst": "zst", ".zstd": "zst", ".xz": "xz", ".bz2": "bz2"}  # endings
MAGIC = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst", b"\xfd7zXZ\0": "xz", b"BZh": "bz2"}  # first bytes of such files
WIDEST = 2**31  # largest window of a Zstandard frame in bytes (zstd --long=31)
BUFFER = 1 << 18
UNREADABLE = (
    OSError,
    EOFError,
    MemoryError,
    zlib.error,
    lzma.LZMAError,
    UnicodeDecodeError,
    zstandard.ZstdError,
    pyarrow.ArrowException,
)


class Input:
    """The unpacked bytes of a file, and how many stored bytes have been read. `packing`: a value of PACKED, or "" for none."""

    def __init__(self, path: Path, packing: str, start: int = 0) -> None:
        """`start`: for a plain file, the byte after which to begin, at the next line."""
        self._raw = path.open("rb")
        self._told = start
        self.bytes: IO[bytes] = self._raw
        if packing == "gz":
            self.bytes = cast(IO[bytes], gzip.GzipFile(fileobj=self._raw))
        elif packing == "zst":
            self.bytes = io.BufferedReader(_Zstandard(self._raw), BUFFER)
        elif packing == "xz":
            self.bytes = cast(IO[bytes], lzma.LZMAFile(self._raw))  # noqa: SIM115
        elif packing == "bz2":
            self.bytes = cast(IO[bytes], bz2.BZ2File(self._raw))
        elif start > 0:
            self._raw.seek(start - 1)
            self._raw.readline()

    def taken(self) -> int:
        """Stored bytes read since the last call."""
        before, self._told = self._told, self._raw.tell()
        return self._told - before

    def __enter__(self) -> Input:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()


class _Zstandard(io.RawIOBase):
    """Reads consecutive Zstandard frames. The package's own reader ends silently in a truncated file; this one does not."""

    STEP = 8192  # compressed bytes at a time, which unpack to at most 256 MiB of the most repetitive text

    def __init__(self, raw: IO[bytes]) -> None:
        super().__init__()
        self._raw, self._packed, self._ready, self._inside = raw, b"", memoryview(b""), False
        self._frame = _frame()

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
                self._frame = _frame()
            self._ready = memoryview(self._frame.decompress(packed))
            self._packed, self._inside = self._frame.unused_data, not self._frame.eof
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _frame() -> Any:
    return zstandard.ZstdDecompressor(max_window_size=WIDEST).decompressobj()


def why_unreadable(path: Path, packing: str, error: BaseException) -> str:
    """What is wrong and the fix, in this tool's words."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError):
        return "it needs more memory than there is; split it into smaller files"
    if isinstance(error, gzip.BadGzipFile) and "Not a gzipped file" in reason and _begins(path) == packing:
        return "bytes follow its last gzip member; compress or copy it again, or cut them off"
    if "requires too much memory" in reason:
        return "its Zstandard window is larger than this machine can hold; pack it again without --long or --ultra"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}; fix that, or leave it out"
    return f"{reason}; make or copy it again, or leave it out"


def _begins(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return packing_of(file.read(8))
    except OSError:
        return ""


def packing_of(head: bytes) -> str:
    """The compression of a file with these first bytes."""
    return next((name for magic, name in MAGIC.items() if head.startswith(magic)), "")
