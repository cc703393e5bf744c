"""Which line of this package an operation comes from, in forward and in backward."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from types import FrameType

ROOT = f"{Path(__file__).parents[1]}/"
OWN = f"{ROOT}trace/"
# Functions of FSDP2 → the kind of memory that is made inside them.
KINDS = {
    "foreach_all_gather": "gathered weights",
    "foreach_all_gather_copy_out": "gathered weights",
    "init_all_gather_outputs": "gathered weights",
    "unshard": "gathered weights",
    "foreach_reduce": "reduce buffers",
}
# Whose callers say more: layers that everything consists of, and functions around torch's.
PASSED_OVER = ("model/ops/matmul.py", "model/layers.py", "model/products.py", "model/norms.py", "parallel/data.py", "parallel/kernels.py")
MODES = ("__torch_dispatch__", "__torch_function__")  # on the stack between an operation and its caller
SKIPPED = ("analysis/host_syncs.py", "analysis/fake_device.py")


def line_here() -> str:
    """The innermost line of the program, "file:number"; of torch if there is none."""
    return place_here()[0]


def place_here() -> tuple[str, str]:
    """(the innermost line of the program, the kind of memory that FSDP2 makes there or "")."""
    frame: FrameType | None = sys._getframe(2)
    line = inner = first = kind = ""
    while frame is not None:
        code = frame.f_code
        name = code.co_filename
        if not kind and code.co_name in KINDS and "_fully_shard" in name:
            kind = KINDS[code.co_name]
        if name.startswith(ROOT) and code.co_name not in MODES:
            short = _of_program(name)
            if short in PASSED_OVER:
                inner = inner or f"{short}:{frame.f_lineno}"
            elif short and not line:
                line = f"{short}:{frame.f_lineno}"
            if line and (kind or short.startswith("train/trainer")):
                break
        elif not first and "/torch/" in name:
            first = f"{name.rpartition('/torch/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    line = line or inner
    return (f"megascale/{line}" if line else f"torch/{first}"), kind


@cache
def _of_program(name: str) -> str:
    """A file of the program relative to the package; empty for the files that watch it."""
    return "" if name.startswith(OWN) or name.endswith(SKIPPED) else name.removeprefix(ROOT)
