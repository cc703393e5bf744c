"""Refuses paths that were meant for a shell: nothing here expands `~` and `$NAME`, so that name would be created or looked for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megascale.errors import UsageError

if TYPE_CHECKING:  # every command imports this file, and most need no config
    from megascale.config.schema import Config

VARIABLE = re.compile(r"\$\{?[A-Za-z_]")


def unexpanded(path: str) -> str | None:
    """Why `path` is wrong, and what to write; None for a path without `~` at its beginning and without variables."""
    if not path.startswith("~") and not VARIABLE.search(path):
        return None
    what = "~ is" if path.startswith("~") else "variables are"
    meant = os.path.expandvars(os.path.expanduser(path))
    if meant.startswith("~") or VARIABLE.search(meant):
        return f"{what} not expanded here, and it has no value on this machine; write the path in full"
    return f"{what} not expanded here; write {meant}"


def paths_of(config: Config) -> Iterator[tuple[str, str]]:
    """(key, path) of every path in the config."""
    data, checkpoint = config.data, config.checkpoint
    keys = {
        "run.dir": config.run.dir,
        "data.tokenizer": data.tokenizer,
        "data.source_tokenizer": data.source_tokenizer,
        "checkpoint.resume": checkpoint.resume,
        "checkpoint.init_from": checkpoint.init_from,
        "parallel.offload_dir": config.parallel.offload_dir,
    }
    yield from ((key, path) for key, path in keys.items() if path is not None)
    for key, sources in (("data.train", data.train), ("data.valid", data.valid)):
        for source in [sources] if isinstance(sources, str) else sources or []:
            yield key, source if isinstance(source, str) else source.path


def check_paths(config: Config) -> None:
    """Raises UsageError for a path that was meant for a shell."""
    for key, path in paths_of(config):
        wrong = unexpanded(path)
        if wrong is not None:
            raise UsageError(f"{key} is {path[:200]!r}: {wrong}")
