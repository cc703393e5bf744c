"""Measures a layer, the embedding and the head on this machine, and prints the `parallel.pp_layers` that balances the stages by it.

Without the key, layers are balanced by estimated FLOPs, which ignore memory-bound norms and a device's inefficiency on small products.
"""

from __future__ import annotations

from megascale.cli import ConfigFile, Overrides, examples, new_app

app = new_app(__doc__ or "")


@app.command(epilog=examples("megascale balance configs/llama-8b.yaml parallel.pp=4"))
def main(
    file: ConfigFile,
    overrides: Overrides = None,
) -> None:
    """Prints the forward and backward time of each part at the config's micro-batch, and the split by measured and by estimated cost."""
    from megascale.analysis.stage_costs import balance
    from megascale.config.load import load_config

    balance(load_config(str(file), overrides or []))
