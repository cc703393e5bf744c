"""pretrain.py whose second rank never comes out of its fifth step's data, or has a bug there when the run is named so."""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

from megascale.train.trainer import Trainer

if __name__ == "__main__":
    real = Trainer.train_step

    def train_step(self: Trainer, step: int, batches: Any) -> Any:
        if step == 5 and os.environ["RANK"] == "1":
            if self.config.run.name == "bug":
                raise ValueError("a bug")
            time.sleep(1000)
        return real(self, step, batches)

    Trainer.train_step = train_step  # type: ignore[method-assign]
    sys.argv = ["pretrain.py", *sys.argv[1:]]
    runpy.run_path(str(Path(__file__).resolve().parents[2] / "pretrain.py"), run_name="__main__")
