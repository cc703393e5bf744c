"""Bytes that layers and the loss keep from forward to backward, and what a backward needs beside them: the tensors that autograd saves in
eager blocks, counted one by one.

Counts are in numbers of the compute format: t tokens of a rank's sublayers, d width, q and k channels of its query and KV heads, w its
share of a feed-forward, n rows of its experts.
"""

from __future__ import annotations

import math
from functools import lru_cache

from megascale.config.attentions import gate_width
from megascale.config.schema import Model
from megascale.planning.setting import Setting
from megascale.planning.weights import Unit

LOGITS = 1 << 28  # of a chunk of the loss on a device (model/loss.py)
CPU_LOGITS, CPU_ROWS = 1 << 22, 256
WIDE = 2  # gradients of a feed-forward's width beside each other, less what has been freed by then
STREAM_NORMS = ("attention_norm", "cross_norm", "ffn_norm")


def layer_bytes(s: Setting, unit: Unit, mode: str) -> float:
    """Bytes that one layer keeps from forward to backward for one micro-batch, under a mode of recomputation. Peaks ask often."""
    if (unit, mode) not in s.layer_memo:
        s.layer_memo[unit, mode] = _layer_bytes(s, unit, mode)
    return s.layer_memo[unit, mode]


def _layer_bytes(s: Setting, unit: Unit, mode: str) -> float:
    if mode in ("full", "nested"):
        return inputs(s, unit)
    if mode == "budget":
        least = inputs(s, unit)
        return least + s.config.parallel.budget * (layer_bytes(s, unit, "none") - least)
    m, compiled, chosen = unit.model, s.config.parallel.compile and not unit.sparse, mode == "selective"
    t, stream, d = s.tokens(unit), s.stream(unit), m.hidden_size
    if m.moeut is not None:
        return _repeated_numbers(s, unit, chosen) * s.item
    numbers = sum(_attention_numbers(s, unit, name, chosen, compiled) for name in ("attention", "cross") if _has(unit, name))
    numbers += _branch_numbers(s, unit, chosen, compiled)
    if chosen:
        # Results of the products: of o and down too, of which compiled blocks keep only what backward reads.
        return (numbers + stream * d) * s.item
    norms = sum(_has(unit, name) for name in STREAM_NORMS)
    # What norms read, on this rank, and what products read, whole.
    numbers += norms * (stream + (0 if compiled else t)) * d
    if not compiled:
        scheme = m.residual_row
        sublayers = 1 if scheme.one_norm else norms
        numbers += stream * d * sublayers * ((scheme.norm == "around") + bool(scheme.channel_scales) + (m.dropout > 0))
    return numbers * s.item


def inputs(s: Setting, unit: Unit) -> float:
    """Bytes of a layer's input."""
    return s.stream(unit) * unit.model.hidden_size * s.item


def angles(s: Setting) -> float:
    """Bytes of the sines and cosines of a stage's positions."""
    m = s.config.model
    rotates = any(of.position_row.rotates for of in m.variants.values()) and m.spacetime is None
    return 2.0 * s.config.train.seq_len / s.config.parallel.cp * m.head_dim * s.item if rotates else 0.0


@lru_cache(maxsize=4096)
def _has(unit: Unit, name: str) -> bool:
    return any(w.startswith(f"{name}.") for w in unit.names)


def _attention_numbers(s: Setting, unit: Unit, name: str, chosen: bool, compiled: bool) -> float:
    """What attention keeps: queries, keys and values as attended, its result, and that again as its product reads it."""
    m, tp, t, exact = unit.model, s.config.parallel.tp, s.tokens(unit), 4.0 / s.item
    if name == "attention" and m.latent is not None:
        return _latent_numbers(s, unit, m, chosen)
    read = s.memory(unit) if name == "cross" else t
    if not _has(unit, f"{name}.k"):  # a kind that is not counted here: the results of its products, and as much again around them
        width = sum(w.shape[0] / (tp if w.cut == 0 else 1) for n, w in unit.names.items() if n.startswith(f"{name}.") and w.product)
        return (1 if chosen else 3) * t * width
    q, k = m.num_heads * m.head_dim / tp, kv_channels(s, m)
    if s.cpu:  # its kernels take as many keys as queries
        k = q
    elif s.item == 8 or (s.item == 4 and m.num_kv_heads != m.num_heads):  # no fused kernel takes these: all scores are kept
        length = s.config.train.seq_len if m.spacetime is None else max(m.spacetime.grid)
        return t * m.num_heads / tp * length + t * q + 2 * read * q + (0 if chosen else t * q)
    numbers = t * 2 * q + read * 2 * k + exact * t * m.num_heads / tp
    if m.attention_gate is not None and name == "attention":  # its sigmoids and the gated result; selective recomputation keeps logits
        numbers += t * gate_width(m) / tp + (0 if chosen else t * q)
    if chosen:
        return numbers + (0 if compiled else t * m.hidden_size)
    if not compiled and s.item == 2 and not s.cpu:  # cuDNN's result is laid out by heads, and copied for the product
        numbers += t * q
    if m.qk_norm or m.residual_row.qk_norm:
        numbers += t * q + read * k
    return numbers + (t * q if m.residual_row.inner_norms else 0.0)


