"""The command `megascale`. A subcommand's module is imported on use."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from megascale.cli import command_of, new_app, run_tool
from megascale.errors import UsageError
from megascale.version import __version__

COMMANDS = {
    "train": "Pretrain the model of a config, or report what it would need (--dry-run).",
    "plan": "Rank layouts of a config on a cluster by predicted time and memory.",
    "prepare": "Turn text, JSON lines or Parquet into token files.",
    "generate": "Sample from a checkpoint or a Hugging Face folder.",
    "translate": "Translate with an encoder-decoder.",
    "evaluate": "Score a checkpoint or a Hugging Face folder on JSONL files.",
    "inspect": "Show what is inside a checkpoint, and whether it is whole.",
    "report": "Write one HTML page about one or several runs.",
    "branch": "Begin a run at a checkpoint of another one, such as a decay.",
    "grow": "Grow a checkpoint into a larger model.",
    "shrink": "Cut a smaller model out of a trained one.",
    "merge": "Merge checkpoints of one model into their mean.",
    "convert": "Convert from and to Hugging Face and Megatron.",
    "probe": "Measure signal and gradients by depth at the first step.",
    "balance": "Measure layers and balance pipeline stages.",
    "slurm": "Print or submit the SLURM batch script of a run.",
    "preflight": "Examine the nodes of a job before it trains.",
    "verify": "Check that a config's curve is the same on every layout.",
    "chaos": "Train under injected faults and compare the curves.",
    "schema": "Write the config's JSON Schema, or its reference page.",
    "version": "Print the version of megascale and of what it runs on.",
}


class Commands(TyperGroup):
    """The subcommands of `COMMANDS`, in its order."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            near = difflib.get_close_matches(cmd_name, COMMANDS, 1)
            hint = f"did you mean {near[0]}?" if near else "`megascale --help` lists the commands"
            raise UsageError(f"there is no command {cmd_name[:60]!r}; {hint}")
        command = command_of(import_module(f"megascale.commands.{cmd_name}").app)
        command.name = cmd_name
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The list of `--help`, without importing the commands."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


app = new_app("Pretrains deep transformers. A run's curve depends on its config and data, never on the cluster.", completion=True)


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback(cls=Commands, no_args_is_help=True, epilog="`megascale COMMAND --help` describes a command and has examples.")
def root(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")] = False,
) -> None:
    """Pretrains deep transformers. A run's curve depends on its config and data, never on the cluster it runs on."""


def main() -> None:
    run_tool(app)
