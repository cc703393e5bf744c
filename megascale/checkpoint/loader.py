"""Finding, checking and loading checkpoints."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from megascale.checkpoint.index import DTYPES, INDEX, TRAINER, Index, file_problem, read_index, read_json
from megascale.checkpoint.planning import LoadPlanner, some, views
from megascale.checkpoint.shards import Part, check_parts
from megascale.checkpoint.storage import LATEST, ShardReader, steps_in
from megascale.comm.piece import Piece
from megascale.errors import MegascaleError, UsageError

T = TypeVar("T")


def newest(root: str | Path) -> Path | None:
    """The checkpoint that `latest` names in a `checkpoints` folder, or the last one with a sound index where that one is gone or damaged.

    None where there is none. Looks at index.json alone: `verify` and `load` read the files.
    """
    root = Path(root)
    folders = [path for _, path in reversed(steps_in(root))]
    try:
        named = (root / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        named = ""
    # Only a name that stands in this folder counts, so that the text cannot lead out of it.
    for path in sorted(folders, key=lambda p: p.name != named):
        try:
            read_index(path)
        except UsageError:
            continue
        return path
    return None


def find(path: str | Path) -> Path:
    """A step folder, a run's directory or its `checkpoints` folder → the step folder. Raises UsageError."""
    where = Path(path)
    if (where / INDEX).is_file():
        return where
    for root in (where / "checkpoints", where):
        found = newest(root) if root.is_dir() else None
        if found is not None:
            return found
    if any(where.glob("*.safetensors")):
        raise UsageError(f"{where} has shards and no {INDEX}: it is not a checkpoint of megascale, or not a whole one{_elsewhere(where)}")
    raise UsageError(f"{where} is no checkpoint and holds none: name a folder step-…, or a run's directory with checkpoints in it")


def verify(path: str | Path | Index) -> list[str]:
    """Reads all of a step folder and returns what is wrong with it: nothing when each file has the indexed size and checksum."""
    try:
        index = path if isinstance(path, Index) else read_index(path)
    except UsageError as error:
        return [str(error)]
    problems = [p for name in sorted(index.files) if (p := file_problem(index, name)) is not None]
    if problems:
        return problems
    by_file: dict[str, list[Part]] = {}
    for name, entry in index.tensors.items():
        for c in entry.chunks:
            part = Part(entry.key(name, c), DTYPES[entry.dtype], c.sizes, (0,) * len(c.sizes), c.sizes)
            by_file.setdefault(c.file, []).append(part)
    checks: list[Callable[[], object]] = [
        functools.partial(check_parts, index.folder / file, parts) for file, parts in sorted(by_file.items())
    ]
    checks.append(functools.partial(read_json, index.folder / TRAINER))
    for check in checks:
        try:
            check()
        except UsageError as error:
            problems.append(str(error))
    return problems


def load(path: str | Path, state: dict[str, Piece], group: dist.ProcessGroup | None = None, prefix: str | None = None) -> dict[str, Any]:
    """Fills the pieces of `state` in place from a step folder, saved on any layout, and returns the trainer's JSON.

    group   the ranks that load together (all of them when None); every one must call
    prefix  only names that begin with it are loaded; the others, stored or in `state`, are left alone

    Raises UsageError on every rank, and before anything is changed, for files that are missing or damaged, and for names, shapes and dtypes
    that differ. The files are divided between the ranks to be checked.
    """
    ranks = Agreement(group)
    wanted = {n: p for n, p in state.items() if prefix is None or n.startswith(prefix)}

    def prepare() -> tuple[Index, dict[str, Any], LoadPlanner, Any]:
        index = read_index(path)
        planner = LoadPlanner(str(path))
        planner.set_up_planner(views(wanted), ShardReader(index).read_metadata(), ranks.rank == 0)
        return index, read_json(index.folder / TRAINER), planner, planner.create_local_plan()

    (index, trainer, planner, plan), _ = ranks.all(prepare, lambda result: None)
    names = sorted(n for n in index.tensors if prefix is None or n.startswith(prefix))
    # What nobody asks for, as one bit a name: the names of all ranks together would be many.
    _, everyone = ranks.all(lambda: sum(1 << i for i, n in enumerate(names) if n not in wanted), lambda bits: bits)
    unasked = functools.reduce(operator.and_, everyone)
    extra = [n for i, n in enumerate(names) if unasked >> i & 1]
    if extra:
        raise UsageError(f"{path} also holds {some(extra)}, which nobody here asks for: it was saved by another model or optimizer")

    files = sorted({TRAINER} | {c.file for n in names for c in index.tensors[n].chunks})

    def check() -> None:
        for name in files[ranks.rank :: ranks.size]:
            problem = file_problem(index, name)
            if problem:
                raise UsageError(f"the checkpoint is damaged: {problem}; resume from an older one with checkpoint.resume=FOLDER")

    reader = ShardReader(index)
    ranks.all(check, lambda result: None)
    ranks.all(lambda: reader.check(plan), lambda result: None)
    ranks.all(lambda: reader.read_data(plan, planner).wait(), lambda result: None)
    return trainer


class Agreement:
    """Ranks that go on together, or fail together: none waits for one that has stopped."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        alone = not dist.is_initialized()
        self.group, self.rank, self.size = group, 0 if alone else dist.get_rank(group), 1 if alone else dist.get_world_size(group)

    def all(self, work: Callable[[], T], share: Callable[[T], Any]) -> tuple[T, list[Any]]:
        """Runs `work` on every rank; returns its result here and what every rank shares of its own.

        Where it fails on some, the lowest of them is blamed on all, with a UsageError if it was one; a failure that is no MegascaleError, a
        bug, is raised as it is where it happened.
        """
        if self.size == 1:
            result = work()
            return result, [share(result)]
        mine: tuple[str | None, bool, Any]
        failure: BaseException | None = None
        try:
            result = work()
            mine = (None, False, share(result))
        except Exception as error:
            failure = error
            mine = (
                str(error) if isinstance(error, MegascaleError) else f"{type(error).__name__}: {error}",
                isinstance(error, MegascaleError),
                None,
            )
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, mine, group=self.group)
        for rank, (message, usage, _) in enumerate(everyone):
            if message is not None:
                if failure is not None and not isinstance(failure, MegascaleError):
                    raise failure
                raise UsageError(message) if usage else RuntimeError(f"rank {rank} failed to load: {message}")
        return result, [shared for _, _, shared in everyone]


def _elsewhere(folder: Path) -> str:
    """What to do with a folder that Hugging Face's tools wrote."""
    if not (folder / "config.json").is_file():
        return ""
    return f"; for a Hugging Face model begin with tools/convert.py {folder} DST --from hf --to megascale, and give DST"
