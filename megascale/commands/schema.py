"""The config's JSON Schema, with which an editor completes and checks configs; or the reference page of all keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from megascale.cli import examples, new_app
from megascale.errors import UsageError

app = new_app(__doc__ or "")


@app.command(
    epilog=examples(
        "megascale schema --out schema.json",
        "megascale schema --format markdown --out docs/config.md",
        "Then start a config in that folder with: # yaml-language-server: $schema=schema.json",
    )
)
def main(
    out: Annotated[Path | None, typer.Option(help="file to write; printed if absent")] = None,
    form: Annotated[Literal["json", "markdown"], typer.Option("--format", help="JSON Schema, or a page for people")] = "json",
) -> None:
    """Writes the JSON Schema of a config, or its reference page."""
    from megascale.config.json_schema import schema_text
    from megascale.config.reference import page
    from megascale.files import write_atomic

    text = schema_text() if form == "json" else page()
    if out is None:
        typer.echo(text.encode(), nl=False)
        return
    try:
        write_atomic(out, text)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written ({error.strerror}): name a file in a folder that you may write to") from None
    print(f"wrote {out}")
