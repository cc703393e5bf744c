"""Versions of megascale and of everything that affects its numbers."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

import megascale
from megascale.cli import examples, new_app
from megascale.plugins import plugins
from megascale.version import __version__

app = new_app(__doc__ or "")
LIBRARIES = ("torch", "numpy", "pydantic", "tokenizers", "safetensors")


@app.command(epilog=examples("megascale version", "megascale version --short"))
def main(short: Annotated[bool, typer.Option("--short", help="print only the number")] = False) -> None:
    """Prints the version of megascale, where it is installed, the versions of Python and the libraries it computes with, and plugins."""
    if short:
        print(__version__)
        return
    print(f"megascale {__version__} in {Path(megascale.__path__[0])}")
    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for library in LIBRARIES:
        print(f"{library} {installed(library)}")
    for plugin in plugins():
        print(f"plugin {plugin}: {plugin.names}")


def installed(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"
