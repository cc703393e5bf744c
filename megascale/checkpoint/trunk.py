"""Branches: a new run that begins with a checkpoint of another one, its trunk, whose files it shares by hard links."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megascale.checkpoint.folders import LATEST, named_as_steps, step_name
from megascale.checkpoint.index import read_index, size_problems
from megascale.checkpoint.trainer import read_progress
from megascale.config.load import apply_overrides, build_config, read_yaml, to_yaml
from megascale.config.phases import FIXED, SECTIONS, spans_of
from megascale.config.saved import CONFIG, stamped
from megascale.config.schema import Config
from megascale.errors import UsageError
from megascale.files import atomic_folder

# Keys on which nothing of the curve depends: they hold for the whole branch.
WHOLE = ("train.log_every", "train.eval_every", "train.eval_steps", "checkpoint", "parallel")


def branch(run: Path, step: int, out: Path, overrides: Iterable[str]) -> dict[str, Any]:
    """Makes the directory `out` of a run that continues from step `step` of `run` with changes. Returns facts about it.

    Keys that change the rest of the curve become a phase of the new run that begins at that step; the trunk's phases up to there stay, and
    later ones are left out. Raises UsageError; then nothing is left behind.
    """
    folder = _checkpoint(run, step)
    problems = size_problems(read_index(folder))  # the branch's own start reads every byte
    if problems:
        raise UsageError(f"{folder} is not whole: {problems[0]}; branch from another step")
    saved = read_progress(folder)
    config, changes, dropped = branched(_whole_config(run, saved), step, out, list(overrides))
    linked = copied = 0
    with atomic_folder(out) as made:
        target = made / "checkpoints" / folder.name
        target.mkdir(parents=True)
        for file in sorted(p for p in folder.iterdir() if p.is_file()):
            try:
                os.link(file, target / file.name)
                linked += file.stat().st_size
            except OSError:  # another file system, or one without links
                shutil.copyfile(file, target / file.name)
                copied += file.stat().st_size
        (made / "checkpoints" / LATEST).write_text(f"{folder.name}\n")
        (made / CONFIG).write_text(stamped(to_yaml(config.plain())))
        facts = {"trunk": str(run.resolve()), "from": str(folder.resolve()), "changes": changes}
        (made / "events.jsonl").write_text(_event("branch", step, facts))
    _tell(run, _event("branched", step, {"branch": str(out.resolve()), "changes": changes}))
    return {"step": step, "config": str(out / CONFIG), "changes": changes, "dropped": dropped, "linked": linked, "copied": copied}


def branched(config: Config, step: int, out: Path, overrides: list[str]) -> tuple[Config, dict[str, Any], int]:
    """The config of a branch, the changes of its new phase, and how many phases of the trunk it leaves out. Raises UsageError."""
    given = apply_overrides({}, overrides)
    phases = given.pop("phases", [])
    if not isinstance(phases, list):
        raise UsageError(f"phases is {phases!r}: write a list, such as phases='[{{from: {step + 100} steps, set: {{optim.lr: 1e-4}}}}]'")
    flat = {f"{section}.{key}": value for section, keys in given.items() if isinstance(keys, dict) for key, value in keys.items()}
    own = {k: v for k, v in flat.items() if k.split(".")[0] in SECTIONS and k not in FIXED and not _of_whole(k)}
    rest = [item for item in overrides if item.partition("=")[0].removeprefix("--").strip() not in {*_written(own, overrides), "phases"}]
    begun = [s.entry for s in spans_of(config) if s.entry is not None and s.first <= step]
    values = config.plain()
    kept = [entry for number, entry in enumerate(values["phases"]) if number in begun]
    new = [{"from": f"{step} steps", "set": own}] if own else []
    values["phases"] = [*kept, *new, *phases]
    values["run"] |= {"name": out.name, "dir": str(out)}
    values["checkpoint"] |= {"resume": "auto", "init_from": None, "init_ema": None, "init_schedule": "given", "init_data": "restart"}
    made = build_config(apply_overrides(values, rest))
    if made.train.steps is not None and made.train.steps <= step:
        raise UsageError(f"train.steps is {made.train.steps}, but the branch begins after step {step}: give a later last step")
    spans_of(made)
    return made, own, len(config.phases) - len(begun)


def _of_whole(key: str) -> bool:
    return any(key == whole or key.startswith(f"{whole}.") for whole in WHOLE)


def _written(keys: Mapping[str, Any], overrides: list[str]) -> set[str]:
    """The keys of overrides that set, or set part of, one of `keys`."""
    names = {item.partition("=")[0].removeprefix("--").strip() for item in overrides}
    return {name for name in names if any(name == key or name.startswith(f"{key}.") for key in keys)}


def _checkpoint(run: Path, step: int) -> Path:
    root = run / "checkpoints"
    there = named_as_steps(root)
    if not there:
        raise UsageError(f"{run} holds no checkpoints: name the directory of a run")
    folder = root / step_name(step)
    if not folder.is_dir():
        listed = ", ".join(str(number) for number, _ in there[-8:])
        raise UsageError(f"{run} has no checkpoint of step {step}; it has those of steps {listed}: choose one with --at")
    return folder


def _whole_config(run: Path, saved: Mapping[str, Any]) -> Config:
    """The config of the whole trunk; of the checkpoint, where that of the run is gone."""
    path = run / CONFIG
    return build_config(read_yaml(path) if path.is_file() else dict(saved["config"]))


def _event(event: str, step: int, details: Mapping[str, Any]) -> str:
    row = {"time": round(time.time(), 3), "step": step, "event": event, **details}
    return json.dumps(row, ensure_ascii=False) + "\n"


def _tell(run: Path, row: str) -> None:
    """Adds a row to the trunk's events, which may be growing: one write at its end. Raises UsageError."""
    try:
        handle = os.open(run / "events.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(handle, row.encode())
        finally:
            os.close(handle)
    except OSError as error:
        raise UsageError(
            f"the branch is made, but {run / 'events.jsonl'} could not record it ({error.strerror or error}): it can be trained as it is"
        ) from None
