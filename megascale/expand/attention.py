"""Maps of the attention of one kind of layer: for each axis that its row names (config/attentions.py), how it grows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from megascale.config.schema import Latent, Model
from megascale.errors import UsageError
from megascale.expand.axes import FRESH, ZERO, AxisMap, axis, beside, inside
from megascale.expand.heads import (
    NOTHING_TURNS,
    Heads,
    Turned,
    cancelling_heads,
    channel_rows,
    grow_channels,
    grow_heads,
    magnitude,
    turned_places,
)
from megascale.expand.normed import Normed, grow_latent, inner_norm
from megascale.expand.options import GrowthOptions
from megascale.model.position import alibi_slopes


@dataclass
class AttentionMaps:
    """axes     by name
    pairs    the axes of layers whose outputs cancel, where they differ
    changes  of the config of these layers
    eps      factors on epsilons, by norm
    lossy    what cannot be exact and why; `dead`: what never gets a gradient
    """

    axes: dict[str, AxisMap]
    pairs: dict[str, AxisMap] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    eps: dict[str, float] = field(default_factory=dict)
    lossy: list[str] = field(default_factory=list)
    dead: list[str] = field(default_factory=list)


def grouped(source: Model, target: Model, options: GrowthOptions, read: AxisMap) -> AttentionMaps:
    """Grouped-query attention. `read`: the map of the columns that read the stream."""
    silent, wide = source.residual_row.inner_norms, source.qk_norm == "width"
    normed = bool(source.qk_norm or source.residual_row.qk_norm)
    old, new = (source.num_heads, source.num_kv_heads), (target.num_heads, target.num_kv_heads)
    heads = grow_heads(old, new, options.heads, options.split, silent)
    maps = AttentionMaps({})
    turned = NOTHING_TURNS
    if target.head_dim != source.head_dim:
        _check_head_size(source, target.head_dim)
        turned = _turned(maps, source, target.head_dim)
    norm = source.norm_row if normed and not wide else None
    channels = grow_channels(source.head_dim, target.head_dim, norm, turned, silent, source.attention_scale is not None)
    if channels.dead:
        maps.dead.append(channels.dead)
    if target.head_dim != source.head_dim:
        maps.changes["rope_exponents"] = channels.exponents
    if normed:
        maps.eps["qk_norm"] = channels.norm_eps_factor
    maps.axes |= {
        "query": channel_rows(heads.query, channels.query),
        "key": channel_rows(heads.key_value, channels.key),
        "value": channel_rows(heads.key_value, channels.value),
        "heads": channel_rows(heads.out, channels.out),
        "query_norm": channels.query_norm,
        "key_norm": channels.key_norm,
        **options_of(source, heads.query, channels.value),
    }
    if wide:
        for name, of_heads in (("query", heads.query), ("key", heads.key_value)):
            whole = channel_rows(of_heads, channels.query).filled(FRESH)
            if whole.uniform_copies is None or not whole.known.all():
                maps.lossy.append(
                    f"{name} heads {of_heads.old} → {of_heads.size} under qk_norm width: its statistics would move; choose a multiple"
                )
            maps.axes[f"{name}_norm"] = whole
    if silent:
        inner = inner_norm("heads", channel_rows(heads.query, channels.value), source)
        maps.axes |= {"heads_gain": inner.gain, "heads_shift": inner.shift}
        maps.eps["attention_inner_norm"] = inner.eps
        maps.lossy += [inner.lossy] if inner.lossy else []
    paired = cancelling_heads(heads, *new)
    maps.pairs = {
        "query": channel_rows(paired.query, channels.query),
        "key": channel_rows(paired.key_value, channels.key),
        "value": channel_rows(paired.key_value, channels.value),
        "heads": inside(paired.out, magnitude(channels.out)),
        **options_of(source, paired.query, channels.value),
    }
    if silent:
        whole = channel_rows(paired.query, channels.value).filled(FRESH)
        maps.pairs |= {"heads_gain": whole, "heads_shift": whole}
    _slopes(maps, source, heads)
    return maps


def options_of(model: Model, heads: AxisMap, values: AxisMap) -> dict[str, AxisMap]:
    """Sinks, which every query head keeps, and the gate on its result, or on each channel of that."""
    return {"sinks": heads, "gated": channel_rows(heads, values.filled(FRESH)) if model.attention_gate == "channel" else heads}


def _turned(maps: AttentionMaps, source: Model, size: int) -> Turned:
    """The channels that rotate in heads of another size. A share of them rotates before and after, as nearly as whole pairs allow."""
    old = source.rotary_dim
    if not source.position_row.rotates:
        return NOTHING_TURNS
    if source.rope_fraction == 1.0:
        return Turned(old, size, source.rope_exponents, source.rope_interleaved)
    new = old * size // source.head_dim if old * size % (2 * source.head_dim) == 0 else old
    share = new / size
    maps.changes["rope_fraction"] = share if int(size * share) == new else math.nextafter(share, 1.0)
    return Turned(old, new, source.rope_exponents, source.rope_interleaved)


def _slopes(maps: AttentionMaps, source: Model, heads: Heads) -> None:
    """Under ALiBi every head keeps its slope."""
    if not source.position_row.slopes or heads.query.size == heads.query.old:
        return
    slopes = source.alibi_slopes or alibi_slopes(heads.query.old)
    fresh = alibi_slopes(heads.query.size)
    maps.changes["alibi_slopes"] = tuple(slopes[s] if s >= 0 else fresh[i] for i, s in enumerate(heads.query.source.tolist()))


def _check_head_size(source: Model, new: int) -> None:
    """Raises UsageError for heads whose size enters something that does not grow with it."""
    if source.qk_norm == "width":
        raise UsageError(
            f"--head-dim is {new} and model.qk_norm is width: new channels would move the norm over all heads; grow num_heads instead"
        )
    if source.rope_scaling is not None and source.rope_scaling.type == "yarn":
        raise UsageError(f"--head-dim is {new} and model.rope_scaling is yarn, whose ramp counts channels; grow num_heads instead")


def latent(source: Model, target: Model, options: GrowthOptions, read: AxisMap) -> AttentionMaps:
    """Multi-head latent attention: heads, their channels for content, position and values, and the latents."""
    was, now = _latent_of(source), _latent_of(target)
    of_values, of_values2 = was.value_dim or source.head_dim, now.value_dim or target.head_dim
    old, new = (source.num_heads, source.num_heads), (target.num_heads, target.num_heads)
    heads = grow_heads(old, new, options.heads, options.split, False)
    maps = AttentionMaps({})
    content = _more(source.head_dim, target.head_dim, "head_dim")
    values = _more(of_values, of_values2, "value_dim")
    turned = _turned_latent(maps, source, was.rope_dim, now.rope_dim)
    # Scores are divided by √channels of content and position together, unless the factor is a number of its own.
    size, size2 = source.head_dim + was.rope_dim, target.head_dim + now.rope_dim
    query = beside(content, turned)
    if source.attention_scale is None and size != size2:
        query = query.scaled((size2 / size) ** 0.5)
    keys, out = content.filled(ZERO), values.filled(ZERO)
    of_kv = grow_latent(was.kv_rank, now.kv_rank, source, options, "kv_rank")
    maps.axes |= {
        "query": channel_rows(heads.query, query),
        "key": channel_rows(heads.key_value, keys),
        "value": channel_rows(heads.key_value, values),
        "heads": channel_rows(heads.out, out),
        "latent": beside(of_kv.rows, turned.filled(ZERO)),
        **_of_latent("latent", of_kv),
        **options_of(source, heads.query, values),
        "query_source": read,
    }
    maps.eps["latent_norm"] = 1.0  # the products that write the latents make up for it
    maps.lossy += [of_kv.lossy] if of_kv.lossy else []
    if was.query_rank is not None and now.query_rank is not None:
        of_query = grow_latent(was.query_rank, now.query_rank, source, options, "query_rank")
        maps.axes |= {"query_latent": of_query.rows, **_of_latent("query_latent", of_query), "query_source": of_query.read}
        maps.lossy += [of_query.lossy] if of_query.lossy else []
    paired = cancelling_heads(heads, *new)
    maps.pairs = {
        "query": channel_rows(paired.query, query),
        "key": channel_rows(paired.key_value, keys),
        "value": channel_rows(paired.key_value, values),
        "heads": inside(paired.out, magnitude(out)),
        **options_of(source, paired.query, values),
    }
    _slopes(maps, source, heads)
    return maps


def _latent_of(model: Model) -> Latent:
    assert model.latent is not None
    return model.latent


def _of_latent(name: str, normed: Normed) -> dict[str, AxisMap]:
    return {f"{name}_gain": normed.gain, f"{name}_shift": normed.shift, f"{name}_read": normed.read}


def _more(old: int, new: int, what: str) -> AxisMap:
    """The old channels, then new ones."""
    if new < old:
        raise UsageError(f"{what} grows from {old} to {new}: choose at least {old}")
    return axis([*range(old), *[FRESH] * (new - old)], old)


def _turned_latent(maps: AttentionMaps, source: Model, old: int, new: int) -> AxisMap:
    """The channels that hold the position: pairs that rotate, if positions do."""
    if new == old or not source.position_row.rotates:
        return _more(old, new, "rope_dim")
    if new < old or new % 2:
        raise UsageError(f"rope_dim grows from {old} to {new}: choose an even number of at least {old}")
    if source.rope_scaling is not None and source.rope_scaling.type == "yarn":
        raise UsageError(f"--rope-dim is {new} and model.rope_scaling is yarn, whose ramp counts channels; grow head_dim instead")
    places, maps.changes["rope_exponents"] = turned_places(Turned(old, new, source.rope_exponents, source.rope_interleaved))
    return axis(places, old)
