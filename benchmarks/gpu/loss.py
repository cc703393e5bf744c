"""Head and loss, forward and backward: ours against torch's chunked `F.linear_cross_entropy`, and the product and loss by themselves.

    python -m benchmarks.gpu.loss [--device cuda] [--tokens 8192 --width 4096 --vocab 128256]

Seconds are medians of interleaved calls, errors those against fp64 (the largest difference of a gradient, relative to its largest entry),
and memory is what a call adds on a GPU. torch's way needs 2.13; it is left out by name elsewhere. Liger's kernels need a GPU and a package
of their own: they are not compared.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks.common import machine, write
from megascale.model.loss import cross_entropy_sum, one_for

Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def ways(backend: str | None) -> dict[str, Way]:
    """Name → the summed loss of x [T, d], weight [V, d] and targets [T]."""
    found: dict[str, Way] = {
        "ours": lambda x, w, t: cross_entropy_sum(x, w, t, 1.0, 0, w.shape[0], None, backend),
        "product, then loss": lambda x, w, t: F.cross_entropy(F.linear(x, w.to(x.dtype)).float(), t, reduction="sum"),
    }
    chunked: Any = getattr(F, "linear_cross_entropy", None)
    if chunked is None:
        print(f"torch {torch.__version__} has no linear_cross_entropy: not compared")
    else:
        # In one call it takes one dtype; fp32 masters are cast before it, as FSDP2 would.
        options: Any = torch.nn.LinearCrossEntropyOptions  # type: ignore[attr-defined]
        for policy in ("auto", "accurate"):
            found[f"torch, {policy}"] = lambda x, w, t, policy=policy: chunked(  # type: ignore[misc]
                x, w.to(x.dtype), t, reduction="sum", options=options(acc_policy=policy)
            )
    return found


def gradients(way: Way, x: Tensor, w: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    loss = way(x, w, targets)
    found = torch.autograd.grad(loss, (x, w), one_for(loss))
    return found[0], found[1]


def main(
    device: str = "cpu",
    tokens: int = 2048,
    width: int = 512,
    vocab: int = 32000,
    times: int = 5,
    compiled: bool = True,
) -> None:
    place, rows = torch.device(device), []
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, *([torch.float32] if device == "cpu" else [])):
        x = torch.randn(tokens, width, device=place, dtype=dtype, requires_grad=True)
        w = (torch.randn(vocab, width, device=place) * width**-0.5).requires_grad_()
        targets = torch.randint(0, vocab, (tokens,), device=place)
        wide = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
        right = gradients(lambda x, w, t: F.cross_entropy(F.linear(x, w), t, reduction="sum"), *wide, targets) if device == "cpu" else None
        seconds: dict[str, list[float]] = {}
        error: dict[str, float] = {}
        memory: dict[str, int] = {}
        for turn in range(times + 1):
            for name, way in ways("inductor" if compiled else None).items():
                if place.type == "cuda":
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                before, begin = torch.cuda.memory_allocated() if place.type == "cuda" else 0, time.perf_counter()
                found = gradients(way, x, w, targets)
                if place.type == "cuda":
                    torch.cuda.synchronize()
                    memory[name] = torch.cuda.max_memory_allocated() - before
                if turn:
                    seconds.setdefault(name, []).append(time.perf_counter() - begin)
                elif right is not None:
                    error[name] = max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, right))
        base = statistics.median(seconds["ours"])
        for name, taken in seconds.items():
            ratio = statistics.median(taken) / base
            rows.append({"dtype": str(dtype)[6:], "way": name, "seconds": statistics.median(taken), "over_ours": ratio})
            rows[-1] |= {"error": error[name]} if name in error else {}
            rows[-1] |= {"bytes": memory[name]} if name in memory else {}
            print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in rows[-1].items()))
    write(__file__, f"loss-{device}", {**machine(), "device": device, "shape": [tokens, width, vocab], "compiled": compiled, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
