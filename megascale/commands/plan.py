"""Ranks layouts of a config on a cluster by predicted step time and memory, before anything runs.

Nothing is measured: docs/planning.md says how far predictions have been compared with runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megascale.cli import ConfigFile, Overrides, examples, new_app

app = new_app(__doc__ or "")


@app.command(
    epilog=examples(
        "megascale plan configs/llama-70b.yaml --cluster configs/clusters/h100-pod.yaml --gpus 512",
        "megascale plan configs/llama-8b.yaml --cluster configs/clusters/h200-pod.yaml --gpus 64 --json plan.json",
    )
)
def main(
    file: ConfigFile,
    cluster: Annotated[Path, typer.Option(help="the cluster's file; configs/clusters/ has examples")],
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(help="devices to use; all of the cluster's if absent")] = None,
    json: Annotated[Path | None, typer.Option(help="also write the result as JSON")] = None,
) -> None:
    """Prints the best layout, why the next ones are slower, layouts with less memory, and the sections to paste into the config."""
    from megascale.config.load import load_config
    from megascale.planning.plan import plan_layouts, write

    text, result = plan_layouts(load_config(str(file), overrides or []), cluster, gpus)
    print("\n".join(text))
    if json is not None:
        write(result, json)
