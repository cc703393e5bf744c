"""Sequence parallelism on a grid: DSP, Ulysses and ring for models that attend along one dimension at a time.

DSP (arXiv 2403.10266) splits the stream along a dimension that the next layer does not attend over, and switches it between layers if it
must; attention itself never communicates. Ulysses and the ring split along one fixed dimension and communicate in the layers that attend
over it. Exchanges are arguments of the model: `moves` between layers and an `attend` in each.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

from torch import Tensor

from megascale.comm.collectives import gather_unequal, split_unequal, switch
from megascale.comm.mesh import Axis, Mesh
from megascale.config.dsp import plan_cuts
from megascale.config.schema import Model, Parallel
from megascale.model.attention import Attend
from megascale.model.spacetime import Grid, Spacetime
from megascale.parallel.context import cut_evenly, places, total, ulysses_attention
from megascale.parallel.ring import Ring, ring_attention


def move(x: Tensor, axis: Axis, shape: tuple[int, ...], source: int | None, target: int | None) -> Tensor:
    """The stream x [b, n, d] of a grid that is `shape` as a whole, resharded from dimension `source` to `target`; None is unsharded.

    keep    i → i: no communication
    split   whole → i: a slice; backward gathers
    switch  i → j: one all-to-all, M·(N−1)/N² bytes from each rank; backward switches back
    gather  i → whole: M·(N−1)/N bytes; backward takes the slice
    """
    if source == target:
        return x
    here = list(shape)
    if source is not None:
        here[source] = cut_evenly(shape[source], axis.size)[axis.rank]
    grid = x.unflatten(1, here)
    if source is None:
        assert target is not None
        grid = split_unequal(grid, axis, 1 + target, cut_evenly(shape[target], axis.size))
    elif target is None:
        grid = gather_unequal(grid, axis, 1 + source, cut_evenly(shape[source], axis.size))
    else:
        parts, lengths = cut_evenly(shape[target], axis.size), cut_evenly(shape[source], axis.size)
        grid = switch(grid, axis, 1 + target, parts, 1 + source, lengths)
    return grid.flatten(1, -2)


def spread_grid(model: Spacetime, mesh: Mesh, cfg: Parallel) -> None:
    """Splits the grid over cp and installs the exchanges of `cfg.cp_method`. Runs after the tensor pass. Identity at size one."""
    axis = mesh["cp"]
    if axis.size == 1:
        return
    shape, layers = model.fields.grid, range(model.cfg.num_layers)
    if cfg.cp_method == "dsp":
        plan = plan_cuts([model.cfg.attended(i) for i in layers], shape, axis.size)
        assert plan is not None
        model.grids = [cut_grid(shape, dim, axis) for dim in plan]
        model.moves = [partial(move, axis=axis, shape=shape, source=plan[max(0, i - 1)], target=plan[i]) for i in layers]
        model.meet_along([model.alone(i) for i in layers])
        return
    dim = cut_dimension(model.cfg, axis.size)
    met = places(shape[dim], axis.size) if cfg.cp_method == "ring" else [[r] for r in _parts(shape[dim], axis.size)]
    model.grids = [[met[axis.rank] if i == dim else [range(n)] for i, n in enumerate(shape)]] * len(layers)
    crossing = [model.cfg.attended(i) == dim for i in layers]
    model.meet_along([_across(model, i, axis, met, cfg.cp_method) if crossing[i] else model.alone(i) for i in layers])


def cut_dimension(cfg: Model, ranks: int) -> int:
    """The dimension that Ulysses and the ring split: the one that fewest layers attend over, the longest among equals."""
    assert cfg.spacetime is not None
    over, grid = [cfg.attended(i) for i in range(cfg.num_layers)], cfg.spacetime.grid
    return min((i for i, n in enumerate(grid) if n >= ranks), key=lambda i: (over.count(i), -grid[i]))


def cut_grid(shape: tuple[int, ...], dim: int, axis: Axis) -> Grid:
    return [[_parts(n, axis.size)[axis.rank]] if i == dim else [range(n)] for i, n in enumerate(shape)]


def _parts(length: int, ranks: int) -> list[range]:
    ends = [length * i // ranks for i in range(ranks + 1)]
    return [range(a, b) for a, b in pairwise(ends)]


def _across(model: Spacetime, layer: int, axis: Axis, met: list[list[range]], method: str) -> Attend:
    """Attention along the split dimension."""
    if method == "ring":
        return partial(ring_attention, ring=Ring.of(axis, met), causal=model.causal(layer))
    return partial(ulysses_attention, axis=axis, lengths=[total(r) for r in met], inner=model.alone(layer))
