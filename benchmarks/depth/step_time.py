"""Seconds of a training step under each residual scheme, norm and linear, compared with pre-norm with RMSNorm at equal shapes.

`python -m benchmarks.depth.step_time` takes turns: in every round each variant runs once, and its time is divided by pre-norm's in that
round; medians over rounds. `--compile` compiles the blocks, as long runs do.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.common import machine, next_token_batch, one_step, toy, trained, write
from megascale.config.schema import Model, Parallel

BASE: dict[str, Any] = {"num_layers": 6, "hidden_size": 512, "num_heads": 8, "vocab_size": 4096}
VARIANTS: dict[str, dict[str, Any]] = {
    "pre": {},
    "post": {"residual": "post"},
    "deepnorm": {"residual": "deepnorm"},
    "branchnorm": {"residual": "branchnorm", "branchnorm_period": 4000},
    "deepscale": {"residual": "deepscale"},
    "deepscale_post": {"residual": "deepscale_post"},
    "subln": {"residual": "subln"},
    "layerscale": {"residual": "layerscale"},
    "parallel": {"residual": "parallel"},
    "pre, QK-norm": {"qk_norm": True},  # what parallel blocks are to be compared with
    "pre, LayerNorm": {"norm": "layernorm"},
    "pre, DyT": {"norm": "dyt"},
    "pre, BitLinear": {"linear": "bitlinear"},
}


def step_of(variant: str, tokens: torch.Tensor, compiled: bool) -> Callable[[], object]:
    cfg = Model.model_validate({**BASE, **VARIANTS[variant]})
    batch = next_token_batch(tokens)
    _, engine = trained(toy(cfg, tokens.shape[1] - 1, Parallel(compile=compiled)), 1, tokens.device)
    return partial(one_step, engine, [batch], 1 / batch.valid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    args = parser.parse_args()
    tokens = torch.randint(0, BASE["vocab_size"], (1, 513))
    steps = {name: step_of(name, tokens, args.compile) for name in dict.fromkeys(["pre", *args.variants])}
    for step in steps.values():
        for _ in range(2):
            step()
    rounds: list[dict[str, float]] = []
    for _ in range(args.rounds):
        seconds = {}
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            seconds[name] = time.perf_counter() - begin
        rounds.append(seconds)
    result = {
        "machine": machine(),
        "model": BASE,
        "tokens": 512,
        "rounds": args.rounds,
        "seconds": {name: statistics.median(r[name] for r in rounds) for name in steps},
        "over_pre": {name: round(statistics.median(r[name] / r["pre"] for r in rounds), 4) for name in steps},
    }
    write(__file__, "step_time_compiled" if args.compile else "step_time", result)


if __name__ == "__main__":
    main()
