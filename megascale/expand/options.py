"""Options of a growth: new sizes, and how each axis is filled."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megascale.config.routers import routers
from megascale.config.schema import Model
from megascale.errors import UsageError


@dataclass(frozen=True)
class Sizes:
    """Sizes of the target; None: the source's. `seq_len` is the context; `experts` counts experts as wide as the source's (or its dense
    feed-forward), each cut into `granularity` finer ones. `kinds`: sizes that one kind of layer alone gets, and its number of layers.
    """

    hidden_size: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    ffn_size: int | None = None
    expert_ffn_size: int | None = None
    num_layers: int | None = None
    experts: int | None = None
    top_k: int | None = None
    granularity: int = 1
    vocab_size: int | None = None
    seq_len: int | None = None
    tokenformer_size: int | None = None
    kv_rank: int | None = None
    query_rank: int | None = None
    rope_dim: int | None = None
    value_dim: int | None = None
    key_heads: int | None = None
    value_heads: int | None = None
    key_dim: int | None = None
    conv_size: int | None = None
    mtp_depth: int | None = None
    kinds: Mapping[str, Sizes] = field(default_factory=dict)


# Sizes that a kind of layer may have for itself; its `num_layers` counts layers of that kind.
KIND_SIZES = (
    "num_heads", "num_kv_heads", "head_dim", "ffn_size", "expert_ffn_size", "experts", "top_k", "granularity", "kv_rank", "query_rank",
    "rope_dim", "value_dim", "key_heads", "value_heads", "key_dim", "conv_size",
)  # fmt: skip
# Those of the sections of kinds of attention; `value_dim` is of either.
LATENT_SIZES = ("kv_rank", "query_rank", "rope_dim", "value_dim")
DELTA_SIZES = ("key_heads", "value_heads", "key_dim", "value_dim", "conv_size")


@dataclass(frozen=True)
class GrowthOptions:
    """How to grow. Every field is a flag of `megascale grow`.

    width      new channels of the stream: duplicate (a remainder as the norm allows), zero, or average (the mean of the others)
    ffn, heads duplicate: copies that share their output; zero: new ones with zero output
    symmetry   what makes copies differ without changing the function: project (a projection of fresh values), snr:DB, or none
    split      shares of the first and of each other copy
    lossless   require: refuse everything that cannot be exact; prefer: refuse what has an exact alternative; off: refuse nothing
    """

    width: str = "duplicate"
    ffn: str = "duplicate"
    heads: str = "duplicate"
    depth: str = "identity"
    placement: str = "spread"
    symmetry: str = "project"
    split: tuple[float, float] = (1.0, 1.0)
    optimizer: str = "drop"
    router: str = "topk_softmax"
    vocabulary: tuple[int | None, ...] | None = None  # the old id of every new id
    enable_vocabulary: bool = False
    lossless: str = "prefer"
    seed: int = 1234


CHOICES = {
    "width": ("duplicate", "zero", "average"),
    "ffn": ("duplicate", "zero"),
    "heads": ("duplicate", "zero"),
    "depth": ("identity", "cancel", "stack", "dus", "interleave", "inject"),
    "placement": ("spread", "end"),
    "optimizer": ("transform", "reset", "drop"),
    "lossless": ("require", "prefer", "off"),
}


METHODS = ("width", "ffn", "heads", "depth")  # their flags end in -method
MOST_TIMES = 4096
MOST_AHEAD = 3  # modules of multi-token prediction
LARGEST_RATIO = 60  # dB: beyond it, noise above the weights leaves few of their digits, and noise below them vanishes


def check_options(options: GrowthOptions) -> GrowthOptions:
    """Raises UsageError naming the flag, its value and the choices."""
    for name, choices in {**CHOICES, "router": tuple(routers())}.items():
        value = getattr(options, name)
        if value not in choices:
            flag = f"{name}-method" if name in METHODS else name
            raise UsageError(f"--{flag} is {value}: choose one of {', '.join(choices)}")
    if options.symmetry not in ("project", "none"):
        if not re.fullmatch(r"snr:-?\d+(\.\d+)?", options.symmetry):
            raise UsageError(f"--symmetry is {options.symmetry}: choose project, none, or snr:DB such as snr:20")
        if abs(float(options.symmetry.removeprefix("snr:"))) > LARGEST_RATIO:
            raise UsageError(f"--symmetry is {options.symmetry}: choose a ratio of at most {LARGEST_RATIO} dB either way, such as snr:20")
    if not all(0 < part < math.inf for part in options.split):
        raise UsageError(f"--split is {options.split[0]:g}:{options.split[1]:g}: both parts must be finite and above zero")
    return options


def parse_split(text: str) -> tuple[float, float]:
    """`A:B` → its two numbers."""
    try:
        first, second = (float(part) for part in text.split(":"))
    except ValueError:
        raise UsageError(f"--split is {text!r}: write two parts such as 1:1 or 3:1") from None
    return first, second


def target_model(source: Model, sizes: Sizes, router: str) -> Model:
    """The source's config at the new sizes. Raises UsageError for sizes that shrink or that the config refuses."""
    changes: dict[str, Any] = {}
    for key in ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_size", "num_layers", "vocab_size", "mtp_depth"):
        old, new = getattr(source, key), getattr(sizes, key)
        if new is None or new == old:
            continue
        if old is None:
            raise UsageError(f"--{key.replace('_', '-')} is {new} but this model has no {key}")
        if new < old:
            by_shrinking = "" if key in ("head_dim", "vocab_size") else ", megascale shrink does"
            raise UsageError(f"--{key.replace('_', '-')} is {new} but the source has {old}: growth does not shrink{by_shrinking}")
        check_times(f"--{key.replace('_', '-')}", max(old, 1), new)
        changes[key] = new
    if changes.get("mtp_depth", 0) > MOST_AHEAD:
        raise UsageError(f"--mtp-depth is {changes['mtp_depth']}: multi-token prediction looks at most {MOST_AHEAD} tokens further")
    if "num_heads" in changes and sizes.num_kv_heads is None and source.num_kv_heads == source.num_heads:
        changes["num_kv_heads"] = changes["num_heads"]  # every query head keeps its own KV head
    moe = _target_experts(source, sizes, router, changes)
    if moe is not None:
        changes["moe"] = moe
    if any(getattr(sizes, key) is not None for key in (*LATENT_SIZES, *DELTA_SIZES)):
        changes |= _target_section(source, sizes)
    if sizes.tokenformer_size is not None:
        changes |= _target_tokens(source, sizes.tokenformer_size)
    return source.model_copy(update=changes)


