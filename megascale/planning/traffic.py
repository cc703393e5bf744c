"""Bytes that a rank sends in a step, by axis: the formulas of docs/layouts.md. `tests/test_counts.py` holds them equal to the program's
counters.

The primitives are bytes of one layer and one pass; `sent_bytes` sums them over a step, and `step.py` turns them into time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megascale.config.dsp import plan_cuts
from megascale.config.layout import ranks_met
from megascale.config.optimizers import optimizers
from megascale.config.stages import V_SHAPED
from megascale.planning.memory import held
from megascale.planning.pipeline import sends
from megascale.planning.setting import Setting
from megascale.planning.weights import Unit, Weight


@dataclass(frozen=True)
class Passes:
    """Bytes of one axis for one layer and micro-batch: forward, backward, and what recomputation sends again."""

    forward: float = 0.0
    backward: float = 0.0
    again: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.again


def others(ranks: int) -> float:
    """(N−1)/N, a rank's share of what a gather, a reduction or an all-to-all moves."""
    return (ranks - 1) / ranks


def tensor_passes(s: Setting, unit: Unit) -> Passes:
    """A layer's exchanges over tp: before and after each sublayer."""
    p, n = s.config.parallel, s.config.parallel.tp
    if n == 1:
        return Passes()
    half = others(n) * s.tokens(unit) * unit.model.hidden_size * s.item  # a gather or a reduce-scatter of the stream; an all-reduce is two
    sublayers = 3.0 if unit.crossed else 2.0
    if unit.sparse and p.expert_tp == 1:  # experts take the tokens of their own rank; shared ones, all
        sublayers -= 0.0 if unit.model.moe is not None and unit.model.moe.num_shared else 1.0
    halves = 2 * sublayers
    again = 0.0
    if p.recompute != "none":
        # Recomputation ends before the last sum; a compiled block keeps the results of its sums.
        again = halves - (1 if p.tp_sequence else 2)
        if p.recompute == "selective" and p.compile and not unit.sparse:
            again = sublayers if p.tp_sequence else 0.0
    return Passes(halves * half, halves * half, again * half)


def context_passes(s: Setting, unit: Unit) -> Passes:
    """A layer's exchanges over cp: key-value blocks around a ring, heads by all-to-all."""
    p, m = s.config.parallel, unit.model
    if p.cp == 1 or p.cp_method == "dsp":
        return Passes()
    heads, ring = p.heads_over, p.cp // p.heads_over
    size = m.head_dim
    if m.latent is not None:  # padded to one size
        size = max(m.head_dim + m.latent.rope_dim, m.latent.value_dim or m.head_dim)
    q, kv_heads = m.num_heads * size / p.tp, m.num_kv_heads / p.tp if m.num_kv_heads % p.tp == 0 else math.ceil(m.num_kv_heads / p.tp)
    k = (kv_heads if kv_heads % heads == 0 else max(kv_heads, heads)) * size
    around = (ring - 1) * s.tokens(unit) * 2 * k * s.item
    across = others(heads) * s.tokens(unit) * (2 * q + 2 * k) * s.item
    kept = p.recompute == "none"
    again = (0.0 if kept or p.recompute == "selective" else around) + (
        0.0 if kept or (p.recompute == "selective" and p.compile) else across
    )
    # Gradients of a ring's blocks add up in full precision.
    return Passes(around + across, (1 + max(4, s.item) / s.item) * around + across, again)


