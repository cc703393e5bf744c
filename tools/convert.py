#!/usr/bin/env python3
"""Converts models between checkpoints of megascale, Hugging Face folders and weights of megatron-core. The same as `megascale convert`."""

from megascale.cli import run_tool
from megascale.commands.convert import app

if __name__ == "__main__":
    run_tool(app)
