"""One forward and backward of any model on any layout, with the moments of the stream after every sublayer.

Hooks read the stream where a sublayer's input begins and where a block ends; models know nothing of them. They keep sums and counts, so one
all-reduce completes them; replicated values count equally often in both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megascale.comm.collectives import all_reduce
from megascale.data.loader import Batch
from megascale.model.block import Block
from megascale.model.spec import MATRICES
from megascale.parallel.model import ParallelModel
from megascale.schedule.accumulate import Schedule

COUNT, SUM, SQUARES, GRADIENT, PAIRS, CORR, GRADIENT_CORR, CHANGE, WEIGHT_GRADIENT = range(9)


@dataclass(frozen=True)
class MeasuredMoments:
    """The stream after one sublayer; layer −1 is the embedding, "source" the embedding of an encoder–decoder's sources. Its layers are
    numbered through both stacks, encoder first.

    mean, variance          mean and variance of its entries
    correlation             mean cosine of two tokens of a sequence
    gradient                root mean square of the loss's gradient at an entry
    gradient_correlation    mean cosine of two tokens' gradients
    weight_gradient         norm of the gradient of the sublayer's weights
    update                  root mean square of an entry's change by one step of the optimizer, divided by the learning rate
    """

    layer: int
    sublayer: str
    mean: float
    variance: float
    correlation: float
    gradient: float
    gradient_correlation: float
    weight_gradient: float
    update: float


def point_names(model: ParallelModel) -> list[tuple[int, str]]:
    """(layer, sublayer) of all points of the whole model in order, the same on every rank."""
    cfg = model.model.cfg
    encoder = cfg.encoder_layers or 0

    def behind(layers: range, *kinds: str) -> list[tuple[int, str]]:
        together = [cfg.at_layer(layer).residual_row.together for layer in layers]
        return [(layer, kind) for layer, one in zip(layers, together) for kind in (("block",) if one else kinds)]

    if not encoder:
        return [(-1, "embedding"), *behind(range(cfg.num_layers), "attention", "ffn")]
    read = [(-1, "source"), *behind(range(encoder), "attention", "ffn")]
    return [*read, (-1, "embedding"), *behind(range(encoder, cfg.total_layers), "attention", "cross", "ffn")]


def stacks(points: Sequence[MeasuredMoments]) -> list[list[MeasuredMoments]]:
    """The points of each stack, its embedding first."""
    starts = [i for i, p in enumerate(points) if p.layer < 0]
    return [list(points[a:b]) for a, b in pairwise([*starts, len(points)])]


class Taps:
    """This rank's measurements by point. The first pass stores the stream; the pass after an update compares with it."""

    def __init__(self, model: ParallelModel, tokens_cut: bool) -> None:
        self.model, self.names = model, point_names(model)
        self.row = {name: i for i, name in enumerate(self.names)}
        # Axes over which ranks hold parts of one sequence.
        self.cuts = [model.mesh["cp"], *([model.mesh["tp"]] if tokens_cut else [])]
        self.sums = torch.zeros(len(self.names), 9, dtype=torch.float64)
        self.streams: dict[int, list[Tensor]] = {i: [] for i in range(len(self.names))}
        # Sums of unit vectors over a sequence's tokens, for the stream and its gradient: the length of a sum gives the mean cosine.
        self.directions: dict[tuple[int, int], list[Tensor]] = {}
        self.seen: dict[int, int] = {}
        self.comparing = False

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles: list[Any] = []
        for stage in self.model.stages:
            for name, block in stage.units():
                assert isinstance(block, Block)  # the tool refuses models with other blocks
                layer = self._layer(name.split("."))
                if name.endswith(".0"):
                    entry = self.row[-1, "source" if name.startswith("encoder") else "embedding"]
                    handles.append(block.register_forward_pre_hook(self._before(entry)))
                for kind, entered in _entries(block):
                    handles.append(entered.register_forward_pre_hook(self._before(self.row[layer, kind])))
                handles.append(block.register_forward_hook(self._after(self.row[layer, "block" if block.row.scheme.together else "ffn"])))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, row: int) -> Any:
        return lambda module, args: self._look(row, args[0])

    def _after(self, row: int) -> Any:
        return lambda module, args, output: self._look(row, output)

    def _look(self, row: int, x: Tensor) -> None:
        if torch._C._current_graph_task_id() >= 0:
            return  # in backward: a recomputed block was already measured
        if self.comparing:
            before = self.streams[row][self.seen.get(row, 0)]
            self.seen[row] = self.seen.get(row, 0) + 1
            self.sums[row, CHANGE] += _squares(x.detach() - before)
            return
        self.streams[row].append(x.detach().clone())
        self.sums[row, COUNT] += x.numel()
        self.sums[row, SUM] += x.detach().to(torch.float64).sum().cpu()
        self.sums[row, SQUARES] += _squares(x.detach())
        self.directions.setdefault((row, CORR), []).append(_directions(x))
        if x.requires_grad:
            x.register_hook(lambda g: self._gradient(row, g))

    def _gradient(self, row: int, g: Tensor) -> None:
        self.sums[row, GRADIENT] += _squares(g)
        self.directions.setdefault((row, GRADIENT_CORR), []).append(_directions(g))

    def weight_gradients(self) -> None:
        """Adds up squared gradients of each sublayer's weights; the embedding has its own entry."""
        for w in self.model.weights:
            grad, row = w.local_grad, self._row_of(w.name)
            if grad is not None and row is not None:
                self.sums[row, WEIGHT_GRADIENT] += _squares(grad) / w.replicas

    def _row_of(self, name: str) -> int | None:
        parts = name.split(".")
        if parts[0] not in ("blocks", "encoder"):
            tables = {"embedding": (-1, "embedding"), "source_embedding": (-1, "source")}
            return self.row[tables[parts[0]]] if parts[0] in tables else None
        kinds = ("block", next(kind for kind in ("attention", "cross", "ffn") if parts[2].startswith(kind)))
        layer = self._layer(parts)
        return next(self.row[layer, kind] for kind in kinds if (layer, kind) in self.row)

    def _layer(self, parts: Sequence[str]) -> int:
        """The block's number through all stacks; its name begins with these parts."""
        return int(parts[1]) + (self.model.model.cfg.encoder_layers or 0) * (parts[0] == "blocks")

    def points(self, loss_scale: float, lr: float) -> list[MeasuredMoments]:
        """The points over all ranks. Gradients ÷ `loss_scale` are those of the mean loss per token."""
        for (row, kind), found in self.directions.items():
            whole = torch.cat(found)  # [sequences, d]
            tokens = torch.tensor([float(self.streams[row][0].shape[1])])
            for axis in self.cuts:
                whole, tokens = all_reduce(whole, axis), all_reduce(tokens, axis)
            n = tokens.item()
            self.sums[row, kind] += (whole.square().sum().item() - n * whole.shape[0]) / max(1.0, n * (n - 1))
            if kind == CORR:
                self.sums[row, PAIRS] += whole.shape[0]
        sums = self.sums.to(self.model.weights[0].local.device)
        if self.model.mesh.size > 1:
            dist.all_reduce(sums)
        return [_point(name, numbers, loss_scale, lr) for name, numbers in zip(self.names, sums.tolist())]


