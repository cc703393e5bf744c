"""The gated delta rule in chunks against a loop over tokens: seconds forward and backward, and peak memory.

    python -m benchmarks.sequence.delta_rule

Seconds are medians of interleaved rounds on two threads in fp32, of the rule alone; the loop is torch's autograd over two
matrix products and an outer product a token. `chunks, autograd` runs the same functions as the operator, whose backward pass is written out
and keeps the inputs alone. Each peak is that of a process of its own, above what it held before. Writes results/delta_rule.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import machine, write
from megascale.model.ops.delta_rule import Fold, delta_rule, scan

KEY_HEADS, VALUE_HEADS, CHANNELS = 2, 4, 64
LENGTHS = (4096,)
ROUNDS = 3


def loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The rule token by token; shapes as of `delta_rule`."""
    r = v.shape[2] // q.shape[2]
    q, k = (x.repeat_interleave(r, 2).transpose(0, 1).flatten(1, 2).unsqueeze(2) for x in (q, k))
    v, decay, rate = v.transpose(0, 1).flatten(1, 2).unsqueeze(2), g.exp().transpose(0, 1).flatten(1), beta.transpose(0, 1).flatten(1)
    state = v.new_zeros(v.shape[1], k.shape[-1], v.shape[-1])
    found = []
    for t in range(len(v)):
        state = state * decay[t, :, None, None]
        u = rate[t, :, None, None] * (v[t] - k[t] @ state)
        state = torch.baddbmm(state, k[t].mT, u)
        found.append(q[t] @ state)
    return torch.cat(found, 1).transpose(0, 1).unsqueeze(0)


WAYS: dict[str, Callable[..., Tensor]] = {
    "loop": loop,
    "chunks": lambda q, k, v, g, beta: delta_rule(q, k, v, g, beta, None),
    "chunks, autograd": lambda q, k, v, g, beta: scan((q, k, v, g, beta), None, Fold.of([q.shape[1]]))[0],
}


def inputs(length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, length, KEY_HEADS, CHANNELS, generator=generator) for _ in range(2))
    v = torch.randn(1, length, VALUE_HEADS, CHANNELS, generator=generator)
    g, beta = (torch.rand(1, length, VALUE_HEADS, generator=generator) for _ in range(2))
    return [x.requires_grad_() for x in (F.normalize(q, dim=-1) * CHANNELS**-0.5, F.normalize(k, dim=-1), v, -0.1 * g, beta)]


def seconds_of(way: Callable[..., Tensor], x: list[Tensor]) -> tuple[float, float]:
    """Forward without a graph, and forward with backward."""
    begin = time.perf_counter()
    with torch.no_grad():
        way(*x)
    middle = time.perf_counter()
    torch.autograd.grad(way(*x).sum(), x)
    return middle - begin, time.perf_counter() - middle


def peak_of(name: str, length: int) -> int:
    seconds_of(WAYS[name], inputs(32))  # what the first call of anything allocates
    x = inputs(length)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.autograd.grad(WAYS[name](*x).sum(), x)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--peak", nargs=2, metavar=("WAY", "LENGTH"), help="only this peak, in bytes")
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.peak:
        print(peak_of(args.peak[0], int(args.peak[1])))
        return
    rows = []
    for length in LENGTHS:
        x = inputs(length)
        every: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
        for way in WAYS.values():
            seconds_of(way, inputs(64))
        for _ in range(args.rounds):
            for name, way in WAYS.items():
                every[name].append(seconds_of(way, x))
        for name, found in every.items():
            command = [sys.executable, "-m", "benchmarks.sequence.delta_rule", "--peak", name, str(length)]
            peak = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            forward, both = (statistics.median(times) for times in zip(*found))
            ratios = [statistics.median(a[i] / b[i] for a, b in zip(every["loop"], found)) for i in (0, 1)]
            rows.append({"length": length, "way": name, "forward": forward, "forward_backward": both, "peak_bytes": peak})
            rows[-1] |= {"forward_of_loop": ratios[0], "forward_backward_of_loop": ratios[1]}
            print(json.dumps(rows[-1]))
    sizes = {"key_heads": KEY_HEADS, "value_heads": VALUE_HEADS, "channels": CHANNELS}
    write(__file__, "delta_rule", {"machine": machine(), **sizes, "rounds": args.rounds, "rows": rows})


if __name__ == "__main__":
    main()
