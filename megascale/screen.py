"""The terminal's letters. Imports nothing that takes long."""

from __future__ import annotations

import io
import sys


def take_any_letter() -> None:
    """From here on a letter that the screen's encoding does not have is written as its number, and ends no program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
