"""Computes any rectangle of a grown tensor from the source. A pure function: the numbers do not depend on how slabs are cut.

Plain copies keep every bit; with weights or noise the arithmetic is fp64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megascale.comm.piece import Piece
from megascale.expand.axes import FRESH, MEAN, ZERO, AxisMap, same
from megascale.expand.plan import Growth
from megascale.expand.tensors import TensorPlan
from megascale.model.init import TILE, initialize
from megascale.model.spec import ParamSpec

# (name, offset, shape) → that rectangle of the source's tensor, in its stored dtype; names as in the model.
Read = Callable[[str, tuple[int, ...], tuple[int, ...]], Tensor]
# (first row, past the last row) of a matrix → those rows whole
Rows = Callable[[int, int], Tensor]

BLOCK = 1 << 22  # elements computed at once: they fit into caches, and their fp64 copy is small compared with a slab
GAP = 64  # source rows closer than this are read together


@dataclass(frozen=True)
class Values:
    """What a target tensor needs besides its maps: initial values of fresh elements, their seed, and noise."""

    name: str
    spec: ParamSpec
    scale: float
    seed: int
    noise: str  # none, project, snr:DB
    mean_by: Tensor | None = None


def element_block(growth: Growth, plan: TensorPlan, shapes: dict[str, tuple[int, ...]], read: Read, dtype: torch.dtype,
                  offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:  # fmt: skip
    """The rectangle of size `shape` at `offset` of the target tensor that `plan` describes; `shapes`: those of the source's tensors."""
    axes = growth.axes_of(plan)
    if plan.source is None and plan.drawn is None:
        return _started(plan, growth.seed, dtype, offset, shape)
    if plan.offset and (plan.scale != 1.0 or any((a.weight != 1).any() for a in axes)):
        return _offset_block(growth, plan, shapes, read, dtype, offset, shape)
    noise = growth.symmetry if axes[-1].shared and len(axes) > 1 else "none"
    mean_by = None
    if plan.mean_by is not None and any((a.source == MEAN).any() for a in axes):
        mean_by = read(plan.mean_by, (0,), shapes[plan.mean_by]).to(torch.float64) / _start_value(plan, growth)
    values = Values(plan.name, plan.spec, plan.scale, growth.seed, noise, mean_by)
    return _nested(values, axes, _matrices(plan, shapes, read, growth.seed), dtype, offset, shape)


