"""Layers that differ, in a config.json (windows and rotary positions by layer type, linear attention, a dense start) ↔ `model.kinds` and
`model.pattern`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megascale.config.schema import Model
from megascale.formats.hf.family import Family
from megascale.formats.hf.rope import agree, read_rope, rope_keys

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
NAMES = {FULL: "full", SLIDING: "sliding", LINEAR: "linear"}  # names of kinds in our models
DENSE, SPARSE = "dense", "experts"
KEYS = ("sliding_window", "rope_theta", "rope_scaling")  # in which such layers may differ


def read_layers(family: Family, config: Mapping[str, Any], layers: Any, length: Any) -> tuple[dict[str, Any], list[str]]:
    """Our keys for windows and positions of all layers, and problems. `layers`: how many the config says there are."""
    window, types, problem = _types(family, config, layers)
    if problem:
        return {}, [problem]
    dense, problem = _dense(family, config, len(types))
    if problem:
        return {}, [problem]
    found, problems = {}, []
    for kind in dict.fromkeys(types):
        found[kind] = {"sliding_window": window if kind == SLIDING else None}
        if family.theta is not None:
            rope, trouble = _rope(family, config, FULL if kind == LINEAR else kind, length)
            found[kind] |= rope
            problems += trouble
    if len(found) == 1 and not dense:
        return {**next(iter(found.values())), **(family.linear if types[0] == LINEAR else {})}, problems
    # A key that all layers share may only be said for the model.
    differ = [k for k in KEYS if len({str(keys.get(k)) for keys in found.values()}) > 1]
    shared = {k: v for k, v in next(iter(found.values())).items() if k not in differ}
    kinds: dict[str, dict[str, Any]] = {}
    names = []
    for layer, kind in enumerate(types):
        parts = {NAMES[kind]: {**{k: found[kind][k] for k in differ if k in found[kind]}, **(family.linear if kind == LINEAR else {})}}
        if len(found) == 1:
            parts = {}
        if dense:
            parts |= {DENSE: {"moe": None}} if layer < dense else {SPARSE: {}}
        names.append("_".join(parts))
        kinds[names[-1]] = {k: v for keys in parts.values() for k, v in keys.items()}
    first = dense if len(found) == 1 else 0
    return {**shared, "kinds": kinds, "pattern_first": names[:first], **pattern_of(names[first:])}, problems


def pattern_of(names: Sequence[str]) -> dict[str, list[str]]:
    """The shortest `pattern` that repeats to these kinds of layers; an incomplete repetition is `pattern_last`."""
    turn = next(n for n in range(1, len(names) + 1) if all(names[i] == names[i % n] for i in range(len(names))))
    rest = len(names) % turn
    return {"pattern": list(names[:turn]), "pattern_last": list(names[len(names) - rest :])}


def _dense(family: Family, config: Mapping[str, Any], layers: int) -> tuple[int, str | None]:
    """How many layers at the beginning are dense, and what is wrong, if anything."""
    if family.dense_first is None:
        return 0, None
    value = config.get(family.dense_first, 0)
    if type(value) is not int or not 0 <= value < layers:
        return 0, f"{family.dense_first} is {str(value)[:100]}, but it must be a number of layers below {layers}, all of them"
    return value, None


def _types(family: Family, config: Mapping[str, Any], layers: Any) -> tuple[int | None, list[str], str | None]:
    """The window, the type of each layer, and what is wrong, if anything."""
    if type(layers) is not int or layers < 1:
        return None, [FULL], None  # the model's own check says so
    if layers > 10_000:
        return None, [FULL], None
    value = config.get("sliding_window", family.default_window)
    if family.window in ("never", "linear") and (window := config.get("sliding_window")) is not None:
        return None, [FULL], f"sliding_window is {window!r}, which {family.model_type} does not have"
    if family.window == "never":
        return None, [FULL] * layers, None
    if family.window == "asked" and not config.get("use_sliding_window", False):
        value = None
    types = config.get("layer_types")
    if family.window == "always" and isinstance(types, list) and value is not None and set(map(str, types)) != {SLIDING}:
        return None, [FULL], f"layer_types is {str(types)[:100]}, which {family.model_type} does not read: remove it"
    if types is None:
        types = _default_types(family, config, layers, value)
    other = LINEAR if family.window == "linear" else SLIDING
    if not (isinstance(types, list) and all(isinstance(t, str) and t in (FULL, other) for t in types)):
        said = repr(types)
        return None, [FULL], f"layer_types is {said[:100]}, but it must be a list of {FULL} and {other}, one for each layer"
    if len(types) != layers:
        return None, [FULL], f"layer_types has {len(types)} entries, but there are {layers} layers"
    if value is None and SLIDING in types:
        return None, [FULL], f"layer_types has {SLIDING}, but there is no sliding_window: add its length, or make all layers {FULL}"
    if value is not None and (type(value) is not int or value < 1):
        return None, [FULL], f"sliding_window is {value!r}, but it must be a number of tokens"
    return value, types, None


def _default_types(family: Family, config: Mapping[str, Any], layers: int, window: Any) -> list[str]:
    """The types of layers in a config that does not list them."""
    if family.window == "linear":
        every = config.get("full_attention_interval", family.full_every)
        every = every if type(every) is int and every > 0 else family.full_every
        return [LINEAR if (i + 1) % every else FULL for i in range(layers)]
    if window is None:
        return [FULL] * layers
    if family.window == "by_layer":
        every = config.get("sliding_window_pattern", config.get("_sliding_window_pattern", family.full_every))
        every = every if type(every) is int and every > 0 else family.full_every
        return [SLIDING if (i + 1) % every else FULL for i in range(layers)]
    first = config.get("max_window_layers", 28) if family.window == "asked" else 0
    first = first if type(first) is int else 0
    return [FULL if i < first else SLIDING for i in range(layers)]


def _rope(family: Family, config: Mapping[str, Any], kind: str, length: Any) -> tuple[dict[str, Any], list[str]]:
    """Our rotary keys of layers of one type, and problems."""
    assert family.theta is not None
    config = {**config, **{ours: config[theirs] for ours, theirs in family.spelled.items() if theirs in config}}
    if family.scaled and not config.get("rope_parameters") and not config.get("rope_scaling"):
        config = {**config, "rope_scaling": family.scaled}
    nested = config.get("rope_parameters")
    nests = "nested" in family.rope
    if nests and (problem := _nested_wrong(nested, config)):
        return {}, [problem]
    by_type = nests and isinstance(nested, Mapping) and any(isinstance(v, Mapping) for v in nested.values())
    # Only layers with full attention are stretched (OLMo 3, Gemma 3), and the others may have a base of their own.
    default = family.theta if kind == FULL or family.sliding_theta is None else family.sliding_theta
    if by_type and isinstance(nested, Mapping):
        own, plain = nested.get(kind), {k: v for k, v in config.items() if k not in ("rope_parameters", "rope_scaling", "rope_theta")}
        given: Mapping[str, Any] = {**plain, "rope_parameters": own if isinstance(own, Mapping) else {}}
    elif nests and kind == SLIDING:
        given = {k: v for k, v in config.items() if k not in ("rope_parameters", "rope_scaling")}
        if family.sliding_theta is not None:
            given = {**given, "rope_theta": config.get("rope_local_base_freq")}
    else:
        given = config
    theta, scaling, fraction, problems = read_rope(given, default, length, family.share, family.rope)
    if fraction != 1.0 and not family.partial:
        problems = [*problems, f"partial_rotary_factor is {fraction!r}, but all channels of a head rotate in {family.model_type}"]
    found = {"rope_theta": theta, "rope_scaling": scaling}
    return found | ({"rope_fraction": fraction} if family.partial else {}), problems


def _nested_wrong(nested: Any, config: Mapping[str, Any]) -> str | None:
    """What is wrong with rotary parameters by layer type, or with what stands beside them."""
    if not nested:
        return None
    if not isinstance(nested, Mapping) or not all(isinstance(v, Mapping) for v in nested.values()):
        return f"rope_parameters is {str(nested)[:100]}, but it must hold a mapping for each of {FULL} and {SLIDING}"
    stray = next((k for k in nested if k not in (FULL, SLIDING)), None)
    if stray is not None:
        return f"rope_parameters.{stray} is not understood"
    lacking = next((k for k, v in nested.items() if v.get("rope_theta") is None), None)
    if lacking is not None:
        return f"rope_parameters.{lacking} has no rope_theta: add it"
    scaling = config.get("rope_scaling")
    if isinstance(scaling, Mapping) and not agree(nested.get(FULL, {}), scaling):
        return "rope_parameters and rope_scaling say different things: leave one of them out"
    return None


def type_of(layer: Model) -> str:
    """Their type of a layer's attention."""
    if layer.attention_row.scans:
        return LINEAR
    return FULL if layer.sliding_window is None else SLIDING


