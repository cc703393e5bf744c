"""Plain values from rank to rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from megascale.comm import gather
from tests.ranks import run_ranks


def several() -> tuple[list[Any], list[Any], str]:
    rank = dist.get_rank()
    unequal = gather.gather_json({"rank": rank, "text": "é\n" * (1 + 500 * rank), "pair": (1, None), "not finite": float("inf")})
    nothing = gather.gather_json("" if rank else None)
    gather.LARGEST = 10
    try:
        gather.gather_json("x" * 20 * rank)
    except ValueError as error:
        return unequal, nothing, str(error)
    return unequal, nothing, ""


@pytest.mark.dist
def test_values_of_unequal_length() -> None:
    """Catches values cut to the length of another's, mixed up between ranks, and one that its own rank alone refuses."""
    for unequal, nothing, refused in run_ranks(2, several):
        assert [v["rank"] for v in unequal] == [0, 1] and [len(v["text"]) for v in unequal] == [2, 1002]
        assert unequal[1]["pair"] == [1, None] and unequal[0]["not finite"] == float("inf") and nothing == [None, ""]
        assert refused == "a rank's value has 22 bytes, more than 10"


def test_alone() -> None:
    """Catches a process alone that gets another kind of value than ranks would, and plain data that is none."""
    assert gather.gather_json((1, "a")) == [[1, "a"]]
    with pytest.raises(TypeError):
        gather.gather_json(object())