def _offset_block(growth: Growth, plan: TensorPlan, shapes: dict[str, tuple[int, ...]], read: Read, dtype: torch.dtype,
                  offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:  # fmt: skip
    """`element_block` of a weight to which the norm adds a number: their sum is mapped. New elements are as they start."""

    def whole(name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        return read(name, offset, shape).to(torch.float64) + plan.offset

    (known,) = (a.known[offset[0] : offset[0] + shape[0]] for a in growth.axes_of(plan))
    found = element_block(growth, replace(plan, offset=0.0), shapes, whole, torch.float64, offset, shape)
    return (found - torch.from_numpy(known) * plan.offset).to(dtype)


def _started(plan: TensorPlan, seed: int, dtype: torch.dtype, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    out = torch.empty(shape, dtype=dtype)
    if plan.constant is not None:
        return out.fill_(plan.constant)
    initialize(Piece(plan.spec.shape, offset, out), plan.name, plan.spec, seed)
    return out


def _start_value(plan: TensorPlan, growth: Growth) -> float:
    """Initial value of a new channel's learned factor."""
    scale = {"attention": "attention_scale", "ffn": "ffn_scale"}[plan.name.split(".")[2]]
    wanted = f"blocks.{plan.name.split('.')[1]}.{scale}"
    return next(t.spec.mean for t in growth.tensors if t.name == wanted)


def _matrices(plan: TensorPlan, shapes: dict[str, tuple[int, ...]], read: Read, seed: int) -> Callable[[int], Rows]:
    """The source as a bank of matrices: a matrix's number → a reader of its rows. Vectors are matrices of one column."""
    if plan.drawn is not None:
        spec = plan.drawn

        def drawn(low: int, high: int) -> Tensor:
            local = torch.empty((high - low, *spec.shape[1:]), dtype=torch.float64)
            initialize(Piece(spec.shape, (low, *(0 for _ in spec.shape[1:])), local), plan.name, spec, seed)
            return local

        return lambda number: drawn
    assert plan.source is not None
    name, stored = plan.source, shapes[plan.source]
    lead = 0 if plan.lifted or len(stored) < 3 else 1
    rows, columns = (*stored[lead:], 1)[:2]
    parts, parts_dim = plan.parts, plan.parts_dim

    def reader(number: int) -> Rows:
        bank, part = divmod(number, parts)
        height, width = (rows // parts, columns) if parts_dim == 0 else (rows, columns // parts)
        top, left = (part * height, 0) if parts_dim == 0 else (0, part * width)
        first = (bank,) if lead else ()

        def some(low: int, high: int) -> Tensor:
            if len(stored) == 1:
                return read(name, (low,), (high - low,)).unsqueeze(1)
            found = read(name, (*first, top + low, left), (*(1 for _ in first), high - low, width))
            return found[0] if lead else found

        return some

    return reader


def _nested(values: Values, axes: tuple[AxisMap, ...], matrices: Callable[[int], Rows], dtype: torch.dtype, offset: tuple[int, ...],
            shape: tuple[int, ...]) -> Tensor:  # fmt: skip
    """Computes banks matrix by matrix, everything else as one matrix."""
    if len(shape) < 3:
        rows, columns = axes[0], axes[1] if len(axes) > 1 else same(1)
        whole = tuple(a.size for a in axes)
        found = _matrix(values, rows, columns, matrices(0), dtype, (), whole, offset[0], shape[0])
        if len(shape) == 1:
            return found[:, 0]
        return found if shape[1] == whole[1] else found[:, offset[1] : offset[1] + shape[1]].contiguous()
    out = torch.empty(shape, dtype=dtype)
    whole = tuple(a.size for a in axes)
    for i in range(shape[0]):
        number = int(axes[0].source[offset[0] + i])
        found = _matrix(values, axes[1], axes[2], matrices(number), dtype, (offset[0] + i,), whole, offset[1], shape[1])
        out[i] = found if shape[2] == whole[2] else found[:, offset[2] : offset[2] + shape[2]]
    return out


def _matrix(values: Values, rows: AxisMap, columns: AxisMap, source: Rows, dtype: torch.dtype, lead: tuple[int, ...],
            whole: tuple[int, ...], first: int, count: int) -> Tensor:  # fmt: skip
    """Rows first … first + count of a target matrix, all columns. `lead` is its number in a bank of shape `whole`."""
    out = torch.empty((count, columns.size), dtype=dtype)
    column = Columns(columns, values.noise != "none")
    height = max(1, BLOCK // columns.size)
    height = height // TILE[0] * TILE[0] or height  # draw whole tiles of initial values
    mean_rows: Tensor | None = None
    begin = 0
    while begin < count:
        end = min(count, (first + begin + height) // height * height - first if height >= TILE[0] else begin + height)
        part, target = slice(first + begin, first + end), out[begin:end]
        kinds = rows.source[part]
        if (kinds == ZERO).any():
            target[torch.from_numpy(np.flatnonzero(kinds == ZERO))] = 0
        for low, high in _runs(kinds):
            _known(values, rows, column, source, lead, whole, first + begin + low, target[low:high])
        if (kinds == MEAN).any():
            if mean_rows is None:
                mean_rows = column.widen(_mean_of_rows(source, rows, values.mean_by) * values.scale)
            target[torch.from_numpy(np.flatnonzero(kinds == MEAN))] = mean_rows.to(dtype)
        for low, high in _runs(np.where(kinds == FRESH, 0, FRESH)):
            _draw_into(values, lead, whole, first + begin + low, 0, target[low:high])
            for kind, left, right in column.lacking:
                if kind == ZERO:
                    target[low:high, left:right] = 0
        begin = end
    return out


class Columns:
    """A column map in parts: `runs` of plain copies, `altered` columns with weights or noise, and columns without a source."""

    def __init__(self, columns: AxisMap, noisy: bool) -> None:
        self.map = columns
        altered = columns.known & ((columns.weight != 1) | ((columns.copies > 1) & noisy))
        self.altered = torch.from_numpy(np.flatnonzero(altered))
        self.source = torch.from_numpy(columns.source[altered])
        self.weight = torch.from_numpy(columns.weight[altered])
        self.noisy = noisy and bool((columns.copies[altered] > 1).any())
        self.runs = [(low, high, int(columns.source[low])) for low, high in _runs(np.where(altered, FRESH, columns.source), together=False)]
        # A few runs are copied as slices; if sources are scattered, an index is faster.
        plain = np.flatnonzero(columns.known & ~altered)
        self.index = None if len(self.runs) <= 64 else (torch.from_numpy(plain), torch.from_numpy(columns.source[plain]))
        self.lacking = [
            (kind, low, high) for kind in (FRESH, ZERO, MEAN) for low, high in _runs(np.where(columns.source == kind, 0, FRESH))
        ]

    def widen(self, row: Tensor) -> Tensor:
        """[old columns] in fp64 → [columns] with their weights; those without a source get the mean or zero."""
        wide = row[torch.from_numpy(np.maximum(self.map.source, 0))] * torch.from_numpy(self.map.weight)
        for kind, low, high in self.lacking:
            wide[low:high] = 0 if kind == ZERO else row.mean()
        return wide

    def copy(self, found: Tensor, target: Tensor) -> None:
        """Copies the plain columns of [b, old] into [b, new]."""
        if self.index is not None:
            target[:, self.index[0]] = found[:, self.index[1]].to(target.dtype)
            return
        for low, high, source in self.runs:
            target[:, low:high].copy_(found[:, source : source + high - low])


def _known(values: Values, rows: AxisMap, column: Columns, source: Rows, lead: tuple[int, ...], whole: tuple[int, ...], first: int,
           target: Tensor) -> None:  # fmt: skip
    """Fills target rows that all have a source; the sources are close to each other."""
    part = slice(first, first + target.shape[0])
    wanted, weight = rows.source[part], rows.weight[part] * values.scale
    low, high = int(wanted.min()), int(wanted.max()) + 1
    found = source(low, high)
    if high - low != len(wanted) or (np.diff(wanted) != 1).any():
        found = found[torch.from_numpy(wanted - low)]
    if not (weight == 1).all():
        found = found.to(torch.float64) * torch.from_numpy(weight)[:, None]
    column.copy(found, target)
    if len(column.altered):
        exact = found[:, column.source].to(torch.float64) * column.weight
        if column.noisy:
            exact += _noise(values, column, lead, whole, first, exact)
        target[:, column.altered] = exact.to(target.dtype)
    for kind, left, right in column.lacking:
        if kind == FRESH:
            _draw_into(values, lead, whole, first, left, target[:, left:right])
        elif kind == ZERO:
            target[:, left:right] = 0
        else:
            target[:, left:right] = found.to(torch.float64).mean(1, keepdim=True).to(target.dtype)


def _noise(values: Values, column: Columns, lead: tuple[int, ...], whole: tuple[int, ...], first: int, known: Tensor) -> Tensor:
    """Noise for the altered columns [b, n]: fresh initial values of the copies minus their mean, so that they add up to zero; with snr
    scaled relative to the row. Columns without copies get none.
    """
    columns, count = column.map, known.shape[0]
    drawn = torch.zeros(known.shape, dtype=torch.float64)
    place = 0
    for low, high in _runs(np.where(np.isin(np.arange(columns.size), column.altered.numpy()), 0, FRESH)):
        drawn[:, place : place + high - low] = _draw(values, lead, whole, first, count, low, high - low)
        place += high - low
    copies = torch.from_numpy(columns.copies[column.altered.numpy()])
    total = torch.zeros(count, columns.old, dtype=torch.float64).index_add_(1, column.source, drawn)
    noise = drawn - total[:, column.source] / copies
    noise[:, copies == 1] = 0
    if not values.noise.startswith("snr:"):
        return noise
    loud = known.square().mean(1, keepdim=True).sqrt() * 10 ** (-float(values.noise[4:]) / 20)
    size = noise[:, copies > 1].square().mean(1, keepdim=True).sqrt()
    return noise * (loud / size.clamp(min=torch.finfo(torch.float64).tiny))


def _draw_into(values: Values, lead: tuple[int, ...], whole: tuple[int, ...], row: int, column: int, target: Tensor) -> None:
    """Draws a rectangle of the target's initial values, rounded once."""
    if len(whole) == 1 or values.spec.equal_rows:
        target.copy_(_draw(values, lead, whole, row, target.shape[0], column, target.shape[1]))
    else:
        initialize(Piece(whole, (*lead, row, column), target if not lead else target.unsqueeze(0)), values.name, values.spec, values.seed)


def _draw(values: Values, lead: tuple[int, ...], whole: tuple[int, ...], row: int, rows: int, column: int, columns: int) -> Tensor:
    """Draws a rectangle of the target's initial values as a matrix, in fp32, or exactly if it is a constant."""
    dtype = torch.float32 if values.spec.std else torch.float64
    if len(whole) == 1:
        out = torch.empty(rows, dtype=dtype)
        initialize(Piece(whole, (row,), out), values.name, values.spec, values.seed)
        return out.unsqueeze(1)
    out = torch.empty((*(1 for _ in lead), rows, columns), dtype=dtype)
    spec = replace(values.spec, equal_rows=False) if columns != whole[-1] else values.spec
    initialize(Piece(whole, (*lead, row, column), out), values.name, spec, values.seed)
    return out[0] if lead else out


def _mean_of_rows(source: Rows, rows: AxisMap, by: Tensor | None) -> Tensor:
    """Mean over the source's rows [old columns] in fp64, weighted by [old rows] where given; read block by block in a fixed order."""
    total: Tensor | None = None
    step = 256
    for low in range(0, rows.old, step):
        block = source(low, min(rows.old, low + step)).to(torch.float64)
        if by is not None:
            block = block * by[low : low + step, None]
        total = block.sum(0) if total is None else total + block.sum(0)
    assert total is not None
    return total / rows.old


def _runs(source: np.ndarray, together: bool = True) -> Iterator[tuple[int, int]]:
    """Runs of indices with a source: with `together` the sources are close to each other, else consecutive."""
    known = source >= 0
    step = np.diff(source)
    apart = (np.abs(step) > GAP) if together else (step != 1)
    cuts = np.flatnonzero(apart | (known[1:] != known[:-1])) + 1
    for low, high in zip([0, *cuts.tolist()], [*cuts.tolist(), len(source)]):
        if high > low and known[low]:
            yield low, high
