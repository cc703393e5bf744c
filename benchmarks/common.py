"""What every benchmark needs: where it ran, how fast products are, and a JSON file beside the script."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megascale.measure.compute import gemm_rate


def machine() -> dict[str, Any]:
    """The machine in words that do not name it."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
    found = {"cpu": model, "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version()}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda or ""}
    return found


def in_turn(steps: dict[str, Callable[[], object]], rounds: int, device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Seconds of each step and the product rate measured right beside it, the candidates taking turns; medians over rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            before = gemm_rate(device, dtype, repeats=2)
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
            rates[name].append((before + gemm_rate(device, dtype, repeats=2)) / 2)
    return {n: {"seconds": statistics.median(seconds[n]), "gemm_flops": statistics.median(rates[n])} for n in steps}


def write(script: str, name: str, result: dict[str, Any]) -> None:
    """results/NAME.json beside the script; prints it as well."""
    path = Path(script).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(result, indent=1)
    path.write_text(text + "\n")
    print(text)
