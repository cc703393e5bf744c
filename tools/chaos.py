#!/usr/bin/env python3
"""Trains a config under injected faults. The same as `megascale chaos`."""

from megascale.cli import run_tool
from megascale.commands.chaos import app

if __name__ == "__main__":
    run_tool(app)
