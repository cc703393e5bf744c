"""Everything that has yet to run on a GPU, in order of value, with a time limit per step: one command for a few minutes on a GPU.

    python -m benchmarks.gpu.bringup --minutes 9 --out DIR     # continues where an earlier call stopped, on this device or another
    python -m benchmarks.gpu.bringup --plan --out DIR          # what is still missing
    python -m benchmarks.gpu.bringup --tables --out DIR        # only writes docs/gpu.md's table from existing results

DIR/bringup.json has all results, with device, versions and clocks. Each step (steps.py) is a command of its own, so one that fails, hangs
or runs out of memory costs no more than its limit; a step whose packages are missing is left out by name. The next call tries failed steps
again, after those that were never tried. Without a GPU steps run at their tiny size (`--tiny`), so that little runs for the first time on
a device. This file imports neither torch nor any other package: what is broken or missing is found, and named, by the steps.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu.steps import BASE, STEPS, Step
from benchmarks.gpu.tables import write_tables

ROOT = Path(__file__).resolve().parents[2]
PAGE, RESULTS = ROOT / "docs" / "gpu.md", "bringup.json"
CACHES = Path(tempfile.gettempdir()) / "megascale-bringup"  # of compilers: the home directory may not be writable
PROBE = """
import json, platform, torch
found = {"torch": torch.__version__, "python": platform.python_version()}
if torch.cuda.is_available():
    free, total = torch.cuda.mem_get_info()
    found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    found |= {"free_bytes": free, "total_bytes": total}
print(json.dumps(found))
"""
OUT_OF_MEMORY = ("OutOfMemoryError", "CUDA out of memory", "MemoryError")
UNFINISHED = "cut off"  # how a step has ended whose call was killed


def environment(base: dict[str, str]) -> dict[str, str]:
    """Of a step: this checkout first, then what the caller has on the path; all steps share the compilers' caches."""
    paths = [str(ROOT), *filter(None, [base.get("PYTHONPATH")])]
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(CACHES / "inductor"), "TRITON_CACHE_DIR": str(CACHES / "triton")}
    ours = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "BENCHMARK_RESULTS": str(CACHES / "results")}
    return {"OMP_NUM_THREADS": "4", **caches, **base, **ours}


def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """`python -m WORDS` in a session of its own. Its output goes into a file: a pipe could be held open by a compiler that outlives it."""
    with log.open("wb") as file:
        env = environment(dict(os.environ))
        return subprocess.Popen([sys.executable, *words], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True, env=env)


def finish(process: Any, limit: float) -> int | None:
    """The exit code; None if it had to be ended at its limit. It ends with this call, too: the next one needs the device."""
    code = None
    try:
        code = int(process.wait(limit))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if code is None:
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)  # one that hangs in the driver may not end; the next step must not wait for it
    return code


Start = Callable[[list[str], Path], Any]


