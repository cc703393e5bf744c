#!/usr/bin/env python3
"""Cuts a smaller model out of a trained one. The same as `megascale shrink`."""

from megascale.cli import run_tool
from megascale.commands.shrink import app

if __name__ == "__main__":
    run_tool(app)
