"""Ulysses as it is for a flat sequence, around every attention of a grid: also where the dimension attended over is whole. It costs twice
what it must, and is here to be measured against.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from megascale.comm.mesh import Axis
from megascale.model.attention import Attend
from megascale.model.ops.attention_tiles import AttentionMask
from megascale.model.spacetime import Spacetime, along, from_lines, sizes, to_lines
from megascale.parallel.context import cut_evenly, ulysses_attention
from megascale.parallel.grid import cut_dimension


def ulysses_everywhere(model: Spacetime, axis: Axis) -> None:
    """Hangs the exchange into every layer that `spread_grid` left without one."""
    dim = cut_dimension(model.cfg, axis.size)
    for layer, (_, block) in enumerate(model.units()):
        over, shape = model.cfg.attended(layer), sizes(model.grids[layer])
        if over != dim:
            whole = [model.fields.grid[i] if i == dim else n for i, n in enumerate(shape)]
            inner = partial(_turned, dim=dim, shape=whole, inner=partial(along, dim=over, shape=whole, inner=model.alone(layer)))
            exchange = partial(ulysses_attention, axis=axis, lengths=cut_evenly(model.fields.grid[dim], axis.size), inner=inner)
            block.attention.attend = partial(along, dim=dim, shape=shape, inner=exchange)


def _turned(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, dim: int, shape: list[int], inner: Attend) -> Tensor:
    """`inner` of tokens that come as lines along `dim`."""
    q, k, v = (from_lines(x, shape, dim) for x in (q, k, v))
    return to_lines(inner(q, k, v, mask), shape, dim)
