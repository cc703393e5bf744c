"""Environment variables that torch reads once, for jobs on GPUs; what the user has set stays. Plain data; no torch."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from pathlib import Path

# Names of the same setting; torch takes the older ones too.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
RECORDED = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
DUMPS = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
FLIGHT = "flight"  # folder in the run directory


def gpu_defaults(run_dir: Path | None, env: Mapping[str, str]) -> dict[str, str]:
    """Defaults for what `env` lacks: memory segments that can grow, since gathers on many streams fragment fixed ones; and a dump of each
    rank's last collectives into the run directory if NCCL gives up.
    """
    wanted = {ALLOCATOR: "expandable_segments:True", RECORDED: "20000", ("TORCH_NCCL_DUMP_ON_TIMEOUT",): "1"}
    if run_dir is not None:
        wanted[DUMPS] = str(run_dir / FLIGHT / "rank-")
    return {names[0]: value for names, value in wanted.items() if not any(name in env for name in names)}


def prepare(run_dir: Path | None, env: MutableMapping[str, str]) -> None:
    """Call before torch creates a group or allocates memory."""
    env.update(gpu_defaults(run_dir, env))
