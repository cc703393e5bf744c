"""Attention inside packed documents: seconds and peak memory, forward and backward, tile by tile and with a mask of [s, s].

`python benchmarks/packing/attention.py`; each row runs in a process of its own, so that its peak is its own. The dense variant stops where
its mask, which torch widens to the dtype of the scores, no longer fits a laptop.
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
from megascale.model.attention_masked import masked_attention
from megascale.model.attention_tiles import Seen

HEADS, HEAD_DIM, MEAN_DOCUMENT = 8, 64, 700
LENGTHS = (512, 2048, 8192, 32768)
LONGEST_DENSE = 16384


def one(way: str, length: int) -> dict[str, float]:
    """Seconds of one layer's attention, forward and backward, and what it added to the peak of the process."""
    torch.manual_seed(0)
    documents = (torch.rand(1, length) < 1 / MEAN_DOCUMENT).cumsum(1)
    seen = Seen(documents=documents)
    q, k, v = (torch.randn(1, HEADS, length, HEAD_DIM, requires_grad=True) for _ in range(3))
    gradient = torch.randn(1, HEADS, length, HEAD_DIM)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def step() -> None:
        if way == "tiles":
            y = masked_attention(q, k, v, seen)
        else:
            place = torch.arange(length)
            mask = (place[:, None] >= place) & (documents[:, None, :, None] == documents[:, None, None, :])
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        torch.autograd.grad(y, (q, k, v), gradient)

    seconds = []
    for _ in range(4 if length < LENGTHS[-1] else 2):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": statistics.median(seconds[1:]), "peak_bytes": (peak - before) * 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "LENGTH"), help="only this row, as JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one[0], int(args.one[1]))))
        return
    rows = []
    for length in LENGTHS:
        for way in ("tiles", "mask"):
            if way == "mask" and length > LONGEST_DENSE:
                continue
            command = [sys.executable, __file__, "--one", way, str(length)]
            rows.append({"length": length, "way": way, **json.loads(subprocess.run(command, check=True, capture_output=True).stdout)})
    write(__file__, "attention", {"machine": machine(), "heads": HEADS, "head_dim": HEAD_DIM, "mean_document": MEAN_DOCUMENT, "rows": rows})


if __name__ == "__main__":
    main()
