"""Compiled functions, whose cache is not shared between processors that differ.

torch keeps what it compiles on disk, where the next run finds it, and finds it by the graph alone. The code it wrote also depends on
the width of the vectors (a loop of 16 numbers a step, for AVX-512) and on the number of threads. Read back on a narrower processor, from
a directory that nodes share or after ATEN_CPU_CAPABILITY was set, it computed wrong numbers without an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megascale.comm.graphs import skip_wrappers


def compile_static(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`function` through torch.compile for tensors of fixed shape; what is kept on disk is kept for this processor and thread count."""
    skip_wrappers()
    settings = torch.compiler.config
    mine, given = cache_tag(), settings.cache_key_tag
    if mine not in given:  # a user may have one of their own in TORCH_COMPILE_CACHE_KEY_TAG
        settings.cache_key_tag = f"{given.split('|')[0]}|{mine}"
    return torch.compile(function, dynamic=False, **options)


def cache_tag() -> str:
    """What the generated code depends on beside the graph."""
    return f"{torch.backends.cpu.get_cpu_capability()}, threads={torch.get_num_threads()}"
