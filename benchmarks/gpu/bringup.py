"""Everything that has yet to run on a GPU, in order of value, with a time limit per step: one command for a few minutes on a GPU.

    python -m benchmarks.gpu.bringup --minutes 9 --out DIR     # continues where an earlier call stopped, on this device or another
    python -m benchmarks.gpu.bringup --plan --out DIR          # what is still missing
    python -m benchmarks.gpu.bringup --tables --out DIR        # only writes docs/gpu.md's table from existing results

Each step is a command of its own, so a step that fails or hangs costs no more than its limit. DIR/NAME.json has its result, with device,
versions and clocks. The next call tries failed steps again, after those that were never tried. Without a GPU, steps that have a tiny size
run at that size (`--tiny`), so that little runs for the first time on a device.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import machine

ROOT = Path(__file__).resolve().parents[2]
PAGE, BEGIN, END = ROOT / "docs" / "gpu.md", "<!-- bring-up -->", "<!-- end of bring-up -->"


@dataclass(frozen=True)
class Step:
    """One step: a module with its arguments, on a device and at the tiny size (empty: it needs a device); `limit` in seconds."""

    name: str
    what: str
    command: str
    tiny: str
    limit: float


WHOLE = "benchmarks.gpu.step"
SMALL = f"{WHOLE} --shape tiny --rounds 1 --compute fp32"
STEPS = (
    Step("tests", "`pytest -m gpu`", "pytest -m gpu -n 8 --maxfail 20", "pytest -m gpu tests/test_gpu.py", 150),
    Step("1.2b", "1.2B in bf16, compiled", f"{WHOLE} --shape 1.2b", SMALL, 90),
    Step("8b", "eight 8B layers in bf16, compiled", f"{WHOLE} --shape 8b", f"{SMALL} --eager", 90),
    Step("8b-fp8", "the same, products in static FP8", f"{WHOLE} --shape 8b --fp8", f"{SMALL} --fp8", 100),
    Step("8b-selective", "the same in bf16, recomputed", f"{WHOLE} --shape 8b --recompute selective", f"{SMALL} --recompute selective", 90),
    Step("8b-budget", "the same, recomputed by budget", f"{WHOLE} --shape 8b --recompute budget", "", 90),
    Step("8b-int8", "the same, moments in 8 bits", f"{WHOLE} --shape 8b --moments int8", f"{SMALL} --eager --moments int8", 90),
    Step("1.2b-muon", "1.2B with Muon in bf16", f"{WHOLE} --shape 1.2b --muon", f"{SMALL} --eager --muon", 100),
    Step("ring", "ring attention", "benchmarks.gpu.ring", "benchmarks.gpu.ring --lengths 128 --places 4 --heads 2 --rounds 1", 60),
    Step("ceilings", "kernel by kernel", "benchmarks.gpu.ceilings", "", 60),
    Step("fp8", "FP8 static, bf16, torchao in turn", "benchmarks.fp8.speed --hidden 2048 --rounds 5 --name bringup", "", 120),
    Step(
        "experts",
        "64 experts beside dense",
        "benchmarks.experts.step_time --device cuda --width 2048 --layers 4 --dtype bf16 --compiled --name bringup",
        "",
        120,
    ),
    Step(
        "peers",
        "beside Hugging Face's Llama",
        "benchmarks.one_process.throughput --config gpu --dtype bf16 --batch 2 --compare",
        "",
        120,
    ),
    Step("packing", "packed documents", "benchmarks.packing.attention --device cuda", "", 60),
)


def clocks() -> dict[str, str]:
    """What the driver reports about the device now; empty without one."""
    query = "name,driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    first = done.stdout.splitlines()[:1]
    return dict(zip(query.split(","), (word.strip() for word in first[0].split(",")))) if first else {}


def run(step: Step, tiny: bool, limit: float, files: Path | None = None) -> dict[str, Any]:
    """Runs a step, whose own files of results go into `files`. Returns how it ended, how long it took, the last JSON that it printed, and
    the end of its output.
    """
    command = [sys.executable, "-m", *(step.tiny if tiny else step.command).split()]
    before, begin = clocks(), time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True,
        env={
            **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4"),
            **({} if files is None else {"BENCHMARK_RESULTS": str(files)}),
        },
    )  # fmt: skip
    try:
        output, code = process.communicate(timeout=limit)[0], process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, code = process.communicate()[0], -1
    return {
        "step": step.name, "what": step.what, "command": command[1:], "tiny": tiny,
        "ended": "ok" if code in (0, 5) else "over its limit" if code == -1 else f"exit code {code}",  # 5: no test was selected
        "seconds": round(time.monotonic() - begin, 1), "limit": limit, "machine": machine(), "clocks": [before, clocks()],
        "result": last_json(output), "tail": output[-4000:],
    }  # fmt: skip


def last_json(output: str) -> Any:
    """The last object that starts at the beginning of a line; None if there is none."""
    decoder = json.JSONDecoder()
    for at in reversed([i for i in range(len(output)) if output[i] == "{" and (i == 0 or output[i - 1] == "\n")]):
        try:
            return decoder.raw_decode(output[at:])[0]
        except ValueError:
            continue
    return None


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """The results of earlier calls, by step."""
    found = {}
    for step in STEPS:
        path = folder / f"{step.name}.json"
        if path.is_file():
            found[step.name] = json.loads(path.read_text())
    return found


def missing(found: dict[str, dict[str, Any]], tiny: bool) -> list[Step]:
    """Steps without a result: first those never tried, then those that failed. On a device, tiny results do not count."""
    there = {name: record for name, record in found.items() if tiny or not record["tiny"]}
    steps = [step for step in STEPS if step.tiny or not tiny]
    failed = [step for step in steps if step.name in there and there[step.name]["ended"] != "ok"]
    return [step for step in steps if step.name not in there] + failed


def table(found: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of all steps: device, how each ended, and its main numbers."""
    lines = ["| step | device | ended | seconds | result |", "|---|---|---|---|---|"]
    for step in STEPS:
        record = found.get(step.name)
        if record is None or record["tiny"]:
            lines.append(f"| {step.what} | – | not run | | |")
            continue
        device = f"{record['machine'].get('gpu', 'CPU')}, torch {record['machine']['torch']}"
        lines.append(f"| {step.what} | {device} | {record['ended']} | {record['seconds']} | {words(record['result'], record['tail'])} |")
    return "\n".join(lines)


