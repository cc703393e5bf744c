"""The config of a smaller model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megascale.config.schema import Model
from megascale.errors import UsageError
from megascale.expand.inner import INNER_SIZES, inner_sizes, smaller_section
from megascale.expand.kinds import check_kinds, pattern_of, sizes_of_kind, with_kinds
from megascale.expand.options import Sizes
from megascale.expand.plan import refuse_unknown_parts
from megascale.expand.stack import PATTERNS

KEYS = ("num_heads", "num_kv_heads", "ffn_size")  # what a kind of layer has for itself


@dataclass(frozen=True)
class Smaller:
    """Sizes of the target; None: the source's.

    ffn_sizes  per target layer, prefixes of a MatFormer (Mix'n'Match)
    drop       numbers of layers that go; with num_layers those go that matter least, in whole patterns
    kinds      sizes that one kind of layer alone gets
    inner      sizes of the section of a kind of attention, by name: kv_rank, query_rank, value_dim, key_heads, value_heads, key_dim,
               conv_size
    """

    hidden_size: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    ffn_size: int | None = None
    num_layers: int | None = None
    ffn_sizes: tuple[int, ...] | None = None
    mtp_depth: int | None = None
    drop: tuple[int, ...] = ()
    kinds: Mapping[str, Sizes] = field(default_factory=dict)
    inner: Mapping[str, int] = field(default_factory=dict)


def smaller_model(source: Model, sizes: Smaller) -> Model:
    """The target's config. Raises UsageError for larger sizes, and for models that cannot shrink."""
    if source.family == "encoder_decoder":
        raise UsageError("model.family is encoder_decoder: shrinking is built for plain decoders and encoders")
    for key in ("moeut", "spacetime", "tokenformer", "ffn_sizes"):
        if getattr(source, key) is not None:
            raise UsageError(f"model.{key} is set: shrinking is built for plain decoders and encoders")
    refuse_unknown_parts(source)
    check_kinds(source, sizes.kinds)
    whole = {key: getattr(sizes, key) for key in ("hidden_size", "num_layers", "mtp_depth")}
    changes = {key: value for key, value in whole.items() if _falls(source, key, value)}
    if sizes.drop:
        changes |= _without(source, sizes)
    asked = Sizes(**{key: getattr(sizes, key) for key in KEYS}, **given_sizes(sizes.inner), kinds=sizes.kinds)
    lacking = [key for key in sizes.inner if not any(key in inner_sizes(own) for own in source.variants.values())]
    if lacking:
        raise UsageError(
            f"--{lacking[0].replace('_', '-')} is {sizes.inner[lacking[0]]}, but no attention of this model has it: leave it out"
        )
    variants = {
        kind: _smaller_block(own, sizes_of_kind(source, kind, asked)[0] if kind else asked, changes)
        for kind, own in source.variants.items()
        if not kind or any(kind in changes.get(key, getattr(source, key)) for key in PATTERNS)
    }
    base = source.model_copy(update=changes)
    if source.kinds:
        of_model = {key: min(getattr(asked, key) or getattr(source, key), getattr(source, key)) for key in KEYS}
        whole_inner = Sizes(**given_sizes({key: size for key, size in sizes.inner.items() if key in inner_sizes(source)}))
        base = base.model_copy(update=of_model | smaller_section(source, whole_inner))
        variants = {kind: own.model_copy(update={"hidden_size": base.hidden_size}) for kind, own in variants.items()}
    target = with_kinds(base, source, variants)
    return target.model_copy(update=_prefixes(source, target, sizes))


def given_sizes(inner: Mapping[str, int]) -> dict[str, Any]:
    """Sizes of attention by name, as fields of `Sizes`. Raises UsageError for other names."""
    unknown = [key for key in inner if key not in INNER_SIZES]
    if unknown:
        raise UsageError(f"{unknown[0]} is no size inside an attention: choose from {', '.join(INNER_SIZES)}")
    return dict(inner)


def _falls(source: Model, key: str, new: int | None) -> bool:
    """Whether a size changes. Raises UsageError for a larger one."""
    old = getattr(source, key)
    if new is not None and new > old:
        raise UsageError(f"--{key.replace('_', '-')} is {new} but the source has {old}: shrinking does not grow, megascale grow does")
    return new is not None and new < old


def _without(source: Model, sizes: Smaller) -> dict[str, Any]:
    """The depth without the layers that are named, and the pattern of those that stay."""
    if sizes.num_layers is not None:
        raise UsageError("--num-layers leaves the choice of layers to the data and --drop-layers names them: give one of the two")
    odd = [i for i in sizes.drop if not 0 <= i < source.num_layers]
    kept = [i for i in range(source.num_layers) if i not in sizes.drop]
    if odd or not kept:
        what = f"names layer {odd[0]}" if odd else "names all layers"
        raise UsageError(f"--drop-layers {what}, but the source has layers 0 to {source.num_layers - 1}: name some of them")
    return {"num_layers": len(kept), **(pattern_of([source.kind_at(i) for i in kept]) if source.kinds else {})}


