"""Predicts a stack at its first step: variance, token correlation and gradient after every sublayer, by the rules of moments.py and the
rows of the residual table.

Assumptions, as in the rules' paper: branches are independent of the stream they join, attention is nearly uniform, and gradients reach its
input through values only. Each part returns its output and a function that propagates a gradient back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megascale.analysis.moments import (
    Gradient,
    Signal,
    capped,
    dropout,
    dropout_gradient,
    expectation,
    gated,
    gated_gradients,
    gelu,
    gelu_gradient,
    linear,
    linear_gradient,
    norm,
    norm_gradient,
    relu,
    relu_gradient,
    slope_correlation,
    swiglu,
    swiglu_gradients,
    tanh,
    tanh_gradient,
)
from megascale.config.attentions import gate_width
from megascale.config.schema import Model
from megascale.model.residual import Residual, Stack, residual

Pull = Callable[[Gradient], Gradient]
# Rounding a normal weight to −1, 0, 1 times its mean size √(2/π)σ keeps this share of its variance: P(|z| > ½√(2/π))·2/π.
TERNARY = math.erfc(0.5 * math.sqrt(2 / math.pi) / math.sqrt(2)) * 2 / math.pi


class PredictedMoments(NamedTuple):
    """The stream after one sublayer."""

    layer: int
    sublayer: str
    variance: float
    correlation: float
    gradient: float


def stack_points(cfg: Model, stack: Stack, seq_len: int, warm: float, first: Signal, last: Gradient) -> list[PredictedMoments]:
    """All points of a stack in order, from the signal that enters it and the gradient after its last block.

    warm  the factor that BranchNorm's branches have at this step
    """
    names: list[tuple[int, str]] = []
    signals: list[Signal] = []
    pulls: list[Pull] = []
    x = first
    for layer in range(stack.layers):
        own = cfg.at_layer(layer)
        row = residual(own, stack, layer)
        parts: list[tuple[str, list[Sublayer]]] = [("attention", [attention]), ("ffn", [feed_forward])]
        if row.scheme.together:
            parts = [("block", [attention, feed_forward])]
        for kind, sublayers in parts:
            x, pull = _join(own, row, x, sublayers, seq_len, stack.side == "decoder", warm, kind != "ffn")
            names.append((layer, kind))
            signals.append(x)
            pulls.append(pull)
    gradients = [last]
    for pull in pulls[:0:-1]:
        gradients.append(pull(gradients[-1]))
    return [PredictedMoments(*name, s.square, s.corr, math.sqrt(g.var)) for name, s, g in zip(names, signals, gradients[::-1])]


Sublayer = Callable[[Model, Residual, Signal, int, bool], tuple[Signal, Pull]]


def _join(
    cfg: Model, row: Residual, x: Signal, sublayers: list[Sublayer], seq_len: int, causal: bool, warm: float, attends: bool
) -> tuple[Signal, Pull]:
    """The stream after skip·x + branch·Σ F, normalized before, after, or at the branch's end."""
    alpha = cfg.dyt_alpha[0 if attends else 1]
    h, pull_before = _norm(cfg, x, alpha) if row.scheme.norm in ("before", "around") else (x, _unchanged)
    factor = row.branch * (warm if row.branch_period else 1.0) * (1.0 if row.channel_scale is None else row.channel_scale)
    branches = [f(cfg, row, h, seq_len, causal) for f in sublayers]
    if row.scheme.norm in ("within", "around"):
        branches = [_normed(cfg, alpha, *branch) for branch in branches]
    parts = [(row.skip, x)] + [(factor, dropout(y, cfg.dropout)) for y, _ in branches]
    var = sum(c * c * s.var for c, s in parts)
    out = Signal(sum(c * s.mean for c, s in parts), var, sum(c * c * s.var * s.corr for c, s in parts) / var)
    joined, pull_after = _norm(cfg, out, alpha) if row.scheme.norm == "after" else (out, _unchanged)

    def pull(g: Gradient) -> Gradient:
        g = pull_after(g)
        into = [p(Gradient(dropout_gradient(factor**2 * g.var, cfg.dropout), (1 - cfg.dropout) * g.corr)) for _, p in branches]
        return _sum([Gradient(row.skip**2 * g.var, g.corr), *map(pull_before, into)])

    return joined, pull


