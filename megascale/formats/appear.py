"""A folder that appears under its name only when all of it is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megascale.checkpoint.storage import discard
from megascale.errors import UsageError


def check_absent(folder: Path) -> None:
    """Raises UsageError where something stands under this name."""
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty, and nothing is written over: name a folder that does not exist")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file, and nothing is written over: name a folder that does not exist")


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """Gives a folder `.tmp-…` beside it to write into, renamed at the end; what a killed run left in there stays for the next one.

    Raises UsageError where `folder` exists or its disk fails; then nothing is left.
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
    except UsageError:
        discard(temporary)
        raise
