"""pretrain.py with a pause before every step, of as many seconds as the file STEP_PAUSE says at the time."""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

from megascale.train.trainer import Trainer

if __name__ == "__main__":
    pause, real = Path(os.environ["STEP_PAUSE"]), Trainer.train_step

    def slow_step(self: Trainer, *args: Any) -> Any:
        time.sleep(float(pause.read_text()))
        return real(self, *args)

    Trainer.train_step = slow_step  # type: ignore[method-assign]
    sys.argv = ["pretrain.py", *sys.argv[1:]]
    runpy.run_path("pretrain.py", run_name="__main__")
