"""What stays out of compiled graphs, without importing the compiler for it: that takes longer than everything else at a start."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """As `torch.compiler.disable`, which imports the compiler at once: here the real one is called where the compiler is there already.

    A graph breaks at the wrapper, since it bears the mark that torch gives to disabled functions.
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
    """To be called before anything is compiled: the compiler is not to look into the frames of the wrappers, which have one code."""
    from torch._dynamo.decorators import skip

    skip(_nothing)
