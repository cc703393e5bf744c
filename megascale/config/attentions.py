"""Kinds of attention as rows: the facts that blocks, axes, rules, growth, estimates and formats need. The modules are in model/. Imports no
torch.

A kind is how tokens of one stack attend to each other. Cross-attention (to another stack's tokens, or a text) is grouped whatever the kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megascale.plugins import with_plugins

if TYPE_CHECKING:  # the config section imports this file to check names
    from megascale.config.schema import Delta, Latent, Model


@dataclass(frozen=True)
class AttentionGrowth:
    """axes     by a weight's name in the module, the growth axis of each of its dimensions: those that `maps` gives, and stream, read and
             the others of expand/tensors.py
    writers  the weights that write into the stream
    maps     (model, larger model, options, map of what reads the stream) → `expand.attention.AttentionMaps`, or its "module:name"
    cut      (model, smaller model, query heads that stay, KV heads that stay) → the same for fewer heads; a kind with a section of its own
             also gets `inside`, what stays by size of that section
    """

    axes: Mapping[str, tuple[str, ...]]
    writers: tuple[str, ...]
    maps: str | Callable[..., Any] = "megascale.expand.attention:grouped"
    cut: str | Callable[..., Any] = "megascale.expand.kept:grouped"


@dataclass(frozen=True)
class AttentionRow:
    """One kind of attention. The defaults promise nothing: a feature that depends on a fact the row does not state is refused.

    build       (model, residual row, dtype, causal) → module, or its "module:name". Its forward is (x [b, s, d], rotary, mask) → [b, s, d],
                between its `enter` and its `leave`; tokens attend to each other through its `attend` alone. Passes replace all three
                (model/attention.py)
    weights     model → weights per layer that every token passes through
    pair_flops  model → forward FLOPs per pair of query and key
    token_flops model → forward FLOPs per token besides products with weights and pairs
    cached      (model, query heads of a rank) → numbers cached there per token and layer in generation; None: it cannot generate
    state       (model, query heads of a rank) → numbers kept there per sequence and layer, however long it is
    widths      (model, tp) → widths of a rank's products, for FP8's alignment; None: no FP8
    tp          its weights may be split by heads
    cp          methods by which its sequence may be split: ring, ulysses
    both_ways   tokens may also attend to later ones: encoders
    grid        blocks over grids support it
    growth      None: unknown; models with it keep their sizes
    theory      analysis/theory.py predicts its output
    megatron    models with it can be converted to and from Megatron
    scans       tokens meet in order, through a state: it has neither positions nor windows nor a score for each pair
    reads       sections of the model that it needs, and that other kinds refuse
    options     keys of the model that it follows and that kinds without them refuse: attention_sink, attention_softcap, attention_gate
    """

    build: str | Callable[..., Any]
    weights: Callable[[Model], int]
    pair_flops: Callable[[Model], int]
    token_flops: Callable[[Model], int] = lambda m: 0
    cached: Callable[[Model, int], float] | None = None
    state: Callable[[Model, int], float] = lambda m, heads: 0.0
    widths: Callable[[Model, int], tuple[int, ...]] | None = None
    tp: bool = False
    cp: tuple[str, ...] = ()
    both_ways: bool = False
    grid: bool = False
    growth: AttentionGrowth | None = None
    theory: bool = False
    megatron: bool = False
    scans: bool = False
    reads: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


OPTIONS = ("attention_sink", "attention_softcap", "attention_gate")


def gate_width(m: Model) -> int:
    """Rows of the gate's product: a channel of the heads' results each, or a head; 0 without a gate."""
    channels = m.head_dim if m.latent is None else m.latent.value_dim or m.head_dim
    return {None: 0, "head": m.num_heads, "channel": m.num_heads * channels}[m.attention_gate]


def _gate_widths(m: Model, tp: int) -> tuple[int, ...]:
    return (gate_width(m) // tp,) if m.attention_gate is not None else ()


def _grouped_weights(m: Model) -> int:
    return m.hidden_size * (m.head_dim * 2 * (m.num_heads + m.num_kv_heads) + gate_width(m))


def _grouped_widths(m: Model, tp: int) -> tuple[int, ...]:
    """Widths of queries, of keys and values, which are replicated if tp does not divide their heads, and of a gate."""
    keys = (m.num_kv_heads // tp if m.num_kv_heads % tp == 0 else 1) * m.head_dim
    return m.num_heads * m.head_dim // tp, keys, *_gate_widths(m, tp)


# Of the options that every kind of softmax attention may have.
OPTION_AXES = {
    "gate.weight": ("gated", "read"),
    "gate.bias": ("gated",),
    "gate.keys": ("new_keys", "read"),
    "gate.values": ("new_values", "gated"),
    "sinks": ("sinks",),
}
GROUPED_GROWTH = AttentionGrowth(
    {
        **OPTION_AXES,
        "q.weight": ("query", "read"),
        "q.bias": ("query",),
        "k.weight": ("key", "read"),
        "k.bias": ("key",),
        "v.weight": ("value", "read"),
        "v.bias": ("value",),
        "o.weight": ("stream", "heads"),
        "o.bias": ("stream",),
        "q_norm.weight": ("query_norm",),
        "q_norm.bias": ("query_norm",),
        "q_norm.alpha": ("one",),
        "k_norm.weight": ("key_norm",),
        "k_norm.bias": ("key_norm",),
        "k_norm.alpha": ("one",),
        "inner_norm.weight": ("heads_gain",),
        "inner_norm.bias": ("heads_shift",),
        "inner_norm.alpha": ("one",),
        # Products as attention over parameters: keys are read, values are written.
        "q.keys": ("new_keys", "read"),
        "q.values": ("new_values", "query"),
        "k.keys": ("new_keys", "read"),
        "k.values": ("new_values", "key"),
        "v.keys": ("new_keys", "read"),
        "v.values": ("new_values", "value"),
        "o.keys": ("new_keys", "heads"),
        "o.values": ("new_values", "stream"),
    },
    writers=("o.weight", "o.values", "o.bias"),
)
# softmax(q·kᵀ/√e)·v per head, with fewer KV heads if model.num_kv_heads says so.
GROUPED = AttentionRow(
    "megascale.model.attention:Attention",
    weights=_grouped_weights,
    pair_flops=lambda m: 4 * m.num_heads * m.head_dim,
    cached=lambda m, heads: 2 * m.num_kv_heads * m.head_dim * (heads / m.num_heads),
    widths=_grouped_widths,
    tp=True,
    cp=("ring", "ulysses"),
    both_ways=True,
    grid=True,
    growth=GROUPED_GROWTH,
    theory=True,
    megatron=True,
    options=OPTIONS,
)


def _latent_weights(m: Model) -> int:
    sizes, d, h = _sizes(m), m.hidden_size, m.num_heads
    content, values = m.head_dim, sizes.value_dim or m.head_dim
    query = h * (content + sizes.rope_dim) * (sizes.query_rank or d) + d * (sizes.query_rank or 0)
    return query + d * (sizes.kv_rank + sizes.rope_dim) + sizes.kv_rank * h * (content + values) + (h * values + gate_width(m)) * d


def _latent_pairs(m: Model) -> int:
    return 2 * m.num_heads * (m.head_dim + _sizes(m).rope_dim + (_sizes(m).value_dim or m.head_dim))


def _latent_widths(m: Model, tp: int) -> tuple[int, ...]:
    """Widths of the latents' products, which every tensor rank computes, and of its heads' queries, keys and values."""
    sizes, h, content = _sizes(m), m.num_heads // tp, m.head_dim
    whole = sizes.query_rank or sizes.kv_rank, sizes.kv_rank, sizes.kv_rank + sizes.rope_dim
    return *whole, h * (content + sizes.rope_dim), h * content, h * (sizes.value_dim or content), *_gate_widths(m, tp)


def _sizes(m: Model) -> Latent:
    assert m.latent is not None
    return m.latent


LATENT_GROWTH = AttentionGrowth(
    {
        **OPTION_AXES,
        "q_down.weight": ("query_latent", "read"),
        "q_down.bias": ("query_latent",),
        "q_norm.weight": ("query_latent_gain",),
        "q_norm.bias": ("query_latent_shift",),
        "q_norm.alpha": ("one",),
        "q.weight": ("query", "query_source"),
        "q.bias": ("query",),
        "kv_down.weight": ("latent", "read"),
        "kv_down.bias": ("latent",),
        "kv_norm.weight": ("latent_gain",),
        "kv_norm.bias": ("latent_shift",),
        "kv_norm.alpha": ("one",),
        "k.weight": ("key", "latent_read"),
        "k.bias": ("key",),
        "v.weight": ("value", "latent_read"),
        "v.bias": ("value",),
        "o.weight": ("stream", "heads"),
        "o.bias": ("stream",),
    },
    writers=("o.weight", "o.bias"),
    maps="megascale.expand.attention:latent",
    cut="megascale.expand.kept:latent",
)
LATENT = AttentionRow(
    "megascale.model.attention_latent:LatentAttention",
    weights=_latent_weights,
    pair_flops=_latent_pairs,
    cached=lambda m, heads: _sizes(m).kv_rank + _sizes(m).rope_dim,
    widths=_latent_widths,
    tp=True,
    cp=("ring", "ulysses"),
    both_ways=True,
    growth=LATENT_GROWTH,
    reads=("latent",),
    options=OPTIONS,
)


def _delta(m: Model) -> Delta:
    assert m.delta is not None
    return m.delta


def _delta_weights(m: Model) -> int:
    """Products, and the convolution, whose taps also multiply once a token."""
    s, d = _delta(m), m.hidden_size
    keys, values = s.key_heads * s.key_dim, s.value_heads * s.value_dim
    return d * (2 * keys + 3 * values + 2 * s.value_heads) + s.conv_size * (2 * keys + values)


def _delta_state(m: Model, heads: int) -> float:
    """The state of a rank's heads, and the tokens that the convolution looks back at."""
    s = _delta(m)
    keys, values = s.key_heads * s.key_dim, s.value_heads * s.value_dim
    return (s.value_heads * s.key_dim * s.value_dim + (s.conv_size - 1) * (2 * keys + values)) * (heads / m.num_heads)


