"""Bytes on the fullest rank of a config, by kind: stored state exactly, the rest from the tensors that the program keeps.

Formulas count the tensors that autograd, FSDP2 and the loss keep, in units of one number of the compute format: t tokens of a rank, d
width, q and k channels of its query and KV heads, f its share of the feed-forward, n rows of its experts. Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from megascale.config.attentions import gate_width
from megascale.config.optimizers import state_bytes
from megascale.config.schema import Config
from megascale.config.stages import StagePart
from megascale.planning.pipeline import live_forwards
from megascale.planning.setting import Setting, setting_of
from megascale.planning.weights import Cuts, Unit

LOGITS = 1 << 28  # of a chunk of the loss on a device (model/loss.py)
CPU_LOGITS, CPU_ROWS = 1 << 22, 256
GATHERED_STAGES = 3  # torch's runtime keeps at most so many stages of a rank gathered


@dataclass(frozen=True)
class Held:
    """Elements of one unit on the first rank of its shards: `kept` stored, `whole` gathered."""

    kept: int
    whole: int


@lru_cache(maxsize=65536)
def held(unit: Unit, cuts: Cuts) -> Held:
    """Sums over a unit's weights."""
    return Held(sum(map(cuts.held, unit.weights)), sum(map(cuts.gathered, unit.weights)))


@lru_cache(maxsize=65536)
def state_of(unit: Unit, cuts: Cuts, name: str, moments: str | None, itemsize: int) -> int:
    """Bytes of an optimizer's state for a unit there."""
    return sum(state_bytes(name, moments, w.matrix, w.shape[-1], cuts.held(w), itemsize) for w in unit.weights)


def stored_bytes(config: Config, ranks: int) -> dict[str, int]:
    """Bytes of weights, gradients, optimizer state and shadows, if any, on the rank that stores most: what `--dry-run` says
    (train/estimate/memory.py).
    """
    setting = setting_of(config, ranks)
    return max((_stored(setting, parts) for parts in setting.stages), key=lambda b: sum(b.values()))


def _stored(s: Setting, parts: list[StagePart]) -> dict[str, int]:
    optim, weights, state, copies = s.config.optim, 0, 0, 0
    for unit, n in (*s.layers_of(parts), *((end, 1) for end in s.ends_of(parts))):
        weights += n * held(unit, s.cuts).kept
        copies += n * sum(s.cuts.held(w) for w in unit.weights if s.shadowed(w))
        if unit is not s.units.copy:  # the rank of the embedding updates it
            state += n * state_of(unit, s.cuts, optim.name, optim.moments, s.stored)
    shadows = {"shadows": copies * s.item} if copies else {}
    return {"parameters": weights * s.stored, "gradients": weights * s.stored, "optimizer": state, **shadows}


def peak_bytes(config: Config, ranks: int, cpu: bool = False) -> dict[str, float]:
    """Bytes by kind at the peak of a step on the fullest rank: weights, gradients, optimizer, gathered, reduce, activations, loss."""
    return peak_of(setting_of(config, ranks), cpu)


def peak_of(s: Setting, cpu: bool = False) -> dict[str, float]:
    """The same for a config taken apart."""
    return max((_peak(s, r, cpu) for r in s.distinct), key=lambda b: sum(b.values()))


def _peak(s: Setting, rank: int, cpu: bool) -> dict[str, float]:
    parts = s.stages[rank]
    stored = _stored(s, parts)
    offload = s.config.parallel.offload
    kinds = {
        "weights": 0.0 if "parameters" in offload else float(stored["parameters"]),
        "gradients": 0.0 if "parameters" in offload else float(stored["gradients"]),
        "optimizer": 0.0 if {"parameters", "optimizer"} & set(offload) else float(stored["optimizer"]),
    }
    layers = s.layers_of(parts)
    kept = _activations(s, rank, layers)
    largest = max((temporary(s, unit) for unit, _ in layers), default=0.0)
    gathered, reduce = _exchanged(s, parts, layers)
    gathered += stored.get("shadows", 0)
    has_head = any(part.last for part in parts)
    loss = loss_bytes(s, cpu) if has_head else 0.0
    # In the loss nothing of a block is recomputed yet; in the first block's backward the logits are gone, but not the head's gradient.
    return kinds | {"gathered": gathered, "reduce": reduce, "activations": kept + max(0.0, largest - loss), "loss": loss}