def layer_keys(family: Family, model: Model, longest: int) -> dict[str, Any]:
    """An export's keys for windows and positions of all layers."""
    layers = [model.at_layer(i) for i in range(model.num_layers)]
    types = [type_of(layer) for layer in layers]
    by_type = {kind: layers[types.index(kind)] for kind in dict.fromkeys(types)}
    full = by_type.get(FULL, next(iter(by_type.values())))
    windows = [m.sliding_window for m in by_type.values() if m.sliding_window is not None]
    keys: dict[str, Any] = {}
    if family.theta is not None:
        keys |= rope_keys(full, longest, family.length, family.rope)
        if family.partial and (full.rope_fraction != 1.0 or family.share != 1.0):
            keys["partial_rotary_factor"] = full.rope_fraction
        if family.scaled and full.rope_scaling is None:
            keys["rope_scaling"] = {"rope_type": "default"}
        for ours, theirs in family.spelled.items():
            if ours in keys:
                keys[theirs] = keys.pop(ours)
    if family.dense_first is not None:
        keys[family.dense_first] = next((i for i, layer in enumerate(layers) if layer.moe is not None), 0)
    if family.window == "never":
        return keys
    if family.window == "linear":
        return {**keys, "layer_types": types}
    keys["sliding_window"] = windows[0] if windows else None
    if family.window == "asked":
        first = types.index(SLIDING) if SLIDING in types else model.num_layers
        keys |= {"use_sliding_window": bool(windows), "max_window_layers": first if windows else 0, "layer_types": types}
    if family.window == "by_layer":
        keys |= {"layer_types": types, "sliding_window": keys["sliding_window"] or family.default_window}
    if "nested" in family.rope:
        local = by_type.get(SLIDING, full)
        parameters = {"rope_theta": full.rope_theta, **keys.get("rope_scaling", {"rope_type": "default"})}
        sliding = {"rope_type": "default", "rope_theta": local.rope_theta}
        keys["rope_parameters"] = {FULL: parameters, SLIDING: sliding}  # of transformers 5; 4 reads the others
        if family.sliding_theta is not None:
            keys["rope_local_base_freq"] = local.rope_theta
    return keys
