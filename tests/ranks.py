"""Starts ranks on this machine: forked, one thread each, met through a file, with a time-out; a failing rank's traceback is re-raised."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from megascale.verify import ranks
from megascale.verify.ranks import RankFailed


def run_ranks(size: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """`function(*args)` on `size` gloo ranks; the results by rank. A case with pipelines is skipped where torch cannot run it."""
    if torch.__version__.startswith("2.11.") and any(getattr(getattr(a, "parallel", None), "pp", 1) > 1 for a in args):
        pytest.skip("pipelines need torch 2.12")
    try:
        return ranks.run_ranks(size, function, *args, timeout=timeout)
    except RankFailed as error:
        raise AssertionError(str(error)) from None


def fresh_process(function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> Any:
    """`function(*args)` in a process that is not forked. torch sets some things up once: autograd's threads know no later device."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result(timeout)
