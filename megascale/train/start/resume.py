"""Where a run starts from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from megascale.checkpoint.choose import Skipped, choose
from megascale.checkpoint.index import TRAINER, read_json
from megascale.checkpoint.loader import find
from megascale.checkpoint.trainer import read_progress, read_trainer
from megascale.comm.agreement import on_all_ranks
from megascale.config.identity import check_allow_change, identity, same_value
from megascale.config.schema import Config, Model
from megascale.errors import UsageError
from megascale.formats.hf.config import differences, hf_config
from megascale.formats.hf.folder import is_hf_folder
from megascale.formats.hf.model import read_hf
from megascale.formats.sources import Foreign
from megascale.formats.tokenizer_files import POSITION
from megascale.parallel.model import ParallelModel
from megascale.train.start.branch import Note
from megascale.train.start.changes import (
    Changes,
    Prints,
    Rates,
    changes_since,
    content_changes,
    curve_changes,
    moved_data,
    plugins_note,
    rates_at,
    told,
)

ORDER = ("run.seed", "train.seq_len")  # beside the data itself, what sample numbers mean


@dataclass(frozen=True)
class RunStart:
    """`folder` None: from fresh weights. `changes`: differences from the checkpoint's run that are allowed, {key: (then, now)}; `rates`:
    what they make of the learning rate. `checked`: all files have been read.

    foreign  how the weights of another format are made; None for a checkpoint of ours
    samples  where in the data a run begins that takes weights only
    notes    what is to be told: checkpoints that were left out, changes of the curve
    """

    folder: Path | None = None
    weights_only: bool = False
    changes: Changes = field(default_factory=dict)
    foreign: Foreign | None = None
    samples: int = 0
    checked: bool = False
    rates: Rates | None = None
    notes: tuple[Note, ...] = ()


def find_start(config: Config, run_dir: Path | None, prints: Prints, elsewhere: Path | None = None, origin: Path | None = None) -> RunStart:
    """The run's own newest whole checkpoint, so that a requeued job goes on; then `elsewhere`, then `init_from`, then nothing.

    run_dir    None: a run that writes nothing has no checkpoints of its own
    prints     what the data are
    elsewhere  a checkpoint of another run, which `resume` names and which has been read
    origin     the grown checkpoint that begins this phase, until there is a newer one

    Collective: the first rank chooses, and all see the same. Raises UsageError where a checkpoint belongs to another run or none is whole.
    """
    on_all_ranks(lambda: _check_asked(config))
    folder, skipped = (None, []) if run_dir is None else choose(run_dir / "checkpoints", origin)
    if folder is None and elsewhere is not None:
        folder = elsewhere
    if folder is None:
        source = config.checkpoint.init_from
        return RunStart() if source is None else on_all_ranks(lambda: _weights_from(config, Path(source), prints))
    return on_all_ranks(lambda: _from_run(config, folder, skipped, prints))


def _check_asked(config: Config) -> None:
    check_allow_change(config.run.allow_change)
    if config.checkpoint.export == "hf":
        hf_config(config.model, config.train.seq_len)  # refuses what could not be exported later


def _from_run(config: Config, folder: Path, skipped: list[Skipped], prints: Prints) -> RunStart:
    """All of a checkpoint, `folder`, which is whole. Raises UsageError where it is of another run."""
    saved = read_progress(folder)
    then = saved.get("config", {})
    known, told_of_it = changes_since(config, saved, folder, prints)
    changes = {**known, **curve_changes(config, then)}
    rates = rates_at(config, then, saved["step"]) if changes else None
    left_out = [
        Note(f"{s.folder.name} is left out: {s.why}", "checkpoint_skipped", {"folder": str(s.folder), "why": s.why}) for s in skipped
    ]
    return RunStart(
        folder, False, changes, checked=True, rates=rates, notes=(*left_out, *told_of_it, *plugins_note(saved), *told(changes, rates))
    )


def _weights_from(config: Config, folder: Path, prints: Prints) -> RunStart:
    """A run that takes its weights from elsewhere, checked as far as headers tell. Raises UsageError."""
    foreign = None
    try:
        other = is_hf_folder(folder)
    except (OSError, ValueError) as error:
        raise UsageError(f"checkpoint.init_from is {str(folder)[:200]!r}, which cannot be accessed ({error}): name a folder") from None
    if other:
        foreign = read_hf(folder, model=config.model, seq_len=config.train.seq_len)
        past = folder / POSITION
    else:
        folder = find(folder)
        past = folder / TRAINER
    if config.checkpoint.init_data == "restart":
        return RunStart(folder, True, foreign=foreign)
    if not past.is_file() or not isinstance(samples := _position(past).get("samples"), int):
        raise UsageError(f"checkpoint.init_data is continue, and {folder} does not say where in its data it stood: use restart")
    then, now = _position(past).get("identity", {}), identity(config)
    moved = []
    if past.name == TRAINER:
        moved = moved_data(config, _position(past), prints)
        content_changes(config, _position(past), prints)
    ours = [k for k in now if (k.startswith("data.") or k in ORDER) and k not in moved]
    changed = [k for k in ours if not same_value(k, then.get(k, now[k]), now[k])]
    if changed:
        lines = "; ".join(f"{k} was {then[k]!r} and is {now[k]!r}" for k in changed)
        raise UsageError(
            f"checkpoint.init_data is continue, and samples have another order than in {folder}: {lines}; set them back, or restart"
        )
    return RunStart(folder, True, foreign=foreign, samples=samples)


def _position(path: Path) -> dict[str, Any]:
    """Where in its data a run stood: in trainer.json, or in what stands for it beside an exported model."""
    if path.name == TRAINER:
        return read_trainer(path.parent)
    found = read_json(path)
    if not isinstance(found.get("identity", {}), dict):
        raise UsageError(f"{path}: identity is {found['identity']!r}, and it should be an object: use init_data restart")
    return found


def model_changes(config: Config, folder: Path) -> str:
    """What the model of a checkpoint's run says otherwise than this one's, for a message about tensors that do not fit; or nothing."""
    if not (folder / TRAINER).is_file():
        return ""
    saved = read_trainer(folder).get("config", {})
    if not isinstance(saved.get("model"), dict):
        return ""
    try:
        changed = differences(Model.model_validate(saved["model"]), config.model)
    except ValidationError:  # of another version
        return ""
    told = ", ".join(f"model.{key} was {then!r} and is {now!r}" for key, (then, now) in changed.items())
    return f"; {told}: set them back, or make another model of it with megascale grow" if changed else ""


def is_own(config: Config, folder: Path, saved: dict[str, Any]) -> bool:
    """Whether the checkpoint `folder`, with `saved` in its trainer.json, was written by the run that goes on from it: not by another one,
    nor by the one of which this run's directory is a copy under another run.name.
    """
    run_dir, place = Path(config.run_dir).resolve(), folder.resolve()
    if run_dir not in place.parents:
        return False
    name = saved.get("config", {}).get("run", {}).get("name")
    return name in (None, config.run.name) or "made" in saved  # a grown one is of no run by its name


def step_of(folder: Path) -> int:
    """Of a folder step-00000100."""
    return int(folder.name.rpartition("-")[2])


def check_coefficients(config: Config, model: ParallelModel, folder: Path | None) -> None:
    """Raises UsageError where a loaded layer's residual coefficient is not the one that the config's scheme and depth give.

    A model that grew keeps the old ones on purpose; `run.allow_change` with model.residual says so.
    """
    if "model.residual" in config.run.allow_change or "model" in config.run.allow_change:
        return
    for state in model.states:
        if state.spec.role == "coefficient":
            loaded, expected = state.tensor, torch.full_like(state.tensor, state.spec.mean)
            if not torch.allclose(loaded, expected, rtol=1e-6):
                raise UsageError(
                    f"{state.name} is {loaded[0].item():.6f} in {folder}, and model.residual {config.model.residual} at this depth gives "
                    f"{expected[0].item():.6f}: start from a checkpoint of this scheme and depth, or keep its coefficients with "
                    "run.allow_change='[model.residual]'"
                )
