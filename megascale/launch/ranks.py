"""Who am I among the ranks? Read from the environment that a launcher set, without importing torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from megascale.errors import UsageError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class RankInfo:
    """Global rank of `size`, place on its node, and where the ranks meet (None for a process alone)."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str | None = None
    port: int | None = None
    launcher: str = "alone"


def find_ranks(environment: Mapping[str, str] | None = None) -> RankInfo:
    """torchrun's variables, or a process alone. Raises UsageError for a half-set environment, naming what is missing."""
    env = os.environ if environment is None else environment
    given = [name for name in TORCHRUN if name in env]
    # An address and a port may stand in a user's shell for other reasons; a rank or a size may not.
    if not any(name in env for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        _refuse_other_launchers(env)
        return RankInfo()
    missing = [name for name in TORCHRUN if name not in env]
    if missing:
        raise UsageError(
            f"the environment of ranks is half set: {', '.join(given)} given, {', '.join(missing)} missing; "
            "start with torchrun, or unset them to run one process"
        )
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        try:
            numbers[name] = int(env[name])
        except ValueError:
            raise UsageError(f"{name} is {env[name]!r} in the environment, and a whole number is needed") from None
    rank, size, local_rank = numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"]
    if not 0 <= rank < size:
        raise UsageError(f"RANK is {rank} and WORLD_SIZE is {size}: a rank must be from 0 to {size - 1}")
    local_size = int(env.get("LOCAL_WORLD_SIZE", str(size)))
    return RankInfo(rank, size, local_rank, local_size, env["MASTER_ADDR"], numbers["MASTER_PORT"], "torchrun")


def _refuse_other_launchers(env: Mapping[str, str]) -> None:
    """Several tasks that each believe to be alone would train the same run over one another."""
    for name, launcher in (
        ("SLURM_STEP_NUM_TASKS", "srun"),
        ("OMPI_COMM_WORLD_SIZE", "mpirun"),
        ("PMI_SIZE", "mpirun"),
    ):
        if env.get(name, "1") != "1":
            raise UsageError(
                f"{launcher} started {env[name]} tasks ({name}), and RANK and WORLD_SIZE are not set: start one torchrun per node"
            )
