"""One rank of `two_hosts.py`: trains every mode at every bandwidth, taking turns, and prints seconds and bytes as JSON (rank 0)."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from benchmarks.common import next_token_batch, one_step, trained
from benchmarks.layered.hosts import ADDRESSES, CABLE, timed
from megascale.config.load import build_config
from megascale.config.schema import Config, Parallel

CPU = torch.device("cpu")
MODEL = {"num_layers": 4, "hidden_size": 256, "num_heads": 4, "ffn_size": 704, "vocab_size": 2048}
SEQ, M = 512, 8


def modes(ranks: int) -> dict[str, Parallel]:
    """What is compared. With two ranks a host, HSDP shards inside the host and has replicas across."""
    wide = {"layered": Parallel(dp_shard=ranks, accumulation="layered"), "depth-first": Parallel(dp_shard=ranks)}
    wide["HSDP"] = Parallel(dp_replicate=2, dp_shard=ranks // 2)
    if ranks > 2:
        wide["layered in HSDP"] = Parallel(dp_replicate=2, dp_shard=ranks // 2, accumulation="layered")
    if importlib.util.find_spec("deepspeed") is not None:
        wide["DeepSpeed ZeRO-3"] = Parallel(dp_shard=ranks, engine="deepspeed")
    return wide


def settings(parallel: Parallel, ranks: int, micro_batch: int) -> Config:
    train = {"steps": 1, "seq_len": SEQ, "micro_batch_size": micro_batch, "global_batch_size": micro_batch * M * ranks}
    return build_config({"model": MODEL, "train": train, "data": {"train": "x"}, "parallel": parallel.model_dump()})


def stepper(config: Config, ranks: int, micro_batches: int = M) -> Callable[[], dict[str, int]]:
    """One training step; returns the bytes that this rank sent, by axis."""
    model, engine = trained(config, ranks, CPU)
    torch.manual_seed(dist.get_rank())
    assert config.model.vocab_size is not None
    batch = next_token_batch(torch.randint(0, config.model.vocab_size, (config.train.micro_batch_size, SEQ + 1)))
    places = config.train.global_batch_size * SEQ

    def step() -> dict[str, int]:
        model.mesh.traffic.take()
        one_step(engine, [batch] * micro_batches, 1 / places)
        return model.mesh.traffic.take()[0]

    return step


def main() -> None:
    rank, ranks, micro_batch, steps = (int(a) for a in sys.argv[1:5])
    bandwidths = [None if b == "-" else int(b) for b in sys.argv[5:]]
    per_host = ranks // 2
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = CABLE
    meeting = f"tcp://{ADDRESSES[0]}:29611"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks, timeout=timedelta(seconds=300))
    ways = {name: stepper(settings(parallel, ranks, micro_batch), ranks) for name, parallel in modes(ranks).items()}
    sent = {name: step() for name, step in ways.items()}  # the first step also warms up
    seconds = timed(ways, bandwidths, steps, rank, per_host)
    if rank == 0:
        print(json.dumps({name: {"sent_bytes": sent[name], "seconds": seconds[name]} for name in ways}))
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
