"""Peak memory of a rank in a step, beyond what it holds between steps, by accumulation and offload, and formulas for block inputs.

`python -m benchmarks.layered.memory`: two gloo ranks, ZeRO-3 with full recomputation, m = 2, 4, 8 micro-batches. Counted is what torch
allocates during a second step, by storage, from the operation that makes it to its last reference. Buffers for offloaded inputs exist
since the first step, so what lies on the "host" is not in it, and is counted by itself. Each run asserts that at most a tenth of the
unsharded gradient stays for reductions, one block of twelve.

Formulas, in block inputs: depth-first holds the L of one micro-batch. Layered holds those of all m, and of each one more for the head.
Offloaded, each micro-batch has its stream on its way; one input comes back, one is ahead.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from benchmarks.common import Allocations, machine, write
from benchmarks.layered.worker import stepper
from megascale.config.load import build_config
from megascale.config.schema import Parallel
from megascale.model.families import build_part
from megascale.model.family import Family
from megascale.model.shape import shape_of
from megascale.model.spec import specs_of
from megascale.parallel import apply
from megascale.parallel.offload import HostStash, offload_block_inputs

SIZES = {"num_layers": 12, "hidden_size": 128, "num_heads": 4, "ffn_size": 352, "vocab_size": 512}
SEQ, MICRO_BATCH, RANKS = 512, 4, 2
KEPT = 0.1  # of the unsharded gradient, at most
INPUT = MICRO_BATCH * SEQ * SIZES["hidden_size"] * 4
WAYS: dict[str, dict[str, Any]] = {
    "depth-first": {},
    "layered": {"accumulation": "layered"},
    "layered, inputs offloaded": {"accumulation": "layered", "offload": ("activations",)},
}


def inputs_held(way: str, m: int) -> int:
    """Bytes of block inputs on the device at the peak, by the formulas."""
    if "offloaded" in way:
        return (m + 2) * INPUT
    return (m * (SIZES["num_layers"] + 1) if way == "layered" else SIZES["num_layers"]) * INPUT


@contextmanager
def kept_by_reductions() -> Iterator[list[int]]:
    """After each backward of a group of weights, the bytes of unsharded gradients that FSDP2 still holds for reductions."""
    reduced, contexts = FSDPParamGroup.post_backward, dict[int, Any]()
    held: list[int] = []

    def post_backward(group: Any, *args: Any) -> None:
        reduced(group, *args)
        contexts[id(group.comm_ctx)] = group.comm_ctx
        held.append(sum(state.reduce_scatter_input.nbytes for c in contexts.values() for state in c.reduce_scatter_states))

    FSDPParamGroup.post_backward = post_backward  # type: ignore[assignment, method-assign]
    try:
        yield held
    finally:
        FSDPParamGroup.post_backward = reduced  # type: ignore[method-assign]


def rank_main(rank: int, way: str, m: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    stashes: list[HostStash] = []

    def kept(model: Family, device: torch.device) -> HostStash:
        stashes.append(offload_block_inputs(model, device))
        return stashes[-1]

    apply.offload_block_inputs = kept
    parallel = Parallel(dp_shard=RANKS, recompute="full", **WAYS[way])
    train = {"steps": 1, "seq_len": SEQ, "micro_batch_size": MICRO_BATCH, "global_batch_size": MICRO_BATCH * m * RANKS}
    config = build_config({"model": SIZES, "train": train, "data": {"train": "x"}, "parallel": parallel.model_dump()})
    step = stepper(config, RANKS, m)
    step()
    with Allocations() as made, kept_by_reductions() as left:
        step()
    whole = 4 * sum(spec.numel for spec in specs_of(build_part(config.model, shape_of(config))).values())
    share = max(left) / whole
    assert share <= KEPT, f"{way}: {share:.2f} of the whole model's fp32 gradient is kept, more than {KEPT}"
    print(json.dumps({"peak": made.most, "host": sum(s.most for s in stashes), "kept": share}))


def measure(way: str, m: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "benchmarks.layered.memory", "--rank"]
        running = [
            subprocess.Popen([*words, str(r), way, str(m), f"file://{folder}/store"], stdout=subprocess.PIPE, text=True)
            for r in range(RANKS)
        ]
        found = [json.loads(p.communicate()[0].strip().splitlines()[-1]) for p in running]
    return {k: max(f[k] for f in found) for k in found[0]}


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        rank, way, micro_batches, store = sys.argv[2:]
        rank_main(int(rank), way, int(micro_batches), store)
        return
    runs: list[dict[str, Any]] = []
    for way in WAYS:
        for m in (2, 4, 8):
            found, formula = measure(way, m), inputs_held(way, m)
            about = {"way": way, "micro_batches": m, "peak_bytes": found["peak"], "host_bytes": found["host"], "kept": found["kept"]}
            runs.append({**about, "inputs_by_formula": formula, "rest_bytes": found["peak"] - formula})
            print(runs[-1], file=sys.stderr, flush=True)
    # The rest is one block's own activations, gradients and the head, alike in every way.
    write(__file__, "memory", {"machine": machine(), "model": SIZES, "input_bytes": INPUT, "runs": runs})


if __name__ == "__main__":
    main()
