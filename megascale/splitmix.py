"""splitmix64's finalizer: a bijective scrambling of 64-bit numbers, that makes nearby inputs unrelated. Imports no torch.

Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; the constants are Stafford's variant 13.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment: 2⁶⁴ over the golden ratio
ALL = 2**64 - 1


def mix64(x: Any) -> Any:
    """One number (int), or many (uint64 array)."""
    x = (x ^ (x >> 30)) * FIRST & ALL
    x = (x ^ (x >> 27)) * SECOND & ALL
    return x ^ (x >> 31)


def mix64_signed(x: Tensor) -> Tensor:
    """The same bits for an int64 tensor, whose shifts copy the sign; masks make them logical."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * (FIRST - 2**64)
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * (SECOND - 2**64)
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
