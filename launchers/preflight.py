#!/usr/bin/env python3
"""Examines the nodes of a job before it trains. The same as `megascale preflight`."""

from megascale.cli import run_tool
from megascale.commands.preflight import app

if __name__ == "__main__":
    run_tool(app)