def check_times(flag: str, old: int, new: int) -> None:
    """Raises UsageError for an implausible size, whose maps alone would fill the memory."""
    if new > MOST_TIMES * old:
        raise UsageError(f"{flag} is {new} but the source has {old}: more than {MOST_TIMES} times as much is implausible, check the number")


def _target_section(source: Model, sizes: Sizes) -> dict[str, Any]:
    """The larger section of a kind of attention."""
    name, known = ("delta", DELTA_SIZES) if source.delta is not None else ("latent", LATENT_SIZES)
    old, changes = getattr(source, name), {}
    for key in dict.fromkeys((*LATENT_SIZES, *DELTA_SIZES)):
        new, flag = getattr(sizes, key), f"--{key.replace('_', '-')}"
        if new is None:
            continue
        if old is None or key not in known:
            owners = [row for row, keys in (("latent", LATENT_SIZES), ("gated_delta", DELTA_SIZES)) if key in keys]
            raise UsageError(f"{flag} is {new} but model.attention is {source.attention}: only {' and '.join(owners)} attention has it")
        was = getattr(old, key) or (source.head_dim if key == "value_dim" else None)
        if was is None:
            raise UsageError(f"{flag} is {new} but queries come from the stream itself: a model without a query_rank gets none")
        if new < was:
            raise UsageError(f"{flag} is {new} but the source has {was}: growth does not shrink")
        check_times(flag, was, new)
        changes[key] = new
    return {name: old.model_copy(update=changes)}