def expert_passes(s: Setting, unit: Unit) -> Passes:
    """A layer's exchanges over ep: rows to their experts and back, if the load is even. With groups at most these: a token travels once to
    each rank it meets, with its gates and one byte for the number of each expert (parallel/once.py).
    """
    if not unit.sparse or s.cuts.ep == 1:
        return Passes()
    moe, d = unit.model.moe, unit.model.hidden_size
    assert moe is not None
    if moe.groups is None or s.config.parallel.ep_rows is not None:
        ways = 2 * others(s.cuts.ep) * s.rows(unit) * d * s.item
        return Passes(ways, ways, 0.0 if s.config.parallel.recompute == "none" else ways)
    copies = others(s.cuts.ep) * s.rows(unit) / moe.top_k * ranks_met(moe, s.cuts.ep)
    ways = copies * (2 * d + moe.top_k) * s.item
    numbers = copies * moe.top_k * (1 if moe.num_experts // s.cuts.ep < 256 else 4)
    return Passes(ways + numbers, ways, 0.0 if s.config.parallel.recompute == "none" else ways + numbers)


def gather_bytes(s: Setting, unit: Unit, experts: bool, ranks: int | None = None) -> float:
    """Bytes to gather a unit's weights over the ranks that shard them; `ranks`: over so many neighbours instead."""
    n = ranks or (s.cuts.edp if experts else s.cuts.shard)
    return others(n) * (_whole(s, unit, experts) * s.item - _whole(s, unit, experts, True) * s.saved)


def reduce_bytes(s: Setting, unit: Unit, experts: bool) -> float:
    """Bytes to reduce-scatter a unit's gradients."""
    return others(s.cuts.edp if experts else s.cuts.shard) * _whole(s, unit, experts) * s.reduced


def replica_bytes(s: Setting, unit: Unit, experts: bool) -> float:
    """Bytes of HSDP's all-reduce of a unit's gradient shards."""
    n = s.sizes["dp_replicate"]
    shards = s.cuts.edp if experts else s.cuts.shard
    return 2 * others(n) * _whole(s, unit, experts) / shards * s.reduced


def _whole(s: Setting, unit: Unit, experts: bool, matrices: bool = False) -> int:
    """Gathered elements of a unit's experts with their own axes, or of its other weights; of its hidden `matrices` alone."""
    found = held(unit, s.cuts)
    if not s.cuts.own_experts or not unit.sparse:
        return 0 if experts else found.matrices if matrices else found.whole
    of = [w for w in unit.weights if w.experts == experts and (w.matrix or not matrices)]
    return sum(s.cuts.gathered(w, unit.model.num_kv_heads) for w in of)


def gathers(s: Setting, unit: Unit, experts: bool = False) -> tuple[float, float]:
    """How often a layer's weights are gathered in a step over all ranks that shard them, and over `reshard_after_forward` neighbours."""
    p, m = s.config.parallel, s.micro_batches
    if p.pp > 1:
        return 1, 0
    if p.accumulation == "layered":
        return 2 * (m // (p.breadth_first or m)), 0
    if not isinstance(p.reshard_after_forward, bool) and p.reshard_after_forward < s.cuts.shard and not experts:
        return m, m
    return (2 * m if p.reshard_after_forward else m), 0


def reductions(s: Setting) -> int:
    """How often gradients are reduced in a step."""
    p, m = s.config.parallel, s.micro_batches
    if p.pp > 1:
        return -(-m // (p.pp_reduce_every or m))
    return m // (p.breadth_first or m) if p.accumulation == "layered" else m


def sent_bytes(s: Setting) -> dict[str, float]:
    """Bytes by axis in a step, of the rank that sends most over it; axes that send nothing are left out."""
    found: dict[str, float] = {}
    for rank in range(len(s.stages)):
        for axis, size in _sent(s, rank).items():
            found[axis] = max(found.get(axis, 0.0), size)
    return {axis: size for axis, size in found.items() if size}


def _sent(s: Setting, rank: int) -> dict[str, float]:
    p, parts, m = s.config.parallel, s.stages[rank], s.micro_batches
    layers, stored = s.layers_of(parts), s.stored_of(parts)
    sent = {"tp": _tensor(s, rank, layers), "cp": m * (sum(n * context_passes(s, u).total for u, n in layers) + _switches(s, rank))}
    sent["ep"] = m * sum(n * expert_passes(s, u).total for u, n in layers)
    if p.pp > 1:
        sent["pp"] = sends(p.pp, p.pp_schedule, p.stages_per_rank, m, rank) * s.message * s.config.model.hidden_size * s.item
        if s.units.copy is not None and p.pp_schedule not in V_SHAPED and rank in (0, p.pp - 1):
            sent["tied"] = held(s.units.copy, s.cuts).kept * s.stored  # the table to the last stage, and its gradient back
    if s.sharded:
        sent["dp_shard"] = _sharding(s, layers, s.ends_of(parts), False)
        sent["edp"] = _sharding(s, layers, [], True)
        if optimizers()[s.config.optim.name].whole_matrices:
            sent["dp_shard"] += _owned(s, stored)
        sent["dp_replicate"] = sum(n * (replica_bytes(s, u, False) + replica_bytes(s, u, True)) for u, n in stored)
    elif p.engine == "ddp":
        copies = s.sizes["dp_replicate"] * s.sizes["cp"]
        sent["dp_replicate"] = 2 * others(copies) * sum(n * held(u, s.cuts).kept for u, n in stored) * s.stored
    return sent


def _switches(s: Setting, rank: int) -> float:
    """Bytes of a micro-batch where DSP splits a grid along another dimension than before, forward and backward."""
    model, p = s.config.model, s.config.parallel
    if p.cp == 1 or p.cp_method != "dsp" or model.spacetime is None:
        return 0.0
    cuts = plan_cuts([model.attended(i) for i in range(model.num_layers)], model.spacetime.grid, p.cp) or []
    mine = [i for part in s.stages[rank] for i in part.layers if i]
    return 2 * others(p.cp) * sum(cuts[i] != cuts[i - 1] for i in mine) * s.stream() * model.hidden_size * s.item


def _owned(s: Setting, stored: list[tuple[Unit, int]]) -> float:
    """Bytes of Muon's matrices, each of which a rank brings together and orthogonalizes for all: to their owners and back. Exact if all
    ranks own as much.
    """
    n = s.cuts.shard
    return 2 * others(n) * sum(count * _whole(s, u, False, True) for u, count in stored) / n * s.stored


def _sharding(s: Setting, layers: list[tuple[Unit, int]], ends: list[Unit], experts: bool) -> float:
    """Gathers and reductions of a step. The ends stay gathered from forward to backward; layered accumulation also keeps the last layer."""
    p, repeats = s.config.parallel, s.units.repeats
    far, near = gathers(s, layers[0][0], experts) if layers else (0, 0)
    times = reductions(s)
    near_ranks = p.reshard_after_forward if not isinstance(p.reshard_after_forward, bool) else 1
    total = 0.0
    for unit, n in layers:
        total += n * (far * gather_bytes(s, unit, experts) + near * gather_bytes(s, unit, experts, near_ranks))
        total += n / repeats * times * reduce_bytes(s, unit, experts)
    if p.accumulation == "layered" and layers:
        total -= times * gather_bytes(s, layers[-1][0], experts)
    once = 1 if p.pp > 1 else times
    return total + sum(once * gather_bytes(s, u, experts) + times * reduce_bytes(s, u, experts) for u in ends)


def _tensor(s: Setting, rank: int, layers: list[tuple[Unit, int]]) -> float:
    p, m, n, model = s.config.parallel, s.micro_batches, s.config.parallel.tp, s.config.model
    if n == 1:
        return 0.0
    total = m * sum(count * tensor_passes(s, u).total for u, count in layers)
    first, last = any(part.first for part in s.stages[rank]), any(part.last for part in s.stages[rank])
    pair = 2 * others(n) * model.hidden_size * s.item  # a gather and a reduction of a token, or an all-reduce
    depth = model.mtp_depth
    # Tables are looked up at the start, and by each module of multi-token prediction; every head reads the whole stream.
    total += m * pair * s.tokens() * (first + last * (1 + 2 * depth))
    if model.encoder_layers and first:
        total += m * pair * s.config.train.micro_batch_size * s.config.train.source_length / p.cp
    memories = sum(max((s.memory(u) for u, _ in s.layers_of([part])), default=0.0) for part in s.stages[rank])
    total += m * pair * memories
    if last and model.spacetime is None:
        # The largest logit, then denominator and the target's logit.
        total += m * (1 + depth) * 2 * others(n) * 3 * s.tokens() * max(4, s.item)
    partial = sum(
        count * s.cuts.gathered(w, u.model.num_kv_heads) // s.cuts.ranks(w)
        for u, count in s.stored_of(s.stages[rank])
        for w in u.weights
        if _partial(s, u, w)
    )
    return total + 2 * others(n) * partial * s.stored


def _partial(s: Setting, unit: Unit, w: Weight) -> bool:
    """Whether a weight's gradient is a partial sum over tp."""
    cut = s.cuts.cut(w, unit.model.num_kv_heads)
    if isinstance(cut, int):
        return False
    if w.experts:
        return s.cuts.etp > 1
    return cut != "tokens" or s.config.parallel.tp_sequence
