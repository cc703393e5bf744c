"""Kinds of attention as rows: what blocks, axes, rules, growth, estimates and formats ask of them. The modules are in model/, and no torch
is needed here.

A kind is how tokens of one stack meet. Attention to a memory (another stack's tokens, a text) is grouped whatever the kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megascale.plugins import with_plugins

if TYPE_CHECKING:  # the section's own check asks for the names here
    from megascale.config.schema import Model


@dataclass(frozen=True)
class AttentionGrowth:
    """Which axis of a growth each dimension of its weights is, by their names in the module: query, key, value and heads by heads and
    channels; stream, read and the others of expand/plan.py. `writers`: those that write into the stream.
    """

    axes: Mapping[str, tuple[str, ...]]
    writers: tuple[str, ...]


@dataclass(frozen=True)
class AttentionRow:
    """One kind of attention. The defaults promise nothing, so that what a row does not say is refused where it would matter.

    build       (model, residual row, dtype, causal) → module, or "module:name" of that. Its forward is (x [b, s, d], rotary, mask) → [b, s,
                d], between its `enter` and its `leave`; tokens meet by its `attend` alone. Passes replace all three (model/attention.py)
    weights     model → elements of a layer's matrices, each of which every token meets
    pair_flops  model → forward FLOPs of a query and a key that meet
    cached      (model, query heads of a rank) → numbers that generation keeps there of each token and layer; None: it cannot generate
    widths      (model, tp) → widths of a rank's products, for FP8's alignment; None: not in FP8
    tp          its weights may be cut by heads
    cp          methods by which its sequence may be cut: ring, ulysses
    both_ways   tokens may also see what comes after them: encoders
    grid        blocks over grids have it
    growth      None: it does not say, and models with it keep their sizes
    theory      analysis/theory.py predicts its output
    megatron    weights of models with it are exchanged with Megatron
    """

    build: str | Callable[..., Any]
    weights: Callable[[Model], int]
    pair_flops: Callable[[Model], int]
    cached: Callable[[Model, int], float] | None = None
    widths: Callable[[Model, int], tuple[int, ...]] | None = None
    tp: bool = False
    cp: tuple[str, ...] = ()
    both_ways: bool = False
    grid: bool = False
    growth: AttentionGrowth | None = None
    theory: bool = False
    megatron: bool = False


def _grouped_weights(m: Model) -> int:
    return m.hidden_size * m.head_dim * 2 * (m.num_heads + m.num_kv_heads)


def _grouped_widths(m: Model, tp: int) -> tuple[int, ...]:
    """Of queries, and of keys and values, which are replicated where tp does not divide them."""
    return m.num_heads * m.head_dim // tp, (m.num_kv_heads // tp if m.num_kv_heads % tp == 0 else 1) * m.head_dim


GROUPED_GROWTH = AttentionGrowth(
    {
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
# softmax(q·kᵀ/√e)·v for each head, with fewer heads of keys and values where model.num_kv_heads says so.
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
)
ATTENTIONS: dict[str, AttentionRow] = {"grouped": GROUPED}


def attentions() -> Mapping[str, AttentionRow]:
    return with_plugins("attentions", ATTENTIONS, AttentionRow)
