#!/usr/bin/env python3
"""Writes one HTML page about one or several runs. The same as `megascale report`."""

from megascale.cli import run_tool
from megascale.commands.report import app

if __name__ == "__main__":
    run_tool(app)
