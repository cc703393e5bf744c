#!/usr/bin/env python3
"""Ranks layouts of a config on a cluster by predicted time and memory. The same as `megascale plan`."""

from megascale.cli import run_tool
from megascale.commands.plan import app

if __name__ == "__main__":
    run_tool(app)
