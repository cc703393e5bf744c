"""Ranks that come to one decision: they go on together, or fail together, and one may decide for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megascale.errors import MegascaleError, UsageError

T = TypeVar("T")


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
