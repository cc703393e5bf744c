"""What makes a run this run: model, data, optimizer, seed, batch and sequence length. The rest may change at a resume."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args, get_origin

from megascale.config.load import flatten, known_keys
from megascale.config.schema import Config, Section
from megascale.errors import UsageError

SINGLE = ("run.seed", "train.global_batch_size", "train.seq_len", "train.source_len", "train.packing")


def identity(config: Config) -> dict[str, Any]:
    """{"section.key": value} of what is this run and no other; `train/changes.py` has what else enters the curve."""
    flat = flatten(config.plain())
    return {k: v for k, v in flat.items() if k.split(".")[0] in ("model", "data", "optim", "grow") or k in SINGLE}


def check_identity(config: Config, saved: dict[str, Any], where: str) -> dict[str, tuple[Any, Any]]:
    """Compares with a checkpoint's identity; returns the allowed changes as {key: (saved, now)}.

    Raises UsageError with the diff where a change is not in `run.allow_change`.
    """
    now = identity(config)
    then = {**defaults_of(saved), **saved}
    changed = {k: (then.get(k), now.get(k)) for k in sorted({*saved, *now}) if then.get(k) != now.get(k)}
    allowed = covered(changed, config.run.allow_change)
    refused = {k: v for k, v in changed.items() if k not in allowed}
    if refused:
        lines = [f"{key}: {old!r} in the checkpoint, {new!r} now" for key, (old, new) in refused.items()]
        keys = ", ".join(refused)
        raise UsageError(
            "\n  ".join([f"this is another run than the one in {where}:", *lines])
            + f"\nset them back, choose another run.name, or allow it with run.allow_change='[{keys}]'"
        )
    return {k: changed[k] for k in allowed}


def defaults_of(saved: Iterable[str], section: type[Section] = Config, prefix: str = "") -> dict[str, Any]:
    """{"section.key": default}: what a key that came after a checkpoint meant before it existed. Sections inside sections, such as
    model.moe, have defaults where `saved` has some of their keys.
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
            raise UsageError(f"run.allow_change names {key}, which is no config key")


def covered(changed: Iterable[str], allowed: Iterable[str]) -> list[str]:
    """A key allows itself, and a section of keys allows all below it."""
    names = tuple(allowed)
    return [k for k in changed if any(k == a or k.startswith(a + ".") for a in names)]
