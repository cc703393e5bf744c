"""Attention inside packed documents: seconds and peak memory, forward and backward, tile by tile and with a mask of [s, s].

`python -m benchmarks.packing.attention [--device cuda]` (there in bf16, by FlexAttention); each row runs in a process of its own, so that
its peak is its own. The dense variant stops where its mask, which torch widens to the dtype of the scores, no longer fits a laptop.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from benchmarks.common import machine, write
from megascale.model.ops.attention_flex import flex_attention, with_blocks
from megascale.model.ops.attention_masked import masked_attention
from megascale.model.ops.attention_tiles import AttentionMask

HEADS, HEAD_DIM, MEAN_DOCUMENT = 8, 64, 700
LENGTHS = (512, 2048, 8192, 32768)
LONGEST_DENSE = 16384


def one(way: str, length: int, device: torch.device) -> dict[str, float]:
    """Seconds of one layer's attention, forward and backward, and what it added to the peak of the process or the device."""
    torch.manual_seed(0)
    on_gpu = device.type == "cuda"
    documents = (torch.rand(1, length) < 1 / MEAN_DOCUMENT).cumsum(1).to(device)
    seen = AttentionMask(documents=documents)
    size, dtype = (1, HEADS, length, HEAD_DIM), torch.bfloat16 if on_gpu else torch.float32
    q, k, v = (torch.randn(size, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    gradient = torch.randn(size, device=device, dtype=dtype)

    def peak() -> int:
        return torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    before = peak()

    def step() -> None:
        if way == "tiles":
            y = flex_attention(q, k, v, with_blocks(seen, length, device)) if on_gpu else masked_attention(q, k, v, seen)
        else:
            place = torch.arange(length, device=device)
            mask = (place[:, None] >= place) & (documents[:, None, :, None] == documents[:, None, None, :])
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        torch.autograd.grad(y, (q, k, v), gradient)
        if on_gpu:
            torch.cuda.synchronize()

    seconds = []
    for _ in range(4 if on_gpu or length < LENGTHS[-1] else 2):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return {"seconds": statistics.median(seconds[1:]), "peak_bytes": peak() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "LENGTH"), help="only this row, as JSON")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one[0], int(args.one[1]), torch.device(args.device))))
        return
    rows = []
    for length in args.lengths:
        for way in ("tiles", "mask"):
            if way == "mask" and length > LONGEST_DENSE:
                continue
            command = [sys.executable, "-m", "benchmarks.packing.attention", "--one", way, str(length), "--device", args.device]
            rows.append({"length": length, "way": way, **json.loads(subprocess.run(command, check=True, capture_output=True).stdout)})
    name = "attention" if args.device == "cpu" else "attention_cuda"
    write(__file__, name, {"machine": machine(), "heads": HEADS, "head_dim": HEAD_DIM, "mean_document": MEAN_DOCUMENT, "rows": rows})


if __name__ == "__main__":
    main()