def layer_bytes(s: Setting, unit: Unit, mode: str) -> float:
    """Bytes that one layer keeps from forward to backward for one micro-batch, under a mode of recomputation."""
    m, tp = s.config.model, s.config.parallel.tp
    t, d = s.tokens, m.hidden_size
    stream = s.stream * d
    if mode in ("full", "nested"):
        return stream * s.item
    compiled = s.config.parallel.compile
    q, k = m.num_heads * m.head_dim / tp, _kv_channels(s)
    attention = t * (2 * q + 2 * k)  # queries, keys, values as attended, and its result
    scores = 4.0 * t * m.num_heads / tp / s.item  # log-sum-exp in fp32
    norms = t * (q + k) if m.qk_norm or m.residual_row.qk_norm else 0.0
    inner = t * q if m.residual_row.inner_norms else 0.0
    inner += _gate_numbers(s, t, q, mode)
    width = next((w.shape[0] for w in unit.weights if w.name in ("ffn.up.weight", "ffn.up.values")), 0)
    branch = _feed_forward_numbers(s, t * width / tp, mode, compiled)
    if unit.sparse:
        assert m.moe is not None and m.moe.ffn_size is not None
        n, etp = s.rows, s.cuts.etp
        shared = t * m.moe.num_shared * m.moe.ffn_size / tp
        branch = _feed_forward_numbers(s, n * m.moe.ffn_size / etp, mode, False) + _feed_forward_numbers(s, shared, mode, False)
        branch += n * d * (1 if mode == "selective" else 3) + 4 * t * m.moe.num_experts * 3 / s.item
    if mode == "selective":
        # Results of the products: of o and down too, of which compiled blocks keep only what backward reads.
        return (stream + (1 if compiled else 2) * t * d + attention + _gate_numbers(s, t, q, mode) + branch) * s.item + scores * s.item
    # What products read: the normalized stream twice, whole where tp_sequence gathers it; and the stream before each norm.
    return (2 * stream + (0 if compiled else 2) * t * d + attention + norms + inner + branch + scores) * s.item


def _feed_forward_numbers(s: Setting, width_rows: float, mode: str, compiled: bool) -> float:
    """Numbers that a feed-forward keeps, in units of its rows × width: results of its products, then activations."""
    gated = s.config.model.gated
    if mode == "selective" or compiled:
        return (2 if gated else 1) * width_rows
    return (4 if gated else 2) * width_rows


def _gate_numbers(s: Setting, t: float, q: float, mode: str) -> float:
    """Numbers that a gate on attention's result keeps: its sigmoids and the gated result; with selective recomputation its logits."""
    m = s.config.model
    if m.attention_gate is None:
        return 0.0
    rows = t * gate_width(m) / s.cuts.tp
    return rows if mode == "selective" else rows + t * q


def _kv_channels(s: Setting) -> float:
    m, tp = s.config.model, s.config.parallel.tp
    heads = m.num_kv_heads / tp if s.cuts.kv_cut else max(1, math.ceil(m.num_kv_heads / tp))
    return heads * m.head_dim


def temporary(s: Setting, unit: Unit) -> float:
    """Bytes that the backward of one layer needs beside what is kept: what it recomputes, and gradients of its widest tensors."""
    mode, d = s.config.parallel.recompute, s.config.model.hidden_size
    again = max(0.0, layer_bytes(s, unit, "none") - layer_bytes(s, unit, mode))
    wide = max((w.shape[w.cut] / s.cuts.tp for w in unit.weights if w.product and isinstance(w.cut, int) and not w.experts), default=0.0)
    moe = s.config.model.moe
    rows = s.rows * (moe.ffn_size or 0) / s.cuts.etp if unit.sparse and moe is not None else 0.0
    return again + (2 * max(s.tokens * wide, rows) + 2 * s.tokens * d) * s.item


