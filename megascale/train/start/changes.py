"""Changes of the curve at a resume: keys outside the run's identity, the learning rate, and the positions in the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megascale.config.identity import check_identity, covered, defaults_of, real_path, same_value
from megascale.config.load import flatten
from megascale.config.schema import Config, DataSource, Optim, Precision, Train
from megascale.data.dataset import read_sources
from megascale.data.fingerprint import Print
from megascale.errors import UsageError
from megascale.optim.learning_rate import learning_rate
from megascale.plugins import versions
from megascale.train.start.branch import Note

# Keys outside the run's identity, since the weights stay valid, that still change the rest of the curve.
CURVE = (
    "train.steps",
    "train.tokens",
    "train.clip",
    "train.max_skipped_steps",
    "train.skip_spikes.sigma",
    "train.skip_spikes.window",
    "train.skip_spikes.in_a_row",
    "precision.compute",
    "precision.master",
    "precision.reduce",
    "precision.fp8",
    "precision.fp8_recipe",
    "precision.loss_scale",
)
LENGTH = ("train.steps", "train.tokens")
Changes = dict[str, tuple[Any, Any]]
Prints = dict[str, dict[str, Print]]


@dataclass(frozen=True)
class Rates:
    """The learning rate of `step`, the next one, before and after the change; `differs`: the first step at which they differ."""

    step: int
    before: float
    after: float
    differs: int | None


def curve_changes(config: Config, saved: Mapping[str, Any]) -> Changes:
    """{key: (then, now)} of keys that affect the curve but not the identity. `saved`: the checkpoint's config, or empty.

    Raises UsageError if a new run length changes the order of the data and `run.allow_change` does not name it.
    """
    if not saved:
        return {}
    flat = flatten(dict(saved))
    then, now = {**defaults_of(flat), **flat}, flatten(config.plain())
    found = {k: (then.get(k), now.get(k)) for k in CURVE if then.get(k) != now.get(k)}
    before = _steps(saved)
    if before is not None and before == config.train.total_steps:
        found = {k: v for k, v in found.items() if k not in LENGTH}
    if "precision.master" in found and _storage(saved) == config.precision.storage:
        del found["precision.master"]
    longer = [k for k in found if k in LENGTH]
    if config.data.order == "megatron" and longer and not covered(longer, config.run.allow_change):
        key = longer[0]
        raise UsageError(
            f"{key} was {found[key][0]} and is now {found[key][1]}; under data.order megatron the order of all samples depends on their "
            f"number: set it back, or allow another order with run.allow_change='[{key}]'"
        )
    return found


def rates_at(config: Config, saved: Mapping[str, Any], step: int) -> Rates | None:
    """Rates of the first step after `step`. None if the checkpoint does not say how its run would have continued."""
    total, now = _steps(saved), config.train.total_steps
    try:
        optim = Optim.model_validate(saved["optim"])
    except (KeyError, ValidationError):
        return None
    if total is None:
        return None

    def both(at: int) -> tuple[float, float]:
        return learning_rate(optim, at, total), learning_rate(config.optim, at, now)

    first, last = step + 1, min(total, now)
    differs = first if both(first)[0] != both(first)[1] else None
    if differs is None and last > first and both(last)[0] != both(last)[1]:
        low, high = first, last  # equal up to the step at which one of them starts to decay
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if both(middle)[0] != both(middle)[1] else (middle, high)
        differs = high
    return Rates(first, *both(first), differs)


def told(changes: Mapping[str, tuple[Any, Any]], rates: Rates | None) -> list[Note]:
    """A warning about the changes; empty if nothing changes from here on."""
    matters = {k: v for k, v in changes.items() if k not in LENGTH or rates is None or rates.differs is not None}
    if not matters:
        return []
    keys = ", ".join(f"{key} was {_short(then)} and is {_short(now)}" for key, (then, now) in matters.items())
    lr = ""
    if rates is not None and rates.differs is not None:
        lr = f"; the learning rate of step {rates.step} would have been {rates.before:.4g} and is {rates.after:.4g}"
        if rates.differs > rates.step:
            lr += f", and it differs from step {rates.differs} on"
    return [Note(f"the curve will differ from the unchanged run: {keys}{lr}")]


def plugins_note(saved: Mapping[str, Any]) -> list[Note]:
    """Plugins installed or removed since the checkpoint. `saved`: trainer.json; older versions of it list no plugins."""
    then, now = saved.get("plugins"), versions()
    if then is None or then == now:
        return []
    gone = [
        f"{name} {number}, which is not installed here (pip install it to have its rows again)"
        for name, number in then.items()
        if name not in now
    ]
    other = [f"{name} {number}, which is {now[name]} here" for name, number in then.items() if now.get(name, number) != number]
    fresh = [f"not yet with {name} {number}" for name, number in now.items() if name not in then]
    return [
        Note(f"the checkpoint was written with other plugins: {'; '.join((*gone, *other, *fresh))}", "plugins", {"then": then, "now": now})
    ]


def averages_note(config: Config, saved: Mapping[str, Any]) -> list[Note]:
    """Averages that begin or end here. `saved`: the checkpoint's config."""
    try:
        then = [a.name for a in Optim.model_validate({"ema": saved.get("optim", {}).get("ema", ())}).ema]
    except (AttributeError, ValidationError):  # from another version
        then = []
    now = [a.name for a in config.optim.ema]
    fresh = [f"{name} starts from the weights of the next step" for name in now if name not in then]
    gone = [f"{name} ends here" for name in then if name not in now]
    return [Note(f"optim.ema is another than in the checkpoint: {'; '.join((*fresh, *gone))}")] if fresh or gone else []


