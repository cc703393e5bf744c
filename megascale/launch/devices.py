"""Chooses a rank's device and checks that no other rank has it. Plain data; no torch.

Ranks of a node may see all of its devices, or only their own (srun --gpus-per-task, --gpu-bind=single), and the environment does not say
which: CUDA numbers the visible devices of a process from 0. The number of visible devices decides, and the devices' UUIDs verify the
choice.
"""

from __future__ import annotations

from collections.abc import Sequence

from megascale.launch.ranks import RankInfo


def device_index(ranks: RankInfo, visible: int) -> int:
    """The number of this rank's device among the `visible` ones, at least one.

    With as many as ranks they are dealt out in order. With fewer, each rank must see its own ones, in which case any of them will do.
    """
    return ranks.local_rank % visible


def shared_device(taken: Sequence[tuple[str, str]]) -> str | None:
    """An error if two ranks took the same device; `taken`: (node, UUID) by rank."""
    first: dict[str, int] = {}
    for rank, (node, device) in enumerate(taken):
        other = first.setdefault(device, rank)
        if other != rank:
            return (
                f"ranks {other} and {rank} on {node} share the device {device}: every rank needs its own; start fewer ranks per node, or "
                "give each its own (srun --gpus-per-task=1, or all of the node's devices to all of its ranks)"
            )
    return None
