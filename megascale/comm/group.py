"""How ranks form a group: the store in which they meet, and torch's process group over it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from megascale.errors import UsageError
from megascale.launch.devices import shared_device
from megascale.launch.ranks import RankInfo, node_name
from megascale.launch.rendezvous import interface_towards, is_loopback, is_own

LOOPBACK = "127.0.0.1"
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


def open_store(ranks: RankInfo, limit: float) -> dist.Store:
    """The store on rank 0's node, within `limit` seconds. Waits for that node only, so that ranks which never come can be named."""
    assert ranks.address is not None and ranks.port is not None
    # torchrun's agents keep their own store, which outlives the ranks: every restart gets its own prefix.
    agent = ranks.launcher == "torchrun" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    inside = not agent and stays_inside(ranks, os.environ)
    store = dist.TCPStore(
        LOOPBACK if inside else ranks.address,
        ranks.port,
        None,
        ranks.rank == 0 and not agent,
        timedelta(seconds=limit),
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=_listen(ranks.port) if inside and ranks.rank == 0 and not is_own(ranks.port) else None,
    )
    attempt = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    # A program may train more than once, and an agent's store still has what an earlier run wrote: that it stops, and where.
    return dist.PrefixStore(f"run-{attempt.add(f'runs/{ranks.rank}', 1)}", attempt)


def stays_inside(ranks: RankInfo, env: Mapping[str, str]) -> bool:
    """Whether all ranks are on this machine. Then the store, which trusts whoever writes into it, is not open to the network.

    torchrun's variables without LOCAL_WORLD_SIZE were set by hand, and may mean several nodes.
    """
    told = ranks.launcher != "torchrun" or "LOCAL_WORLD_SIZE" in env
    return is_loopback(ranks.address or "") or (ranks.one_node and told)


def _listen(port: int) -> int:
    """A socket on loopback for torch, which closes it; torch's own listens on every interface. Raises UsageError if the port is taken."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((LOOPBACK, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise UsageError(f"MASTER_PORT {port} cannot be used on {LOOPBACK} ({error.strerror}): set MASTER_PORT to a free port") from None
    return listener.detach()


def check_own_device(store: dist.Store, ranks: RankInfo, uuid: str) -> None:
    """Raises UsageError on all ranks if two of them share a device. Uses the store, since NCCL would hang or abort."""
    store.set(f"device/{ranks.rank}", json.dumps([node_name(), uuid]))
    if ranks.rank == 0:
        taken = [json.loads(word) for word in store.multi_get([f"device/{rank}" for rank in range(ranks.size)])]
        store.set("device/verdict", shared_device([(str(node), str(device)) for node, device in taken]) or "")
    verdict = store.get("device/verdict").decode()
    if verdict:
        raise UsageError(verdict)


def interface_mistake(env: Mapping[str, str], own: Iterable[str]) -> str | None:
    """Why gloo cannot use the interfaces that GLOO_SOCKET_IFNAME names on a node with the interfaces `own`; None if it can.

    gloo takes exact names only; NCCL's variable also takes prefixes, and `^` to exclude.
    """
    wanted, have = env.get(GLOO_INTERFACE, ""), sorted(set(own))
    unknown = [name for name in wanted.split(",") if name not in have]
    if not wanted or not unknown:
        return None
    return (
        f"{GLOO_INTERFACE} is {wanted!r}, and the interfaces that have an address here are {', '.join(have)}: name one of them, or unset "
        "it (then the one towards MASTER_ADDR is taken)"
    )


def join(store: dist.Store, ranks: RankInfo, backend: str, patience: float, device: torch.device | None = None) -> None:
    """Creates the process group, whose collectives give up after `patience` seconds. Collective over all ranks.

    device  this rank's; a group that uses NCCL alone connects on it now, and each axis of the mesh is then split off in one call
    """
    # gloo announces the address that the host's own name resolves to, which others often cannot reach.
    address = LOOPBACK if stays_inside(ranks, os.environ) else ranks.address
    interface = interface_towards(address) if address else None
    if interface is not None:
        os.environ.setdefault(GLOO_INTERFACE, interface)
    own = device if backend == "nccl" else None  # with two backends only one could be split
    dist.init_process_group(
        backend, store=store, rank=ranks.rank, world_size=ranks.size, timeout=timedelta(seconds=patience), device_id=own
    )
