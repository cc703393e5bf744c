"""The steps of the bring-up, in order of value: plain data."""

from __future__ import annotations

from dataclasses import dataclass

BASE = ("torch", "numpy", "pydantic", "ruamel.yaml", "typer", "safetensors", "psutil")  # without these no step runs


@dataclass(frozen=True)
class Step:
    """One step: a module with its arguments, on a device and at the tiny size; `limit` in seconds; packages that it `needs`."""

    name: str
    what: str
    command: str
    tiny: str
    limit: float
    needs: tuple[str, ...] = ()


WHOLE = "benchmarks.gpu.step"
SMALL = f"{WHOLE} --shape tiny --rounds 1 --compute fp32"
FULL = "--recompute full --micro-batches 8"
EXPERTS = "benchmarks.experts.step_time --device cuda --width 2048 --layers 4 --dtype bf16 --compiled"
FEW = "benchmarks.experts.step_time --width 64 --sequences 1 --rounds 1 --threads 1 --dtype fp32 --experts 4"
PEERS = "benchmarks.one_process.throughput"
RING = "benchmarks.gpu.ring"
STEPS = (
    Step("operators", "every operator, compared with a CPU", "benchmarks.gpu.operators --apart 8", "benchmarks.gpu.operators", 200),
    Step("1.2b", "1.2B in bf16, compiled", f"{WHOLE} --shape 1.2b", SMALL, 90),
    Step("8b", "eight 8B layers in bf16, compiled", f"{WHOLE} --shape 8b", f"{SMALL} --eager", 90),
    Step("8b-fp8", "the same, products in static FP8", f"{WHOLE} --shape 8b --fp8", f"{SMALL} --eager --fp8", 100),
    Step(
        "fp8",
        "FP8 static, bf16, torchao in turn",
        "benchmarks.fp8.speed --hidden 2048 --rounds 5 --name bringup",
        "benchmarks.fp8.speed --tiny",
        150,
    ),
    Step("experts", "64 experts beside dense", f"{EXPERTS} --theirs=", f"{FEW} --theirs=", 150),
    Step("ring", "ring attention, its peers simulated", RING, f"{RING} --lengths 128 --places 4 --heads 2 --rounds 1", 60),
    Step(
        "peers",
        "beside Hugging Face's Llama, both compiled",
        f"{PEERS} --dtype bf16 --batch 2 --config gpu --compare",
        f"{PEERS} --rounds 1 --batch 1 --config tiny --compare",
        150,
        ("transformers",),
    ),
    Step(
        "8b-selective",
        "eight 8B layers, recomputed",
        f"{WHOLE} --shape 8b --recompute selective",
        f"{SMALL} --eager --recompute selective",
        90,
    ),
    Step("8b-budget", "the same, recomputed by budget", f"{WHOLE} --shape 8b --recompute budget", f"{SMALL} --recompute budget", 90),
    Step("8b-depth", "eight micro-batches, one after the other", f"{WHOLE} --shape 8b {FULL}", f"{SMALL} --eager {FULL}", 90),
    Step("8b-layered", "the same, layered", f"{WHOLE} --shape 8b {FULL} --layered", f"{SMALL} --eager {FULL} --layered", 90),
    Step("8b-int8", "eight 8B layers, moments in 8 bits", f"{WHOLE} --shape 8b --moments int8", f"{SMALL} --eager --moments int8", 90),
    Step("1.2b-muon", "1.2B with Muon in bf16", f"{WHOLE} --shape 1.2b --muon", f"{SMALL} --eager --muon", 100),
    Step("packing", "packed documents", "benchmarks.packing.attention --device cuda", "benchmarks.packing.attention --lengths 128", 60),
    Step(
        "tests",
        "what `pytest -m gpu` has beside the operators",
        "pytest -m gpu --deselect tests/test_gpu.py::test_gpu_equals_cpu",
        "pytest --version",
        90,
        ("pytest",),
    ),
    Step("ceilings", "kernel by kernel", "benchmarks.gpu.ceilings", "benchmarks.gpu.ceilings --tiny", 60),
    Step("mixtral", "experts beside Hugging Face's Mixtral", f"{EXPERTS} --experts 8", f"{FEW} --theirs=eager", 150, ("transformers",)),
)
