#!/usr/bin/env python3
"""Measures signal and gradient moments by depth at the first step. The same as `megascale probe`."""

from megascale.cli import run_tool
from megascale.commands.probe import app

if __name__ == "__main__":
    run_tool(app)