def words(result: Any, tail: str) -> str:
    """A result in a few words."""
    if not isinstance(result, dict):
        return (tail.strip().splitlines() or [""])[-1].replace("|", "/")[:120]
    if "mfu" in result:
        memory = f", {result['peak_bytes'] / 1e9:.1f} GB" if result.get("peak_bytes") else ""
        waits = f", host waits at {', '.join(result['host_waits'])}" if result["host_waits"] else ", no host waits"
        return f"{1000 * result['step_seconds']:.0f} ms, MFU {result['mfu']:.2f}, {result['launches']} launches{memory}{waits}"
    if "rows" in result:
        return ", ".join(f"{row['length'] // 1024}k: {row['share']:.2f} of one fused call" for row in result["rows"] if "share" in row)
    return "in the JSON file"


def write_tables(found: dict[str, dict[str, Any]], page: Path) -> None:
    """Puts the table between its two marks on the page. Raises ValueError if they are missing."""
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page} has no place for the table: put the lines {BEGIN} and {END} into it")
    before, rest = text.split(BEGIN, 1)
    page.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{rest.split(END, 1)[1]}")


def main(
    minutes: Annotated[float, typer.Option(help="all steps end within this time")] = 9.0,
    out: Annotated[Path, typer.Option(help="folder of results; later calls add what is missing")] = ROOT / "benchmarks/gpu/results/bringup",
    plan: Annotated[bool, typer.Option("--plan", help="print what is missing, run nothing")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="tiny sizes; the default without a GPU")] = False,
    tables: Annotated[bool, typer.Option("--tables", help="only write the table of docs/gpu.md")] = False,
    page: Annotated[Path, typer.Option(help="the page to write the table into")] = PAGE,
) -> None:
    tiny = tiny or not torch.cuda.is_available()
    out.mkdir(parents=True, exist_ok=True)
    found = records(out)
    if plan:
        for step in missing(found, tiny):
            print(f"{step.name:14} {step.limit:4.0f} s  {step.what}: python -m {step.tiny if tiny else step.command}")
        return
    end = time.monotonic() + 60 * minutes
    for step in () if tables else missing(found, tiny):
        left = end - time.monotonic()
        if left < min(step.limit, 30):
            print(f"{step.name}: not started, {left:.0f} s are left")
            continue
        found[step.name] = run(step, tiny, min(step.limit, left), (out / "files").resolve())
        (out / f"{step.name}.json").write_text(json.dumps(found[step.name], indent=1) + "\n")
        print(f"{step.name}: {found[step.name]['ended']} after {found[step.name]['seconds']} s", flush=True)
    if not tiny or tables:
        write_tables(found, page)


if __name__ == "__main__":
    typer.run(main)