def _normed(cfg: Model, alpha: float, y: Signal, pull_branch: Pull) -> tuple[Signal, Pull]:
    """Adds a norm at the end of a branch."""
    normed, pull_norm = _norm(cfg, y, alpha)
    return normed, lambda g: pull_branch(pull_norm(g))


def attention(cfg: Model, row: Residual, h: Signal, seq_len: int, causal: bool) -> tuple[Signal, Pull]:
    """Output product of averaged values. A query that attends to n tokens has Σa² = e^{(1−r)s²}/n, s² the variance of its scores."""
    d, wide, narrow = cfg.hidden_size, cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    scores = 1.0 if cfg.attention_scale is None else cfg.attention_scale**2 * cfg.head_dim
    for role, width in (("query", wide), ("key", narrow)):
        z, _ = _product(cfg, row, h, role, width, d)
        scores *= (_norm(cfg, z, cfg.dyt_alpha[1])[0] if cfg.qk_norm or row.scheme.qk_norm else z).square
    scores = scores if cfg.attention_softcap is None else capped(scores, cfg.attention_softcap)
    peak = math.exp(min(50.0, (1 - h.corr) * scores))
    seen = np.arange(1, seq_len + 1) if causal else np.full(seq_len, seq_len)
    own = float(np.minimum(1.0, peak / seen).mean())  # Σa² over a query's keys
    later = np.arange(1, seq_len + 1)
    shared = float(((later - 1) / seen).sum() * 2 / max(1, seq_len * (seq_len - 1)))  # Σab of two queries
    values, pull_values = _product(cfg, row, h, "value", narrow, d)
    kept = _kept_by_keys(scores, h.corr, seen) if cfg.attention_sink is not None else 1.0
    alike = values.corr + (1 - values.corr) * own
    y = Signal(0.0, values.var * alike * kept, (values.corr + (1 - values.corr) * shared) / alike)
    inner, pull_inner = _norm(cfg, y, cfg.dyt_alpha[1]) if row.scheme.inner_norms else (y, _unchanged)
    passed, pull_gate = _gated(cfg, row, h, inner) if cfg.attention_gate is not None else (inner, None)
    out, pull_out = _product(cfg, row, passed, "attention_out", d, wide)
    # Gradient of a value: Σ of a over all queries that attend to it.
    weight = 1 / seen
    received = np.cumsum(weight[::-1])[::-1] if causal else np.ones(seq_len)
    squared, alone = float((received**2).mean()), float(np.minimum(1.0, peak / seen).sum() / seq_len)
    pairs = max(1, seq_len * (seq_len - 1))
    crossed, met = (seq_len**2 - seq_len * squared) / pairs, (seq_len - float(np.minimum(1.0, peak / seen).sum())) / pairs

    def pull(g: Gradient) -> Gradient:
        g = pull_out(g)
        g, into_gate = (g, None) if pull_gate is None else pull_gate(g)
        g = pull_inner(g)
        var = kept * g.var * (g.corr * squared + (1 - g.corr) * alone)
        cov = kept * g.var * (g.corr * crossed + (1 - g.corr) * met)
        # Queries of a group share a value, so its gradients add up.
        back = pull_values(Gradient(var * wide / narrow, min(1.0, cov / var)))
        return back if into_gate is None else _sum([back, into_gate])

    return out, pull


def _kept_by_keys(scores: float, corr: float, seen: NDArray[np.int64]) -> float:
    """Mean square of the share of the softmax that keys get beside a sink of 0, for queries that see `seen` keys. Of the scores' variance
    the share `corr` is common to a query's keys, and moves them all against the sink.
    """
    mass = (seen * math.exp(min(50.0, (1 - corr) * scores / 2)))[:, None]
    return expectation(lambda z: ((1 / (1 + np.exp(-z) / mass)) ** 2).mean(0), max(0.0, corr) * scores)


