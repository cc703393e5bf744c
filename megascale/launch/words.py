"""What may stand in a batch script, and where: a file name or an option must never be read as a command, or as another option."""

from __future__ import annotations

import re
from collections.abc import Iterable

from megascale.errors import UsageError

# No shell and no SLURM quotes these: a line end starts a new line of the script, and nothing can hold a NUL.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
# SLURM's own reader of #SBATCH lines takes these for the end of a quotation, and for a sign that the next letter counts as it is.
_SBATCH = re.compile(r'["\\]')


def check_line_words(words: Iterable[tuple[str, str | None]]) -> None:
    """(what it is, its value) of all that stands within one line. Raises UsageError for control characters."""
    for what, value in words:
        found = _CONTROL.search(value or "")
        if found is not None:
            raise UsageError(
                f"{what} is {value!r}: a script cannot hold {found[0]!r} there without running what follows as a command; take it out"
            )


def check_sbatch_words(words: Iterable[tuple[str, str | None]]) -> None:
    """The same for values of #SBATCH lines, which know quotation marks and hardly anything else."""
    words = list(words)
    check_line_words(words)
    for what, value in words:
        found = _SBATCH.search(value or "")
        if found is not None:
            raise UsageError(f"{what} is {value!r}: {found[0]} cannot stand in an #SBATCH line; choose another")


def check_shell_words(words: Iterable[tuple[str, str]]) -> None:
    """Values that the shell quotes whole, several lines too; only what it cannot hold is refused."""
    for what, value in words:
        if "\0" in value or re.search("[\ud800-\udfff]", value):
            raise UsageError(f"{what} is {value!r}: no argument and no variable can hold a NUL or half a surrogate pair; take it out")


def check_mounts(folders: Iterable[str]) -> None:
    """pyxis and apptainer read FOLDER:FOLDER, and commas between them."""
    for folder in folders:
        if "," in folder or ":" in folder:
            raise UsageError(f"the container would have to see {folder}, and , and : divide its mounts: choose a folder without them")


def quoted(text: str) -> str:
    """A value of an #SBATCH line, which knows double quotes."""
    return f'"{text}"' if re.search(r"[\s#']", text) else text