def _smaller_block(source: Model, asked: Sizes, whole: Mapping[str, Any]) -> Model:
    """The config of one kind of layer."""
    if source.qk_norm == "width" and (asked.num_heads or asked.num_kv_heads):
        raise UsageError("model.qk_norm is width: fewer heads would move its statistics; shrink hidden_size, ffn_size or num_layers")
    changes: dict[str, Any] = {key: getattr(asked, key) for key in KEYS if _falls(source, key, getattr(asked, key))}
    if "num_heads" in changes and asked.num_kv_heads is None and source.num_kv_heads == source.num_heads:
        changes["num_kv_heads"] = changes["num_heads"]
    if source.moe is not None and ("ffn_size" in changes or (source.moe.every > 1 and "num_layers" in whole)):
        raise UsageError("model.moe is set: widths of experts and every n-th layer stay as they are; shrink hidden_size or heads")
    changes |= smaller_section(source, asked)
    heads, kv = changes.get("num_heads", source.num_heads), changes.get("num_kv_heads", source.num_kv_heads)
    if heads % kv or heads // kv > source.num_heads // source.num_kv_heads:
        raise UsageError(
            f"{heads} query heads over {kv} KV heads: each KV head keeps at most the {source.num_heads // source.num_kv_heads} it had"
        )
    return source.model_copy(update=changes)


def _prefixes(source: Model, target: Model, sizes: Smaller) -> dict[str, Any]:
    """The keys of a model that is cut out of a MatFormer."""
    changes: dict[str, Any] = {}
    if sizes.ffn_sizes is not None:
        if sizes.ffn_size is not None:
            raise UsageError("--ffn-size is one width for all layers and --ffn-sizes one for each: give one of the two")
        if source.matformer is None:
            raise UsageError("--ffn-sizes mixes prefixes that were trained together, but the source has no model.matformer: use --ffn-size")
        if len(sizes.ffn_sizes) != target.num_layers:
            raise UsageError(f"--ffn-sizes has {len(sizes.ffn_sizes)} widths but the target {target.num_layers} layers")
        changes["ffn_sizes"] = sizes.ffn_sizes
    if source.matformer is not None:
        wanted = sizes.ffn_sizes or ((sizes.ffn_size,) if sizes.ffn_size else ())
        untrained = [f for f in wanted if f not in source.nested_sizes]
        if untrained:
            raise UsageError(
                f"feed-forward width {untrained[0]} was not trained: model.matformer has {', '.join(map(str, source.nested_sizes))}"
            )
        if wanted:
            changes["matformer"] = None
    return changes


def turn_of(source: Model) -> int:
    """Layers that go together: a whole pattern."""
    return math.lcm(max(1, len(source.pattern)), *(m.moe.every for m in source.variants.values() if m.moe is not None))


def removable(source: Model) -> range:
    """First layers of the runs of `turn_of` layers that may go: any inside the repeated patterns, since the others still follow the pattern
    then, but never the first or the last block; what they do, no other does.
    """
    first = max(1, len(source.pattern_first))
    end = min(source.num_layers - 1, source.num_layers - len(source.pattern_last))
    return range(first, max(first, end - turn_of(source) + 1))


def cheapest_layers(source: Model, keep: int, without: list[float]) -> list[int]:
    """The layers that stay if those runs go whose losses `without` them, by their first layer, have the least sum."""
    turn, n = turn_of(source), source.num_layers
    times, rest = divmod(n - keep, turn)
    if rest:
        raise UsageError(
            f"--num-layers is {keep} but the source has {n}, in patterns of {turn} layers that go together: take off a multiple of {turn}, "
            "or name layers with --drop-layers"
        )
    # best[k]: the least sum of k runs among the layers so far, and their first layers
    none: tuple[float, tuple[int, ...]] = (math.inf, ())
    best: list[list[tuple[float, tuple[int, ...]]]] = [[(0.0, ()), *[none] * times]]
    for end in range(1, n + 1):
        row = list(best[-1])
        begin = end - turn
        if begin >= 0:
            for k in range(times):
                total = best[begin][k][0] + without[begin]
                if total < row[k + 1][0]:
                    row[k + 1] = (total, (*best[begin][k][1], begin))
        best.append(row)
    loss, begins = best[-1][times]
    if loss == math.inf:
        most = (len(removable(source)) + turn - 1) // turn * turn
        raise UsageError(f"--num-layers is {keep}: the first and the last block stay, choose at least {n - most}")
    gone = {i for begin in begins for i in range(begin, begin + turn)}
    return [i for i in range(n) if i not in gone]