def _activations(s: Setting, rank: int, layers: list[tuple[Unit, int]]) -> float:
    """Bytes of all layers and micro-batches that are live at once."""
    p = s.config.parallel
    inputs = sum(n * layer_bytes(s, u, "full") for u, n in layers)
    if p.recompute == "nested" and layers:
        blocks = sum(n for _, n in layers)
        size = max(1, math.isqrt(blocks - 1) + 1)  # as parallel/recompute.py groups them
        kept = inputs / size + inputs / blocks * (size - 1)
    else:
        kept = sum(n * layer_bytes(s, u, p.recompute) for u, n in layers)
    if "activations" in p.offload:
        kept -= inputs
    if p.accumulation == "layered":
        return kept * (p.breadth_first or s.micro_batches)
    if p.pp > 1:
        live = live_forwards(p.pp_schedule, p.pp, p.stages_per_rank, s.micro_batches)[rank]
        ends = 2 * s.stream * s.config.model.hidden_size * s.item  # a stage keeps its input and its output
        return live * (kept / p.stages_per_rank + ends)
    return kept


def _exchanged(s: Setting, parts: list[StagePart], layers: list[tuple[Unit, int]]) -> tuple[float, float]:
    """Bytes of gathered weights, and of gradients before they are reduced."""
    p = s.config.parallel
    sizes = [(held(u, s.cuts).whole, n) for u, n in layers]
    whole, block = sum(size * n for size, n in sizes), max((size for size, _ in sizes), default=0)
    ends = [held(u, s.cuts).whole for u in s.ends_of(parts)]
    if not s.sharded:
        # Products cast stored weights without a shadow, and autograd keeps the casts unless they are recomputed.
        if s.config.shadows:
            return 0.0, 0.0
        cast = s.item * (whole if p.recompute == "none" else block) if s.item != s.stored else 0
        return float(cast), 0.0
    if p.pp > 1:
        share = min(1.0, GATHERED_STAGES / p.stages_per_rank)
        summed = 2 * block + max(ends, default=0) if p.pp_reduce_every == 1 else whole + sum(ends)
        return s.item * (share * whole + sum(ends)), float(s.reduced * summed)
    if p.reshard_after_forward is False and p.accumulation != "layered":
        kept = float(whole)
    elif not isinstance(p.reshard_after_forward, bool):
        kept = 3 * block + whole / p.reshard_after_forward
    else:
        kept = min(sum(n for _, n in sizes), 3) * block  # the one that computes, the next one, and the buffer that it arrives in
    # Of gradients: the block's own, the buffer of the one before, and the root's of the micro-batch before.
    buffers = s.item * block + s.reduced * (2 * block + (max(ends, default=0) if s.micro_batches > 1 else 0))
    return s.item * (kept + sum(ends)), float(buffers)


def loss_bytes(s: Setting, cpu: bool) -> float:
    """Bytes of the loss: logits of a chunk, the head's gradient, that of the stream."""
    m, tp = s.config.model, s.config.parallel.tp
    assert m.vocab_size is not None
    rows, d, t = -(-m.vocab_size // tp), m.hidden_size, s.tokens
    most = min(LOGITS, max(CPU_LOGITS, CPU_ROWS * rows)) if cpu else LOGITS
    chunks = max(1, math.ceil(t * rows / most))
    exact = max(4, s.item)
    chunk = t * rows / chunks * (2 * s.item if s.config.parallel.compile else s.item + exact)
    head = rows * d * (exact if chunks > 1 else s.item)
    cast = rows * d * s.item if chunks > 1 and exact != s.item else 0
    return max(chunk + head, head + cast) + 2 * t * d * s.item
