#!/usr/bin/env python3
"""Shows what is inside a checkpoint, and whether it is whole. The same as `megascale inspect`."""

from megascale.cli import run_tool
from megascale.commands.inspect import app

if __name__ == "__main__":
    run_tool(app)
