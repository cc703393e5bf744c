#!/usr/bin/env python3
"""Measures layers and prints the `parallel.pp_layers` that balances the stages. The same as `megascale balance`."""

from megascale.cli import run_tool
from megascale.commands.balance import app

if __name__ == "__main__":
    run_tool(app)
