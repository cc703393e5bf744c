"""Rotary positions in a config.json, as transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters) write them, in a form that both
read alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megascale.config.schema import Model

ROPE = frozenset({"rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"})
# Keys that some kinds of scaling have and the others ignore.
OF_KINDS = frozenset(
    ["factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"]
)


def read_rope(config: Mapping[str, Any], default: float, length: Any) -> tuple[Any, dict[str, Any] | None, Any, list[str]]:
    """θ, our scaling, the share of a head's channels that rotate, and problems.

    length  the longest sequence, the default for the original one
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
    rest = dict(next(iter(stored.values()), {}))
    theta = _first(rest.pop("rope_theta", None), config.get("rope_theta"), default)
    kind, other = rest.pop("rope_type", None), rest.pop("type", None)
    kind = _first(kind, other, "default")
    share = _first(rest.pop("partial_rotary_factor", None), config.get("partial_rotary_factor"), 1.0)
    if kind == "default":
        problems = [f"{k} is {v!r}, which is not understood" for k, v in rest.items() if v is not None and k not in OF_KINDS]
        return theta, None, share, problems
    wanted, problems = _scaling(kind, rest, length)
    return theta, None if problems else wanted, share, problems


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next((v for v in values if v is not None), None)


def agree(parameters: Mapping[str, Any], scaling: Mapping[str, Any]) -> bool:
    """Whether both forms in a file agree, apart from θ."""

    def plain(given: Mapping[str, Any]) -> dict[str, Any]:
        rest = {k: v for k, v in given.items() if k not in ("rope_theta", "type", "rope_type") and v is not None}
        return {**rest, "type": _first(given.get("rope_type"), given.get("type"), "default")}

    return plain(parameters) == plain(scaling)


def _scaling(kind: Any, rest: dict[str, Any], length: Any) -> tuple[dict[str, Any], list[str]]:
    """Our section for a scaling, and problems. Removes known keys from `rest`."""
    problems = []
    original = _first(rest.pop("original_max_position_embeddings", None), length)
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
        if rest.pop("truncate", True) is not True:
            problems.append("rope_scaling.truncate is not True, which is not understood")
    elif kind != "linear":
        return wanted, [f"rope_type is {kind!r}, but only default, linear, llama3 and yarn are supported"]
    problems += [f"rope_scaling.{k} is {v!r}, which is not understood" for k, v in rest.items() if v is not None]
    problems += [f"rope_scaling.{k} is absent" for k, v in wanted.items() if v is None and k != "attention_factor"]
    return wanted, problems


def rope_keys(model: Model, length: int, key: str) -> dict[str, Any]:
    """An export's keys for positions, those of transformers 4, which 5 also reads.

    length  the longest sequence, stored under `key`

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
        given |= {} if scaling.attention_factor is None else {"attention_factor": scaling.attention_factor}
    return {"rope_theta": model.rope_theta, "rope_scaling": given, key: length}
