"""Whether a run fits into memory: the verdict, its exact and estimated parts, and what would fit if it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megascale.config.schema import Config
from megascale.launch.ranks import RankInfo
from megascale.sizes import byte_words
from megascale.train.estimate.memory import host_bytes, needed
from megascale.train.estimate.oom_advice import ROOM, advice, limit_of
from megascale.train.phases import Phase


@dataclass(frozen=True)
class Room:
    """Memory that a rank may use: `limit` in bytes, None if unknown, and `where` as the end of a sentence."""

    limit: float | None
    where: str
    host: bool = False  # the ranks compute on CPUs, so offloading does not free memory


@dataclass(frozen=True)
class Verdict:
    """Verdict on the fullest rank in the most demanding phase: `state` bytes (exact) and `activations` (estimated). `fits` is None if the
    available memory is unknown; `advice` is empty unless `fits` is False.
    """

    fits: bool | None
    state: int
    activations: float
    room: Room
    after_step: int | None  # the phase begins after this step
    advice: str


def room_of(config: Config, ranks: int, device_bytes: float | None) -> Room:
    """Room on devices with `device_bytes`, by default on the devices of this machine."""
    devices = f"on each of {ranks} devices" if ranks > 1 else "on one device"
    if device_bytes is not None:
        return Room(device_bytes, devices)
    wanted = config.run.device
    if wanted != "cpu" and torch.cuda.is_available():
        return Room(limit_of(torch.device("cuda", 0), RankInfo()), f"{devices} like the first here ({torch.cuda.get_device_name(0)})")
    if wanted == "cuda" or (wanted == "auto" and ranks > 1):
        return Room(None, devices)
    machine = "of this machine's memory" if ranks == 1 else f"for each of {ranks} ranks, if all of them ran on this machine"
    return Room(limit_of(torch.device("cpu"), RankInfo(size=ranks, local_size=ranks)), machine, host=True)


def verdict(phases: Sequence[Phase], ranks: int, room: Room) -> Verdict:
    """The verdict on the phase that needs most memory."""
    needs = [_need(phase.config, ranks, room) for phase in phases]
    worst = max(range(len(phases)), key=lambda i: sum(needs[i]))
    state, live = needs[worst]
    fits = None if room.limit is None else state + live < ROOM * room.limit
    change = advice(phases[worst].config, ranks, room.limit, room.host) if fits is False and room.limit is not None else ""
    return Verdict(fits, state, live, room, phases[worst - 1].until if worst else None, change)


def verdict_lines(found: Verdict) -> list[str]:
    """The answer, then the numbers behind it, then advice."""
    need, room = byte_words(found.state + found.activations), found.room
    after = "" if found.after_step is None else f", from the change after step {found.after_step:,} on"
    if room.limit is None:
        first = f"fits: unknown, {need} needed {room.where}{after}; torch finds no GPU here to compare with"
    else:
        first = f"fits: {'yes' if found.fits else 'no'}, {need} of {byte_words(room.limit)} {room.where}{after}"
    lines = [
        first,
        f"  {byte_words(found.state)} of stored state, exact, and {byte_words(found.activations)} of activations, gathered weights and "
        "loss, an estimate;",
        f"  {100 * (1 - ROOM):.0f} % must stay free for what the estimate leaves out: contexts, buffers of collectives, fragments",
    ]
    if room.limit is None:
        lines.append("  add --device-memory GB for a verdict, or run.device=cpu for one about this machine")
    elif room.host:
        lines.append("  this is about CPUs: --device-memory GB asks about other devices")
    return [*lines, *([f"  {found.advice}"] if found.advice else [])]


def _need(config: Config, ranks: int, room: Room) -> tuple[int, float]:
    state, live = needed(config, ranks, room.host)
    if room.host:
        offloaded = host_bytes(config, ranks)
        live += offloaded["inputs"]
        state += 0 if config.parallel.offload_dir else offloaded["state"]
    return state, live
