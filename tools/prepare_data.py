#!/usr/bin/env python3
"""Turns text into token files. The same as `megascale prepare`."""

from megascale.cli import run_tool
from megascale.commands.prepare import app

if __name__ == "__main__":
    run_tool(app)
