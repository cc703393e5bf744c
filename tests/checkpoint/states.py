"""Small training states cut into rectangles: what the checkpoint tests save and load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import strategies as st
from torch import Tensor

from megascale.checkpoint.loader import find, load
from megascale.checkpoint.saver import Checkpointer, Event
from megascale.comm.piece import Piece
from tests.ranks import run_ranks

TENSORS: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "model.a": ((7, 5), torch.float32),
    "model.b": ((3,), torch.float64),
    "model.experts": ((4, 1, 6), torch.bfloat16),
    "model.none": ((0, 3), torch.float32),
    "optim.m": ((2, 6, 3), torch.float8_e4m3fn),
    "optim.step": ((), torch.int64),
    "optim.seen": ((9, 2), torch.bool),
    "optim.flags": ((5, 3), torch.uint16),
}
# Where a rank's rectangle begins and how large it is.
Rectangle = tuple[tuple[int, ...], tuple[int, ...]]
# name → a rectangle for each rank
Layout = dict[str, list[Rectangle]]


def whole(name: str) -> Tensor:
    shape, dtype = TENSORS[name]
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def cut_whole(ranks: int = 1) -> Layout:
    """Everything on every rank."""
    return {name: [((0,) * len(shape), shape)] * ranks for name, (shape, _) in TENSORS.items()}


def cut_rows(ranks: int) -> Layout:
    """Shards like FSDP2: rows in chunks, the last ones smaller or empty."""
    layout = cut_whole(ranks)
    for name, (shape, _) in TENSORS.items():
        if shape:
            step = -(-shape[0] // ranks)
            bounds = [(min(r * step, shape[0]), min((r + 1) * step, shape[0])) for r in range(ranks)]
            layout[name] = [((first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])) for first, last in bounds]
    return layout


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Each tensor cut at random places along random dimensions; ranks that are left hold copies or nothing."""
    ranks = draw(st.integers(1, 4))
    layout = {}
    for name, (shape, _) in TENSORS.items():
        parts: list[Rectangle] = [((0,) * len(shape), shape)]
        for _ in range(draw(st.integers(0, ranks - 1)) if shape else 0):
            offset, sizes = parts.pop(draw(st.integers(0, len(parts) - 1)))
            dim = draw(st.integers(0, len(shape) - 1))
            at = draw(st.integers(0, sizes[dim]))
            second = tuple(o + at * (d == dim) for d, o in enumerate(offset))
            parts.append((offset, tuple(at if d == dim else n for d, n in enumerate(sizes))))
            parts.append((second, tuple(n - at if d == dim else n for d, n in enumerate(sizes))))
        # Empty rectangles begin where full ones do; DCP must not take one for the other.
        nothing: list[Rectangle] = [((0,) * len(shape), (0, *shape[1:]))] if shape else []
        rest = [draw(st.sampled_from(parts + nothing)) for _ in range(ranks - len(parts))]
        layout[name] = draw(st.permutations(parts + rest))
    return layout


def state(layout: Layout, rank: int = 0, fill: int | None = None) -> dict[str, Piece]:
    """A rank's pieces, strided views where the cut makes them so; all elements `fill` where it is given."""
    result = {}
    for name, (shape, _) in TENSORS.items():
        offset, sizes = layout[name][rank]
        full = whole(name) if fill is None else torch.full_like(whole(name).to(torch.float32), fill).to(whole(name).dtype)
        result[name] = Piece(shape, offset, full[tuple(slice(o, o + n) for o, n in zip(offset, sizes))])
    return result


def same(a: dict[str, Piece], b: dict[str, Piece]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(bits(a[n].local) == bits(b[n].local) for n in a)


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def this_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def checkpointer(root: str | Path, **changes: Any) -> Checkpointer:
    return Checkpointer(Path(root), **{"keep_last": 3, "keep_every": None, "asynchronous": False, **changes})


def save_layout(root: str, layout: Layout, step: int = 1) -> list[Event]:
    saver = checkpointer(root, asynchronous=True)
    saver.save(step, state(layout, this_rank()), {"step": step, "identity": {"run.seed": 7}})
    return saver.finish()


def load_layout(root: str, layout: Layout) -> bool:
    target = state(layout, this_rank(), fill=0)
    load(find(root), target)
    return same(target, state(layout, this_rank()))


def make(root: Path, ranks: int = 2) -> Path:
    """A checkpoint of all tensors, cut over `ranks` ranks; its folder."""
    for events in run_ranks(ranks, save_layout, str(root), cut_rows(ranks)):
        assert [e.kind for e in events] == ["saved"], events
    return find(root)


def vector(value: float, size: int = 4) -> dict[str, Piece]:
    return {"model.norm": Piece((size,), (0,), torch.full((size,), value))}


def kinds(events: list[Event]) -> list[str]:
    return [e.kind for e in events]


def on_ranks(ranks: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """`run_ranks` with a time-out below pytest's own: what hangs is reported as the rank that did not answer."""
    return run_ranks(ranks, work, *args)
