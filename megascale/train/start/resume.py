"""Where a run starts from."""

from __future__ import annotations

import json
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
from megascale.formats.shapes import MODEL, our_shapes
from megascale.formats.sources import Foreign, open_checkpoint, own_of
from megascale.formats.tensor_maps import compare_names
from megascale.formats.tokenizer_files import POSITION
from megascale.parallel.model import ParallelModel
from megascale.train.phases import Phase
from megascale.train.start.branch import Note
from megascale.train.start.changes import (
    Changes,
    Prints,
    Rates,
    averages_note,
    changes_since,
    content_changes,
    curve_changes,
    moved_data,
    plugins_note,
    rates_at,
    told,
)

ORDER = ("run.seed", "train.seq_len")  # with the data itself, these define what sample numbers mean


@dataclass(frozen=True)
class RunStart:
    """`folder` None: fresh weights. `changes`: allowed differences from the checkpoint's run, {key: (then, now)}; `rates`: their effect on
    the learning rate. `checked`: all files have been read.

    foreign  how to build the weights from another format; None for a checkpoint of ours
    samples  position in the data of a run that takes weights only; `drawn`: the segments of it that are finished
    notes    warnings: skipped checkpoints, changes of the curve
    """

    folder: Path | None = None
    weights_only: bool = False
    changes: Changes = field(default_factory=dict)
    foreign: Foreign | None = None
    samples: int = 0
    drawn: tuple[dict[str, Any], ...] = ()
    checked: bool = False
    rates: Rates | None = None
    notes: tuple[Note, ...] = ()


def find_start(phase: Phase, run_dir: Path | None, prints: Prints, elsewhere: Path | None = None) -> RunStart:
    """Chooses the run's own newest whole checkpoint, so that a requeued job continues; else `elsewhere`, else `init_from`, else none.

    run_dir    None: a run that writes nothing, so it has no checkpoints
    prints     fingerprints of the data
    elsewhere  a checkpoint of another run that `resume` names; it has been read

    A grown checkpoint that begins the phase is used until there is a newer one.
    Collective: the first rank chooses for all. Raises UsageError if a checkpoint belongs to another run or none is whole.
    """
    config = phase.config
    on_all_ranks(lambda: _check_asked(config))
    folder, skipped = (None, []) if run_dir is None else choose(run_dir / "checkpoints", phase.origin)
    if folder is None and elsewhere is not None:
        folder = elsewhere
    if folder is None:
        source = config.checkpoint.init_from
        return RunStart() if source is None else on_all_ranks(lambda: _weights_from(config, Path(source), prints))
    return on_all_ranks(lambda: _from_run(phase, folder, skipped, prints))


def _check_asked(config: Config) -> None:
    check_allow_change(config.run.allow_change)
    if config.checkpoint.export == "hf":
        hf_config(config.model, config.train.seq_len)  # raises for a model that could not be exported later


def _from_run(phase: Phase, folder: Path, skipped: list[Skipped], prints: Prints) -> RunStart:
    """Starts from everything in the whole checkpoint `folder`. Raises UsageError if it belongs to another run."""
    saved = read_progress(folder)
    then = saved.get("config", {})
    check_phases(phase, saved, folder)
    # A phase begins with the checkpoint of the one before: what differs between their configs is no change of the run.
    config = phase.config
    if saved["step"] < phase.first and phase.before is not None:
        config = phase.before
        prints = {part: found if same_data(phase.before, phase.config, part) else {} for part, found in prints.items()}
    known, told_of_it = changes_since(config, saved, folder, prints)
    changes = {**known, **curve_changes(config, then)}
    rates = rates_at(config, then, saved["step"]) if changes and not phase.whole.phases else None
    left_out = [
        Note(f"{s.folder.name} is skipped: {s.why}", "checkpoint_skipped", {"folder": str(s.folder), "why": s.why}) for s in skipped
    ]
    return RunStart(
        folder, False, changes, checked=True, rates=rates,
        notes=(*left_out, *told_of_it, *plugins_note(saved), *told(changes, rates), *averages_note(config, then)),
    )  # fmt: skip


def same_data(before: Config, now: Config, part: str) -> bool:
    return bool(getattr(before.data, part) == getattr(now.data, part)) and before.data.valid_fraction == now.data.valid_fraction


def check_phases(phase: Phase, saved: dict[str, Any], folder: Path) -> None:
    """Raises UsageError if phases that had begun by the checkpoint `folder` are not those of the config; later ones may change."""
    then = [list(entry) for entry in saved.get("phases") or []]
    now = [[first, changes] for first, changes in phase.begun if first <= saved["step"]]
    if json.dumps(then, sort_keys=True) != json.dumps(now, sort_keys=True) and "phases" not in phase.config.run.allow_change:
        raise UsageError(
            f"phases that had begun by {folder} are {_listed(then)} there and {_listed(now)} now: set them back, choose another run.name, "
            "or allow it with run.allow_change='[phases]'; phases that have not begun may change"
        )


