"""Compiled functions, whose cache is not shared between different processors.

torch caches compiled code on disk and looks it up by the graph alone. But the code also depends on the vector width (a loop of 16 numbers
per step for AVX-512) and on the number of threads. Reused on a narrower processor, through a directory that nodes share or after setting
ATEN_CPU_CAPABILITY, it computed wrong numbers without an error.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from megascale.comm.graphs import skip_wrappers

Backend = str | Callable[..., Any]  # of torch.compile: its name, or a function of a graph and its inputs


def compile_static(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`function` through torch.compile for tensors of fixed shape; the disk cache is specific to this processor and thread count."""
    skip_wrappers()
    settings = torch.compiler.config
    mine, given = cache_tag(), settings.cache_key_tag
    if mine not in given:  # a user may have set TORCH_COMPILE_CACHE_KEY_TAG
        settings.cache_key_tag = f"{given.split('|')[0]}|{mine}"
    # The rows that an expert's rank receives are a size known at run time only.
    config: Any = importlib.import_module("torch._dynamo.config")
    config.capture_dynamic_output_shape_ops = True
    return torch.compile(function, dynamic=False, **options)


def cache_tag() -> str:
    """Everything besides the graph that the generated code depends on."""
    return f"{torch.backends.cpu.get_cpu_capability()}, threads={torch.get_num_threads()}"
