"""Atomic files and folders: readers find them whole or not at all. Imports no torch."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megascale.errors import UsageError

# Errors of CIFS and several FUSE file systems for the fsync of a folder, which they do not support; files are on disk anyway.
NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary name next to `path` to write, renamed at the end: a reader sees the old file or the new one, never half of it.
    After an error nothing new is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        discard(temporary)
        raise


def write_atomic(path: Path, text: str) -> None:
    """`atomic_file` of a text. Raises OSError."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def copy_atomic(source: Path, target: Path) -> None:
    """Copies the file `source` to `target`: a reader sees the old one or the new one. A link stays a link. Raises OSError."""
    with atomic_file(Path(os.path.realpath(target))) as temporary:
        shutil.copyfile(source, temporary)


def write_durably(path: Path, content: bytes) -> None:
    """Writes a small file and flushes it to disk. Raises OSError naming it."""
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def sync_folder(path: Path) -> None:
    """Flushes the names in a folder to disk, if the file system supports it. Raises OSError naming it."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise OSError(error.errno, error.strerror, str(path)) from None


def discard(path: Path) -> None:
    """Deletes a file, a link or a folder as far as possible; a link's target stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def check_absent(folder: Path) -> None:
    """Raises UsageError if something exists under this name."""
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty, and nothing is overwritten: name a folder that does not exist")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file, and nothing is overwritten: name a folder that does not exist")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder `.tmp-…` next to it, renamed at the end; leftovers of a killed run stay in it for the next one.

    Raises UsageError if `folder` exists or its disk fails; then nothing is left.
    """
    check_absent(folder)
    temporary = folder.absolute().with_name(f".tmp-{folder.name}")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.rename(folder)
    except OSError as error:
        discard(temporary)
        raise UsageError(
            f"{folder} could not be written ({error.strerror or error}: {error.filename}), and nothing is left of it"
        ) from None
    except Exception:
        discard(temporary)
        raise
