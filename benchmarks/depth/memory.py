"""Peak memory of a step beyond weights, gradients and optimizer state, by recomputation and depth.

`python -m benchmarks.depth.memory`: DeepNorm blocks of width 64 on 4 × 128 tokens in fp32, one process, minutes of one core. Counted is
what torch allocates during forward and backward, by storage, from the operation that makes it to its last reference. A block's input is
131,072 bytes; the head's logits and one block's own activations are the rest, alike at every depth.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.common import Allocations, machine, write
from megascale.comm.mesh import build_mesh
from megascale.config.layout import axis_sizes
from megascale.config.schema import Model, Parallel
from megascale.model.decoder import Decoder, Shape
from megascale.model.kernels import choose_kernels
from megascale.parallel.apply import parallelize

BATCH, SEQ, WIDTH = 4, 128, 64
CPU = torch.device("cpu")


def peak(recompute: str, layers: int) -> int:
    """Bytes."""
    cfg = Model(num_layers=layers, hidden_size=WIDTH, num_heads=2, ffn_size=128, vocab_size=512, residual="deepnorm")
    parallel = Parallel(recompute=recompute)  # type: ignore[arg-type]
    stage = Decoder(cfg, Shape(SEQ, torch.float32, torch.float32), choose_kernels("torch", cfg.norm, CPU).norm)
    model = parallelize([stage], build_mesh(axis_sizes(parallel, 1), "cpu"), parallel, CPU)
    for _ in model.draw_weights(0):
        pass
    for w in model.weights:
        w.parameter.grad = torch.zeros_like(w.parameter)
    tokens = torch.randint(0, 512, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))
    with Allocations() as made:
        model.module(tokens, tokens, scale=1 / tokens.numel()).backward()
    return made.most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[100, 200, 1000])
    parser.add_argument("--modes", nargs="+", default=["none", "selective", "full", "nested"])
    args = parser.parse_args()
    found: dict[str, dict[str, int]] = {}
    for mode in args.modes:
        found[mode] = {}
        for layers in args.layers:
            found[mode][str(layers)] = peak(mode, layers)
            print(mode, layers, f"{found[mode][str(layers)] / 1e6:.1f} MB", flush=True)
    write(__file__, "memory", {"machine": machine(), "input_bytes": BATCH * SEQ * WIDTH * 4, "peak_bytes": found})


if __name__ == "__main__":
    main()
