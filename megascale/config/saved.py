"""The config.yaml that a run or a growth writes; a comment at its top names the version."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megascale.version import __version__

CONFIG = "config.yaml"
STAMP = "# Written by megascale "


def stamped(yaml: str) -> str:
    return f"{STAMP}{__version__}\n{yaml}"


def hint_of_newer(path: Path) -> str | None:
    """The fix for a config that a newer version wrote and this one cannot read; None if that is not the cause."""
    try:
        with path.open("rb") as file:
            text = file.read(200).decode("utf-8", "replace")
    except OSError:
        return None
    found = re.search(rf"^{STAMP}([0-9]+(?:\.[0-9]+)+)", text, re.MULTILINE)
    if found is None or numbers(found[1]) <= numbers(__version__):
        return None
    return (
        f"{path} was written by megascale {found[1]}, but this is {__version__}: install a newer megascale "
        "(pip install --upgrade megascale), or remove the keys that this one does not know"
    )


def plugins_of_run(values: Mapping[str, Any]) -> dict[str, str]:
    """{distribution: version} that the newest checkpoint in a config's own run directory records; empty where nothing can be read. `values`
    may be any.
    """
    run = values.get("run")
    run = run if isinstance(run, Mapping) else {}
    root = Path(str(run.get("dir") or f"runs/{run.get('name', 'run')}")) / "checkpoints"
    try:
        newest = (root / "latest").read_text(encoding="utf-8").strip()
        found = json.loads((root / newest / "trainer.json").read_bytes())["plugins"]
        return {str(name): str(number) for name, number in found.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall("[0-9]+", version)[:3]]
