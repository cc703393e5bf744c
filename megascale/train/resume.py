"""Where a run starts from, and whether its directory is its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from megascale.checkpoint.index import TRAINER, read_json
from megascale.checkpoint.loader import find, newest
from megascale.config.identity import check_allow_change, check_identity, identity
from megascale.config.load import build_config, read_yaml
from megascale.config.schema import Config, Model
from megascale.errors import UsageError
from megascale.formats.hf import Foreign, read_hf
from megascale.formats.hf_config import differences, hf_config
from megascale.formats.hf_folder import is_hf_folder
from megascale.formats.tokenizer_files import POSITION
from megascale.parallel.apply import ParallelModel

OWN_FILES = ("config.yaml", "metrics.jsonl", "events.jsonl", "checkpoints")
ORDER = ("run.seed", "train.seq_len")  # beside the data itself, what sample numbers mean


@dataclass(frozen=True)
class Start:
    """`folder` None: from fresh weights. `changes`: allowed differences from the checkpoint's run, {key: (then, now)}.

    foreign  how the weights of another format are made; None for a checkpoint of ours
    samples  where in the data a run begins that takes weights only
    """

    folder: Path | None = None
    weights_only: bool = False
    changes: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    foreign: Foreign | None = None
    samples: int = 0


def find_start(config: Config, run_dir: Path, whole: Config | None = None, origin: Path | None = None) -> Start:
    """The run's own newest checkpoint first, so that a requeued job goes on; then `resume: DIR`, then `init_from`, then nothing.

    whole   the config that the run was begun with, where it grows and `config` is of a later phase; `origin` the grown checkpoint that
            begins this phase, until there is a newer one

    Raises UsageError where a checkpoint belongs to another run or is not there.
    """
    check_allow_change(config.run.allow_change)
    if config.checkpoint.export == "hf":
        hf_config(config.model, config.train.seq_len)  # refuses what could not be exported later
    wanted = config.checkpoint.resume
    _check_owner(whole or config, run_dir)
    own = newest(run_dir / "checkpoints")
    if origin is not None and (own is None or step_of(own) <= step_of(origin)):
        own = origin
    if wanted == "never":
        if own is not None:
            raise UsageError(
                f"checkpoint.resume is never and {run_dir} already holds a run up to {own.name}: choose another run.name, or resume auto"
            )
        folder = None
    else:
        folder = own if own is not None or wanted == "auto" else find(wanted)
    if folder is not None:
        saved = read_json(folder / "trainer.json")
        if not isinstance(saved.get("identity"), dict) or not isinstance(saved.get("step"), int):
            raise UsageError(
                f"{folder / 'trainer.json'} is not from pretraining (no identity or step): start from its weights with checkpoint.init_from"
            )
        return Start(folder, False, check_identity(config, saved["identity"], str(folder)))
    return Start() if config.checkpoint.init_from is None else _weights_from(config, Path(config.checkpoint.init_from))


def _weights_from(config: Config, folder: Path) -> Start:
    """A run that takes its weights from elsewhere, checked as far as headers tell. Raises UsageError."""
    foreign = None
    if is_hf_folder(folder):
        foreign = read_hf(folder, model=config.model, seq_len=config.train.seq_len)
        past = folder / POSITION
    else:
        folder = find(folder)
        past = folder / TRAINER
    if config.checkpoint.init_data == "restart":
        return Start(folder, True, foreign=foreign)
    if not past.is_file() or not isinstance(samples := read_json(past).get("samples"), int):
        raise UsageError(f"checkpoint.init_data is continue, and {folder} does not say where in its data it stood: use restart")
    then, now = read_json(past).get("identity", {}), identity(config)
    changed = [k for k in now if (k.startswith("data.") or k in ORDER) and then.get(k, now[k]) != now[k]]
    if changed:
        lines = "; ".join(f"{k} was {then[k]!r} and is {now[k]!r}" for k in changed)
        raise UsageError(
            f"checkpoint.init_data is continue, and samples have another order than in {folder}: {lines}; set them back, or restart"
        )
    return Start(folder, True, foreign=foreign, samples=samples)


def model_changes(config: Config, folder: Path) -> str:
    """What the model of a checkpoint's run says otherwise than this one's, for a message about tensors that do not fit; or nothing."""
    saved = read_json(folder / TRAINER).get("config")
    if not isinstance(saved, dict) or not isinstance(saved.get("model"), dict):
        return ""
    try:
        changed = differences(Model.model_validate(saved["model"]), config.model)
    except ValidationError:  # of another version
        return ""
    told = ", ".join(f"model.{key} was {then!r} and is {now!r}" for key, (then, now) in changed.items())
    return f"; {told}: set them back, or make another model of it with tools/grow.py" if changed else ""


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


def claim_run_dir(config: Config, run_dir: Path, start: Start) -> None:
    """Makes the run's directory, or says why it cannot be written."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / ".writable").touch()
        (run_dir / ".writable").unlink()
    except OSError as error:
        raise UsageError(f"the run directory {run_dir} cannot be written ({error.strerror}): choose another run.dir") from None


def _check_owner(config: Config, run_dir: Path) -> None:
    """A directory with other files in it, or with another run, is not ours."""
    if not run_dir.exists():
        return
    if not run_dir.is_dir():
        raise UsageError(f"run.dir {run_dir} is a file: choose another run.name or run.dir")
    names = {p.name for p in run_dir.iterdir()}
    if names and not names & set(OWN_FILES) and names - {"exit.json", "STOP", "launch"}:
        raise UsageError(
            f"run.dir {run_dir} holds files that are no run's ({', '.join(sorted(names)[:3])}): choose another run.name or run.dir"
        )
    if (run_dir / "config.yaml").is_file():
        there = build_config(read_yaml(run_dir / "config.yaml"))
        check_identity(config, identity(there), str(run_dir / "config.yaml"))
