"""Agreement between ranks: they continue together or fail together, and one may decide for all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

from megascale.errors import MegascaleError, UsageError
from megascale.launch.ranks import node_name

T = TypeVar("T")
Outcome = tuple[type[MegascaleError] | None, str | None, Any]  # (class of a rank's error, its message, the value it shares)
SHOWN = 4  # most keys or ranks that a message names


class Agreement:
    """Makes ranks continue together or fail together, so that none waits for one that has stopped. `group` None: all ranks."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        alone = not dist.is_initialized()
        self.group, self.rank, self.size = group, 0 if alone else dist.get_rank(group), 1 if alone else dist.get_world_size(group)

    def all(self, work: Callable[[], T], share: Callable[[T], Any]) -> tuple[T, list[Any]]:
        """Runs `work` on every rank; returns the local result and `share` of every rank's result.

        If it fails on some ranks, all raise the error of the lowest of them, which names the rank unless all failed. Any other exception
        than MegascaleError is a bug and is raised as it is on the rank where it happened.
        """
        result, everyone = self._everywhere(work, share)
        failed = [rank for rank, (_, message, _) in enumerate(everyone) if message is not None]
        if failed:
            kind, message, _ = everyone[failed[0]]
            raise (kind or RuntimeError)(message if len(failed) == self.size else f"rank {failed[0]}: {message}")
        return result, [shared for _, _, shared in everyone]

    def first(self, work: Callable[[], T]) -> T:
        """Runs `work` on the first rank only; returns its result, or raises its error, on all ranks."""
        _, everyone = self._everywhere(lambda: work() if self.rank == 0 else None, lambda result: result)
        kind, message, result = everyone[0]
        if message is not None:
            raise (kind or RuntimeError)(message)
        return result  # type: ignore[no-any-return]

    def _everywhere(self, work: Callable[[], T], share: Callable[[T], Any]) -> tuple[T, list[Outcome]]:
        """The local result and every rank's `Outcome`. A bug is raised here after the other ranks know of it."""
        result, bug = None, None
        mine: Outcome
        try:
            result = work()
            mine = (None, None, share(result))
        except MegascaleError as error:
            if self.size == 1:
                raise
            mine = (type(error), str(error), None)
        except Exception as error:
            bug = error
            mine = (None, f"{type(error).__name__}: {error}", None)
        everyone = [mine]
        if self.size > 1:
            everyone = [mine] * self.size
            dist.all_gather_object(everyone, mine, group=self.group)
        if bug is not None:
            raise bug
        return result, everyone  # type: ignore[return-value]

    def same(self, value: Any, what: str) -> None:
        """Raises UsageError on all ranks if one has another `value` than the first."""
        _, everyone = self.all(lambda: value, lambda own: own)
        for rank, other in enumerate(everyone):
            if other != everyone[0]:
                raise UsageError(f"{what} on rank 0 is {everyone[0]} and on rank {rank} {other}: does every node see the same files?")

    def alike(self, values: Mapping[str, Any], advice: str) -> None:
        """Raises UsageError on all ranks if one has other `values` than the first, naming both ranks, both values and the `advice`."""
        text = json.dumps(values, sort_keys=True, default=str)
        digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        _, everyone = self.all(lambda: (digest, node_name()), lambda own: own)
        others = [rank for rank, (its, _) in enumerate(everyone) if its != everyone[0][0]]
        if not others:
            return
        # Only now are values sent, and only those of two ranks: those of thousands would be megabytes per rank.
        first, other = (self._told_by(rank, json.loads(text)) for rank in (0, others[0]))
        where = [f"rank {rank} on {everyone[rank][1]}" for rank in (others[0], 0)]
        raise UsageError(f"{unlike(differences(first, other), *where)}{_more(others[1:])}: {advice}")

    def _told_by(self, rank: int, value: Any) -> Any:
        told = [value]
        dist.broadcast_object_list(told, rank if self.group is None else dist.get_global_rank(self.group, rank), self.group)
        return told[0]


Differences = dict[str, tuple[Any, Any]]


def differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> Differences:
    """{key: (value of the first, value of the other)} for differing values."""
    keys = list(dict.fromkeys((*first, *other)))
    return {k: (first.get(k), other.get(k)) for k in keys if first.get(k) != other.get(k)}


def unlike(found: Differences, other: str, first: str) -> str:
    """Half a sentence: the values of `other`, and those of `first` instead."""
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


def on_all_ranks(action: Callable[[], T]) -> T:
    """Runs `action` on every rank and returns its result; an error on one rank is raised on all, so that none waits for another."""
    return Agreement().all(action, lambda _: None)[0]