def probe(begin: Start = start) -> dict[str, Any]:
    """torch and the GPU, as a process of its own finds them; `error` if there is no answer."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        code = finish(begin(["-c", PROBE], log), 120)
        output = log.read_text(errors="replace")
    return last_json(output) or {"error": "no answer within 120 s" if code is None else last_line(output)}


def clocks() -> dict[str, str]:
    """What the driver reports about the device now; empty without one."""
    query = "name,driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    first = done.stdout.splitlines()[:1]
    return dict(zip(query.split(","), (word.strip() for word in first[0].split(",")))) if first else {}


def run(step: Step, tiny: bool, limit: float, about: dict[str, Any], begin: Start = start) -> dict[str, Any]:
    """Runs a step: how it ended, how long it took, the last JSON that it printed, and the end of its output."""
    words, before, now = ["-m", *(step.tiny if tiny else step.command).split()], clocks(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        try:
            code = finish(begin(words, log), limit)
            ended = "over its limit" if code is None else "ok" if code in (0, 5) else f"exit code {code}"  # 5: no test was selected
        except OSError as error:  # no memory for a process, a full disk
            ended = str(error)
        output = log.read_text(errors="replace") if log.exists() else ""
    if ended.startswith("exit code") and any(word in output for word in OUT_OF_MEMORY):
        ended = "out of memory"
    return {
        "step": step.name, "what": step.what, "command": words, "tiny": tiny, "ended": ended, "limit": limit,
        "seconds": round(time.monotonic() - now, 1), "machine": about, "clocks": [before, clocks()],
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


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """The results of earlier calls, by step; those of steps that are no more are left out."""
    try:
        found = json.loads((folder / RESULTS).read_text())
    except (OSError, ValueError):
        return {}
    return {step.name: found[step.name] for step in STEPS if step.name in found}


def keep(folder: Path, found: dict[str, dict[str, Any]]) -> None:
    """Writes all results in one file, whole or not at all: a call may be killed at any time."""
    new = folder / f"{RESULTS}.new"
    new.write_text(json.dumps(found, indent=1) + "\n")
    new.replace(folder / RESULTS)


def missing(found: dict[str, dict[str, Any]], tiny: bool) -> list[Step]:
    """Steps without a result: first those never tried, then those that failed. On a device, tiny results do not count."""
    there = {name: record for name, record in found.items() if tiny or not record["tiny"]}
    failed = [step for step in STEPS if step.name in there and there[step.name]["ended"] != "ok"]
    return [step for step in STEPS if step.name not in there] + failed


def absent(names: tuple[str, ...]) -> list[str]:
    """The packages among `names` that are not installed here."""

    def there(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:  # of the package around it
            return False

    return [name for name in names if not there(name)]


def needs_words(step: Step) -> str:
    lacking = absent(step.needs)
    return f" [left out: {' and '.join(lacking)} not installed]" if lacking else ""


def run_missing(out: Path, minutes: float, tiny: bool, about: dict[str, Any], begin: Start = start) -> dict[str, dict[str, Any]]:
    """Runs what is missing and fits into the minutes, and keeps each result as soon as it is there."""
    found, end = records(out), time.monotonic() + 60 * minutes
    for step in missing(found, tiny):
        left = end - time.monotonic()
        if absent(step.needs):
            print(f"{step.name}:{needs_words(step)}")
            continue
        if left < 0.6 * step.limit:
            print(f"{step.name}: not started, {left:.0f} s are left")
            continue
        found[step.name] = {
            "step": step.name,
            "tiny": tiny,
            "ended": UNFINISHED,
            "seconds": 0,
            "machine": about,
            "result": None,
            "tail": "",
        }
        keep(out, found)
        found[step.name] = run(step, tiny, min(step.limit, left), about, begin)
        keep(out, found)
        print(f"{step.name}: {found[step.name]['ended']} after {found[step.name]['seconds']} s", flush=True)
    return found


def parsed(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="all steps end within this time")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/gpu/results", help="folder of bringup.json")
    parser.add_argument("--plan", action="store_true", help="print what is missing, run nothing")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes; the default without a GPU")
    parser.add_argument("--tables", action="store_true", help="only write the table of docs/gpu.md")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write the table into")
    return parser.parse_args(words)


def main(words: list[str] | None = None, begin: Start = start) -> int:
    args = parsed(words)
    if args.tables:
        write_tables(records(args.out), args.page)
        return 0
    if lacking := absent(BASE):
        print(f"megascale needs {', '.join(lacking)}: pip install {' '.join(lacking)}, or put them on PYTHONPATH", file=sys.stderr)
        return 2
    about = probe(begin)
    tiny = args.tiny or "gpu" not in about
    if tiny and not args.tiny:
        print(f"no GPU ({about.get('error', 'torch finds none')}): steps run at their tiny size, which says nothing about a device")
    if not tiny and about["free_bytes"] < 0.9 * about["total_bytes"]:
        held = (about["total_bytes"] - about["free_bytes"]) / 1e9
        print(f"{about['gpu']} is not free: other processes hold {held:.0f} GB, and rates may be theirs (nvidia-smi says whose)")
    if args.plan:
        for step in missing(records(args.out), tiny):
            print(f"{step.name:14} {step.limit:4.0f} s  {step.what}: python -m {step.tiny if tiny else step.command}{needs_words(step)}")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    CACHES.mkdir(parents=True, exist_ok=True)
    found = run_missing(args.out, args.minutes, tiny, about, begin)
    if not tiny:
        write_tables(found, args.page)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a step ends as well
    sys.exit(main())
