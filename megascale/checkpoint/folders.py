"""The folders of checkpoints by name: listed, published by a rename, set aside, removed. Their content does not matter here."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from megascale.errors import UsageError
from megascale.files import discard, sync_folder, write_durably

LATEST = "latest"
ASIDE = "set-aside-"  # plus the time: checkpoints after the one to which a run went back, and whatever occupied a needed name
STEP = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def named_as_steps(root: Path) -> list[tuple[int, Path]]:
    """Everything in `root` with a checkpoint's name, including dangling links, as (step, path), oldest first.

    Empty if the folder does not exist. Raises UsageError if it cannot be listed.
    """
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        if root.is_symlink():
            raise UsageError(f"{root} is a link to {os.readlink(root)}, which does not exist: is its disk mounted?") from None
        return []
    except NotADirectoryError:
        raise UsageError(f"{root} is a file, but checkpoints need a folder of that name: move it away") from None
    except OSError as error:
        raise UsageError(
            f"{root} cannot be listed ({error.strerror or error}): check the disk and the permissions, then try again"
        ) from None
    found = ((STEP.fullmatch(name), root / name) for name in names)
    return sorted((int(match[1]), path) for match, path in found if match)


def steps_in(root: Path) -> list[tuple[int, Path]]:
    """Published checkpoints in `root` as (step, folder), oldest first. Raises UsageError if it cannot be listed."""
    return [(step, path) for step, path in named_as_steps(root) if path.is_dir()]


def aside_in(root: Path) -> Path:
    """A new folder name in `root` for things that are in the way but must not be deleted."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return next(p for n in range(1000) if not os.path.lexists(p := root / f"{ASIDE}{stamp}{f'-{n}' if n else ''}"))


def set_aside(path: Path, place: Path) -> Path:
    """Moves a file, folder or link into `place` under its old name. Raises OSError."""
    place.mkdir(parents=True, exist_ok=True)
    os.rename(path, place / path.name)
    return place / path.name


def publish(root: Path, temporary: Path, step: int) -> None:
    """Gives a finished temporary folder its name, then lets `latest` point to it. Raises OSError."""
    sync_folder(temporary)
    final = root / step_name(step)
    replaced, pointer = root / f".tmp-del-{final.name}", root / f".tmp-{LATEST}"
    for path, wanted in ((final, final.is_dir()), (root / LATEST, not (root / LATEST).is_dir())):
        if os.path.lexists(path) and not wanted:  # a file or a dangling link with a step's name, or a folder with that of the pointer
            set_aside(path, aside_in(root))
    if final.exists():  # two renames in a row: a folder cannot replace one that is not empty
        os.rename(final, replaced)
    try:
        os.rename(temporary, final)
        sync_folder(root)
        write_durably(pointer, f"{final.name}\n".encode())
        os.replace(pointer, root / LATEST)
        sync_folder(root)
    except OSError:  # restores the old state, so that nobody finds the failed one later
        discard(pointer)
        if final.exists():
            os.rename(final, temporary)
        if replaced.exists():
            os.rename(replaced, final)
        raise
    discard(replaced)


def remove(folder: Path) -> None:
    """Renames it first, so that nobody finds half a checkpoint. Raises OSError."""
    doomed = folder.with_name(f".tmp-del-{folder.name}")
    os.rename(folder, doomed)
    discard(doomed)
