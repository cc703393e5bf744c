#!/usr/bin/env python3
"""Translates with an encoder–decoder. The same as `megascale translate`."""

from megascale.cli import run_tool
from megascale.commands.translate import app

if __name__ == "__main__":
    run_tool(app)