def _listed(entries: list[list[Any]]) -> str:
    return "; ".join(f"from step {first}: {', '.join(f'{k}={v}' for k, v in changes.items())}" for first, changes in entries) or "none"


def _weights_from(config: Config, folder: Path, prints: Prints) -> RunStart:
    """Starts from the weights in another folder, checked by their headers. Raises UsageError."""
    foreign = None
    try:
        other = is_hf_folder(folder)
    except (OSError, ValueError) as error:
        raise UsageError(f"checkpoint.init_from is {str(folder)[:200]!r}, which cannot be accessed ({error}): name a folder") from None
    average = config.checkpoint.init_ema
    if other and average is not None:
        raise UsageError(f"checkpoint.init_ema is {average}, but {folder} is a Hugging Face folder, which has no averages: leave it out")
    if other:
        foreign = read_hf(folder, model=config.model, seq_len=config.train.seq_len)
        past = folder / POSITION
    else:
        folder = find(folder)
        past = folder / TRAINER
        foreign = _average(config, folder, average)
    if config.checkpoint.init_data == "restart":
        return RunStart(folder, True, foreign=foreign)
    if not past.is_file() or not isinstance(samples := _position(past).get("samples"), int):
        raise UsageError(f"checkpoint.init_data is continue, but {folder} does not record its position in the data: use restart")
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
            f"checkpoint.init_data is continue, but samples have another order than in {folder}: {lines}; set them back, or restart"
        )
    drawn = tuple(_position(past).get("drawn") or ())
    return RunStart(folder, True, foreign=foreign, samples=samples, drawn=drawn)


def _average(config: Config, folder: Path, name: str | None) -> Foreign | None:
    """An average of a checkpoint of ours as this run's weights: `name`, or that of the run's optimizer. None if it has none and `name` is
    None. Raises UsageError if they are another model's.
    """
    if name is None and own_of(read_trainer(folder).get("config") or {}) is None:
        return None
    opened = open_checkpoint(folder, name, "checkpoint.init_ema")
    held = {n: t for n, t in opened.source.tensors.items() if n.startswith(MODEL)}
    ours = our_shapes(config.model, config.train.seq_len)
    compare_names({MODEL + n: s for n, s in ours.items()}, held, str(folder))
    return Foreign(opened.model, opened.seq_len, list(held.values()), opened.source.read, {}, opened.source.stamp)


def _position(path: Path) -> dict[str, Any]:
    """Reads a run's position in its data, from trainer.json or its counterpart next to an exported model."""
    if path.name == TRAINER:
        return read_trainer(path.parent)
    found = read_json(path)
    if not isinstance(found.get("identity", {}), dict):
        raise UsageError(f"{path}: identity is {found['identity']!r}, but it should be an object: use init_data restart")
    return found


def model_changes(config: Config, folder: Path) -> str:
    """Differences between a checkpoint's model and this run's, for a message about tensors that do not fit; empty without any."""
    if not (folder / TRAINER).is_file():
        return ""
    saved = read_trainer(folder).get("config", {})
    if not isinstance(saved.get("model"), dict):
        return ""
    try:
        changed = differences(Model.model_validate(saved["model"]), config.model)
    except ValidationError:  # from another version
        return ""
    told = ", ".join(f"model.{key} was {then!r} and is {now!r}" for key, (then, now) in changed.items())
    return f"; {told}: set them back, or convert the model with megascale grow" if changed else ""


def is_own(config: Config, folder: Path, saved: dict[str, Any]) -> bool:
    """Whether the checkpoint `folder`, with `saved` in its trainer.json, was written by the run that continues from it: not by another one,
    nor by the run from which this directory was copied under a new run.name.
    """
    run_dir, place = Path(config.run_dir).resolve(), folder.resolve()
    if run_dir not in place.parents:
        return False
    name = saved.get("config", {}).get("run", {}).get("name")
    return name in (None, config.run.name) or "made" in saved  # a grown checkpoint belongs to no run by name


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name: step-00000100 → 100."""
    return int(folder.name.rpartition("-")[2])


def check_coefficients(config: Config, model: ParallelModel, folder: Path | None) -> None:
    """Raises UsageError if a loaded layer's residual coefficient differs from that of the config's scheme and depth.

    A grown model keeps the old ones on purpose: set `run.allow_change` to model.residual.
    """
    if "model.residual" in config.run.allow_change or "model" in config.run.allow_change:
        return
    for state in model.states:
        if state.spec.role == "coefficient":
            loaded, expected = state.tensor, torch.full_like(state.tensor, state.spec.mean)
            if not torch.allclose(loaded, expected, rtol=1e-6):
                raise UsageError(
                    f"{state.name} is {loaded[0].item():.6f} in {folder}, but model.residual {config.model.residual} at this depth gives "
                    f"{expected[0].item():.6f}: start from a checkpoint of this scheme and depth, or keep its coefficients with "
                    "run.allow_change='[model.residual]'"
                )