def _latent_numbers(s: Setting, unit: Unit, m: Model, chosen: bool) -> float:
    """Latents before and after their norm, on every tensor rank; queries, keys and values padded to one size."""
    assert m.latent is not None
    t, heads = s.tokens(unit), m.num_heads / s.config.parallel.tp
    content, turned, value = m.head_dim, m.latent.rope_dim, m.latent.value_dim or m.head_dim
    size = max(content + turned, value)
    attended = t * heads * (4 * size + 4.0 / s.item)
    latents = t * (m.latent.kv_rank + (m.latent.query_rank or 0))
    if chosen:
        products = t * (latents / t + turned + heads * (content + turned + content + value) + m.hidden_size)
        return attended - t * heads * 3 * size + products
    return attended + 2 * latents + t * heads * value


def _branch_numbers(s: Setting, unit: Unit, chosen: bool, compiled: bool) -> float:
    """What the feed-forward or the experts keep."""
    m, tp, t, d = unit.model, s.config.parallel.tp, s.tokens(unit), unit.model.hidden_size
    factor = (2 if m.gated else 1) if chosen or compiled else (4 if m.gated else 2)
    if not unit.sparse:
        width = next((w.shape[0] for n, w in unit.names.items() if n in ("ffn.up.weight", "ffn.up.values")), 0)
        return factor * t * width / tp + (t * d if chosen and not compiled else 0.0)
    assert m.moe is not None and m.moe.ffn_size is not None
    n, logits = s.rows(unit), s.stream(unit) if s.config.parallel.expert_tp == 1 else t
    numbers = factor * n * m.moe.ffn_size / s.cuts.etp + factor * t * m.moe.num_shared * m.moe.ffn_size / tp
    return numbers + n * d * (1 if chosen else 3) + 3 * 4.0 / s.item * logits * m.moe.num_experts


def _repeated_numbers(s: Setting, unit: Unit, chosen: bool) -> float:
    """What one pass through a layer of MoEUT keeps: each head chooses experts for its values and results, whose rows have the width d."""
    m = unit.model
    assert m.moeut is not None and m.moe is not None and m.moe.ffn_size is not None
    t, d, heads, e = s.tokens(unit), m.hidden_size, m.num_heads / s.config.parallel.tp, m.head_dim
    chosen_rows = t * heads * m.moeut.attention_top_k
    n = s.rows(unit)
    return 4 * t * d + t * heads * e * 5 + chosen_rows * 2 * (d + e) + n * (3 * d + 2 * m.moe.ffn_size)


def kv_channels(s: Setting, m: Model) -> float:
    """Channels of the KV heads that a tensor rank holds."""
    tp = s.config.parallel.tp
    heads = m.num_kv_heads / tp if m.num_kv_heads % tp == 0 else max(1, math.ceil(m.num_kv_heads / tp))
    return heads * m.head_dim


def temporary(s: Setting, unit: Unit) -> float:
    """Bytes that the backward of one layer needs beside what is kept, in the middle of its feed-forward: what it recomputes, and gradients
    of its widest tensors.
    """
    mode, m = s.config.parallel.recompute, unit.model
    again = max(0.0, layer_bytes(s, unit, "none") - layer_bytes(s, unit, mode))
    wide = max((w.shape[w.cut] / s.cuts.tp for w in unit.weights if w.product and isinstance(w.cut, int) and not w.experts), default=0.0)
    rows = s.rows(unit) * (m.moe.ffn_size or 0) / s.cuts.etp if unit.sparse and m.moe is not None else 0.0
    return again + (WIDE * max(s.tokens(unit) * wide, rows) + 2 * s.tokens(unit) * m.hidden_size) * s.item


def head_rows(s: Setting) -> int:
    """Rows of the head on a tensor rank: of the vocabulary, or the numbers of a patch."""
    m = s.config.model
    rows = m.spacetime.values if m.spacetime is not None else m.vocab_size
    assert rows is not None
    return -(-rows // s.config.parallel.tp)


def loss_bytes(s: Setting) -> float:
    """Bytes of the loss at its peak: logits of a chunk in the compute and in the exact format, their gradient, the head's gradient; the
    norm's result, and gradients of the stream. Each module of multi-token prediction has kept its own gradients by then.
    """
    m, d, t = s.config.model, s.config.model.hidden_size, s.tokens()
    rows, exact = head_rows(s), max(4, s.item)
    stream = s.stream() * d * s.item * 2 + t * d * s.item * (2 if s.config.parallel.tp > 1 else 1)
    if m.spacetime is not None:
        return t * rows * (s.item + 2 * exact) + stream
    most = min(LOGITS, max(CPU_LOGITS, CPU_ROWS * rows)) if s.cpu else LOGITS
    chunks = max(1, math.ceil(t * rows / most))
    one = t * rows / chunks
    compiled = s.config.parallel.compile
    widened = 0 if exact == s.item else exact + s.item
    chunk = one * (2 * s.item if compiled else s.item + widened)
    head = rows * d
    if chunks > 1:  # the gradient so far, and that of the chunk before, stay beside a chunk
        chunk += (0 if compiled else one * s.item) + head * exact
    else:
        chunk = max(chunk, one * s.item * (2 if widened else 1) + head * s.item)
    ahead = m.mtp_depth * (head + t * d) * s.item
    return chunk + stream + ahead
