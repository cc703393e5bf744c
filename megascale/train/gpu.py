"""Checks of a GPU before anything is allocated on it, and warnings about what will be slow there."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

from megascale.config.schema import Config
from megascale.errors import UsageError
from megascale.launch.ranks import RankInfo, node_name
from megascale.sizes import byte_words

FP8_CAPABILITY = (8, 9)  # FP8 products: Ada, Hopper and newer
BF16_CAPABILITY = (8, 0)
CUDNN_ATTENTION = 91501  # the first cuDNN whose attention torch prefers to FlashAttention-2


def check_card(config: Config, ranks: RankInfo, name: str, capability: tuple[int, int], built_for: Sequence[str]) -> None:
    """Raises UsageError if a card cannot do what the config asks. `built_for`: architectures of torch's kernels, such as sm_90."""
    about = f"{name} has compute capability {capability[0]}.{capability[1]}"
    if built_for and not any(runs(arch, capability) for arch in built_for):
        raise UsageError(
            f"{about}, and torch {torch.__version__} only has kernels for {', '.join(built_for)}: install a torch that is built for "
            "it, or set run.device cpu"
        )
    fp8, compute = config.precision.fp8, config.precision.compute
    if fp8 != "false" and capability < FP8_CAPABILITY:
        raise UsageError(
            f"precision.fp8 is {fp8} and {name} has compute capability {capability}: FP8 products need {FP8_CAPABILITY}; use precision.fp8 "
            "false, which is the same model in precision.compute"
        )
    if compute == "bf16" and capability < BF16_CAPABILITY:
        raise UsageError(f"precision.compute is bf16 and {about}: bf16 products need 8.0; use precision.compute fp32")
    if " MIG " in f"{name} " and ranks.size > 1:
        raise UsageError(
            f"rank {ranks.rank} on {node_name()} has {name}, a slice of a GPU, and there are {ranks.size} ranks: NCCL does not connect "
            "slices; train on one of them alone, or switch MIG off"
        )


def take(ranks: RankInfo, device: torch.device) -> None:
    """Makes `device` this process's own. Raises UsageError if CUDA cannot even start there, as on a GPU that is full or that one process
    has for itself.
    """
    try:
        torch.cuda.set_device(device)
        torch.cuda.mem_get_info(device)  # needs a context, which takes some hundred MB
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"rank {ranks.rank} on {node_name()} cannot use {device} ({reason}): it is held by "
            f"{holders(device) or 'processes that are not visible from here'}; end them, or choose other GPUs with CUDA_VISIBLE_DEVICES"
        ) from None


def why_no_gpu() -> str:
    """Why torch finds no GPU, and the fix."""
    built = torch.version.cuda
    if built is None:
        return f"torch {torch.__version__} is built for CPUs; install its CUDA build, or use auto or cpu"
    driver: int = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]  # 12040 for CUDA 12.4
    if driver and driver // 1000 < int(built.split(".")[0]):
        has = f"{driver // 1000}.{driver % 1000 // 10}"
        return f"its driver takes CUDA up to {has} and torch {torch.__version__} is built for {built}; update the driver"
    return "look at the driver (nvidia-smi) and at CUDA_VISIBLE_DEVICES, or use auto or cpu"


def runs(arch: str, capability: tuple[int, int]) -> bool:
    """Whether kernels built for `arch` run on a card: binaries (sm_86) on the same major version from their minor version on, PTX
    (compute_90) also on all newer ones. A letter after the number (sm_90a) restricts them to exactly that capability.
    """
    kind, _, digits = arch.partition("_")
    if not digits.isdigit():
        return digits[:-1].isdigit() and divmod(int(digits[:-1]), 10) == capability
    own = divmod(int(digits), 10)
    return own <= capability and (kind == "compute" or own[0] == capability[0])


def check_room(config: Config, ranks: RankInfo, device: torch.device, state: Callable[[], int]) -> None:
    """Raises UsageError if a GPU's free memory cannot hold even the weights and the optimizer's `state`, in bytes."""
    if device.type != "cuda" or config.parallel.offload:
        return
    free, total = torch.cuda.mem_get_info(device)
    need = state()
    if need <= free:
        return
    held = (
        f"{byte_words(total - free)} of its {byte_words(total)} are held by {holders(device) or 'processes that are not visible from here'}"
    )
    fits = "end them" if need <= total else "shard the state over more ranks (parallel.dp_shard, tp, pp), or offload (parallel.offload)"
    raise UsageError(
        f"rank {ranks.rank} on {node_name()} needs {byte_words(need)} on {device} for weights and optimizer state alone, and "
        f"{byte_words(free)} are free: {held}; {fits}"
    )


def holders(device: torch.device) -> str:
    """The processes that use a GPU's memory, according to nvidia-smi; empty if it does not say."""
    with suppress(OSError, subprocess.SubprocessError, RuntimeError):
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        ask = ["nvidia-smi", f"--id=GPU-{uuid}", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader"]
        lines = subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
        return "; ".join(f"process {line.strip()}" for line in lines[:8] if line.strip())
    return ""


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """For the log: the facts that decide which attention kernel runs."""
    if device.type != "cuda":
        return {}
    cudnn = torch.backends.cudnn.version() or 0
    return {"cudnn": cudnn, "attention": "cudnn" if cudnn >= CUDNN_ATTENTION else "flash"}


def slow_notes(config: Config, facts: dict[str, Any]) -> list[str]:
    """Sentences about what a config makes slow on a GPU; none on a CPU."""
    if facts["device"] == "cpu":
        return []
    notes = []
    if config.precision.compute in ("fp32", "fp64"):
        notes.append(
            f"precision.compute is {config.precision.compute} on {facts['device']}: products run without tensor cores, about ten times "
            "slower than in bf16, and attention without a fused kernel of its own; set precision.compute bf16"
        )
        if config.model.moe is not None:
            notes.append(
                f"experts in {config.precision.compute} run one after the other, and the host waits for their row counts at each product: "
                "the grouped kernel takes bf16; set precision.compute bf16"
            )
    elif facts.get("attention") == "flash":
        notes.append(
            f"attention runs on FlashAttention-2, since cuDNN is {facts['cudnn']} and torch prefers its attention from {CUDNN_ATTENTION} "
            "on: up to 1.7 times slower on Hopper; install nvidia-cudnn 9.15.1 or newer (torch's wheels for CUDA 13 bring it)"
        )
    if not config.parallel.compile and config.precision.fp8 == "false":  # FP8 has a note of its own
        notes.append(
            f"parallel.compile is false on {facts['device']}: every operation of a block is a kernel of its own, which reads and writes "
            "memory again; set parallel.compile true"
        )
    return notes