def _entries(block: Block) -> list[tuple[str, nn.Module]]:
    """The sublayers that another sublayer follows, each with the module that first reads the stream after it."""
    if block.row.scheme.together:
        return []
    before = block.row.scheme.norm in ("before", "around")
    entries: list[tuple[str, nn.Module | None]] = []
    if block.cross is not None:
        entries.append(("attention", block.cross_norm if before else block.cross))
    entries.append(("attention" if block.cross is None else "cross", block.ffn_norm if before else block.ffn))
    return [(kind, module) for kind, module in entries if module is not None]


def _squares(x: Tensor) -> Tensor:
    return x.to(torch.float64).square().sum().cpu()


def _directions(x: Tensor) -> Tensor:
    """x [b, s, d] → Σ over tokens of x/|x| [b, d]"""
    y = x.detach().to(torch.float64)
    return (y / y.norm(dim=-1, keepdim=True).clamp(min=1e-300)).sum(1)


def _point(name: tuple[int, str], s: list[float], loss_scale: float, lr: float) -> MeasuredMoments:
    count, sequences = max(s[COUNT], 1.0), max(s[PAIRS], 1.0)
    mean = s[SUM] / count
    return MeasuredMoments(
        *name,
        mean=mean,
        variance=s[SQUARES] / count - mean**2,
        correlation=s[CORR] / sequences,
        gradient=math.sqrt(s[GRADIENT] / count) / loss_scale,
        gradient_correlation=s[GRADIENT_CORR] / sequences,
        weight_gradient=math.sqrt(s[WEIGHT_GRADIENT]) / loss_scale,
        update=math.sqrt(s[CHANGE] / count) / lr,
    )


