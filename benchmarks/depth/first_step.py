"""The first step by depth: how far one SGD step moves the top of the stream, and whether the first block gets the gradient of the last.

`python -m benchmarks.depth.first_step --data data/stdlib` (2 × 128 tokens of that corpus, width 64, fp64, about 15 minutes of one core).
Steps of 1e-9 in fp64 measure slopes; where a slope is so steep that even they leave the linear range, the number is a lower bound.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import machine, write
from megascale.analysis.first_step import measure
from megascale.config.load import load_config
from megascale.launch.ranks import RankInfo

SCHEMES: dict[str, list[str]] = {
    "deepnorm": ["model.residual=deepnorm"],
    "branchnorm": ["model.residual=branchnorm", "model.branchnorm_period=4000"],
    # As published, with ReLU and 4d; SwiGLU, quadratic in its input, returns about twice the gradient that its output says.
    "deepscale": ["model.residual=deepscale", "model.ffn=relu", "model.ffn_size=256"],
    "deepscale_post": ["model.residual=deepscale_post", "model.ffn=relu", "model.ffn_size=256"],
    "deepscale_swiglu": ["model.residual=deepscale"],
    "deepscale_swiglu_gradient": ["model.residual=deepscale", "model.deepscale_unit=gradient"],
    "pre": ["model.residual=pre"],
    "post": ["model.residual=post"],
    "post_xavier": ["model.residual=branchnorm", "model.branchnorm_period=1"],  # what BranchNorm becomes
    "subln": ["model.residual=subln"],
    "layerscale": ["model.residual=layerscale"],
    "parallel": ["model.residual=parallel"],
}
CONFIG = Path(__file__).parents[2] / "configs" / "depth-100.yaml"


def first_step(scheme: str, layers: int, data: str) -> dict[str, float]:
    small = ["train.micro_batch_size=2", "precision.compute=fp64", "run.device=cpu", f"run.threads={torch.get_num_threads()}"]
    config = load_config(str(CONFIG), [*SCHEMES[scheme], *small, f"model.num_layers={layers}", f"data.train={data}"])
    points = measure(config, RankInfo(), torch.device("cpu"), 1e-9)["points"]

    def gradient(layer: int) -> float:
        return math.hypot(*(p["weight_gradient"] for p in points if p["layer"] == layer))

    return {
        "update": points[-1]["update"],
        "gradient_first_over_last": gradient(0) / gradient(layers - 1),
        "gradient_first_over_middle": gradient(0) / gradient(layers // 2),
        "cosine_embedding": points[0]["correlation"],
        "cosine_top": points[-1]["correlation"],
        "variance_top": points[-1]["variance"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="data/stdlib", help="prefix of token files")
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 48, 192, 768, 1000])
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    args = parser.parse_args()
    before = Path(__file__).parent / "results" / "first_step.json"
    # Schemes that are not asked for keep their numbers.
    found: dict[str, dict[str, Any]] = json.loads(before.read_text())["schemes"] if before.exists() else {}
    for scheme in args.schemes:
        found[scheme] = {}
        for layers in args.layers:
            found[scheme][str(layers)] = numbers = first_step(scheme, layers, args.data)
            print(scheme, layers, {k: f"{v:.3g}" for k, v in numbers.items()}, flush=True)
    write(__file__, "first_step", {"machine": machine(), "data": Path(args.data).name, "schemes": found})


if __name__ == "__main__":
    main()
