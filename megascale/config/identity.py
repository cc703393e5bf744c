"""The run's identity: model, data, optimizer, seed, batch and sequence length. All other keys may change at a resume."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, get_args, get_origin

from megascale.config.load import flatten, known_keys
from megascale.config.schema import Config, Section
from megascale.errors import UsageError

SINGLE = ("run.seed", "train.global_batch_size", "train.seq_len", "train.source_len", "train.packing")
SOURCES = ("data.train", "data.valid")
BESIDE = ("optim.ema", "optim.ema_valid")  # averages follow the weights, and change none
PATHS = ("data.tokenizer", "data.source_tokenizer")


def identity(config: Config) -> dict[str, Any]:
    """{"section.key": value} of the identity; `train/start/changes.py` lists the other keys that affect the curve."""
    flat = flatten(config.plain())
    return {k: v for k, v in flat.items() if (k.split(".")[0] in ("model", "data", "optim", "grow") or k in SINGLE) and k not in BESIDE}


def check_identity(config: Config, saved: dict[str, Any], where: str, moved: Collection[str] = ()) -> dict[str, tuple[Any, Any]]:
    """Compares with a checkpoint's identity; returns the allowed changes as {key: (saved, now)}.

    moved  keys among data.train and data.valid whose data are the same in another place

    Raises UsageError with the diff for a change that is not in `run.allow_change`.
    """
    now = identity(config)
    then = {**defaults_of(saved), **saved}
    keys = (k for k in sorted({*saved, *now}) if k not in moved)
    changed = {k: (then.get(k), now.get(k)) for k in keys if not same_value(k, then.get(k), now.get(k))}
    allowed = covered(changed, config.run.allow_change)
    refused = {k: v for k, v in changed.items() if k not in allowed}
    if refused:
        lines = [f"{key}: {old!r} there, {new!r} now{renamed(key, old, new)}" for key, (old, new) in refused.items()]
        names = ", ".join(refused)
        raise UsageError(
            "\n  ".join([f"this is another run than the one in {where}:", *lines])
            + f"\nset them back, choose another run.name, or allow it with run.allow_change='[{names}]'"
        )
    return {k: changed[k] for k in allowed}


def same_value(key: str, then: Any, now: Any) -> bool:
    """Whether two values of a key mean the same. Paths are equal if they lead to the same file, however they are written."""
    if then == now:
        return True
    if key in PATHS and isinstance(then, str) and isinstance(now, str):
        return real_path(then) == real_path(now)
    return key in SOURCES and (places := places_of(then)) is not None and places == places_of(now)


def only_moved(key: str, then: Any, now: Any) -> bool:
    """Whether a key names sources with unchanged names and weights, which keep their samples in the same order."""
    before, after = (places_of(v) for v in (then, now))
    return key in SOURCES and before is not None and after is not None and [p[1:] for p in before] == [p[1:] for p in after]


def places_of(value: Any) -> list[tuple[str, str, float]] | None:
    """[(place, name, weight), …] for a value of data.train or data.valid; None for any other value. A YAML file with a list counts as
    one place.
    """
    entries = [{"path": value}] if isinstance(value, str) else value
    if not isinstance(entries, list):
        return None
    found = []
    for entry in entries:
        source = {"path": entry} if isinstance(entry, str) else entry
        if not isinstance(source, dict) or not isinstance(path := source.get("path"), str):
            return None
        listed = isinstance(value, str) and path.endswith((".yaml", ".yml"))
        name = path if listed else source.get("name") or Path(path).name
        found.append((real_path(path), real_path(path) if listed else name, source.get("weight", 1.0)))
    return found


def renamed(key: str, then: Any, now: Any) -> str:
    """The fix for files that moved and changed their default name, which would reorder the samples."""
    before, after = (places_of(v) or [] for v in (then, now))
    pairs = list(zip(before, after))
    if key != "data.train" or len(before) != len(after) or not any(b[1] != a[1] and os.sep not in b[1] + a[1] for b, a in pairs):
        return ""
    entries = ", ".join(f"{{path: {a[0]}, name: {b[1]}" + (f", weight: {b[2]:g}}}" if b[2] != 1 else "}") for b, a in pairs)
    return f" (a source's name, by default the end of its path, orders its samples: if these are the same files, use {key}='[{entries}]')"


def real_path(path: str) -> str:
    """Where a path leads, through links; other text is returned unchanged."""
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):
        return path


def defaults_of(saved: Iterable[str], section: type[Section] = Config, prefix: str = "") -> dict[str, Any]:
    """{"section.key": default} for keys newer than a checkpoint. A nested section such as model.moe has defaults if `saved` has some of its
    keys.
    """
    found: dict[str, Any] = {}
    for key, info in section.model_fields.items():
        name = f"{prefix}{info.alias or key}"
        kinds = () if get_origin(info.annotation) is tuple else (info.annotation, *get_args(info.annotation))  # a list is one value
        inner = [t for t in kinds if isinstance(t, type) and issubclass(t, Section)]
        if inner and (not prefix or any(k.startswith(f"{name}.") for k in saved)):
            found |= defaults_of(saved, inner[0], f"{name}.")
        elif not info.is_required():
            value = info.get_default(call_default_factory=True)
            found[name] = list(value) if isinstance(value, tuple) else value
    return found


def check_allow_change(keys: Iterable[str]) -> None:
    """Raises UsageError for a key that does not exist."""
    known = set(known_keys())
    for key in keys:
        if key not in known:
            raise UsageError(f"run.allow_change names {key}, which is not a config key")


def covered(changed: Iterable[str], allowed: Iterable[str]) -> list[str]:
    """Keys of `changed` that `allowed` names, itself or by a section above."""
    names = tuple(allowed)
    return [k for k in changed if any(k == a or k.startswith(a + ".") for a in names)]
