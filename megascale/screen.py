"""Characters on the terminal. Imports nothing slow."""

from __future__ import annotations

import io
import sys


def take_any_letter() -> None:
    """From now on characters outside the screen's encoding are written as escapes instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