def sources_of(config: Config) -> list[list[Any]]:
    """[[name, path, weight], …] of the training mixture, recorded in checkpoints because a file that `data.train` names may change."""
    return [[s.name, s.path, s.weight] for s in read_sources(config.data.train, "data.train")]


def changes_since(config: Config, saved: dict[str, Any], folder: Path, prints: Prints) -> tuple[Changes, list[Note]]:
    """The allowed changes since the checkpoint `folder`, and notes about them. `saved`: its trainer.json.

    Raises UsageError if it belongs to another run or was trained on other data.
    """
    moved = moved_data(config, saved, prints)
    other = check_identity(config, saved["identity"], str(folder), moved)
    mixture, told_of_it = mixture_changes(config, saved, "data.train" in moved)
    return {**other, **mixture, **content_changes(config, saved, prints)}, told_of_it


def moved_data(config: Config, saved: Mapping[str, Any], prints: Prints) -> list[str]:
    """Which of data.train and data.valid only moved: names, weights and content of the files are the same. `saved`: trainer.json; older
    versions do not record the content.
    """
    before, found = saved.get("fingerprints", {}), []
    then, now = _named(saved.get("sources") or _listed(saved)), _named(sources_of(config))
    if prints["train"] and before.get("train") == prints["train"] and then == now:
        found.append("data.train")
    if prints["valid"] and before.get("valid") == prints["valid"]:
        found.append("data.valid")
    return found


def content_changes(config: Config, saved: Mapping[str, Any], prints: Prints) -> Changes:
    """{"data.train[source]": (then, now)} of sources with new content under old names that `run.allow_change` allows.

    Raises UsageError if it does not allow them.
    """
    found: Changes = {}
    for part, sources in prints.items():
        before = saved.get("fingerprints", {}).get(part, {})
        other = {name: (before[name], now) for name, now in sources.items() if name in before and before[name] != now}
        if other and not covered([key := f"data.{part}"], config.run.allow_change):
            name, (then, now) = next(iter(other.items()))
            ends = ", ".join(f"{end} was {then.get(end)} and is {now.get(end)}" for end in now if then.get(end) != now[end])
            raise UsageError(
                f"{key}: the files of {name} differ from those that the run was trained on ({ends}), so its samples would change: put the "
                f"old ones back, choose another run.name, or allow it with run.allow_change='[{key}]'"
            )
        found |= {f"data.{part}[{name}]": ("; ".join(map(str, a.values())), "; ".join(b.values())) for name, (a, b) in other.items()}
    return found


def mixture_changes(config: Config, saved: Mapping[str, Any], moved_only: bool = False) -> tuple[Changes, list[Note]]:
    """A change of the mixture that no key shows. `saved`: trainer.json; `moved_only`: the sources are known to have only moved. A changed
    mixture continues every source where it was (data/history.py).

    Raises UsageError for a change in a file that `data.train` names, unless `run.allow_change` has data.train.
    """
    now = sources_of(config)
    then = saved.get("sources") or _listed(saved)
    if not then or _shares(then) == _shares(now) or moved_only:
        return {}, []
    changed: Changes = {}
    if same_value("data.train", saved.get("identity", {}).get("data.train"), config.plain()["data"]["train"]):
        if not covered(["data.train"], config.run.allow_change):
            raise UsageError(
                f"the mixture in {config.data.train} has changed: it was {_mixture(then)} and is {_mixture(now)}; set it back, choose "
                "another run.name, or allow it with run.allow_change='[data.train]'"
            )
        changed["data.train"] = (_mixture(then), _mixture(now))
    if config.data.order == "megatron":
        return changed, [Note("the mixture has changed; under data.order megatron this changes the order of all following samples")]
    words = f"the mixture has changed: it was {_mixture(then)} and is {_mixture(now)}; every source continues where it was"
    return changed, [Note(words, "mixture", {"then": _mixture(then), "now": _mixture(now)})]


def _named(sources: list[list[Any]]) -> list[tuple[str, float]]:
    return [(name, share) for name, _, share in _shares(sources)] if sources else []


def _shares(sources: list[list[Any]]) -> list[tuple[str, str, float]]:
    total = sum(weight for _, _, weight in sources)
    return [(name, real_path(path), round(weight / total, 12)) for name, path, weight in sources]


def _mixture(sources: list[list[Any]]) -> str:
    return ", ".join(f"{name} {weight:g}" for name, _, weight in sources)


def _listed(saved: Mapping[str, Any]) -> list[list[Any]]:
    """The sources in the saved config; empty if it names a file, which may have changed."""
    value = saved.get("config", {}).get("data", {}).get("train")
    if not isinstance(value, str | list) or (isinstance(value, str) and value.endswith((".yaml", ".yml"))):
        return []
    try:
        entries = value if isinstance(value, str) else [e if isinstance(e, str) else DataSource.model_validate(e) for e in value]
        return [[s.name, s.path, s.weight] for s in read_sources(entries, "data.train")]
    except (ValidationError, UsageError):
        return []


def _steps(saved: Mapping[str, Any]) -> int | None:
    try:
        return Train.model_validate(saved["train"]).total_steps
    except (KeyError, ValidationError):
        return None


def _storage(saved: Mapping[str, Any]) -> str | None:
    try:
        return Precision.model_validate(saved.get("precision", {})).storage
    except ValidationError:
        return None


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
