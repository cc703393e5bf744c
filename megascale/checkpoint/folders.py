"""The folders of checkpoints by name: listed, published by a rename, set aside, removed. Nothing here knows what is in them."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from megascale.errors import UsageError
from megascale.files import discard, sync_folder, write_durably

LATEST = "latest"
ASIDE = "set-aside-"  # with the time: folders of checkpoints that a run has gone back behind, and of what was in its way
STEP = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def named_as_steps(root: Path) -> list[tuple[int, Path]]:
    """Whatever bears the name of a checkpoint in `root`, a link that leads nowhere included, as (step, path), oldest first.

    Nothing where there is no such folder. Raises UsageError where it cannot be listed: that is not the same.
    """
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        if root.is_symlink():
            raise UsageError(f"{root} is a link to {os.readlink(root)}, and nothing is there: is its disk mounted?") from None
        return []
    except NotADirectoryError:
        raise UsageError(f"{root} is a file, and checkpoints stand in a folder of that name: move it away") from None
    except OSError as error:
        raise UsageError(
            f"{root} cannot be listed ({error.strerror or error}): look at the disk and at who may read there, then try again"
        ) from None
    found = ((STEP.fullmatch(name), root / name) for name in names)
    return sorted((int(match[1]), path) for match, path in found if match)


def steps_in(root: Path) -> list[tuple[int, Path]]:
    """Published checkpoints in `root` as (step, folder), oldest first. Raises UsageError where it cannot be listed."""
    return [(step, path) for step, path in named_as_steps(root) if path.is_dir()]


def aside_in(root: Path) -> Path:
    """A new name in `root` for what is in the way and is nobody's to delete."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return next(p for n in range(1000) if not os.path.lexists(p := root / f"{ASIDE}{stamp}{f'-{n}' if n else ''}"))


def set_aside(path: Path, place: Path) -> Path:
    """Moves a file, folder or link as it is into `place`, under the name that it has. Raises OSError."""
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
    if final.exists():  # two renames with nothing between: a folder cannot be renamed onto one that is not empty
        os.rename(final, replaced)
    try:
        os.rename(temporary, final)
        sync_folder(root)
        write_durably(pointer, f"{final.name}\n".encode())
        os.replace(pointer, root / LATEST)
        sync_folder(root)
    except OSError:  # as it was before: what has failed must not be found later
        discard(pointer)
        if final.exists():
            os.rename(final, temporary)
        if replaced.exists():
            os.rename(replaced, final)
        raise
    discard(replaced)


def remove(folder: Path) -> None:
    """Takes the name away first, so that nobody finds half a checkpoint. Raises OSError."""
    doomed = folder.with_name(f".tmp-del-{folder.name}")
    os.rename(folder, doomed)
    discard(doomed)
