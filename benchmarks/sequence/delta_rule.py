"""The gated delta rule in chunks against a loop over tokens: seconds forward and backward, and peak memory.

    python -m benchmarks.sequence.delta_rule

Medians of interleaved rounds in fp32, of the rule alone. On one thread in seconds of the processor, which a busy machine hardly changes; on
two the least seconds of the clock, which it does: a loop of short operations then waits more often. The loop is torch's autograd over two
matrix products and an outer product a token; `chunks, autograd` the functions of our operator without its backward pass, which keeps the
inputs alone. Each peak is that of a process of its own, above what it held before. Writes results/delta_rule.json.
"""

from __future__ import annotations

import argparse
import itertools
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
LENGTHS = (1024, 4096)
ROUNDS = 5


def loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The rule token by token; shapes as of `delta_rule`."""
    r = v.shape[2] // q.shape[2]
    q, k = (x.repeat_interleave(r, 2).transpose(0, 1).flatten(1, 2).unsqueeze(2) for x in (q, k))
    v, decay, rate = v.transpose(0, 1).flatten(1, 2).unsqueeze(2), g.exp().transpose(0, 1).flatten(1), beta.transpose(0, 1).flatten(1)
    state = v.new_zeros(v.shape[1], k.shape[-1], v.shape[-1])
    found = []
    # Unbound at once: the gradient of an index is as long as the whole, and would make the loop quadratic.
    for query, key, value, keep, write_rate in zip(*(x.unbind() for x in (q, k, v, decay[..., None, None], rate[..., None, None]))):
        state = state * keep
        state = torch.baddbmm(state, key.mT, write_rate * (value - key @ state))
        found.append(query @ state)
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


def seconds_of(way: Callable[..., Tensor], x: list[Tensor], clock: Callable[[], float]) -> tuple[float, float]:
    """Forward without a graph, and forward with backward."""
    begin = clock()
    with torch.no_grad():
        way(*x)
    middle = clock()
    torch.autograd.grad(way(*x).sum(), x)
    return middle - begin, clock() - middle


def peak_of(name: str, length: int) -> int:
    seconds_of(WAYS[name], inputs(32), time.process_time)  # what the first call of anything allocates
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
    rows, peaks = [], {}
    for length in LENGTHS:
        for name in WAYS:  # first: a process begins with its parent's peak
            command = [sys.executable, "-m", "benchmarks.sequence.delta_rule", "--peak", name, str(length)]
            peaks[name, length] = int(subprocess.run(command, check=True, capture_output=True).stdout)
    for length, threads in itertools.product(LENGTHS, (1, 2)):
        torch.set_num_threads(threads)
        clock, summed = (time.process_time, statistics.median) if threads == 1 else (time.perf_counter, min)
        every: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
        x = inputs(length)
        for number in range(args.rounds + 1):  # the first round warms up
            for name, way in WAYS.items():
                found = seconds_of(way, x, clock)
                every[name] += [found] if number else []
        loops = [summed(times) for times in zip(*every["loop"])]
        for name, each in every.items():
            forward, both = (summed(times) for times in zip(*each))
            row = {"length": length, "threads": threads, "way": name, "forward": forward, "forward_backward": both}
            rows.append(row | {"times_as_fast": [loops[0] / forward, loops[1] / both], "peak_bytes": peaks[name, length]})
            print(json.dumps(rows[-1]))
    sizes = {"key_heads": KEY_HEADS, "value_heads": VALUE_HEADS, "channels": CHANNELS}
    write(__file__, "delta_rule", {"machine": machine(), **sizes, "rounds": args.rounds, "rows": rows})


if __name__ == "__main__":
    main()
