"""pretrain.py with a pause in every step, so that a test can step in between: `python -m tests.launch.slow CONFIG …`."""

from __future__ import annotations

import os
import runpy
import sys
import time
from typing import Any

from megascale.train.trainer import Trainer

if __name__ == "__main__":
    pause, real = float(os.environ["STEP_SECONDS"]), Trainer.train_step

    def slow_step(self: Trainer, *args: Any) -> Any:
        time.sleep(pause)
        return real(self, *args)

    Trainer.train_step = slow_step  # type: ignore[method-assign]
    sys.argv = ["pretrain.py", *sys.argv[1:]]
    runpy.run_path("pretrain.py", run_name="__main__")