def _gated(cfg: Model, row: Residual, h: Signal, y: Signal) -> tuple[Signal, Callable[[Gradient], tuple[Gradient, Gradient]]]:
    """y times its gate; a gradient of that → those of y and of the gate's input h."""
    rows = gate_width(cfg)
    gate, pull_gate = _product(cfg, row, h, "gate", rows, cfg.hidden_size)

    def pull(g: Gradient) -> tuple[Gradient, Gradient]:
        to_gate, to_y = gated_gradients(g.var, gate, y)
        to_gate *= cfg.num_heads * cfg.head_dim / rows  # a head's gate hears all its channels
        back = pull_gate(Gradient(to_gate, g.corr * y.corr * slope_correlation("sigmoid", gate)))
        return Gradient(to_y, g.corr * slope_correlation("share", gate)), back

    return gated(gate, y), pull


def feed_forward(cfg: Model, row: Residual, h: Signal, seq_len: int, causal: bool) -> tuple[Signal, Pull]:
    """down(φ(up)), or down(silu(gate)·up)."""
    d, f = cfg.hidden_size, cfg.ffn_size
    up, pull_up = _product(cfg, row, h, "up", f, d)
    gate, pull_gate = _product(cfg, row, h, "gate", f, d)
    rule = cfg.ffn_row.theory
    y = swiglu(gate, up) if rule == "swiglu" else relu(up) if rule == "relu" else gelu(up)
    inner, pull_inner = _norm(cfg, y, cfg.dyt_alpha[1]) if row.scheme.inner_norms else (y, _unchanged)
    out, pull_out = _product(cfg, row, inner, "down", d, f)

    def pull(g: Gradient) -> Gradient:
        g = pull_inner(pull_out(g))
        if rule == "swiglu":
            to_gate, to_up = swiglu_gradients(g.var, gate, up)
            through_gate = Gradient(to_gate, g.corr * up.corr * slope_correlation("silu", gate))
            return _sum([pull_gate(through_gate), pull_up(Gradient(to_up, g.corr * slope_correlation("gate", gate)))])
        var = relu_gradient(g.var) if rule == "relu" else gelu_gradient(g.var, up.var)
        return pull_up(Gradient(var, g.corr * slope_correlation("relu" if rule == "relu" else "gelu", up)))

    return out, pull


def _product(cfg: Model, row: Residual, x: Signal, role: str, out_dim: int, in_dim: int) -> tuple[Signal, Pull]:
    weight = (row.starts.std(role, out_dim, in_dim) * row.product_scale(in_dim)) ** 2
    if cfg.linear == "dense":
        return linear(x, in_dim, weight), lambda g: Gradient(linear_gradient(g.var, out_dim, weight), g.corr)
    unit = Signal(x.mean / math.sqrt(x.square), x.var / x.square, x.corr)
    weight *= TERNARY
    return linear(unit, in_dim, weight), lambda g: Gradient(linear_gradient(g.var, out_dim, weight) / x.square, g.corr)


def _norm(cfg: Model, x: Signal, alpha: float) -> tuple[Signal, Pull]:
    if cfg.norm_row.theory == "tanh":
        return tanh(x, alpha), lambda g: Gradient(tanh_gradient(g.var, x.var, alpha), g.corr)
    # A token's entries share a mean only if all tokens share it, which the correlation shows.
    corr = (x.corr * x.var + x.mean**2) / x.square
    return norm(Signal(0.0, x.square, corr)), lambda g: Gradient(norm_gradient(g.var, x.square), g.corr)


def _unchanged(g: Gradient) -> Gradient:
    return g


def _sum(parts: list[Gradient]) -> Gradient:
    var = sum(g.var for g in parts)
    return Gradient(var, sum(g.var * g.corr for g in parts) / var if var > 0 else 0.0)
