"""Ranks that come to one decision: they go on together, or fail together, and one may decide for all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

from megascale.errors import MegascaleError, UsageError
from megascale.launch.ranks import node_name

T = TypeVar("T")
SHOWN = 4  # keys or ranks that a message names


class Agreement:
    """Ranks that go on together, or fail together: none waits for one that has stopped. `group` None: all ranks."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        alone = not dist.is_initialized()
        self.group, self.rank, self.size = group, 0 if alone else dist.get_rank(group), 1 if alone else dist.get_world_size(group)

    def all(self, work: Callable[[], T], share: Callable[[T], Any]) -> tuple[T, list[Any]]:
        """Runs `work` on every rank; returns its result here and what every rank shares of its own.

        Where it fails on some, the lowest of them is blamed on all, with its own MegascaleError if it was one; a failure that is none, a
        bug, is raised as it is where it happened.
        """
        if self.size == 1:
            result = work()
            return result, [share(result)]
        mine: tuple[type[MegascaleError] | None, str | None, Any]
        failure: BaseException | None = None
        try:
            result = work()
            mine = (None, None, share(result))
        except Exception as error:
            failure = error
            known = isinstance(error, MegascaleError)
            mine = (type(error) if known else None, str(error) if known else f"{type(error).__name__}: {error}", None)  # type: ignore[assignment]
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, mine, group=self.group)
        for rank, (kind, message, _) in enumerate(everyone):
            if message is not None:
                if failure is not None and not isinstance(failure, MegascaleError):
                    raise failure
                raise kind(message) if kind is not None else RuntimeError(f"rank {rank} failed: {message}")
        return result, [shared for _, _, shared in everyone]

    def first(self, work: Callable[[], T]) -> T:
        """What `work` gives on the first rank, told to all; it is run nowhere else. Errors are raised on all."""
        _, everyone = self.all(lambda: work() if self.rank == 0 else None, lambda result: result)
        return everyone[0]  # type: ignore[no-any-return]

    def same(self, value: Any, what: str) -> None:
        """Raises UsageError on all ranks where one has another `value` than the first."""
        _, everyone = self.all(lambda: value, lambda own: own)
        for rank, other in enumerate(everyone):
            if other != everyone[0]:
                raise UsageError(f"{what} on rank 0 is {everyone[0]} and on rank {rank} {other}: does every node see the same files?")

    def alike(self, values: Mapping[str, Any], advice: str) -> None:
        """Raises UsageError on all ranks where one has other `values` than the first, naming both ranks, both values and the `advice`."""
        text = json.dumps(values, sort_keys=True, default=str)
        digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        _, everyone = self.all(lambda: (digest, node_name()), lambda own: own)
        others = [rank for rank, (its, _) in enumerate(everyone) if its != everyone[0][0]]
        if not others:
            return
        # Values travel only now, and those of two ranks only: those of thousands would be megabytes for each of them.
        first, other = (self._told_by(rank, json.loads(text)) for rank in (0, others[0]))
        where = [f"rank {rank} on {everyone[rank][1]}" for rank in (others[0], 0)]
        raise UsageError(f"{unlike(differences(first, other), *where)}{_more(others[1:])}: {advice}")

    def _told_by(self, rank: int, value: Any) -> Any:
        told = [value]
        dist.broadcast_object_list(told, rank if self.group is None else dist.get_global_rank(self.group, rank), self.group)
        return told[0]


Differences = dict[str, tuple[Any, Any]]


def differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> Differences:
    """{key: (value of the first, value of the other)} where they are not the same."""
    keys = list(dict.fromkeys((*first, *other)))
    return {k: (first.get(k), other.get(k)) for k in keys if first.get(k) != other.get(k)}


def unlike(found: Differences, other: str, first: str) -> str:
    """Half a sentence: what `other` has, and what `first` has instead."""
    shown = list(found.items())[:SHOWN]
    more = f" (and {len(found) - SHOWN} more keys differ)" if len(found) > SHOWN else ""
    theirs, ours = (", ".join(f"{key} {_short(pair[which])}" for key, pair in shown) for which in (1, 0))
    return f"{other} has {theirs} and {first} has {ours}{more}"


def _more(ranks: list[int]) -> str:
    if not ranks:
        return ""
    named = ", ".join(map(str, ranks[:SHOWN])) + (f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else "")
    return f" (rank {named} differs from rank 0, too)" if len(ranks) == 1 else f" (ranks {named} differ from rank 0, too)"


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
