"""Seconds of one layer, of the loss and of the optimizer on a device, without exchanges."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megascale.planning.activations import head_rows
from megascale.planning.cluster import Device
from megascale.planning.memory import held, state_of
from megascale.planning.setting import ITEMSIZE, Setting
from megascale.planning.weights import Unit, Weight

# Kernels of a block forward and backward, counted on Llama blocks by a fake device: (compiled, eager); and those of a mixture beside them.
KERNELS = {True: (22, 40), False: (30, 58)}
KERNELS_OF_EXPERTS = 25
# Numbers that compiled kernels read and write, per token: stream (two norms, two sums), per channel of q and k (rotation), per channel of
# the feed-forward. Eager ones move about twice as many, since every operation is a kernel; backward twice as many as forward.
STREAM, ROTATED, INNER = 10, 2, 3
EAGER, FP8_CASTS = 2.0, 1.5
ATTENTION_BACKWARD = 2.5  # products of attention backward, those of forward being one: five for two
LOSS_PASSES = {True: 2, False: 6}  # over the logits: (compiled, eager), each reading and writing once


@dataclass(frozen=True)
class Seconds:
    """Of one micro-batch: forward, backward without recomputation, and recomputation; `kernels` launched in all."""

    forward: float
    backward: float
    again: float
    kernels: float


def product_flops(s: Setting, unit: Unit, w: Weight) -> float:
    """Forward FLOPs of one product on this rank."""
    if w.experts:
        return 2.0 * s.rows(unit) * w.shape[1] * w.shape[2] / s.cuts.etp
    heads = unit.model.num_kv_heads
    elements = float(math.prod(s.cuts.local(w, heads)))
    if w.cut == "kv_heads" and heads % s.cuts.tp:
        elements *= math.ceil(heads / s.cuts.tp) / heads
    # A bank of attention's experts (MoEUT) is used in part; a memory has tokens of its own.
    share = w.uses / s.units.repeats if len(w.shape) > 2 else 1.0
    tokens = s.memory(unit) if w.name.startswith(("cross.k.", "cross.v.")) else s.tokens(unit)
    return 2.0 * tokens * elements * share


def attention_flops(s: Setting, unit: Unit) -> float:
    """Forward FLOPs of attention on this rank, masked pairs left out."""
    m, train = unit.model, s.config.train
    pairs = s.tokens(unit) * m.attention_row.pair_flops(m) / s.cuts.tp
    if m.spacetime is not None:  # along one dimension
        return pairs * (sum(m.spacetime.grid) / len(m.spacetime.grid) + s.memory(unit) / train.micro_batch_size)
    length = train.source_length if unit.source else train.seq_len
    met = min(m.sliding_window or length, length)
    share = (1 - met / (2 * length)) * met if m.causal and not unit.source else float(length)
    return pairs * (share + s.memory(unit) / train.micro_batch_size)


def layer_seconds(s: Setting, unit: Unit, device: Device) -> Seconds:
    """One layer's time on the device, at least that of launching its kernels."""
    m, p, precision = unit.model, s.config.parallel, s.config.precision
    dtype = precision.compute if precision.fp8 == "false" else "fp8"
    products = 0.0
    for w in unit.weights:
        if w.product:
            flops = product_flops(s, unit, w)
            products += flops / device.product_rate("bf16" if w.name.startswith("ffn.router") else dtype, flops) if flops else 0.0
    attention = attention_flops(s, unit) / (device.attention_share * device.peak(precision.compute))
    q, k = m.num_heads * m.head_dim / p.tp, m.num_kv_heads * m.head_dim / p.tp
    width = sum(w.shape[0] for w in unit.weights if w.name == "ffn.up.weight") / p.tp
    rows = s.rows(unit) * (0 if not unit.sparse or m.moe is None else m.moe.ffn_size or 0) / s.cuts.etp
    gated = q if m.attention_gate is not None else 0.0
    numbers = STREAM * s.stream(unit) * m.hidden_size + ROTATED * s.tokens(unit) * (q + k)
    numbers += INNER * (s.tokens(unit) * (width + gated) + rows)
    if unit.sparse:
        numbers += 4 * s.rows(unit) * m.hidden_size  # permuting rows there and back
    numbers *= (1.0 if p.compile else EAGER) * (1.0 if precision.fp8 == "false" else FP8_CASTS)
    passing = numbers * s.item / device.memory_bytes_per_second
    forward_kernels, backward_kernels = KERNELS[p.compile and not unit.sparse]
    extra = KERNELS_OF_EXPERTS if unit.sparse else 0

    def at_least(seconds: float, kernels: float) -> float:
        return max(seconds / device.step_share, kernels * max(device.kernel_seconds, device.launch_seconds))

    forward = at_least(products + attention + passing, forward_kernels + extra)
    backward = at_least(2 * products + ATTENTION_BACKWARD * attention + 2 * passing, backward_kernels + 2 * extra)
    times = {"none": 0, "selective": 0, "full": 1, "nested": 2}[p.recompute]
    again = times * forward if p.recompute != "selective" else at_least(passing / 2, 0 if p.compile else forward_kernels / 2)
    kernels = (1 + times) * (forward_kernels + extra) + backward_kernels + 2 * extra
    return Seconds(forward, backward, again, kernels)


def loss_seconds(s: Setting, device: Device) -> float:
    """Heads and losses of one micro-batch, gradients included: they are computed together."""
    m, p = s.config.model, s.config.parallel
    rows, tokens = head_rows(s), s.tokens() * (1 + m.mtp_depth)
    flops = 2.0 * tokens * rows * m.hidden_size
    passes = LOSS_PASSES[p.compile] * 2 * tokens * rows * s.item / device.memory_bytes_per_second
    return (3 * flops / device.product_rate(s.config.precision.compute, flops) + passes) / device.step_share


def update_seconds(s: Setting, units: list[tuple[Unit, int]], device: Device) -> float:
    """Gradient norm and optimizer: every number is read once or twice, and weights and states are written."""
    optim, item = s.config.optim, ITEMSIZE[s.config.precision.storage]
    kept = sum(n * held(u, s.cuts).kept for u, n in units)
    state = sum(n * state_of(u, s.cuts, optim.name, optim.moments, item, len(optim.ema)) for u, n in units)
    return (4 * kept * item + 2 * state) / device.memory_bytes_per_second


def flops_per_step(s: Setting) -> float:
    """Training FLOPs of the model in a step, as MFU counts them (measure/compute.py)."""
    return s.units.flops * s.config.train.global_batch_size * s.config.train.seq_len
