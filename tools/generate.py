#!/usr/bin/env python3
"""Samples from a checkpoint or a Hugging Face folder. The same as `megascale generate`."""

from megascale.cli import run_tool
from megascale.commands.generate import app

if __name__ == "__main__":
    run_tool(app)
