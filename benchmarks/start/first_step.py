"""Seconds from the command to the first step of one process, and what an asynchronous save costs the steps.

`python -m benchmarks.start.first_step DATA_PREFIX`
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import machine, write


def main() -> None:
    prefix, seconds = sys.argv[1], []
    for _ in range(5):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            command = [sys.executable, "pretrain.py", "configs/quickstart.yaml", f"data.train={prefix}", f"run.dir={run}", "train.steps=1"]
            start = time.time()
            process = subprocess.Popen([*command, "train.eval_every=0"], stderr=subprocess.DEVNULL)
            while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text().endswith("\n"):
                time.sleep(0.01)
                if process.poll() not in (None, 0):
                    raise SystemExit(f"the run ended with {process.returncode}")
            seconds.append(time.time() - start)
            process.wait()
            assert json.loads((run / "exit.json").read_text())["code"] == 0
    write(__file__, "first_step", {"machine": machine(), "seconds": seconds, "median_seconds": statistics.median(seconds)})


if __name__ == "__main__":
    main()
