"""One rank's part of ring attention with simulated peers, against one fused call over as many pairs: the rate that a ring could reach.

    python -m benchmarks.gpu.ring [--lengths 32768 --lengths 65536] [--places 8]

Each place of a ring of `places` holds 1/places of the sequence and attends to every block; nothing is sent. Forward and backward.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks.common import machine
from megascale.model.ops.attention_tiles import visible_pairs
from megascale.parallel.context import Spread
from megascale.parallel.ring import add_fused, add_fused_gradients, rectangles


def ring_of_one(q: Tensor, block: Tensor, d_out: Tensor, held: list[list[range]], place: int) -> None:
    """The computation of one place: all blocks forward, then all backward, each with the keys and values of `block` [2, b, h, t, e]."""
    out, lse = torch.zeros_like(q, dtype=torch.float32), torch.full((*q.shape[:3], 1), float("-inf"), device=q.device)
    parts = [r for owner in range(len(held)) for r in rectangles(held[place], held[owner], True)]
    add_fused(out, lse, q, block, parts)
    d_q, d_k, d_v = torch.zeros(3, *q.shape, device=q.device)
    add_fused_gradients((d_q, d_k, d_v), d_out, q, block, out.to(q.dtype), lse, parts)


def seconds(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    taken = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[1:])


def compare(length: int, places: int, heads: int, device: torch.device, rounds: int) -> dict[str, Any]:
    """Pairs per second of the ring's blocks, and of one causal call with 1/√places of the length, which has as many pairs."""
    dtype, held = torch.bfloat16 if device.type == "cuda" else torch.float32, Spread.of(length, places, 1, 1).met
    here = sum(map(len, held[0]))
    q, k, v, d_out = (torch.randn(1, heads, here, 128, device=device, dtype=dtype) for _ in range(4))
    block = torch.stack((k, v))
    one = round(length / places**0.5) // 16 * 16
    x, y, z = (torch.randn(1, heads, one, 128, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    d_whole = torch.randn(1, heads, one, 128, device=device, dtype=dtype)

    def fused() -> None:
        torch.autograd.grad(F.scaled_dot_product_attention(x, y, z, is_causal=True), (x, y, z), d_whole)

    of_ring = (
        sum(visible_pairs(held[0], other) for other in held)
        * heads
        / seconds(lambda: ring_of_one(q, block, d_out, held, 0), device, rounds)
    )
    of_one = visible_pairs([range(one)], [range(one)]) * heads / seconds(fused, device, rounds)
    return {
        "length": length,
        "places": places,
        "ring_pairs_per_second": of_ring,
        "fused_pairs_per_second": of_one,
        "share": of_ring / of_one,
    }


def main(
    lengths: Annotated[list[int], typer.Option()] = [32768, 65536, 131072],  # noqa: B006
    places: Annotated[int, typer.Option()] = 8,
    heads: Annotated[int, typer.Option()] = 16,
    rounds: Annotated[int, typer.Option()] = 5,
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = []
    for length in lengths:
        rows.append(compare(length, places, heads, device, rounds))
        print(json.dumps({"machine": machine(), "places": places, "rows": rows}), flush=True)  # a longer one may not fit


if __name__ == "__main__":
    typer.run(main)
