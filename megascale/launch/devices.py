"""Which device a rank takes, and whether it is its own. Plain data; no torch.

Ranks of a node may see all of its devices, or each its own alone (srun --gpus-per-task, --gpu-bind=single), and nothing in their
environment says which: CUDA numbers what a process sees from 0 on. The number of what is seen chooses, and the devices' UUIDs tell whether
the choice was right.
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
    """A sentence where two ranks took one device; `taken`: (node, UUID) by rank."""
    first: dict[str, int] = {}
    for rank, (node, device) in enumerate(taken):
        other = first.setdefault(device, rank)
        if other != rank:
            return (
                f"ranks {other} and {rank} on {node} have one device, {device}: every rank needs its own; start fewer ranks per node, or "
                "give each its own (srun --gpus-per-task=1, or all of the node's devices to all of its ranks)"
            )
    return None
