#!/usr/bin/env python3
"""Grows a checkpoint. The same as `megascale grow`."""

from megascale.cli import run_tool
from megascale.commands.grow import app

if __name__ == "__main__":
    run_tool(app)
