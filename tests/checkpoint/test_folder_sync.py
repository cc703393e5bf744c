"""File systems that cannot sync a folder, and those that can and fail."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from megascale.checkpoint.loader import find, verify
from megascale.files import sync_folder, write_durably
from tests.checkpoint.states import checkpointer, vector


def failing(number: int, kind: Callable[[int], bool]) -> Callable[[int], None]:
    """os.fsync that fails for folders, or for files."""
    real = os.fsync

    def fsync(handle: int) -> None:
        if kind(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        real(handle)

    return fsync


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_file_systems_without_a_sync_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Catches a run on CIFS or FUSE none of whose saves succeeds, which it learns of at its end."""
    monkeypatch.setattr(os, "fsync", failing(number, stat.S_ISDIR))
    saver = checkpointer(tmp_path)
    saver.save(1, vector(1.0), {"step": 1})
    assert [(e.kind, e.message) for e in saver.finish()] == [("saved", "")] and verify(find(tmp_path)) == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_disks_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Catches a disk's failure that is taken for a file system's habit, and an error that does not name its folder."""
    monkeypatch.setattr(os, "fsync", failing(number, stat.S_ISDIR))
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        sync_folder(tmp_path)
    assert caught.value.filename == str(tmp_path)


def test_a_file_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the leniency towards folders spreading to files, whose content would not be on disk."""
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL, stat.S_ISREG))
    with pytest.raises(OSError, match=r"trainer\.json"):
        write_durably(tmp_path / "trainer.json", b"{}")
