"""Kernels compiled ahead of time: registers, spilled bytes and shared memory of each, from the compiler that comes with Triton."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

KERNEL = re.compile(r"async_compile\.triton\('(\w+)', '''\n(.*?)''', device_str='cuda'\)", re.DOTALL)


def usage(source: str) -> dict[str, dict[str, int]]:
    """Kernel → registers, local (spilled) and shared bytes, in the first configuration that Inductor would try. For device.py's device."""
    import triton  # type: ignore[import-not-found,unused-ignore]
    from torch._inductor import config as settings
    from torch._inductor.codecache import PyCodeCache

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = {}
    for name, text in KERNEL.findall(source):
        tuner: Any = getattr(PyCodeCache.load(text), name)
        with settings.patch(use_static_triton_launcher=False):
            kernel = tuner._precompile_config(tuner.configs[0]).kernel
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        found[name] = resources(said) | {"shared": int(kernel.metadata.shared)}
    return found


def resources(said: str) -> dict[str, int]:
    """What cuobjdump says about one kernel."""
    numbers = {word: int(n) for word, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    return {"registers": numbers["REG"], "spilled": numbers["LOCAL"] + numbers["STACK"]}
