"""What all layers of a micro-batch share, made once: rotary angles, and the tiles of masks that FlexAttention skips.

Without it each stage of a pipeline and each layer of layered accumulation would make them again for every micro-batch, and so would every
pass of a step over the same positions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")
MOST = 16  # results that depend on no tensor, of so many lengths and kinds at most


class Remembered:
    """Results by name, and by the tensor of a micro-batch that they are made of: they are forgotten with it."""

    def __init__(self) -> None:
        self.always: dict[Hashable, object] = {}
        self.by_batch: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def of(self, source: Tensor | None, name: Hashable, make: Callable[[], T]) -> T:
        """The result that `make` has for this `source`, which must not change; None: it depends on `name` alone."""
        if torch.is_inference_mode_enabled():
            return make()  # a later step could not use it in a backward pass
        if source is None:
            found = self.always
            while len(found) >= MOST and name not in found:
                del found[next(iter(found))]
        else:
            found = self.by_batch.setdefault(source, {})
        if name not in found:
            found[name] = make()
        return found[name]  # type: ignore[return-value]
