"""Rows from other installed packages: the entry-point group `megascale.plugins` (docs/plugins.md).

An entry point names a module, or any object, with `ROWS`: {kind: {name: row}}. Every table of rows includes those of plugins. Imports no
torch, and neither may a plugin's ROWS: a function may be written as "module:function", which is imported when it is needed.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from megascale.errors import UsageError

GROUP = "megascale.plugins"
KINDS = ("activations", "attentions", "decays", "metrics", "norms", "optimizers", "positions", "readers", "residuals", "routers")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

R = TypeVar("R")


@dataclass(frozen=True)
class Plugin:
    """An entry point of an installed distribution, and its rows by kind and name."""

    name: str
    distribution: str
    version: str
    rows: Mapping[str, Mapping[str, Any]]

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"

    @property
    def names(self) -> str:
        return "; ".join(f"{kind} {', '.join(rows)}" for kind, rows in self.rows.items())

    @property
    def way_out(self) -> str:
        return f"fix the plugin, or remove it with `pip uninstall {self.distribution}`"


@cache  # installed packages do not change while a process runs
def plugins() -> tuple[Plugin, ...]:
    """All installed plugins, by distribution. Raises UsageError for one that cannot be imported or whose ROWS are invalid."""
    found = entry_points(group=GROUP)
    return tuple(_load(e) for e in sorted(found, key=lambda e: (_distribution(e), e.name)))


def versions() -> dict[str, str]:
    """{distribution: version} of the plugins, which checkpoints record and ranks compare."""
    return {p.distribution: p.version for p in plugins()}


def with_plugins(kind: str, own: Mapping[str, R], row: type[R]) -> Mapping[str, R]:
    """The rows of a kind: the built-in `own`, and those of plugins. Raises UsageError if a plugin uses a name that is taken, or gives
    something else than a `row`.
    """
    found = dict(own)
    giver: dict[str, Plugin] = {}
    for plugin in plugins():
        for name, value in plugin.rows.get(kind, {}).items():
            where = f"the plugin {plugin.name} of {plugin} has {name} among its {kind}"
            if name in found:
                whose = f"{giver[name]} has one of that name" if name in giver else "megascale has a built-in of that name"
                raise UsageError(f"{where}, and {whose}: give the row another name, or `pip uninstall {plugin.distribution}`")
            if not isinstance(value, row):
                raise UsageError(f"{where}, a {type(value).__name__}, and a {row.__module__}.{row.__name__} is needed: {plugin.way_out}")
            found[name], giver[name] = value, plugin
    return found


def giver_of(kind: str, name: str) -> Plugin | None:
    """The plugin that a row comes from; None for a built-in."""
    return next((p for p in plugins() if name in p.rows.get(kind, {})), None)


def resolve(part: str | Callable[..., Any], row: str) -> Callable[..., Any]:
    """The function that "module:function" names, or `part` itself if it is a function. `row`: its owner, for the message. Raises
    UsageError.
    """
    if not isinstance(part, str):
        return part
    module, _, name = part.partition(":")
    try:
        return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]
    except Exception as error:
        raise UsageError(f"{row} needs {part}, which cannot be imported ({type(error).__name__}: {error}): fix or uninstall it") from None


def nearest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean …?", or nothing."""
    near = difflib.get_close_matches(word, list(known), 1, 0.6)
    return f"; did you mean {near[0]}?" if near else ""


def installed() -> str:
    """The installed plugins, as half a sentence."""
    return ", ".join(map(str, plugins())) or "none"


def gone(then: Mapping[str, str]) -> str:
    """Says which plugins of `then`, {distribution: version}, are not installed now, and how to install them; empty if none."""
    now = versions()
    absent = [f"{name} {number}" for name, number in then.items() if name not in now]
    names = " ".join(name for name in then if name not in now)
    return f"trained with the plugin {', '.join(absent)}, which is not installed here: `pip install {names}`" if absent else ""


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value


def _load(entry: EntryPoint) -> Plugin:
    distribution, version = _distribution(entry), str(entry.dist.version) if entry.dist is not None else "unknown"
    who, way_out = f"the plugin {entry.name} of {distribution} {version}", f"`pip uninstall {distribution}`"
    try:
        rows = entry.load().ROWS
    except (Exception, SystemExit) as error:
        what = "has no ROWS" if isinstance(error, AttributeError) and "ROWS" in str(error) else "cannot be imported"
        raise UsageError(f"{who} {what} ({type(error).__name__}: {error}): fix {entry.value}, or {way_out}") from None
    if not isinstance(rows, Mapping):
        raise UsageError(f"{who}: ROWS is a {type(rows).__name__}, and {{kind: {{name: row}}}} is needed; fix {entry.value}, or {way_out}")
    for kind, named in rows.items():
        if kind not in KINDS:
            what = f"{kind!r}{nearest(str(kind), KINDS)} (there are {', '.join(KINDS)})"
            raise UsageError(f"{who}: ROWS has the kind {what}; fix {entry.value}, or {way_out}")
        bad = [n for n in named if not isinstance(n, str) or not NAME.fullmatch(n)] if isinstance(named, Mapping) else [named]
        if bad:
            raise UsageError(f"{who}: {kind} has {bad[0]!r} where a row's name is needed; fix {entry.value}, or {way_out}")
    return Plugin(entry.name, distribution, version, rows)
