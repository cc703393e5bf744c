"""Maps of linear attention by the gated delta rule: its heads, their channels and the convolution."""

from __future__ import annotations

from collections.abc import Mapping

from megascale.config.schema import Delta, Model
from megascale.errors import UsageError
from megascale.expand.attention import AttentionMaps
from megascale.expand.axes import FRESH, ZERO, AxisMap, axis, repeated, shared
from megascale.expand.heads import Heads, cancelling_heads, channel_rows, grow_heads, magnitude
from megascale.expand.options import GrowthOptions


def grow(source: Model, target: Model, options: GrowthOptions, read: AxisMap) -> AttentionMaps:
    """More heads, channels and tokens of the convolution. Queries and keys are divided by their length, to which copies would add, so that
    new channels are zero in both. The norm over a head's values divides by their mean square, and its input falls with √key_dim.
    """
    was, now = _delta_of(source), _delta_of(target)
    try:
        heads = grow_heads((was.value_heads, was.key_heads), (now.value_heads, now.key_heads), options.heads, options.split, False)
    except UsageError as error:
        raise UsageError(f"value_heads and key_heads of model.delta are as query heads and KV heads: {error}") from None
    copies = now.value_dim // was.value_dim if options.width == "duplicate" else 1
    share = copies * was.value_dim / now.value_dim
    values = repeated(was.value_dim, now.value_dim, copies, ZERO)
    keys = axis([*range(was.key_dim), *[ZERO] * (now.key_dim - was.key_dim)], was.key_dim)
    earlier = now.conv_size - was.conv_size
    taps = axis([*[ZERO] * earlier, *range(was.conv_size)], was.conv_size)
    maps = AttentionMaps(_axes(heads, keys, values, shared(values.filled(FRESH), options.split), taps))
    maps.axes["head_gain"] = values.filled(FRESH).scaled(share**0.5)
    maps.eps["delta_norm"] = share * was.key_dim / now.key_dim
    paired = cancelling_heads(heads, now.value_heads, now.key_heads)
    maps.pairs = _axes(paired, keys, values, magnitude(shared(values.filled(FRESH), options.split)), taps)
    if now.key_dim != was.key_dim:
        maps.dead.append(f"new channels next to {was.key_dim} of queries and keys that are divided by their length are zero on both sides")
    return maps


def _axes(heads: Heads, keys: AxisMap, values: AxisMap, out: AxisMap, taps: AxisMap) -> dict[str, AxisMap]:
    """By the names of the row. Where a channel is zero, its taps and its gate may start anyhow."""
    return {
        "delta_keys": channel_rows(heads.key_value, keys),
        "delta_key_taps": channel_rows(heads.key_value, keys.filled(FRESH)),
        "delta_values": channel_rows(heads.query, values),
        "delta_gate": channel_rows(heads.query, values.filled(FRESH)),
        "delta_heads": heads.query,
        "heads": channel_rows(heads.out, out),
        "taps": taps,
    }


def cut(source: Model, target: Model, query: list[int], key_value: list[int], inside: Mapping[str, list[int]]) -> AttentionMaps:
    """Heads, channels and taps that stay, as `inside` says: num_heads and num_kv_heads are not its heads. What a head reads falls with
    √key_dim, and the norm over its values divides by their mean square, as if those that go had been zero.
    """
    was = _delta_of(source)
    keys, values = axis(inside["key_dim"], was.key_dim), axis(inside["value_dim"], was.value_dim)
    heads, taps = axis(inside["value_heads"], was.value_heads), axis(inside["conv_size"], was.conv_size)
    kept = Heads(heads, axis(inside["key_heads"], was.key_heads), heads)
    share = values.old / values.size
    maps = AttentionMaps({**_axes(kept, keys, values, values, taps), "head_gain": values.scaled(share**0.5)})
    maps.eps["delta_norm"] = share * keys.old / keys.size
    return maps


def _delta_of(model: Model) -> Delta:
    assert model.delta is not None
    return model.delta
