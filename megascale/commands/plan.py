"""Ranks layouts of a config on a cluster by predicted step time and memory, before anything runs.

docs/planning.md says how far predictions have been compared with runs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from megascale.cli import Overrides, examples, new_app
from megascale.errors import UsageError

app = new_app(__doc__ or "")


@app.command(
    epilog=examples(
        "megascale plan configs/llama-70b.yaml --cluster configs/clusters/h100-pod.yaml --gpus 512",
        "megascale plan configs/llama-8b.yaml --cluster configs/clusters/h200-pod.yaml --gpus 64 --json plan.json",
        "megascale plan configs/llama-405b.yaml --cluster configs/clusters/h100-pod.yaml --scale 512..131072 --plots plots",
        "megascale plan configs/llama-405b.yaml --cluster configs/clusters/h100-pod.yaml --gpus 4096 --job 30 --plots plots",
        "megascale plan --calibrate here.yaml --gpus 4",
    )
)
def main(
    file: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="YAML file; not needed to calibrate alone")] = None,
    overrides: Overrides = None,
    cluster: Annotated[Path | None, typer.Option(help="the cluster's file; configs/clusters/ has examples")] = None,
    gpus: Annotated[int | None, typer.Option(help="devices to use; all of the cluster's if absent")] = None,
    scale: Annotated[
        str | None,
        typer.Option(
            metavar="A..B", help="tables of A, 2A, 4A … up to B GPUs: days by method, strong and weak scaling, tokens for a budget"
        ),
    ] = None,
    job: Annotated[
        float | None, typer.Option(metavar="DAYS", help="also simulate the best layout for so long: failures, saves, spares, slow links")
    ] = None,
    seed: Annotated[int, typer.Option(help="first of the simulation's seeds")] = 0,
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="draw scale.png or job.png there")] = None,
    json: Annotated[Path | None, typer.Option(help="also write the result as JSON")] = None,
    calibrate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="measure products, attention, casts and links here, and write a cluster file first")
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(metavar="FILE", help="calibrate with a result of benchmarks.gpu.ceilings instead, laid over --cluster")
    ] = None,
) -> None:
    """Prints the best layout, why the next ones are slower, layouts with less memory, and the sections to paste into the config."""
    from megascale.config.load import load_config
    from megascale.planning.plan import plan_layouts, plan_scale, write

    if measured is not None and calibrate is None:
        raise UsageError(f"--measured {measured} is what to calibrate with: add --calibrate FILE, the cluster file to write")
    if calibrate is not None:
        from megascale.planning.calibrate import calibrate as run

        print("\n".join(run(calibrate, gpus, cluster, measured)))
        if file is None:
            return
        cluster = calibrate
    if file is None or cluster is None:
        raise UsageError("a plan needs a config and --cluster FILE, such as configs/clusters/h100-pod.yaml; --calibrate FILE writes one")
    config = load_config(str(file), overrides or [])
    if plots is not None and scale is None and job is None:
        raise UsageError(f"--plots {plots} draws what --scale or --job found: add one of them")
    if scale is not None and (gpus is not None or job is not None):
        raise UsageError("--scale asks for many numbers of GPUs: leave --gpus and --job out, or plan one number without --scale")
    check_plots(plots)
    if scale is not None:
        text, result = plan_scale(config, cluster, scale)
    else:
        text, result = plan_layouts(config, cluster, gpus, job, seed)
    print("\n".join(text))
    if plots is not None:
        from megascale.report.plans import draw_scale, draw_study

        if scale is not None:
            draw_scale(result, plots / "scale.png")
        else:
            draw_study(result["job"], plots / "job.png")
    if json is not None:
        write(result, json)


def check_plots(plots: Path | None) -> None:
    """Makes the folder of plots. Raises UsageError if it cannot."""
    try:
        if plots is not None:
            plots.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--plots {plots} cannot be made: {error.strerror}") from None
    if plots is not None and not os.access(plots, os.W_OK):
        raise UsageError(f"--plots {plots} cannot be written to: choose another folder")
