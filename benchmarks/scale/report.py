"""What a report of a very long run takes.

    python -m benchmarks.scale.report [STEPS …]       # 10000 100000 1000000

Each length in a process of its own: CPU seconds to read the rows and to draw the page, its size, and the process's largest memory.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import machine, write
from megascale.report.page import page
from megascale.report.read import read_runs

STEPS = (10_000, 100_000, 1_000_000)


def row(step: int, generator: random.Random) -> dict[str, Any]:
    loss = 2 + 8 * step**-0.3 + generator.gauss(0, 0.02)
    more = {"grad_norm": 1.0, "lr": 1e-4, "tokens": step * 4_000_000, "tokens_per_second": 1e6, "step_seconds": 4.0, "data_seconds": 0.001}
    return {"step": step, "loss": loss, **more, "mfu": 0.4, "memory_bytes": 5e10, "sent_bytes": {"dp_shard": 1e9, "tp": 1e9}}


def one(steps: int) -> dict[str, Any]:
    generator = random.Random(1)
    with tempfile.TemporaryDirectory() as folder:
        with open(Path(folder) / "metrics.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row(step, generator)) + "\n" for step in range(1, steps + 1))
        size = Path(file.name).stat().st_size
        begin = time.process_time()
        runs = read_runs([Path(folder)])
        read = time.process_time()
        text = page(runs, "run")
    found = {"metrics_bytes": size, "read_seconds": round(read - begin, 2), "page_seconds": round(time.process_time() - read, 2)}
    return {**found, "page_bytes": len(text), "resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def main(counts: list[int]) -> None:
    rows = {}
    for steps in counts:
        done = subprocess.run([sys.executable, "-m", __spec__.name, "--one", str(steps)], stdout=subprocess.PIPE, text=True, check=True)
        rows[str(steps)] = json.loads(done.stdout.splitlines()[-1])
    write(__file__, "report", {"machine": machine(), "steps": rows})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(int(sys.argv[2]))))
    else:
        main([int(n) for n in sys.argv[1:]] or list(STEPS))