def kinds_of(changes: Iterable[str]) -> dict[str, Sizes]:
    """`kinds.NAME.SIZE=N` … → the sizes of each kind. Raises UsageError for anything else."""
    found: dict[str, dict[str, int]] = {}
    for change in changes:
        match = re.fullmatch(r"kinds\.([A-Za-z_][A-Za-z0-9_-]*)\.([a-z_]+)=(\d+)", change)
        if match is None or int(match[3]) < 1:
            raise UsageError(f"{change!r} is not understood: write kinds.NAME.SIZE=N, such as kinds.dense.ffn_size=4096")
        found.setdefault(match[1], {})[match[2]] = int(match[3])
    return {name: sizes_of(name, given) for name, given in found.items()}


def sizes_of(kind: str, given: Mapping[str, Any]) -> Sizes:
    """The sizes of one kind, by the names of the command's flags. Raises UsageError for names that a kind does not have."""
    known = {"num_experts" if key == "experts" else key: key for key in (*KIND_SIZES, "num_layers")}
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.6)
            hint = f"did you mean {near[0]}?" if near else f"its sizes are {', '.join(known)}"
            raise UsageError(f"kinds.{kind}.{key} is not a size of a kind; {hint}")
        if type(value) is not int or value < 1:
            raise UsageError(f"kinds.{kind}.{key} is {value!r}: give a whole number, 1 or more")
    return Sizes(**{known[key]: value for key, value in given.items()})


def _target_tokens(source: Model, size: int) -> dict[str, Any]:
    old = source.tokenformer
    if old is None:
        raise UsageError(f"--tokenformer-size is {size} but the source's products are {source.linear}: only linear tokenformer has tokens")
    if size < old.tokens:
        raise UsageError(f"--tokenformer-size is {size} but the source has {old.tokens}: growth does not shrink")
    check_times("--tokenformer-size", old.tokens, size)
    return {"tokenformer": old.model_copy(update={"tokens": size, "scale": old.scale or old.tokens**0.5})}


def _target_experts(source: Model, sizes: Sizes, router: str, changes: dict[str, Any]) -> Any:
    from megascale.config.schema import Moe

    parts = sizes.granularity
    if source.moe is None:
        if sizes.experts is None:
            if parts != 1 or sizes.top_k is not None or sizes.expert_ffn_size is not None:
                raise UsageError("--granularity, --top-k and --expert-ffn-size are for experts: give --num-experts, or leave them out")
            return None
        width = sizes.expert_ffn_size or changes.get("ffn_size") or source.ffn_size
        moe, old, top_k = Moe(router=router, num_experts=1, top_k=1, ffn_size=width), 1, sizes.top_k or min(2, sizes.experts)
    else:
        moe, old = source.moe, source.moe.num_experts
        width = sizes.expert_ffn_size or (changes.get("ffn_size") if moe.ffn_size == source.ffn_size else None) or moe.ffn_size
        if sizes.experts is None and parts == 1 and width == moe.ffn_size and sizes.top_k in (None, moe.top_k):
            return None
        grown = (sizes.experts or old) / old
        top_k = sizes.top_k or round(moe.top_k * grown)
    assert width is not None
    experts = sizes.experts or old
    if experts < old or experts % old:
        raise UsageError(f"--num-experts is {experts} but the source has {old}: give a multiple")
    check_times("--num-experts", old, experts)
    before = (source.moe.ffn_size if source.moe is not None else None) or source.ffn_size or 0
    if width < before:
        raise UsageError(
            f"--expert-ffn-size is {width} but the source's feed-forward has {before}: experts start as wide, --granularity cuts them"
        )
    if parts < 1 or width % parts:
        raise UsageError(f"--granularity is {parts} but an expert has {width} channels: give a divisor")
    if sizes.granularity > 1 and width != before:
        raise UsageError("experts grow in width or are cut into finer ones, one at a time: leave one of --granularity and the width out")
    update = {"num_experts": experts * parts, "top_k": top_k * parts, "ffn_size": width // parts}
    if moe.groups is not None and moe.top_groups is not None:
        # Every copy of the experts, and every part, is a group beside the old ones, so that a group's score stays what it was.
        times = experts * parts // old
        update |= {"groups": moe.groups * times, "top_groups": moe.top_groups * times}
    return moe.model_copy(update=update)
