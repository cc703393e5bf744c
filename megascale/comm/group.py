"""How ranks become a group: the store in which they meet, and torch's process group over it."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist

from megascale.launch.ranks import RankInfo
from megascale.launch.rendezvous import interface_towards


def open_store(ranks: RankInfo, limit: float) -> dist.Store:
    """The store on rank 0's node, within `limit` seconds. Waits for that node alone: whoever never comes can then be named."""
    assert ranks.address is not None and ranks.port is not None
    # torchrun's agents keep a store of their own, in which every restart of the ranks has its place.
    agent = ranks.launcher == "torchrun" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        ranks.address,
        ranks.port,
        None,
        ranks.rank == 0 and not agent,
        timedelta(seconds=limit),
        wait_for_workers=False,
        multi_tenant=True,
    )
    return dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def join(store: dist.Store, ranks: RankInfo, backend: str, patience: float) -> None:
    """Collective over all ranks: the process group, whose collectives give up after `patience` seconds."""
    # gloo announces what the host's own name resolves to, which on many machines is an address that others do not reach.
    interface = interface_towards(ranks.address) if ranks.address else None
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.size, timeout=timedelta(seconds=patience))
