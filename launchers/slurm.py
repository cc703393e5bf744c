#!/usr/bin/env python3
"""Prints the SLURM batch script of a run, or submits it. The same as `megascale slurm`."""

from megascale.cli import run_tool
from megascale.commands.slurm import app

if __name__ == "__main__":
    run_tool(app)
