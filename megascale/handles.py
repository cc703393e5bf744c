"""Objects that operators in compiled graphs refer to.

An operator takes tensors and numbers only, and a number would be a constant of the graph: every layer would be compiled anew. So an object
is referred to by its number in a tensor on the host, an input of the graph, and one graph serves all layers.
"""

from __future__ import annotations

from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_numbers = count()
_objects: WeakValueDictionary[int, Any] = WeakValueDictionary()


def handle_of(thing: object) -> Tensor:
    """A new handle, 0-dim int64 on the host; it refers to `thing` as long as that lives."""
    number = next(_numbers)
    _objects[number] = thing
    return torch.tensor(number, device="cpu")


def held(handle: Tensor) -> Any:
    """The object of a handle."""
    return _objects[int(handle)]
