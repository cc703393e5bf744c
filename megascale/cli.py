"""Shared by all commands: errors that the user can fix give one message instead of a traceback."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from megascale.config.paths import unexpanded
from megascale.errors import MegascaleError, UsageError
from megascale.launch.exits import Exit, as_exit
from megascale.screen import take_any_letter

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="section.key=value", help="laid over what the file says; may be repeated")]
CLOSED = 141  # a shell's exit code for a program whose reader has gone (128 + SIGPIPE)


def new_app(help_text: str, completion: bool = False) -> typer.Typer:
    return typer.Typer(help=help_text, add_completion=completion, pretty_exceptions_enable=False, rich_markup_mode=None)


def examples(*lines: str) -> str:
    """The end of a command's --help, one example per line."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def command_of(app: typer.Typer) -> Any:
    """The single command of an app, which refuses paths that were meant for a shell."""
    check_paths_of(app)
    return typer.main.get_command(app)


def check_paths_of(app: typer.Typer) -> None:
    for command in app.registered_commands:
        if command.callback is not None:
            command.callback = with_checked_paths(command.callback)


def run_tool(app: typer.Typer) -> None:
    """Runs a command; errors that the user can fix become a message on standard error and an exit code. Others are bugs."""
    take_any_letter()
    check_paths_of(app)
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # a closed pipe (`tool | head`) shows up here, where it can be silenced
    except MegascaleError as error:
        leave(Exit(error.code, str(error)))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(CLOSED) from None
    except Exception as error:
        known = ending_of(error)
        if known is None:
            raise
        leave(known)


def ending_of(error: Exception) -> Exit | None:
    """The ending for errors of the machine or of files; None for bugs."""
    known = as_exit(error)
    if known is not None:
        return known
    if isinstance(error, UnicodeError):
        return Exit(2, f"a text or a name is not UTF-8 ({error}): convert or rename it")
    if isinstance(error, BrokenProcessPool):
        return Exit(4, "a worker process was killed, probably for lack of memory: use fewer workers, or more memory")
    return None


def leave(ending: Exit) -> None:
    print(f"error: {ending.reason}", file=sys.stderr)
    raise SystemExit(ending.code) from None


def with_checked_paths(work: Callable[..., Any]) -> Callable[..., Any]:
    """`work`, which refuses paths that were meant for a shell."""

    @functools.wraps(work)
    def checked(**options: Any) -> Any:
        for value in options.values():
            for path in value if isinstance(value, list) else [value]:
                if isinstance(path, Path):
                    check_path(str(path))
        return work(**options)

    return checked


def check_path(path: str) -> None:
    """Raises UsageError for a path that was meant for a shell."""
    wrong = unexpanded(path)
    if wrong is not None:
        raise UsageError(f"the path {path[:200]!r} cannot be used: {wrong}")
