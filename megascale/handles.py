"""Objects that operators in compiled graphs refer to, and values that graphs tell them.

An operator takes tensors and numbers only, and a number would be a constant of the graph: every layer would be compiled anew. So an object
is referred to by its number in a tensor on the host, an input of the graph, and one graph serves all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_numbers = count()
_objects: WeakValueDictionary[int, Any] = WeakValueDictionary()


class Listener(Protocol):
    """What values can be told to. It may keep them: see `KEEPS_MEMORY` in model/deferred.py."""

    def hear(self, about: str, *values: Tensor) -> None: ...


def handle_of(thing: object) -> Tensor:
    """A new handle, 0-dim int64 on the host; it refers to `thing` as long as that lives."""
    number = next(_numbers)
    _objects[number] = thing
    return torch.tensor(number, device="cpu")


def held(handle: Tensor) -> Any:
    """The object of a handle."""
    return _objects[int(handle)]


def telling(x: Tensor, listener: Tensor, about: str, values: Sequence[Tensor]) -> Tensor:
    """`x`, and whenever it is computed, the object of the handle `listener` hears the values.

    A graph drops what changes nothing. So in a graph an operator says that it changes a zero, which is added to x.
    """
    if not torch.compiler.is_compiling():
        held(listener).hear(about, *values)
        return x
    zero = x.new_zeros(())
    tell(zero, listener, about, values)
    return x + zero


@torch.library.custom_op("megascale::tell", mutates_args={"zero"})
def tell(zero: Tensor, listener: Tensor, about: str, values: Sequence[Tensor]) -> None:
    held(listener).hear(about, *values)


@tell.register_fake
def _(zero: Tensor, listener: Tensor, about: str, values: Sequence[Tensor]) -> None:
    return None