def _delta_widths(m: Model, tp: int) -> tuple[int, ...]:
    s = _delta(m)
    return s.key_heads * s.key_dim // tp, s.value_heads * s.value_dim // tp


DELTA_GROWTH = AttentionGrowth(
    {
        **{f"{name}.weight": ("delta_keys", "read") for name in ("q", "k")},
        **{f"{name}.bias": ("delta_keys",) for name in ("q", "k")},
        "v.weight": ("delta_values", "read"),
        "v.bias": ("delta_values",),
        "z.weight": ("delta_gate", "read"),
        "z.bias": ("delta_gate",),
        "a.weight": ("delta_heads", "read"),
        "b.weight": ("delta_heads", "read"),
        "q_conv.weight": ("delta_key_taps", "taps"),
        "k_conv.weight": ("delta_key_taps", "taps"),
        "v_conv.weight": ("delta_gate", "taps"),
        "A_log": ("delta_heads",),
        "dt_bias": ("delta_heads",),
        "norm.weight": ("head_gain",),
        "o.weight": ("stream", "heads"),
        "o.bias": ("stream",),
    },
    writers=("o.weight", "o.bias"),
    maps="megascale.expand.delta:grow",
    cut="megascale.expand.delta:cut",
)
# A head reads its state, and replaces a row of it, which is three products of a vector with a matrix, of 2·K·V operations each.
GATED_DELTA = AttentionRow(
    "megascale.model.attention_delta:GatedDelta",
    weights=_delta_weights,
    pair_flops=lambda m: 0,
    token_flops=lambda m: 6 * _delta(m).value_heads * _delta(m).key_dim * _delta(m).value_dim,
    cached=lambda m, heads: 0.0,
    state=_delta_state,
    widths=_delta_widths,
    tp=True,
    cp=("ring", "ulysses"),
    scans=True,
    growth=DELTA_GROWTH,
    reads=("delta",),
)
ATTENTIONS: dict[str, AttentionRow] = {"grouped": GROUPED, "latent": LATENT, "gated_delta": GATED_DELTA}


def attentions() -> Mapping[str, AttentionRow]:
    return with_plugins("attentions", ATTENTIONS, AttentionRow)
