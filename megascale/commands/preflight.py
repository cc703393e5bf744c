"""Examines the nodes of a job before it trains: products, memory, disk, clocks, versions, links; names what is slow or broken.

Runs under srun, torchrun, mpirun or alone. Exits with 0 if all is well and with 5 if a node is unfit; the report names it and prints the
--exclude line for sbatch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megascale.cli import examples, new_app

app = new_app(__doc__ or "")


@app.command(epilog=examples("srun megascale preflight --out runs/NAME", "megascale preflight --out runs/NAME"))
def main(
    out: Annotated[Path, typer.Option(help="folder of the reports, on the file system where the run will write")],
    share: Annotated[float, typer.Option(min=0.01, max=1, help="share of the median below which a rate is slow")] = 0.7,
    timeout: Annotated[float, typer.Option(min=1, help="seconds that a phase may take before missing ranks are reported")] = 120.0,
    gemm_size: Annotated[int, typer.Option(min=64)] = 2048,
    disk_mb: Annotated[int, typer.Option(min=1)] = 64,
    link_mb: Annotated[int, typer.Option(min=1)] = 16,
) -> None:
    """Writes preflight.json and preflight.txt into OUT."""
    from megascale.measure.preflight import Effort, preflight

    preflight(out, share, timeout, Effort(gemm_size, disk_mb, link_mb))
