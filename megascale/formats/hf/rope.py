"""Rotary positions in a config.json, as transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters) write them, in a form that both
read alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from megascale.config.schema import Model

ROPE = frozenset({"rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"})
# Keys that some kinds of scaling have and the others ignore.
OF_KINDS = frozenset(
    [
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "truncate",
    ]
)


def read_rope(
    config: Mapping[str, Any], default: float, length: Any, default_share: float = 1.0, forms: Sequence[str] = ()
) -> tuple[Any, dict[str, Any] | None, Any, list[str]]:
    """θ, our scaling, the share of a head's channels that rotate, and problems.

    length  the longest sequence, the default for the original one
    forms   `Family.rope`
    """
    stored = {k: config[k] for k in ("rope_parameters", "rope_scaling") if config.get(k)}
    odd = [f"{k} is {v!r}, which is not a mapping" for k, v in stored.items() if not isinstance(v, Mapping)]
    odd += [
        f"{k} is nested by layer type ({', '.join(map(str, v))}), but all layers have the same positions here"
        for k, v in stored.items()
        if isinstance(v, Mapping) and any(isinstance(x, Mapping) for x in v.values())
    ]
    if odd:
        return default, None, 1.0, odd
    if len(stored) == 2 and not agree(*stored.values()):
        return default, None, 1.0, ["rope_parameters and rope_scaling say different things: leave one of them out"]
    name, inner = next(iter(stored.items()), ("", {}))
    rest = dict(inner)
    odd = [
        f"{k} is {config[k]!r}, but {name} says {rest[k]!r}: leave one of them out"
        for k in ("rope_theta", "partial_rotary_factor")
        if config.get(k) is not None and rest.get(k) is not None and config[k] != rest[k]
    ]
    if odd:
        return default, None, 1.0, odd
    theta = first(rest.pop("rope_theta", None), config.get("rope_theta"), default)
    kind, other = rest.pop("rope_type", None), rest.pop("type", None)
    kind = first(kind, other, "default")
    share = first(rest.pop("partial_rotary_factor", None), config.get("partial_rotary_factor"), default_share)
    if kind == "default":
        problems = [f"{k} is {v!r}, which is not understood" for k, v in rest.items() if v is not None and k not in OF_KINDS]
        return theta, None, share, problems
    wanted, problems = _scaling(kind, rest, length, forms)
    return theta, None if problems else wanted, share, problems


def first(*values: Any) -> Any:
    """The first value that is not None."""
    return next((v for v in values if v is not None), None)


def agree(parameters: Mapping[str, Any], scaling: Mapping[str, Any]) -> bool:
    """Whether both forms in a file agree, apart from θ."""

    def plain(given: Mapping[str, Any]) -> dict[str, Any]:
        rest = {k: v for k, v in given.items() if k not in ("rope_theta", "type", "rope_type") and v is not None}
        return {**rest, "type": first(given.get("rope_type"), given.get("type"), "default")}

    return plain(parameters) == plain(scaling)


def _scaling(kind: Any, rest: dict[str, Any], length: Any, forms: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Our section for a scaling, and problems. Removes known keys from `rest`."""
    problems = []
    original = first(rest.pop("original_max_position_embeddings", None), length)
    wanted: dict[str, Any] = {"type": kind, "factor": rest.pop("factor", None)}
    if kind == "llama3":
        wanted |= {"original_seq_len": original, **{k: rest.pop(k, None) for k in ("low_freq_factor", "high_freq_factor")}}
    elif kind == "yarn":
        wanted |= {
            "original_seq_len": original,
            "beta_fast": rest.pop("beta_fast", None) or 32,
            "beta_slow": rest.pop("beta_slow", None) or 1,
        }
        wanted["attention_factor"] = rest.pop("attention_factor", None)
        if "mscale" in forms:
            wanted["attention_factor"] = first(wanted["attention_factor"], _amplitude(wanted["factor"], rest))
            rest.pop("mscale", None), rest.pop("mscale_all_dim", None)
        truncate = first(rest.pop("truncate", None), True)
        if truncate is False and "truncate" in forms:
            wanted["truncate"] = False
        elif truncate is not True:
            problems.append(f"rope_scaling.truncate is {str(truncate)[:100]}, which is not understood")
    elif kind != "linear":
        return wanted, [f"rope_type is {kind!r}, but only default, linear, llama3 and yarn are supported"]
    problems += [f"rope_scaling.{k} is {v!r}, which is not understood" for k, v in rest.items() if v is not None]
    problems += [f"rope_scaling.{k} is absent" for k, v in wanted.items() if v is None and k != "attention_factor"]
    return wanted, problems


