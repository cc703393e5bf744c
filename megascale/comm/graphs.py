"""Keeps functions out of compiled graphs without importing the compiler, which would dominate the start-up time."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """Like `torch.compiler.disable`, which imports the compiler at once; this calls it only if the compiler is already imported.

    A graph breaks at the wrapper, since it has torch's mark of disabled functions.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" in sys.modules:
            return disabled(function)(*args, **kwargs)  # type: ignore[no-any-return]
        return function(*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call


@functools.cache
def disabled(function: Callable[..., Any]) -> Any:
    return torch.compiler.disable(function)


@outside_graphs
def _nothing() -> None: ...


def skip_wrappers() -> None:
    """Call before compiling anything: makes the compiler skip the frames of the wrappers, which share one code object."""
    from torch._dynamo.decorators import skip

    skip(_nothing)
