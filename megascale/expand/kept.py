"""Maps of the attention of one layer that keeps some of its heads."""

from __future__ import annotations

from collections.abc import Mapping

from megascale.config.norms import NormGrowth
from megascale.config.schema import Model
from megascale.expand.attention import AttentionMaps, options_of
from megascale.expand.axes import AxisMap, axis, beside, same
from megascale.expand.heads import channel_rows
from megascale.expand.normed import kept_gain
from megascale.expand.said import growth_of


def grouped(source: Model, target: Model, query: list[int], key_value: list[int]) -> AttentionMaps:
    """Grouped-query attention that keeps these query heads and KV heads, with all their channels."""
    growth, head = growth_of(source), same(source.head_dim)
    queries = channel_rows(axis(query, source.num_heads), head)
    keys = channel_rows(axis(key_value, source.num_kv_heads), head)
    wide = source.qk_norm == "width"
    maps = AttentionMaps({"query": queries, "key": keys, "value": keys, "heads": queries})
    maps.axes |= options_of(source, axis(query, source.num_heads), head)
    maps.axes |= {"query_norm": queries if wide else head, "key_norm": keys if wide else head}
    maps.axes |= {"heads_gain": kept_gain(growth, queries), "heads_shift": queries}
    if source.qk_norm or source.residual_row.qk_norm:
        maps.eps["qk_norm"] = 1.0  # a head keeps all channels
    if source.residual_row.inner_norms and growth.power is not None:
        maps.eps["attention_inner_norm"] = source.num_heads / target.num_heads
    return maps


def latent(source: Model, target: Model, query: list[int], key_value: list[int], inside: Mapping[str, list[int]]) -> AttentionMaps:
    """Latent attention that keeps these heads, channels of the latents and channels of values. The rows that write a latent make up for
    what its norm divides by, as if the channels that go had been zero.
    """
    sizes = source.latent
    assert sizes is not None
    growth, heads, turned = growth_of(source), axis(query, source.num_heads), same(sizes.rope_dim)
    of_values = axis(inside["value_dim"], sizes.value_dim or source.head_dim)
    values, kv = channel_rows(heads, of_values), axis(inside["kv_rank"], sizes.kv_rank)
    maps = AttentionMaps({"latent": beside(_written(growth, kv), turned)})
    maps.axes |= {"latent_gain": kept_gain(growth, kv), "latent_shift": kv, "latent_read": kv}
    maps.axes |= {
        "query": channel_rows(heads, beside(same(source.head_dim), turned)),
        "key": channel_rows(heads, same(source.head_dim)),
        "value": values,
        "heads": values,
        **options_of(source, heads, of_values),
    }
    if sizes.query_rank is not None:
        own = axis(inside["query_rank"], sizes.query_rank)
        maps.axes |= {"query_latent": _written(growth, own), "query_latent_gain": kept_gain(growth, own)}
        maps.axes |= {"query_latent_shift": own, "query_source": own}
    maps.eps["latent_norm"] = 1.0
    return maps


def _written(growth: NormGrowth, kept: AxisMap) -> AxisMap:
    """Rows that write the kept channels of a latent, which a norm then divides by their size."""
    return kept.scaled(1 / growth.gain(kept.old / kept.size))
