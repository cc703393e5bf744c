"""Maps of the attention of one layer that keeps some of its heads."""

from __future__ import annotations

from megascale.config.schema import Model
from megascale.expand.attention import AttentionMaps, options_of
from megascale.expand.axes import axis, beside, same
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


def latent(source: Model, target: Model, query: list[int], key_value: list[int]) -> AttentionMaps:
    """Latent attention that keeps these heads; the latents and the channels stay."""
    sizes = source.latent
    assert sizes is not None
    heads = axis(query, source.num_heads)
    kv, turned = same(sizes.kv_rank), same(sizes.rope_dim)
    own = same(sizes.query_rank or source.hidden_size)
    values = channel_rows(heads, same(sizes.value_dim or source.head_dim))
    maps = AttentionMaps({"latent": beside(kv, turned), "latent_gain": kv, "latent_shift": kv, "latent_read": kv})
    maps.axes |= {
        "query": channel_rows(heads, beside(same(source.head_dim), turned)),
        "key": channel_rows(heads, same(source.head_dim)),
        "value": values,
        "heads": values,
        **options_of(source, heads, same(sizes.value_dim or source.head_dim)),
    }
    if sizes.query_rank is not None:
        maps.axes |= {"query_latent": own, "query_latent_gain": own, "query_latent_shift": own, "query_source": own}
    maps.eps["latent_norm"] = 1.0
    return maps
