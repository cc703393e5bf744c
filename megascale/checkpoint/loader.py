"""Finding, checking and loading checkpoints."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megascale.checkpoint.choose import none_whole, propose
from megascale.checkpoint.index import DTYPES, INDEX, TRAINER, Damaged, Index, file_problem, read_index
from megascale.checkpoint.shards import FilePart, check_parts
from megascale.checkpoint.trainer import read_trainer
from megascale.comm.agreement import Agreement
from megascale.comm.piece import Piece
from megascale.errors import UsageError

if TYPE_CHECKING:
    from megascale.checkpoint.planning import LoadPlanner


def newest(root: str | Path) -> Path | None:
    """The checkpoint that `latest` names in a `checkpoints` folder, or the last one with valid JSON if that one is gone or damaged.

    None without any. Checks only the JSON: `verify`, `load` and `choose` read the files. Raises UsageError if all are damaged, or one
    cannot be read for another reason.
    """
    found, skipped = propose(Path(root), [])
    if found is None and skipped:
        raise Damaged(none_whole(Path(root), skipped))
    return found


def find(path: str | Path) -> Path:
    """A step folder, a run's directory or its `checkpoints` folder → the step folder. Raises UsageError."""
    where = Path(path)
    try:
        if (where / INDEX).is_file():
            return where
        for root in (where / "checkpoints", where):
            found = newest(root) if root.is_dir() else None
            if found is not None:
                return found
        shards = any(where.glob("*.safetensors"))
    except (OSError, ValueError) as error:  # the name is too long or contains a zero byte
        raise UsageError(f"{str(where)[:200]!r} cannot be accessed ({error}): name a folder step-…, or a run's directory") from None
    if shards:
        raise UsageError(f"{where} has shards but no {INDEX}: it is not a checkpoint of megascale, or not a whole one{_elsewhere(where)}")
    raise UsageError(f"{where} is not a checkpoint and holds none: name a folder step-…, or a run's directory with checkpoints in it")


def verify(path: str | Path | Index) -> list[str]:
    """Reads a whole step folder and lists its problems: none if each file has the indexed size and checksum."""
    try:
        index = path if isinstance(path, Index) else read_index(path)
    except UsageError as error:
        return [str(error)]
    try:
        problems = [p for name in sorted(index.files) if (p := file_problem(index, name)) is not None]
    except UsageError as error:
        return [str(error)]
    if problems:
        return problems
    by_file: dict[str, list[FilePart]] = {}
    for name, entry in index.tensors.items():
        for c in entry.chunks:
            part = FilePart(entry.key(name, c), DTYPES[entry.dtype], c.sizes, (0,) * len(c.sizes), c.sizes)
            by_file.setdefault(c.file, []).append(part)
    checks: list[Callable[[], object]] = [
        functools.partial(check_parts, index.folder / file, parts) for file, parts in sorted(by_file.items())
    ]
    checks.append(functools.partial(read_trainer, index.folder))
    for check in checks:
        try:
            check()
        except UsageError as error:
            problems.append(str(error))
    return problems


def load(
    path: str | Path,
    state: dict[str, Piece],
    group: dist.ProcessGroup | None = None,
    prefix: str | None = None,
    checked: bool = False,
    free: Callable[[str], bool] = lambda name: False,
) -> dict[str, Any]:
    """Fills the pieces of `state` in place from a step folder that any layout saved, and returns the trainer's JSON.

    group    the ranks that load together (None: all); all must call
    prefix   load only names with this prefix; all others, stored or in `state`, are ignored
    checked  `choose` or `confirm` has already verified the checksums
    free     names that the checkpoint may lack, which stay as they are, and names in it that nobody needs to ask for

    Raises UsageError on every rank, before anything is changed, for missing or damaged files and for names, shapes and dtypes that differ.
    The ranks share the work of verifying files.
    """
    # Imported here: DCP would slow the start of runs without a checkpoint.
    from megascale.checkpoint.planning import LoadPlanner, some, views
    from megascale.checkpoint.storage import ShardReader

    ranks = Agreement(group)
    wanted = {n: p for n, p in state.items() if prefix is None or n.startswith(prefix)}

    def prepare() -> tuple[Index, dict[str, Any], LoadPlanner, Any]:
        index = read_index(path)
        for name in [n for n in wanted if free(n) and n not in index.tensors]:
            del wanted[name]
        reader = ShardReader(index)
        planner = LoadPlanner(str(path), reader.overlapping)
        planner.set_up_planner(views(wanted), reader.read_metadata(), ranks.rank == 0)
        return index, read_trainer(index.folder), planner, planner.create_local_plan()

    (index, trainer, planner, plan), _ = ranks.all(prepare, lambda result: None)
    stored = sorted(n for n in index.tensors if prefix is None or n.startswith(prefix))
    names = [n for n in stored if not free(n)]
    # Names that nobody asks for, as one bit per name: gathering the names of all ranks would be large.
    _, everyone = ranks.all(lambda: sum(1 << i for i, n in enumerate(names) if n not in wanted), lambda bits: bits)
    unasked = functools.reduce(operator.and_, everyone)
    extra = [n for i, n in enumerate(names) if unasked >> i & 1]
    if extra:
        raise UsageError(f"{path} also holds {some(extra)}, which nobody here asks for: it was saved by another model or optimizer")

    if not checked:
        check_files(index, {TRAINER}.union(*(index.tensors[n].files() for n in stored)), ranks)
    reader = ShardReader(index)
    ranks.all(lambda: reader.check(plan), lambda result: None)
    ranks.all(lambda: reader.read_data(plan, planner).wait(), lambda result: None)
    return trainer


def check_files(index: Index, names: Collection[str], ranks: Agreement) -> None:
    """Verifies files of a checkpoint, which the ranks share among them. Raises UsageError on every rank."""
    files = sorted(names)

    def check() -> None:
        for name in files[ranks.rank :: ranks.size]:
            problem = file_problem(index, name)
            if problem:
                raise UsageError(f"the checkpoint is damaged: {problem}; name an older one")

    ranks.all(check, lambda result: None)


def _elsewhere(folder: Path) -> str:
    """Advice on a folder that Hugging Face's tools wrote."""
    if not (folder / "config.json").is_file():
        return ""
    return f"; convert a Hugging Face model first (megascale convert {folder} DST --from hf --to megascale), and give DST"
