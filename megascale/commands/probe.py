"""Signal and gradient moments by depth at the first step, compared with theory: one forward and backward of a config on its own tokens.

Alone or under torchrun, on any layout. Writes OUT.json and OUT.png and prints warnings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megascale.cli import ConfigFile, Overrides, examples, new_app

app = new_app(__doc__ or "")


@app.command(epilog=examples("megascale probe configs/depth-100.yaml data.train=data/text --out runs/probe"))
def main(
    file: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="where OUT.json and OUT.png go")] = Path("probe"),
    lr: Annotated[float, typer.Option(help="learning rate of the one SGD step; small, so that it measures a slope")] = 1e-4,
) -> None:
    """Probes the config's model with one micro-batch per data rank (for a pipeline: enough to fill it)."""
    from megascale.analysis.first_step import measure, write
    from megascale.config.load import load_config
    from megascale.launch.ranks import find_ranks
    from megascale.train.device import choose_device
    from megascale.train.process_group import process_group

    ranks = find_ranks()
    # Hooks cannot look inside compiled blocks; the numbers are the same without compilation.
    config = load_config(str(file), [*(overrides or []), "parallel.compile=false"])
    device = choose_device(config, ranks)
    with process_group(config, ranks):
        result = measure(config, ranks, device, lr)
    if ranks.rank == 0:
        write(result, out)
        for sentence in result["warnings"] or ["no problem found: no rank collapse, no vanishing or exploding gradients"]:
            print(sentence)
        print(f"wrote {out}.json and {out}.png")
