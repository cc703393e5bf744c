#!/usr/bin/env python3
"""Pretrains the model of a config: `python pretrain.py CONFIG [section.key=value …]` (`megascale train`), also under torchrun."""

from megascale.cli import run_tool
from megascale.commands.train import app

if __name__ == "__main__":
    run_tool(app)
