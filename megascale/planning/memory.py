"""Bytes on the fullest rank of a config, by kind: stored state exactly, the rest from the tensors that the program keeps.

The peak is the largest of a few moments of a step: in the loss, in the backward of the layer that comes first and of the one that comes
last. Formulas count what autograd (activations.py), FSDP2 and the loss keep then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from megascale.config.optimizers import state_bytes
from megascale.config.schema import Config
from megascale.config.stages import StagePart
from megascale.planning.activations import angles, inputs, layer_bytes, loss_bytes, temporary
from megascale.planning.pipeline import live_of_stages, sends
from megascale.planning.setting import Setting, setting_of
from megascale.planning.weights import Cuts, Unit

KINDS = ("weights", "gradients", "optimizer", "gathered", "reduce", "activations", "loss")
OWN = 4  # in the middle of a layer's backward, which share of its gradients is there
GATHERED_STAGES = 3  # torch's runtime keeps at most so many stages of a rank gathered


@dataclass(frozen=True)
class Held:
    """Elements of one unit on the first rank of its shards: `kept` stored, `whole` gathered, and hidden `matrices` among these."""

    kept: int
    whole: int
    matrices: int


@lru_cache(maxsize=65536)
def held(unit: Unit, cuts: Cuts) -> Held:
    """Sums over a unit's weights."""
    sizes = [(w, cuts.gathered(w, unit.model.num_kv_heads)) for w in unit.weights]
    return Held(sum(n // cuts.ranks(w) for w, n in sizes), sum(n for _, n in sizes), sum(n for w, n in sizes if w.matrix))


@lru_cache(maxsize=65536)
def state_of(unit: Unit, cuts: Cuts, name: str, moments: str | None, itemsize: int, averages: int) -> int:
    """Bytes of an optimizer's state for a unit there."""
    heads = unit.model.num_kv_heads
    sizes = [(w, cuts.columns(w, heads), cuts.gathered(w, heads) // cuts.ranks(w)) for w in unit.weights]
    return sum(state_bytes(name, moments, w.matrix, w.shape[-1], here, n, itemsize, averages) for w, here, n in sizes)


def stored_bytes(config: Config, ranks: int) -> dict[str, int]:
    """Bytes of weights, gradients, optimizer state and shadows, if any, on the rank that stores most: what `--dry-run` says
    (train/estimate/memory.py).
    """
    setting = setting_of(config, ranks)
    return max((_stored(setting, parts) for parts in setting.stages), key=lambda b: sum(b.values()))


def _stored(s: Setting, parts: list[StagePart]) -> dict[str, int]:
    optim, weights, state, copies = s.config.optim, 0, 0, 0
    for unit, n in s.stored_of(parts):
        weights += n * held(unit, s.cuts).kept
        if s.config.shadows:
            heads = unit.model.num_kv_heads
            copies += n * sum(s.cuts.gathered(w, heads) // s.cuts.ranks(w) for w in unit.weights if s.shadowed(w))
        if unit is not s.units.copy:  # the rank of the embedding updates it
            state += n * state_of(unit, s.cuts, optim.name, optim.moments, s.stored, len(optim.ema))
    shadows = {"shadows": copies * s.item} if copies else {}
    return {"parameters": weights * s.stored, "gradients": weights * s.stored, "optimizer": state, **shadows}


def peak_bytes(config: Config, ranks: int, cpu: bool = False) -> dict[str, float]:
    """Bytes by kind at the peak of a step on the fullest rank: weights, gradients, optimizer, gathered, reduce, activations, loss."""
    return peak_of(setting_of(config, ranks, cpu))


def peak_of(s: Setting) -> dict[str, float]:
    """The same for a config taken apart."""
    return max((_peak(s, r) for r in s.distinct), key=lambda b: sum(b.values()))


@dataclass(frozen=True)
class Rank:
    """What a pipeline rank's peaks are made of, in bytes.

    stored    weights, gradients and optimizer state
    layers    its kinds of layers with their numbers
    ends      gathered elements of the embedding, of the head, and of what else stands beside its layers
    whole, block  gathered elements of all its layers, and of the largest one
    """

    stored: dict[str, int]
    layers: list[tuple[Unit, int]]
    front: int
    tail: int
    whole: int
    block: int
    has_head: bool


def _rank(s: Setting, rank: int) -> Rank:
    parts = s.stages[rank]
    layers, units = s.layers_of(parts), s.units
    ends = s.ends_of(parts)
    tail = sum(held(u, s.cuts).whole for u in ends if u is units.tail)
    sizes = [(held(u, s.cuts).whole, n) for u, n in layers]
    return Rank(
        _stored(s, parts),
        layers,
        sum(held(u, s.cuts).whole for u in ends) - tail,
        tail,
        sum(size * n for size, n in sizes) // units.repeats,
        max((size for size, _ in sizes), default=0),
        any(part.last for part in parts),
    )


def _peak(s: Setting, rank: int) -> dict[str, float]:
    """The largest of the moments at which a step may need most."""
    r, offload = _rank(s, rank), s.config.parallel.offload
    away = "parameters" in offload
    always = {
        "weights": float(r.stored.get("shadows", 0) + (0 if away else r.stored["parameters"])),
        "optimizer": 0.0 if away or "optimizer" in offload else float(r.stored["optimizer"]),
    }
    moments = [_in_backward(s, r, rank, True), _in_backward(s, r, rank, False), _after_layer(s, r, rank)]
    if r.has_head:
        moments.append(_in_loss(s, r, rank))
    found = always | max(moments, key=lambda b: sum(b.values()))
    return {k: 0.0 if away and k == "gradients" else found[k] for k in KINDS}


def _in_loss(s: Setting, r: Rank, rank: int) -> dict[str, float]:
    """In the loss everything is kept that backward reads, and nothing of a block is recomputed yet."""
    p, many = s.config.parallel, s.micro_batches > 1
    gradients, reduce = _gradients(s, r, many), 0.0
    if not s.sharded:
        gathered = _casts(s, r, rank, True, True)
    elif p.accumulation == "layered":
        # The head and the last layer; the head's gradients are summed over micro-batches before they are reduced.
        gathered, gradients = float(s.item * (r.tail + r.block)), float(s.reduced * (r.tail or r.front))
    else:
        # FSDP2 keeps the last buffer that weights arrived in: the head's, or that of the last layer if the head has no group.
        arrived = 0 if p.pp > 1 else r.tail or r.block
        gathered = s.item * (r.front + r.tail + arrived + _kept_gathered(s, r))
        reduce = float(s.reduced * r.front) if many and p.pp == 1 else 0.0
    return {
        "gradients": gradients,
        "gathered": gathered,
        "reduce": reduce,
        "activations": _activations(s, rank),
        "loss": loss_bytes(s),
    }


def _in_backward(s: Setting, r: Rank, rank: int, first: bool) -> dict[str, float]:
    """In the middle of the backward of the layer that comes first, when all others still wait, or of the one that comes last, when their
    gradients are there.
    """
    p, many = s.config.parallel, s.micro_batches > 1
    layered = p.accumulation == "layered"
    largest = max((temporary(s, unit) for unit, _ in r.layers), default=0.0)
    gathered, reduce, gradients = _gathered_backward(s, r), 0.0, _gradients(s, r, (many and not layered) or not first)
    if s.sharded:
        # The buffer of the unit before, and some of the layer's own gradients.
        before = max(r.block, (r.tail or (r.front if many and not layered else 0)) if first else 0)
        reduce = s.item * r.block / OWN + (0.0 if p.pp > 1 else float(s.reduced * before))
        gradients += s.reduced * r.block if layered else 0.0
    else:
        # Without FSDP a gradient is cast beside the one that it is added to.
        gathered, reduce = _casts(s, r, rank, first), float((s.item + s.stored) * (r.tail if first else r.front))
    activations = _activations(s, rank) - (0.0 if first else _freed(s, r)) + largest
    return {"gradients": gradients, "gathered": gathered, "reduce": reduce, "activations": activations, "loss": 0.0}


def _after_layer(s: Setting, r: Rank, rank: int) -> dict[str, float]:
    """When the gradients of a late layer, or of the embedding, have just been copied to be reduced."""
    layered, size = s.config.parallel.accumulation == "layered", max(r.block, r.front)
    if not s.sharded or s.config.parallel.pp > 1:
        return dict.fromkeys(KINDS, 0.0)
    return {
        "gradients": _gradients(s, r, True),
        "gathered": _gathered_backward(s, r),
        "reduce": float((s.reduced + (s.reduced if layered else s.item)) * size),
        "activations": _activations(s, rank) - _freed(s, r),
        "loss": 0.0,
    }


def _freed(s: Setting, r: Rank) -> float:
    """Activations of all layers but one of a micro-batch, or of all that pass a layer together."""
    p = s.config.parallel
    each = [(layer_bytes(s, u, p.recompute), n) for u, n in r.layers]
    left = sum(n * size for size, n in each) / p.stages_per_rank - max((size for size, _ in each), default=0.0)
    return left * ((p.breadth_first or s.micro_batches) if p.accumulation == "layered" else 1)


def _gathered_backward(s: Setting, r: Rank) -> float:
    """Bytes of gathered weights in a layer's backward: its own and the next one's beside the embedding's."""
    p = s.config.parallel
    kept = p.pp > 1 or (p.reshard_after_forward is False and p.accumulation != "layered")
    ends = 0 if p.accumulation == "layered" else r.front + (r.tail if p.pp > 1 else 0)
    # Nested recomputation passes a whole group of layers again.
    blocks = 0 if kept else max(2, _group(sum(n for _, n in r.layers))) if p.recompute == "nested" else 2
    return s.item * (ends + _kept_gathered(s, r) + blocks * r.block)


def _gradients(s: Setting, r: Rank, there: bool) -> float:
    """Gradients that are stored, or summed over the micro-batches of a pipeline before they are reduced."""
    if s.config.parallel.pp > 1 and s.sharded and s.config.parallel.pp_reduce_every == 1:
        # Reduced after every micro-batch: beside the stored ones those of the layers in work.
        return float(r.stored["gradients"] + s.reduced * (2 * r.block + max(r.front, r.tail))) if there else 0.0
    if s.config.parallel.pp > 1 and s.sharded:
        return float(s.reduced * (r.whole + r.front + r.tail)) if there else 0.0
    return float(r.stored["gradients"]) if there else 0.0


def _casts(s: Setting, r: Rank, rank: int, first: bool, in_loss: bool = False) -> float:
    """Weights that no FSDP gathers are cast where products read them. Unless they are recomputed, autograd keeps the casts, those of every
    micro-batch. `first`, `in_loss`: before the first of these has been freed.
    """
    if s.item == s.stored or s.config.shadows:
        return 0.0
    kept = float(0 if in_loss else r.block)
    if s.config.parallel.recompute == "none":
        sizes = [sum(n * held(u, s.cuts).whole for u, n in s.layers_of([part])) for part in s.stages[rank]]
        kept = float(sum(live * size for live, size in zip(_live(s, rank), sizes)) - (0 if first else max(0, sizes[0] - r.block)))
    return s.item * (kept + (r.tail or r.front if in_loss and r.has_head else 0))


def _kept_gathered(s: Setting, r: Rank) -> float:
    """Elements of layers that stay gathered between forward and backward."""
    p = s.config.parallel
    if p.pp > 1:
        return min(1.0, GATHERED_STAGES / p.stages_per_rank) * r.whole
    if p.accumulation == "layered" or p.reshard_after_forward is True:
        return 0.0
    return r.whole if p.reshard_after_forward is False else r.whole / p.reshard_after_forward


def _activations(s: Setting, rank: int) -> float:
    """Bytes of all layers and micro-batches that are live at once."""
    p, item = s.config.parallel, s.item * s.config.model.hidden_size
    total = 0.0
    for part, live in zip(s.stages[rank], _live(s, rank)):
        layers = s.layers_of([part])
        kept = sum(n * layer_bytes(s, u, p.recompute) for u, n in layers) if p.recompute != "nested" else _grouped_inputs(s, layers)
        if "activations" in p.offload:
            kept -= _grouped_inputs(s, layers)
        # Every cross-attention reads one memory; a stage keeps what it was sent.
        kept += item * (max((s.memory(u) for u, _ in layers), default=0.0) + (s.message if p.pp > 1 and not part.first else 0.0))
        # Layers that micro-batches pass together have rotary angles of their own, and a stream and its gradient wait between two of them.
        layered = p.accumulation == "layered"
        kept += angles(s) * (sum(n for _, n in layers) if layered else 1) + (2 * item * s.stream() if layered else 0.0)
        total += live * kept
    if p.pp > 1:  # what it sends stays until the end of the step
        total += item * s.message * sends(p.pp, p.pp_schedule, p.stages_per_rank, s.micro_batches, rank)
    return total


def _live(s: Setting, rank: int) -> list[int]:
    """By stage of a rank, micro-batches that are between forward and backward."""
    p = s.config.parallel
    if p.accumulation == "layered":
        return [p.breadth_first or s.micro_batches]
    return live_of_stages(p.pp_schedule, p.pp, p.stages_per_rank, s.micro_batches, rank) if p.pp > 1 else [1]


def _grouped_inputs(s: Setting, layers: list[tuple[Unit, int]]) -> float:
    """Bytes of the inputs of layers that are kept: of each group's first one and of the group in work, with nested recomputation."""
    found, blocks = sum(n * inputs(s, u) for u, n in layers), sum(n for _, n in layers)
    if s.config.parallel.recompute != "nested" or not blocks:
        return found
    size = _group(blocks)
    return found / size + found / blocks * (size - 1)


def _group(blocks: int) -> int:
    """Layers of a group under nested recomputation, as parallel/recompute.py groups them."""
    return max(1, math.isqrt(max(0, blocks - 1)) + 1)


def inputs_away(s: Setting) -> float:
    """Bytes of layers' inputs that offloading keeps in host memory on the fullest rank."""
    return max(sum(n * _grouped_inputs(s, s.layers_of([part])) for part, n in zip(parts, _live(s, r))) for r, parts in enumerate(s.stages))
