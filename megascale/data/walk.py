"""Inputs and folders → the files to read, and messages about what was left out."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePath

from megascale.data.forms import Form, form_of, readers
from megascale.errors import UsageError

OUTPUTS = (".json", ".model", ".tokenizer.json", ".bin", ".idx")  # endings of a preparation's output files
STREAMS = ("/dev/", "/proc/")  # where shells expose pipes


@dataclass
class Chosen:
    """`files` in order, with their `forms`. `left_out`: reason → paths."""

    files: list[Path] = field(default_factory=list)
    forms: dict[Path, Form] = field(default_factory=dict)
    left_out: dict[str, list[Path]] = field(default_factory=dict)

    def leave(self, path: Path, why: str) -> None:
        self.left_out.setdefault(why, []).append(path)

    def sentences(self) -> list[str]:
        """Messages for the screen."""
        said = [f"left out {paths[0]}{f' and {n} more' if (n := len(paths) - 1) else ''}: {why}" for why, paths in self.left_out.items()]
        unusual = [path for path, form in self.forms.items() if form.unusual]
        if unusual:
            said.append(f"{len(unusual)} files are read as JSON lines by what is in them, such as {unusual[0]}")
        kinds = {kind: [p for p, f in self.forms.items() if f.kind == kind] for kind in readers()}
        mixed = [f"{len(paths)} of {kind} ({paths[0].name} …)" for kind, paths in kinds.items() if paths]
        if len(mixed) > 1:
            said.append(f"the files are of several kinds, all of which are taken: {', '.join(mixed)}; --pattern takes one")
        return said


def choose_files(
    inputs: Sequence[Path], pattern: str, exclude: Sequence[str], keys: tuple[str, ...], once: bool = True, outputs: Sequence[Path] = ()
) -> Chosen:
    """The files below `inputs` (`find_files`) that can be read, each real file only `once`, and without `outputs`.

    Unreadable files found in a folder are left out and reported. Raises UsageError for an unreadable input that was named itself, or if
    nothing is left.
    """
    chosen = Chosen()
    files = find_files(inputs, pattern, exclude, chosen)
    named = set(inputs)
    if once:
        files = _once(files, chosen)
    for path in files:
        if path in outputs:
            continue
        try:
            form = form_of(path, keys)
        except OSError as error:
            form = Form("other", why=f"cannot be read ({error.strerror or error}): fix that, or leave it out")
        if form.kind != "other":
            if form.kind == "parquet" or form.packing:
                check_not_empty(path)
            chosen.forms[path] = form
            chosen.files.append(path)
        elif path in named:
            raise UsageError(f"{path} {form.why}")
        else:
            chosen.leave(path, form.why)
    if not chosen.forms:
        why = "; ".join(chosen.sentences()) or "all are outputs"
        raise UsageError(f"no file is left to read in {', '.join(map(str, inputs))}: {why}")
    return chosen


def check_not_empty(path: Path) -> None:
    """Raises UsageError for an empty file. Text may be empty; a compressed or Parquet file never is, so its text would be missing."""
    if path.stat().st_size == 0:
        raise UsageError(f"{path} has no bytes, as after a download that failed: make or copy it again, or leave it out")


def find_files(inputs: Sequence[Path], pattern: str, exclude: Sequence[str] = (), chosen: Chosen | None = None) -> list[Path]:
    """The inputs, with folders replaced by the files below that match `pattern`, in sorted order. Links to folders are followed, each real
    folder once. Hidden files, earlier outputs and unreadable folders are left out and reported in `chosen`.

    `exclude`: names of folders to skip, unless they are the input. Raises UsageError for an input that does not exist.
    """
    chosen = chosen or Chosen()
    if not pattern or PurePath(pattern).is_absolute() or "\0" in pattern:
        raise UsageError(f"--pattern {pattern!r} is matched below the folders that are given: make it relative, such as '*.txt'")
    files: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for path in inputs:
        if os.path.isdir(path):
            below = sorted(_below(path, PurePath(pattern).parts, set(exclude), seen, chosen))
            if not below and not chosen.left_out:
                raise UsageError(f"the folder {path} has no file that matches --pattern {pattern!r}")
            files += below
        elif os.path.exists(path):
            files.append(path)
        elif str(path) == "-" or str(path).startswith(STREAMS):
            raise UsageError(f"{path} is not an ordinary file, but inputs are read more than once: write it to a file and give that")
        else:
            raise UsageError(f"there is no input {str(path)[:300]}: correct the path")
    return files


def _below(root: Path, pattern: tuple[str, ...], exclude: set[str], seen: set[tuple[int, int]], chosen: Chosen) -> list[Path]:
    """Files below a folder. Links come after all real folders, so that a file below the root twice keeps its real path."""
    files: list[Path] = []
    folders, links = [root], list[Path]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            facts = folder.stat()
            if (facts.st_dev, facts.st_ino) in seen:
                if folder.is_symlink() or folder == root:
                    chosen.leave(folder, "leads to a folder that is read already")
                continue
            seen.add((facts.st_dev, facts.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            if folder == root:
                raise UsageError(f"the folder {folder} cannot be read ({error.strerror or error}): fix that, or leave it out") from None
            chosen.leave(folder, f"cannot be read ({error.strerror or error})")
            continue
        made = _outputs({entry.name for entry in entries})
        for entry in entries:
            path = folder / entry.name
            if entry.is_dir():
                if entry.name not in exclude and not _hidden(path, pattern, chosen):
                    (links if entry.is_symlink() else folders).append(path)
            elif _matches(path.relative_to(root).parts, ("**", *pattern)) and not _hidden(path, pattern, chosen):
                if entry.name in made:
                    chosen.leave(path, "is of an earlier preparation")
                else:
                    files.append(path)
    return files


def _hidden(path: Path, pattern: tuple[str, ...], chosen: Chosen) -> bool:
    """Whether a name begins with a dot but the pattern does not."""
    if not path.name.startswith(".") or any(part.startswith(".") for part in pattern):
        return False
    chosen.leave(path, "is hidden, its name begins with a dot")
    return True


def _outputs(names: set[str]) -> set[str]:
    """The names in a folder that a preparation wrote: those next to tokens and their index."""
    prefixes = {name[: -len(".idx")] for name in names if name.endswith(".idx") and name[: -len(".idx")] + ".bin" in names}
    return {prefix + ending for prefix in prefixes for ending in OUTPUTS} & names


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Matches like pathlib; `**` is any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[skip:], pattern[1:]) for skip in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _once(files: list[Path], chosen: Chosen) -> list[Path]:
    """Removes duplicates by link or by being named twice; the real path stays."""
    known: set[tuple[int, int]] = set()
    kept: set[int] = set()
    for place, path in sorted(enumerate(files), key=lambda item: (item[1].is_symlink(), item[0])):
        try:
            facts = path.stat()
        except OSError:  # reported when it is opened
            kept.add(place)
            continue
        if (facts.st_dev, facts.st_ino) in known and stat.S_ISREG(facts.st_mode):
            chosen.leave(path, "is the same file as another one")
        else:
            known.add((facts.st_dev, facts.st_ino))
            kept.add(place)
    return [path for place, path in enumerate(files) if place in kept]