def _m(factor: float, weight: float) -> float:
    """YaRN's amplitude for a stretch, as DeepSeek weighs it."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _amplitude(factor: Any, rest: Mapping[str, Any]) -> float | None:
    """The factor on cosines and sines that DeepSeek's weights say; None: YaRN's own."""
    one, all_dims = rest.get("mscale"), rest.get("mscale_all_dim")
    if not _number(factor) or not _number(one) or not _number(all_dims) or not one or not all_dims:
        return None
    return _m(factor, one) / _m(factor, all_dims)


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e6


def score_factor(config: Mapping[str, Any], channels: Any) -> tuple[float | None, list[str]]:
    """The factor on attention scores of heads with so many channels, where DeepSeek's weights say another than their root; and problems."""
    given: Mapping[str, Any] = next((config[k] for k in ("rope_parameters", "rope_scaling") if isinstance(config.get(k), Mapping)), {})
    kind, weight, factor = first(given.get("rope_type"), given.get("type"), "default"), given.get("mscale_all_dim"), given.get("factor")
    problems = [
        f"rope_scaling.{k} is {shown!r}, but it must be a number"
        for k in ("mscale", "mscale_all_dim")
        if (shown := str(given.get(k))[:100]) != "None" and not _number(given[k])
    ]
    if kind == "default" or not weight or problems or not _number(factor) or type(channels) is not int or channels < 1:
        return None, problems
    return float(channels**-0.5 * _m(factor, float(weight)) ** 2), problems


def _weights_of(model: Model) -> dict[str, float]:
    """DeepSeek's keys for a model's amplitude and factor on scores."""
    scaling, latent = model.rope_scaling, model.latent
    assert scaling is not None and latent is not None
    if scaling.factor <= 1:
        return {}
    log = 0.1 * math.log(scaling.factor)
    all_dims = (
        (((model.attention_scale or 0.0) * (model.head_dim + latent.rope_dim) ** 0.5) ** 0.5 - 1) / log if model.attention_scale else 0.0
    )
    if not all_dims:
        return {}
    one = (scaling.amplitude * _m(scaling.factor, all_dims) - 1) / log
    return {"mscale": round(one, 6), "mscale_all_dim": round(all_dims, 6)}


def rope_keys(model: Model, length: int, key: str, forms: Sequence[str] = ()) -> dict[str, Any]:
    """An export's keys for positions, those of transformers 4, which 5 also reads.

    length  the longest sequence, stored under `key`
    forms   `Family.rope`

    If YaRN's original length is stored, transformers 4 used the longest sequence divided by it as the factor instead of the stored factor,
    until huggingface/transformers#40320. So it is omitted if it equals the longest sequence, its default; otherwise the longest sequence
    becomes original length × factor, or the original length if that is not a whole number.
    """
    scaling = model.rope_scaling
    if scaling is None:
        return {"rope_theta": model.rope_theta, key: length}
    given: dict[str, Any] = {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type == "llama3":
        given["original_max_position_embeddings"] = scaling.original_seq_len
        given |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.type == "yarn":
        stretched = scaling.factor * scaling.original_seq_len
        if length != scaling.original_seq_len and stretched == int(stretched) and stretched / scaling.original_seq_len == scaling.factor:
            given["original_max_position_embeddings"], length = scaling.original_seq_len, int(stretched)
        else:
            length = scaling.original_seq_len
        given |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        weights = _weights_of(model) if "mscale" in forms else {}
        said = _amplitude(scaling.factor, weights) if weights else None
        given |= weights
        given |= {} if scaling.attention_factor in (None, said) else {"attention_factor": scaling.attention_factor}
        given |= {} if scaling.truncate else {"truncate": False}
    return {"rope_theta": model.rope_theta, "rope_scaling": given, key: length}
