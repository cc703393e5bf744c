#!/usr/bin/env python3
"""`python tools/stop_at.py STEP CONFIG [section.key=value …]`: pretrain.py that gets a file STOP when STEP is logged.

For demonstrations and tests, which must stop at the same place on every machine; by hand one says `touch RUN/STOP` at any time.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

from megascale.train.log.run_log import RunLog


def stop_at(step: int) -> None:
    """Makes the run of this process put the file beside its metrics once the row of `step` is there."""
    write = RunLog.metrics

    def metrics(log: RunLog, row: dict[str, Any]) -> None:
        write(log, row)
        if row["step"] == step and log.run_dir is not None:
            (log.run_dir / "STOP").touch()

    RunLog.metrics = metrics  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    stop_at(int(sys.argv[1]))
    script = str(Path(__file__).resolve().parent.parent / "pretrain.py")
    sys.argv = [script, *sys.argv[2:]]
    runpy.run_path(script, run_name="__main__")
