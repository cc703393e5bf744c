"""Sources of the query heads, KV heads and head channels of a grown attention.

g KV heads with m query heads each become g' with m'. A source group may spread over several target groups, whose slots its query heads fill
cyclically in order. So query heads are copied within their group, groups with all their query heads, and KV heads alone if m' < m. Tiling
query heads across groups would give them other keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megascale.config.norms import NormRow
from megascale.errors import UsageError
from megascale.expand.axes import FRESH, ZERO, AxisMap, axis, cancelling, inside, same, shared


@dataclass(frozen=True)
class Heads:
    """Maps over heads: `query` (rows), `key_value` (rows), and `out` (columns of the output product)."""

    query: AxisMap
    key_value: AxisMap
    out: AxisMap


def grow_heads(old: tuple[int, int], new: tuple[int, int], method: str, split: tuple[float, float], silent: bool) -> Heads:
    """(query heads, KV heads) → more of them. Raises UsageError if no map exists.

    method   duplicate: slots beyond the source's heads get copies that share its output; zero: new heads with zero output
    silent   a norm follows the heads, so new heads must not affect it: their values are zero
    """
    (h, g), (h2, g2) = old, new
    m, m2 = h // g, h2 // g2
    if g2 < g:
        raise UsageError(f"num_kv_heads grows from {g} to {g2}: choose at least {g}")
    spread = [g2 // g + (1 if j < g2 % g else 0) for j in range(g)]
    if min(spread) * m2 < m:
        raise UsageError(
            f"{h} query heads over {g} KV heads do not fit into {h2} over {g2}: each KV head would serve {m2} instead of {m}, and its "
            f"{min(spread)} copies only {min(spread) * m2} in all; choose num_heads of at least {g2 * -(-m // min(spread))}"
        )
    query, key_value, heard = [], [], []
    for j, groups in enumerate(spread):
        for slot in range(groups * m2):
            within = slot % m
            known = method == "duplicate" or slot < m
            query.append(j * m + within if known else FRESH)
            heard.append(j * m + within if known else (FRESH if silent else ZERO))
        for copy in range(groups):
            used = method == "duplicate" or copy * m2 < m
            key_value.append(j if used else (ZERO if silent else FRESH))
    if (
        silent and method == "zero" and any(key_value[i // m2] >= 0 and query[i] < 0 for i in range(len(query)))
    ):  # a new head in an old group has its values and would affect the norm
        raise UsageError(
            f"num_heads grows from {h} to {h2} with {g2} KV heads under inner norms: a new query head would bring its KV head's values "
            "into the norm; duplicate a whole number of times, or add KV heads with their query heads"
        )
    return Heads(axis(query, h), axis(key_value, g), shared(axis(heard, h), split))


def cancelling_heads(heads: Heads, query_heads: int, kv_heads: int) -> Heads:
    """Pairs of heads whose outputs cancel: within each KV head's group if it has several, else pairs of KV heads with their query head."""
    group = query_heads // kv_heads
    if group == 1:
        query, out = cancelling(heads.query)
        key_value, _ = cancelling(heads.key_value)
        return Heads(query, key_value, out)
    rows, outs = [], []
    for j in range(kv_heads):
        part = slice(j * group, (j + 1) * group)
        row, out = cancelling(AxisMap(heads.query.source[part], heads.query.weight[part], heads.query.old))
        rows.append(row)
        outs.append(out)
    return Heads(_joined(rows), heads.key_value, _joined(outs))


def _joined(parts: list[AxisMap]) -> AxisMap:
    return AxisMap(np.concatenate([p.source for p in parts]), np.concatenate([p.weight for p in parts]), parts[0].old)


@dataclass(frozen=True)
class Channels:
    """Maps over the channels of one head: rows of queries, keys and values, columns of the output product, and norms of queries and keys.
    `exponents` of the rotary pairs if they changed; `dead`: why some channels never get a gradient.
    """

    query: AxisMap
    key: AxisMap
    value: AxisMap
    out: AxisMap
    query_norm: AxisMap
    key_norm: AxisMap
    norm_eps_factor: float = 1.0
    exponents: tuple[float, ...] | None = None
    dead: str | None = None


@dataclass(frozen=True)
class Turned:
    """The channels of a head that rotate, its first ones: their number before and after, the exponents of their pairs (None: 2i/old), and
    whether the two channels of a pair are neighbours or half of them apart.
    """

    old: int
    new: int
    exponents: tuple[float, ...] | None = None
    interleaved: bool = False


