"""Models whose layers differ: the sizes of each kind, the config that says them, and the shortest pattern of a list of layers."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from megascale.config.schema import Model, Moe
from megascale.config.schema.kinds import KEYS, Kind, MoeOfKind
from megascale.config.schema.model_parts import Given
from megascale.errors import UsageError
from megascale.expand.options import DELTA_SIZES, KIND_SIZES, LATENT_SIZES, Sizes, target_model

# Where the config has a size, if not as `model.SIZE`.
PLACES = {
    "expert_ffn_size": ("moe", "ffn_size"),
    "experts": ("moe", "num_experts"),
    "granularity": ("moe", "num_experts"),
    "top_k": ("moe", "top_k"),
}
Patterned = dict[str, tuple[str, ...]]  # pattern_first, pattern and pattern_last


def target_kinds(source: Model, sizes: Sizes, router: str) -> tuple[Model, dict[str, Model], dict[str, int], list[str]]:
    """The target's config, the same of each kind, the parts that each kind's experts are cut into, and notes on kinds that stay."""
    check_kinds(source, sizes.kinds)
    if not source.kinds:
        target = target_model(source, sizes, router)
        return target, {"": target}, {"": sizes.granularity}, []
    base = source.model_copy(update={"kinds": {}, "pattern": (), "pattern_first": (), "pattern_last": ()})
    absent: dict[str, Any] = {key: None for key in (*LATENT_SIZES, *DELTA_SIZES) if not _has_size(base, key)}
    of_model = replace(sizes, **absent)
    if base.moe is None and sizes.experts is None:  # sizes of experts are then those of kinds
        of_model = replace(of_model, top_k=None, granularity=1, expert_ffn_size=None)
    target = target_model(base, of_model, router)
    variants, parts, stay = {}, {}, {}
    for name, own in source.variants.items():
        asked, stay[name] = sizes_of_kind(source, name, sizes)
        try:
            variants[name] = target_model(own, asked, router)
        except UsageError as error:
            raise UsageError(f"kinds.{name}: {error}") from None
        parts[name] = asked.granularity
    for key in KIND_SIZES:
        if _is_given(sizes, key) and not any(_has_size(own, key) for own in source.variants.values()):
            raise UsageError(
                f"{key} is {getattr(sizes, key)}, but no kind of layer has it: {', '.join(source.kinds)} are of other attention"
            )
        if all(key in kept for kept in stay.values()):
            raise UsageError(
                f"{key} is {getattr(sizes, key)}, but every kind of layer has its own: give kinds.NAME.{key}=N, NAME one of "
                f"{', '.join(source.kinds)}"
            )
    notes = [f"kinds.{name} keeps its own {key}: kinds.{name}.{key}=N grows it" for name, kept in stay.items() for key in kept]
    whole = target.model_copy(update={key: getattr(source, key) for key in ("kinds", "pattern", "pattern_first", "pattern_last")})
    return with_kinds(whole, source, variants), variants, parts, notes


def check_kinds(source: Model, kinds: Iterable[str]) -> None:
    """Raises UsageError for a kind that the model does not have."""
    for name in kinds:
        if name not in source.kinds:
            near = difflib.get_close_matches(name, source.kinds, 1, 0.6)
            known = f"its kinds are {', '.join(source.kinds)}" if source.kinds else "the model has no kinds"
            raise UsageError(f"kinds.{name} is named, but {known}{f'; did you mean {near[0]}?' if near else ''}")


def sizes_of_kind(source: Model, name: str, sizes: Sizes) -> tuple[Sizes, list[str]]:
    """The sizes that are asked of one kind, and the given ones that it does not follow, since it has its own in the source."""
    own = sizes.kinds.get(name, Sizes())
    asked, kept = {}, []
    for key in KIND_SIZES:
        if _is_given(own, key):
            asked[key] = getattr(own, key)
        elif _is_given(sizes, key) and _has_size(source.variants[name], key):
            if _has_own(source, name, key):
                kept.append(key)
            else:
                asked[key] = getattr(sizes, key)
    whole = {f.name: getattr(sizes, f.name) for f in fields(Sizes) if f.name not in (*KIND_SIZES, "kinds")}
    return Sizes(**whole, **asked), kept


def _is_given(sizes: Sizes, key: str) -> bool:
    return getattr(sizes, key) not in ((None, 1) if key == "granularity" else (None,))


def _has_size(model: Model, key: str) -> bool:
    """Whether a model's attention has a size; others every model has."""
    sections = {"latent": LATENT_SIZES, "delta": DELTA_SIZES}
    owners = [section for section, keys in sections.items() if key in keys]
    return not owners or any(getattr(model, section) is not None for section in owners)


def _has_own(source: Model, name: str, key: str) -> bool:
    """Whether a kind says this size, so that the model's does not reach it. Sizes of a kind of attention reach all layers that have it."""
    kind = source.kinds[name]
    section, field = PLACES.get(key, (key, None))
    if section not in kind.model_fields_set:
        return False
    inner = getattr(kind, section)
    return field is None or inner is None or source.moe is None or field in inner.model_fields_set


def with_kinds(target: Model, source: Model, variants: Mapping[str, Model]) -> Model:
    """`target` with the kinds whose configs are `variants`; each says what `source` has it say, and what differs from the target. Without
    kinds, with the keys of the only variant.
    """
    if not source.kinds:
        return target.model_copy(update={key: getattr(variants[""], key) for key in (*KEYS, "moe")})
    kinds = {}
    for name, own in variants.items():
        before = source.kinds[name]
        given = {key: getattr(own, key) for key in KEYS if key in before.model_fields_set or getattr(own, key) != getattr(target, key)}
        moe = _moe_of_kind(target.moe, own.moe, before)
        kinds[name] = Kind(**given, **moe)
    return target.model_copy(update={"kinds": kinds})


def _moe_of_kind(model: Moe | None, own: Moe | None, before: Given) -> dict[str, Any]:
    """What a kind says of experts: nothing if they are the model's."""
    said = "moe" in before.model_fields_set
    if own is None:
        return {"moe": None} if said or model is not None else {}
    of_kind = getattr(before, "moe", None)
    known = of_kind.model_fields_set if of_kind is not None else set()
    base = model or Moe()
    given = {key: getattr(own, key) for key in Moe.model_fields if key in known or getattr(own, key) != getattr(base, key)}
    return {"moe": MoeOfKind(**given)} if given or said or model is None else {}


def pattern_of(names: Sequence[str]) -> Patterned:
    """The shortest pattern_first, pattern and pattern_last of layers of these kinds; of equally short ones the shortest pattern, and the
    one that begins first.
    """
    n = len(names)
    best, found = n, (0, n, 0)  # names in all; where the pattern begins, its length (n: none repeats) and its repetitions
    for turn in range(1, n // 2 + 1):
        begin = 0
        for i in range(turn, n + 1):
            if i < n and names[i] == names[i - turn]:
                continue
            times = (i - begin) // turn
            if times > 1 and n - turn * (times - 1) < best:
                best, found = n - turn * (times - 1), (begin, turn, times)
            begin = i - turn + 1
    begin, turn, times = found
    if times == 0:
        return {"pattern_first": (), "pattern": tuple(names), "pattern_last": ()}
    end = begin + turn * times
    return {
        "pattern_first": tuple(names[:begin]),
        "pattern": tuple(names[begin : begin + turn]),
        "pattern_last": tuple(names[end:]),
    }
