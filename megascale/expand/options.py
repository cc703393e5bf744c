"""Options of a growth: new sizes, and how each axis is filled."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from megascale.config.routers import routers
from megascale.config.schema import Model
from megascale.errors import UsageError


@dataclass(frozen=True)
class Sizes:
    """Sizes of the target; None: the source's. `seq_len` is the context; `experts` counts experts as wide as the source's (or its dense
    feed-forward), each cut into `granularity` finer ones.
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
    for key in ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_size", "num_layers", "vocab_size"):
        old, new = getattr(source, key), getattr(sizes, key)
        if new is None or new == old:
            continue
        if old is None:
            raise UsageError(f"--{key.replace('_', '-')} is {new} but this model has no {key}")
        if new < old:
            by_shrinking = "" if key in ("head_dim", "vocab_size") else ", megascale shrink does"
            raise UsageError(f"--{key.replace('_', '-')} is {new} but the source has {old}: growth does not shrink{by_shrinking}")
        check_times(f"--{key.replace('_', '-')}", old, new)
        changes[key] = new
    if "num_heads" in changes and sizes.num_kv_heads is None and source.num_kv_heads == source.num_heads:
        changes["num_kv_heads"] = changes["num_heads"]  # every query head keeps its own KV head
    moe = _target_experts(source, sizes, router, changes)
    if moe is not None:
        changes["moe"] = moe
    if sizes.tokenformer_size is not None:
        changes |= _target_tokens(source, sizes.tokenformer_size)
    return source.model_copy(update=changes)


def check_times(flag: str, old: int, new: int) -> None:
    """Raises UsageError for an implausible size, whose maps alone would fill the memory."""
    if new > MOST_TIMES * old:
        raise UsageError(f"{flag} is {new} but the source has {old}: more than {MOST_TIMES} times as much is implausible, check the number")


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
    return moe.model_copy(update=update)
