"""What all tools do alike: print one message instead of a traceback for what the user can mend."""

from __future__ import annotations

import sys

import typer

from megascale.errors import MegascaleError


def new_app(help_text: str) -> typer.Typer:
    return typer.Typer(help=help_text, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def run_tool(app: typer.Typer) -> None:
    """Runs a tool; a MegascaleError becomes its message on standard error and its exit code."""
    try:
        app()
    except MegascaleError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
