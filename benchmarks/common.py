"""Shared by all benchmarks: where it ran, how fast products are, and a JSON file next to the script."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megascale.config.schema import Config, Data, Model, Parallel, Precision, Train
from megascale.data.loader import Batch
from megascale.measure.compute import gemm_rate
from megascale.parallel.model import ParallelModel
from megascale.train.build import build_engine, draw_model
from megascale.train.engines.engine import Engine, backward, update

LR = 1e-4  # of timed steps, whose losses nobody looks at


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


def toy(model: Model, seq_len: int, parallel: Parallel | None = None, compute: str = "fp32", **more: Any) -> Config:
    """A config around a model; `more` are other sections."""
    sections: dict[str, Any] = {"train": Train(steps=1, seq_len=seq_len), "data": Data(train="none"), **more}
    return Config(model=model, parallel=parallel or Parallel(), **{"precision": Precision(compute=compute), **sections})  # type: ignore[arg-type]


def next_token_batch(tokens: torch.Tensor) -> Batch:
    """tokens [b, s+1] → a micro-batch in which every token is a target."""
    targets = tokens[:, 1:].contiguous()
    return Batch(tokens[:, :-1].contiguous(), targets, None, None, torch.arange(len(tokens)), targets.numel())


def trained(config: Config, ranks: int, device: torch.device) -> tuple[ParallelModel, Engine]:
    """A drawn model and the engine that trains it, as a run has them."""
    model = draw_model(config, ranks, device)
    return model, build_engine(model, config, device)


def one_step(engine: Engine, batches: Sequence[Batch], scale: float) -> None:
    """The step that a run makes."""
    update(engine, backward(engine, batches, scale, LR))


def in_turn(steps: dict[str, Callable[[], object]], rounds: int, device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Seconds of each step and the product rate measured right with it, the candidates taking turns; medians over rounds."""
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


class Allocations(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are still referred to, and their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: dict[int, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, torch.Tensor):  # what was there before is not this step's
                self.known.setdefault(tensor.untyped_storage()._cdata, None)
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return

        def gone(_: Any) -> None:
            del self.known[key]
            self.now -= size

        self.known[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


def write(script: str, name: str, result: dict[str, Any]) -> None:
    """Writes results/NAME.json next to the script and prints it; into the folder BENCHMARK_RESULTS instead, if that is set."""
    path = Path(os.environ.get("BENCHMARK_RESULTS") or Path(script).parent / "results") / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1)
    path.write_text(text + "\n")
    print(text)