def probe(
    model: ParallelModel,
    schedule: Schedule,
    batches: Sequence[Batch],
    places: int,
    lr: float,
    tokens_cut: bool,
    all_weights: bool = False,
    loss_scale: float = 1.0,
) -> list[MeasuredMoments]:
    """One pass forward and back, one step of plain gradient descent at `lr`, and another pass to measure its effect.

    places       tokens in the batches of all ranks
    tokens_cut   the stream is split along the sequence over the tensor axis
    all_weights  the step updates all weights; else only the blocks' matrices, which DeepNorm's bound covers: gains of norms add a part that
                 grows with their number under every scheme
    loss_scale   loss scale for FP8 gradients; results do not include it
    """
    taps = Taps(model, tokens_cut)
    model.train(True)
    model.at_step(1)
    with taps.hooks():
        schedule.run(batches, loss_scale / places)
        taps.weight_gradients()
        with torch.no_grad():
            for w in model.weights:
                if (grad := w.local_grad) is not None and (all_weights or w.placement.spec.role in MATRICES):
                    w.local.sub_(grad, alpha=lr / loss_scale)
                w.parameter.grad = None
        taps.comparing = True
        schedule.run(batches, loss_scale / places)
    for w in model.weights:
        w.parameter.grad = None
    return taps.points(loss_scale, lr)


def warnings(points: list[MeasuredMoments]) -> list[str]:
    """Warnings. The thresholds are a factor of ten between the ends of a stack, and tokens within 25 degrees of each other."""
    every = stacks(points)
    if len(every) == 1:
        return _warnings(points)
    return [f"{side}: {words}" for side, of_stack in zip(("encoder", "decoder"), every) for words in _warnings(of_stack)]


def _warnings(points: list[MeasuredMoments]) -> list[str]:
    """Warnings about one stack."""
    found: list[str] = []
    stack = points[1:]
    if not all(math.isfinite(value) for p in points for value in (p.variance, p.gradient, p.weight_gradient)):
        bad = next(p for p in points if not (math.isfinite(p.variance) and math.isfinite(p.gradient)))
        found.append(f"not finite: the stream or its gradient after the {bad.sublayer} of layer {bad.layer} is not finite")
        return found
    first, last = stack[0], stack[-1]
    if last.correlation > 0.9 and points[0].correlation < 0.9:
        where = next(p for p in stack if p.correlation > 0.9)
        found.append(
            f"rank collapse: two tokens' vectors have a mean cosine of {last.correlation:.3f} at the top ({points[0].correlation:.3f} in "
            f"the embedding), beyond 0.9 from layer {where.layer} on: the top cannot tell tokens apart"
        )
    gradients = {p.layer: 0.0 for p in stack}
    for p in stack:
        gradients[p.layer] = math.hypot(gradients[p.layer], p.weight_gradient)
    low, high = gradients[first.layer], gradients[last.layer]
    if high > 0 and low < high / 10:
        found.append(
            f"vanishing gradients: the weights of block {first.layer} get {low / high:.1e} of what those of block {last.layer} get: lower "
            "layers hardly learn; deepnorm or deepscale keep them alike"
        )
    if high > 0 and low > high * 10:
        found.append(
            f"exploding gradients: the weights of block {first.layer} get {low / high:.1f} times what those of block {last.layer} get: "
            "lower layers take all of the clipped step; deepnorm or deepscale keep them alike"
        )
    if last.variance > 100 * first.variance:
        found.append(
            f"growing stream: its variance rises from {first.variance:.3g} to {last.variance:.3g} over the stack: upper blocks add little "
            "to what is already there"
        )
    return found
