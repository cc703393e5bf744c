"""Distance of theory from measurement after every sublayer at the first step, scheme by scheme.

`python -m benchmarks.depth.theory --data data/stdlib512`: 48 blocks of width 64 on 4 × 128 real tokens, about a minute of one core. Written
are the largest deviations over the stack: of the variance and of the gradient relative to theory, of the cosine absolute.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.common import machine, write
from benchmarks.depth.first_step import CONFIG, SCHEMES
from megascale.analysis.first_step import measure
from megascale.config.load import load_config
from megascale.launch.ranks import RankInfo

MORE: dict[str, list[str]] = {
    "pre_dyt": ["model.residual=pre", "model.norm=dyt"],
    "pre_bitlinear": ["model.linear=bitlinear", "model.residual=pre"],
    "deepscale_gelu": ["model.residual=deepscale", "model.ffn=gelu"],
    "deepscale_encoder": ["model.residual=deepscale", "model.ffn=relu", "model.ffn_size=256", "model.family=encoder"],
}


def deviations(overrides: list[str], data: str, layers: int) -> dict[str, float]:
    small = ["train.micro_batch_size=4", "run.device=cpu", f"run.threads={torch.get_num_threads()}", f"data.train={data}"]
    config = load_config(str(CONFIG), [*overrides, *small, f"model.num_layers={layers}"])
    found = measure(config, RankInfo(), torch.device("cpu"), 1e-6)
    pairs = list(zip(found["points"][1:], found["theory"]))
    return {
        "variance": max(abs((p["variance"] + p["mean"] ** 2) / t["variance"] - 1) for p, t in pairs),
        "gradient": max(abs(p["gradient"] / t["gradient"] - 1) for p, t in pairs),
        "cosine": max(abs(p["correlation"] - t["correlation"]) for p, t in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="data/stdlib", help="prefix of token files")
    parser.add_argument("--layers", type=int, default=48)
    args = parser.parse_args()
    found = {name: deviations(overrides, args.data, args.layers) for name, overrides in {**SCHEMES, **MORE}.items()}
    rounded = {name: {k: round(v, 3) for k, v in numbers.items()} for name, numbers in found.items()}
    write(__file__, "theory", {"machine": machine(), "layers": args.layers, "largest_deviation": rounded})


if __name__ == "__main__":
    main()