NOTHING_TURNS = Turned(0, 0)


def grow_channels(old: int, new: int, norm: NormRow | None, turned: Turned, silent: bool, own_scale: bool = False) -> Channels:
    """A head of `old` channels → `new`. Raises UsageError if no map is exact.

    norm       norm of queries and keys, if any
    own_scale  the factor on scores is a number of its own instead of 1/√channels
    """
    plain = same(old)
    if new == old:
        return Channels(plain, plain, plain, plain, plain, plain, 1.0, turned.exponents)
    if new < old or turned.new % 2:
        raise UsageError(f"head_dim grows from {old} to {new}: choose {'an even number of ' if turned.new else ''}at least {old}")
    ratio, value = new / old, axis([*range(old), *[ZERO if silent else FRESH] * (new - old)], old)
    smaller = 0.0 if own_scale else 0.5  # the power of the ratio by which the factor on scores falls
    out = value.filled(FRESH if silent else ZERO)
    power = None if norm is None or norm.growth is None else norm.growth.power
    copied = power is not None and new % old == 0
    place, turns = _places(old, new, turned, copied)
    if copied:
        # Repeated channels with the same frequencies keep the norm's statistics; the product is a sum over all copies.
        both = axis(place, old)
        gain = both.scaled(ratio ** (smaller - 1))
        return Channels(both, both, value, out, gain, both, 1.0, turns)
    where = axis(place, old)
    if norm is None:
        return Channels(where, where.filled(ZERO).scaled(ratio**smaller), value, out, plain, plain, 1.0, turns)
    if power is None:
        # Without statistics new query channels may be nonzero at once; the keys' stay zero through the norm.
        quiet = where.filled(ZERO)
        return Channels(where, quiet, value, out, where, where.scaled(ratio**smaller), 1.0, turns)
    if norm.centres or norm.bias:
        raise UsageError(
            f"head_dim grows from {old} to {new} under QK-norm: new channels would move its {'mean' if norm.centres else 'bias'}; choose a "
            f"multiple of {old}"
        )
    # With added zeros both norms return ratio^(1/power) times as much.
    shrink = ratio ** (smaller - 2 / power)
    quiet = where.filled(ZERO)
    dead = f"new query and key channels next to {old} normalized ones are zero on both sides: a multiple of {old} would train"
    return Channels(quiet, quiet, value, out, where.scaled(shrink), where, (ratio ** (-1 / power)) ** power, turns, dead)


def _places(old: int, new: int, turned: Turned, copied: bool) -> tuple[list[int], tuple[float, ...] | None]:
    """Source channel of every target channel (FRESH: new), and the pairs' exponents if 2i/new would not keep the old ones."""
    first, turns = turned_places(turned, copied)
    still, still2 = old - turned.old, new - turned.new
    return [*first, *(turned.old + i % still if still and (copied or i < still) else FRESH for i in range(still2))], turns


def turned_places(turned: Turned, copied: bool = False) -> tuple[list[int], tuple[float, ...] | None]:
    """The same of the channels that rotate. `copied`: the new ones turn as the old ones do."""
    old, new = turned.old, turned.new
    if not old:
        return [], None
    half, half2 = old // 2, new // 2
    was = turned.exponents or tuple(2 * i / old for i in range(half))
    if copied:
        pair = [p % half for p in range(half2)]
        turns: tuple[float, ...] | None = tuple(was[p] for p in pair)
    elif new % old == 0 and turned.exponents is None:
        # Old pair i becomes pair ratio·i, which has the same frequency.
        step = new // old
        pair, turns = [p // step if p % step == 0 else FRESH for p in range(half2)], None
    else:
        pair = [p if p < half else FRESH for p in range(half2)]
        turns = tuple(was[p] if p < half else (p - half) / (half2 - half) for p in range(half2))
    if turned.interleaved:
        return [c for p in pair for c in ((2 * p, 2 * p + 1) if p >= 0 else (FRESH, FRESH))], turns
    return [*pair, *(p + half if p >= 0 else FRESH for p in pair)], turns


def channel_rows(heads: AxisMap, channels: AxisMap) -> AxisMap:
    """The map of [heads·channels]."""
    return inside(heads, channels)


def magnitude(channels: AxisMap) -> AxisMap:
    """The same map without signs."""
    return AxisMap(channels.source, abs(channels.weight), channels.old, channels.shared)
