"""One rank of `methods.py`: trains one spacetime model under every method, counts bytes and, between hosts, seconds (rank 0 prints)."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from benchmarks.common import one_step, trained
from benchmarks.layered.hosts import ADDRESSES, CABLE, timed
from benchmarks.sequence.everywhere import ulysses_everywhere
from megascale.config.load import build_config
from megascale.config.schema import Config, Parallel
from megascale.data.loader import Batch
from megascale.model.spacetime import Spacetime

CPU = torch.device("cpu")
GRID, BATCH, LAYERS = (24, 48), 4, 4
MODEL = {"family": "spacetime", "hidden_size": 96, "num_heads": 24, "ffn_size": 192, "head_dim": 4}


def methods(n: int) -> dict[str, Parallel]:
    return {
        "DSP": Parallel(cp=n, cp_method="dsp", engine="ddp"),
        "Ulysses where the cut is": Parallel(cp=n, cp_method="ulysses", engine="ddp"),
        "Ulysses around all": Parallel(cp=n, cp_method="ulysses", engine="ddp"),
        "ring": Parallel(cp=n, engine="ddp"),
        "tensor + sequence": Parallel(tp=n, tp_sequence=True, engine="ddp"),
    }


def settings(parallel: Parallel, layers: int) -> Config:
    fields = {"shape": GRID, "patch": (1, 1), "channels": 3, "objective": "masked"}
    tokens = GRID[0] * GRID[1]
    train = {"steps": 1, "seq_len": tokens, "micro_batch_size": BATCH, "global_batch_size": BATCH}
    model = {**MODEL, "num_layers": layers, "spacetime": fields}
    return build_config({"model": model, "train": train, "data": {"train": "x"}, "parallel": parallel.model_dump()})


def stepper(name: str, n: int, layers: int) -> Callable[[], int]:
    """One training step; returns the bytes that this rank sent for the method, weights' gradients left out."""
    config = settings(methods(n)[name], layers)
    model, engine = trained(config, n, CPU)
    if name == "Ulysses around all":
        assert isinstance(model.model, Spacetime)
        ulysses_everywhere(model.model, model.mesh["cp"])
    fields = torch.randn(BATCH, *GRID, 3, generator=torch.Generator().manual_seed(1))
    targets = (torch.rand(BATCH, GRID[0] * GRID[1], generator=torch.Generator().manual_seed(2)) < 0.5).to(torch.int64) - 1
    batch = Batch(fields, targets, None, None, torch.arange(BATCH), int((targets >= 0).sum()))

    def step() -> int:
        model.mesh.traffic.take()
        one_step(engine, [batch], 1 / batch.valid)
        sent = model.mesh.traffic.take()[0]
        return sent.get("cp", 0) + sent.get("tp", 0)

    return step


def main() -> None:
    rank, ranks, steps, meeting = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    bandwidths = [None if b == "-" else int(b) for b in sys.argv[5:]]
    torch.set_num_threads(1)
    if bandwidths:
        os.environ["GLOO_SOCKET_IFNAME"] = CABLE
        meeting = f"tcp://{ADDRESSES[0]}:29612"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks, timeout=timedelta(seconds=300))
    # What a pair of layers more sends: the first switch of a plan is saved, and embedding and head have exchanges of their own.
    fewer = {name: stepper(name, ranks, LAYERS - 2)() for name in methods(ranks)}
    ways = {name: stepper(name, ranks, LAYERS) for name in methods(ranks)}
    sent = {name: step() for name, step in ways.items()}  # the first step also warms up
    seconds = timed(ways, bandwidths, steps, rank, ranks // 2)
    if rank == 0:
        told = {n: {"sent_bytes": sent[n], "sent_bytes_of_a_pair": sent[n] - fewer[n], "seconds": seconds[n]} for n in ways}
        print(json.dumps(told))
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
