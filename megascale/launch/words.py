"""Checks words in a batch script: a file name or an option must never be read as a command or as another option."""

from __future__ import annotations

import re
from collections.abc import Iterable

from megascale.errors import UsageError

# Neither shells nor SLURM can quote these: a line end starts a new line of the script, and nothing can hold a NUL.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
# SLURM's parser of #SBATCH lines reads these as the end of a quotation and as an escape.
_SBATCH = re.compile(r'["\\]')


def check_line_words(words: Iterable[tuple[str, str | None]]) -> None:
    """Checks (what it is, its value) for values within one line. Raises UsageError for control characters."""
    for what, value in words:
        found = _CONTROL.search(value or "")
        if found is not None:
            raise UsageError(
                f"{what} is {value!r}: a script cannot hold {found[0]!r} there without running what follows as a command; take it out"
            )


def check_sbatch_words(words: Iterable[tuple[str, str | None]]) -> None:
    """The same for values of #SBATCH lines, which support little beyond quotation marks."""
    words = list(words)
    check_line_words(words)
    for what, value in words:
        found = _SBATCH.search(value or "")
        if found is not None:
            raise UsageError(f"{what} is {value!r}: {found[0]} is not allowed in an #SBATCH line; choose another value")


def check_shell_words(words: Iterable[tuple[str, str]]) -> None:
    """Values that the shell quotes as a whole, even several lines; refuses only what it cannot hold."""
    for what, value in words:
        if "\0" in value or re.search("[\ud800-\udfff]", value):
            raise UsageError(f"{what} is {value!r}: no argument and no variable can hold a NUL or half a surrogate pair; take it out")


def check_mounts(folders: Iterable[str]) -> None:
    """pyxis and apptainer parse FOLDER:FOLDER, separated by commas."""
    for folder in folders:
        if "," in folder or ":" in folder:
            raise UsageError(f"the container would have to see {folder}, but , and : separate its mounts: choose a folder without them")


def quoted(text: str) -> str:
    """A double-quoted value of an #SBATCH line."""
    return f'"{text}"' if re.search(r"[\s#']", text) else text
