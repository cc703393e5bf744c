"""Compiled functions, whose cache is not shared between different processors.

torch caches compiled code on disk and looks it up by the graph alone. But the code also depends on the vector width (a loop of 16 numbers
per step for AVX-512) and on the number of threads. Reused on a narrower processor, through a directory that nodes share or after setting
ATEN_CPU_CAPABILITY, it computed wrong numbers without an error.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch

from megascale.comm.graphs import skip_wrappers

# Graphs of one block's code: its kinds of layers, times training and evaluation, times steps that watch FP8. Beyond torch's limit of 8 the
# rest of the model would run eager, with a line in a log as the only sign.
GRAPHS = 64
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
    config.recompile_limit = max(config.recompile_limit, GRAPHS)
    return torch.compile(function, dynamic=False, **options)


def left_out() -> str | None:
    """A sentence if torch.compile left parts of what it was given to eager code so far in this process."""
    utils: Any = sys.modules.get("torch._dynamo.utils")
    reasons = [] if utils is None else [str(reason).strip().splitlines()[0] for reason in utils.counters["graph_break"]]
    if not reasons:
        return None
    return f"parallel.compile is true, but torch.compile left parts of the step to eager code, which is slower: {'; '.join(reasons[:3])}"


def cache_tag() -> str:
    """Everything besides the graph that the generated code depends on."""
    return f"{torch.backends.cpu.get_cpu_capability()}, threads={torch.get_num_threads()}"
