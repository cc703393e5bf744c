"""trainer.json, a checkpoint's data other than tensors: read in one place, and checked before use."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megascale.checkpoint.index import LARGEST, TRAINER, Damaged, read_json
from megascale.errors import UsageError

COUNTS = ("step", "samples", "tokens", "skipped_in_a_row")
SECTIONS = ("identity", "config", "converted", "hf_generation_config", "made", "logger_ids", "fingerprints", "plugins", "mixture")
TEXTS = (("precision", "compute"), ("precision", "fp8"), ("data", "tokenizer"), ("run", "name"))  # config keys that must be text
NEEDED = ("step", "samples", "tokens", "identity")  # required for a resume; keys added to the format later have defaults


def read_trainer(folder: Path) -> dict[str, Any]:
    """Reads a step folder's trainer.json; every known key has its type. Which keys are present depends on the writer.

    Raises Damaged naming the file and the key, and UsageError if the disk cannot read it.
    """
    path = folder / TRAINER
    found = read_json(path)
    for key in COUNTS:
        if key in found and not (type(found[key]) is int and 0 <= found[key] <= LARGEST):
            raise _wrong(path, key, found[key], "a whole number from 0")
    for key in SECTIONS:
        if key in found and not isinstance(found[key], dict):
            raise _wrong(path, key, found[key], "an object")
    for name, section in found.get("config", {}).items():
        if not isinstance(section, list if name in ("grow", "phases", "evaluate") else dict):
            raise _wrong(path, f"config.{name}", section, "a section with keys of its own")
    for name, key in TEXTS:
        value = found.get("config", {}).get(name, {}).get(key)
        if not isinstance(value, str | None):
            raise _wrong(path, f"config.{name}.{key}", value, "a text")
    for name, number in found.get("logger_ids", {}).items():
        if not isinstance(number, str):
            raise _wrong(path, f"logger_ids.{name}", number, "a text")
    for name, number in found.get("plugins", {}).items():
        if not isinstance(number, str):
            raise _wrong(path, f"plugins.{name}", number, "a text")
    listed = found.get("sources", [])
    if not isinstance(listed, list) or not all(_is_source(entry) for entry in listed):
        raise _wrong(path, "sources", listed, "a list of [name, path, weight]")
    for key in ("drawn", "phases"):
        if not isinstance(found.get(key, []), list):
            raise _wrong(path, key, found[key], "a list")
    if not _is_window(found.get("spikes", {})):
        raise _wrong(path, "spikes", found["spikes"], "two lists of numbers of one length, and two counts")
    for part, sources in found.get("fingerprints", {}).items():
        if not isinstance(sources, dict) or not all(isinstance(files, dict) for files in sources.values()):
            raise _wrong(path, f"fingerprints.{part}", sources, "an object of sources")
    return found


def read_progress(folder: Path) -> dict[str, Any]:
    """`read_trainer` of a checkpoint that a run can resume from. Raises UsageError if pretraining did not write it."""
    found = read_trainer(folder)
    absent = [key for key in NEEDED if key not in found]
    if absent:
        raise UsageError(
            f"{folder / TRAINER} is not from pretraining (it has no {', '.join(absent)}): start from its weights with checkpoint.init_from"
        )
    return found


def _is_source(value: Any) -> bool:
    kinds = [type(part) for part in value] if isinstance(value, list) else []
    return kinds[:2] == [str, str] and len(kinds) == 3 and kinds[2] in (int, float) and value[2] > 0


def _is_window(value: Any) -> bool:
    """What optim/spikes.py keeps, or nothing."""
    if value == {}:
        return True
    if not isinstance(value, dict) or value.keys() != {"losses", "norms", "taken", "skipped"}:
        return False
    lists, counts = (value["losses"], value["norms"]), (value["taken"], value["skipped"])
    numbers = all(isinstance(x, list) and all(type(n) in (int, float) and math.isfinite(n) for n in x) for x in lists)
    return numbers and len(lists[0]) == len(lists[1]) and all(type(n) is int and 0 <= n <= LARGEST for n in counts)


def _wrong(path: Path, key: str, value: Any, needed: str) -> Damaged:
    shown = repr(value)
    return Damaged(
        f"{path}: {key} is {shown if len(shown) <= 60 else shown[:57] + '...'}, but it should be {needed}: the checkpoint is damaged, "
        "use an older one"
    )
