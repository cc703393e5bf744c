"""config.json ↔ the model section. Nothing is guessed: unknown keys and values are refused by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from megascale.config.load import flatten
from megascale.config.routers import routers
from megascale.config.rules.kinds import PAIRWISE
from megascale.config.schema import Model
from megascale.errors import UsageError
from megascale.formats.hf import t5
from megascale.formats.hf.families import BY_TYPE, FAMILIES, NOT_HERE
from megascale.formats.hf.family import Family, Key
from megascale.formats.hf.keys import ONLY, harmless
from megascale.formats.hf.layers import LINEAR, layer_keys, read_layers, type_of
from megascale.formats.hf.quantized import KEY, problem_of
from megascale.formats.hf.rope import ROPE, first, score_factor

WINDOW = frozenset({"sliding_window", "use_sliding_window", "layer_types"})
LINEAR_LAYERS, QUANTIZED = frozenset({"full_attention_interval"}), frozenset({KEY})
BY_LAYER = frozenset({"sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq"})
# Keys of the model section that do not affect a trained model's logits: initialization and training. An export drops no token.
TRAINING = frozenset(
    [
        "init_std",
        "init_base",
        "init_base.width",
        "init_base.depth",
        "mtp_depth",
        "mtp_weight",
        "dropout",
        "token_correlation",
        "deepscale_unit",
        "dyt_alpha",
        "branchnorm_period",
        "moe.aux_loss",
        "moe.z_loss",
        "moe.bias_rate",
        "moe.capacity_factor",
        "moe.eval_capacity_factor",
        "moe.init",
        "moe.balance_over",
        "moe.sequence_loss",
    ]
)
# Keys that attention with a state does not read.
UNREAD = frozenset(
    {*PAIRWISE, "num_heads", "num_kv_heads", "head_dim", "position", "attention_gate", "attention_sink", "attention_softcap"}
)
DELTA = "delta."  # sizes of linear attention
DEEPEST = 1 << 20  # most layers that are listed one by one
LONGEST = 1 << 40  # longest sequence that a file may name
SHOWN = 100  # characters of a value in a message


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json. Raises UsageError for an unknown one."""
    kind = config.get("model_type")
    known = ", ".join(f.model_type for f in FAMILIES)
    if not isinstance(kind, str) or kind not in BY_TYPE:
        said, near = str(kind), difflib.get_close_matches(str(kind), BY_TYPE, 1, 0.6)
        reason = f" ({NOT_HERE[said]})" if isinstance(kind, str) and said in NOT_HERE else ""
        nearest = f"; the nearest is {near[0]}" if near and not reason else ""
        raise UsageError(f"{where}: model_type is {shown(kind)}{reason}, but only {known} can be read{nearest}: use one of these")
    family = BY_TYPE[kind]
    named = config.get("architectures") or [family.architecture]
    if not isinstance(named, list) or not {family.architecture, *family.also}.intersection(n for n in named if isinstance(n, str)):
        raise UsageError(
            f"{where}: architectures is {shown(named)}, and of {kind} it is {' or '.join((family.architecture, *family.also))} that can be "
            "read: use its language model"
        )
    return family


def model_section(config: Mapping[str, Any], where: str) -> tuple[Model, int | None]:
    """config.json → the model section and the longest sequence, None if it does not say.

    where  the file, for messages

    Raises UsageError naming every unknown key.
    """
    family = family_of(config, where)
    problems = _unknown(family, config)
    for key, allowed in {**ONLY, **family.fixed}.items():
        value = config.get(key, allowed[0])
        if value not in allowed and not (value is None and key in ONLY):
            problems.append(f"{key} is {shown(value)}, but only {allowed[0]!r} is supported")
    flat: dict[str, Any] = {"family": "decoder", **family.ours}
    for known_key in family.keys:
        flat[known_key.ours], problem = _value(known_key, config)
        problems += [] if problem is None else [problem]
    for key, other in family.same.items():
        if config.get(key) is not None and key in config and config[key] != config.get(other):
            problems.append(f"{key} is {shown(config[key])}, but it must be {other}, which is {shown(config.get(other))}")
    quantized = problem_of(family, config)
    problems += [] if quantized is None else [quantized]
    length = config.get(family.length, family.default_length)
    by_layer, trouble = read_layers(family, config, flat.get("num_layers"), length)
    flat |= by_layer
    problems += trouble
    if family.width_factor and isinstance(flat.get("hidden_size"), int):
        flat["embedding_factor"] = flat["hidden_size"] ** 0.5
    if family.linear:
        flat = _with_linear(flat, family.linear["attention"])
    if family.branch is not None:
        flat["layer_coefficients"], problem = _branches(config.get(family.branch, 1.0), flat.get("num_layers"))
        problems += [] if problem is None else [f"{family.branch} {problem}"]
    if "mscale" in family.rope:
        channels = [flat.get(k) for k in ("head_dim", "latent.rope_dim")]
        flat["attention_scale"], trouble = score_factor(config, sum(channels) if all(type(c) is int for c in channels) else None)
        problems += trouble
    if "moe.groups" in flat:  # in one group are all experts
        flat["moe.top_groups"] = None if flat["moe.groups"] is None else first(flat["moe.top_groups"], 1)
    if flat.get("moe.top_k") == 1 and flat.get("moe.num_experts") != 1 and _normalized_alone(flat.get("moe.router"), flat):
        problems.append("with one expert per token its normalized gate is 1, but here it is a probability")
    rows = config.get("type_vocab_size", 2)
    if family.model_type == "t5":
        flat["head_scale"] = t5.head_scale(config)
        problems += t5.problems(config)
    if family.segments is not None and (type(rows) is not int or rows < 1):
        problems.append(f"type_vocab_size is {shown(rows)}, but there must be at least one segment")
    if problems:
        raise UsageError(f"{where} describes a {family.model_type} model that cannot be read: {'; '.join(problems)}")
    if length is not None and (type(length) is not int or not 1 <= length <= LONGEST):
        raise UsageError(f"{where}: {family.length} is {shown(length)}, but it must be the model's longest sequence: correct the file")
    model = _validated(flat, where)
    if model.vocab_size is None:
        raise UsageError(f"{where} has no vocab_size: add the number of rows of its embedding")
    return model, length


def _value(key: Key, config: Mapping[str, Any]) -> tuple[Any, str | None]:
    """Our value of a key, and what is wrong with theirs, if anything."""
    value = config.get(key.theirs, config.get(key.also or key.theirs, key.default))
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if key.neutral is not None and number and value == key.neutral:
        return None, None
    if key.power is not None and number and value > 0:
        return float(value) ** key.power, None
    if key.per is not None:
        unit = config.get(key.per)
        if type(value) is int and type(unit) is int and unit > 0 and value >= 0 and value % unit == 0:
            return value // unit, None
        return None, f"{key.theirs} is {shown(value)}, but it must be a multiple of {key.per}, which is {shown(unit)}"
    if key.values is None:
        return value, None
    if isinstance(value, str | bool) and value in key.values:
        return key.values[value], None
    return None, f"{key.theirs} is {shown(value)}, but only {', '.join(map(repr, key.values))} are supported"


def _branches(value: Any, layers: Any) -> tuple[list[tuple[float, float]] | None, str | None]:
    """Coefficients of layers whose branches all have one factor, and what is wrong with it, if anything."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None, f"is {shown(value)}, but it must be a number"
    if value == 1 or type(layers) is not int or not 0 < layers <= DEEPEST:
        return None, None
    return [(1.0, float(value))] * layers, None


def _with_linear(flat: dict[str, Any], attention: str) -> dict[str, Any]:
    """Moves the sizes of linear attention from the model to the kinds that have it."""
    sizes = {k.removeprefix(DELTA): v for k, v in flat.items() if k.startswith(DELTA)}
    if flat.get("attention") == attention:  # all layers
        return flat
    rest = {k: v for k, v in flat.items() if not k.startswith(DELTA)}
    if "kinds" not in rest:
        return rest
    kinds = {n: {**keys, "delta": sizes} if keys.get("attention") == attention else keys for n, keys in rest["kinds"].items()}
    return {**rest, "kinds": kinds}


def _unknown(family: Family, config: Mapping[str, Any]) -> list[str]:
    """Lists unknown keys with their values."""
    known = {k.theirs for k in family.keys} | {k.also for k in family.keys if k.also is not None}
    known |= ONLY.keys() | family.fixed.keys() | WINDOW | {family.length} | (ROPE if family.theta is not None else set())
    known |= {*family.inert, *(BY_LAYER if family.window == "by_layer" else ()), *(LINEAR_LAYERS if family.window == "linear" else ())}
    known |= {*family.spelled.values(), *family.same, *(QUANTIZED if family.quantized else ())}
    known |= {k for k in (family.dense_first, family.branch) if k is not None}
    return [
        f"{shown(k)[1:-1]} is {shown(v)}, which is not understood"
        for k, v in config.items()
        if k not in known and not harmless(k) and v is not None
    ]


def shown(value: Any) -> str:
    """A value for a message, shortened if long."""
    said = repr(value)
    return said if len(said) <= SHOWN else f"{said[:SHOWN]}…"


def _validated(flat: Mapping[str, Any], where: str) -> Model:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, inner = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[inner] = value
    if isinstance(nested.get("num_heads"), int) and nested.get("hidden_size") is not None and nested["num_heads"] < 1:
        raise UsageError(f"{where}: the number of heads is {nested['num_heads']}: correct the file")
    try:
        return Model.model_validate(nested)
    except (ValidationError, TypeError) as error:
        first: Any = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error), "input": None}
        key = ".".join(map(str, first["loc"]))
        said = str(first["msg"]).removeprefix("Value error, ")
        said = f"model.{key} would be {shown(first['input'])}: {said}" if key else said
        raise UsageError(f"{where} describes an impossible model: {said}") from None


def _normalized_alone(router: str | None, flat: Mapping[str, Any]) -> bool:
    """Whether the gate of a Hugging Face model with this router is always 1 with one expert per token."""
    return bool(flat.get("moe.renormalize")) or (router is not None and routers()[router].single is not None)


def functional(model: Model) -> dict[str, Any]:
    """{"section.key": value} of everything that affects a trained model's logits."""
    flat = flatten({k: v for k, v in model.model_dump(mode="json").items() if v is not None})
    balance = flat.pop("moe.balance", None)
    if balance == "bias":
        flat["moe.balance"] = balance  # `bias` adds a bias to the choice of experts
    if model.moe is not None and model.moe.every == 1:
        flat.pop("ffn_size", None)  # no layer is dense
    if flat.get("attention_bias") == flat["bias"]:
        flat.pop("attention_bias")  # what `bias` says anyway
    if model.attention_row.scans:
        flat = {k: v for k, v in flat.items() if k not in UNREAD and not k.startswith("rope_scaling.")}
    if flat.get("attention_scale") == _root(model):
        flat.pop("attention_scale")  # the default
    if model.latent is not None:
        flat.setdefault("latent.value_dim", model.head_dim)
    for name in [n for n in flat if n.startswith("norm_eps_of.") and flat[n] == model.norm_eps]:
        flat.pop(name)
    if model.moe is not None and (model.moe.top_k == 1 or flat.get("moe.renormalize") == model.moe.router_row.divides):
        flat.pop("moe.renormalize", None)  # a single gate is never divided
    if not model.position_row.rotates:
        flat.pop("rope_theta", None)
    if not model.position_row.distances:
        flat.pop("relative_buckets")
        flat.pop("relative_distance")
    return {k: v for k, v in flat.items() if k not in TRAINING and v is not None}


def _root(model: Model) -> float:
    """The factor on attention scores if the config says none."""
    return float((model.head_dim + (0 if model.latent is None else model.latent.rope_dim)) ** -0.5)


def differences(model: Model, other: Model) -> dict[str, tuple[Any, Any]]:
    """{"key": (value in model, value in other)} for keys that make their logits differ."""
    if (model.kinds or other.kinds) and model.num_layers == other.num_layers:
        for layer in range(model.num_layers):
            if changed := differences(model.at_layer(layer), other.at_layer(layer)):
                return {f"{key} of layer {layer}": values for key, values in changed.items()}
        return {}
    mine, theirs = functional(model), functional(other)
    return {k: (mine.get(k), theirs.get(k)) for k in sorted({*mine, *theirs}) if mine.get(k) != theirs.get(k)}


def hf_config(model: Model, seq_len: int, original: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config.json of a model, for the first family that matches it exactly.

    original  the config.json it was converted from: its harmless keys are kept if the family is the same

    Raises UsageError naming the differences to the nearest family.
    """
    nearest: tuple[Family, dict[str, tuple[Any, Any]]] | None = None
    if model.moe is not None and model.moe.top_k == 1 and model.moe.router_row.single is not None:
        model = model.model_copy(update={"moe": model.moe.model_copy(update={"router": model.moe.router_row.single})})
    kind = (original or {}).get("model_type")
    for family in sorted(FAMILIES, key=lambda f: f.model_type != kind):
        found = _as_family(model, seq_len, family, original if family.model_type == kind else None)
        if found is None:
            continue
        try:
            other, _ = model_section(found, "the export")
        except UsageError:  # this family cannot say such sizes
            continue
        changed = differences(model, other)
        if not changed:
            return found
        if nearest is None or len(changed) < len(nearest[1]):
            nearest = (family, changed)
    if nearest is None:
        raise UsageError(f"model.family is {model.family}, but no supported Hugging Face family is of that kind: export text models")
    family, changed = nearest
    said = ", ".join(f"model.{k} is {mine!r} (it has {theirs!r})" for k, (mine, theirs) in changed.items())
    raise UsageError(f"no Hugging Face family matches this model; {family.model_type} is nearest, but {said}")


def _fullest(model: Model) -> Model:
    """The config of a layer that says the most: one with experts, and with full attention, if there is one."""
    layers = [model.at_layer(i) for i in range(model.num_layers)] if model.kinds else [model]
    return max(layers, key=lambda layer: (layer.moe is not None, type_of(layer) != LINEAR, -layers.index(layer)))


def _factor_of_branches(model: Model) -> float:
    """The factor on every branch, if there is one; differences show where there are several."""
    pairs = set(model.layer_coefficients or ())
    return next(iter(pairs))[1] if len(pairs) == 1 else 1.0


def _as_family(model: Model, seq_len: int, family: Family, original: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The model's values under the family's keys; None if it is of another kind."""
    whole, model = model, _fullest(model)
    flat = {**flatten(model.model_dump(mode="json")), **({"moe.num_experts": None} if model.moe is None else {})}
    if model.family != family.ours.get("family", "decoder") or (model.moe is None) == any(k.ours.startswith("moe.") for k in family.keys):
        return None
    flat["mtp_depth"] = whole.mtp_depth
    flat |= next(({f"{DELTA}{k}": v for k, v in m.delta.model_dump().items()} for m in whole.variants.values() if m.delta is not None), {})
    if flat.get("attention_scale") is None and "attention_scale" in (k.ours for k in family.keys):
        flat["attention_scale"] = _root(model)
    if model.latent is not None:
        flat["latent.value_dim"] = model.latent.value_dim or model.head_dim
    if model.moe is not None and (flat.get("moe.renormalize") is None or model.moe.top_k == 1):
        flat["moe.renormalize"] = model.moe.top_k > 1 and model.moe.router_row.divides
    if model.moe is not None and model.moe.top_k == 1 < model.moe.num_experts and _normalized_alone(family.ours.get("moe.router"), flat):
        return None  # its only gate is 1
    config: dict[str, Any] = {k: v for k, v in (original or {}).items() if harmless(k)}
    config |= {"architectures": [family.architecture], "model_type": family.model_type}
    for key in family.keys:
        value = flat.get(key.ours)
        if key.values is not None:
            known = (original or {}).get(key.theirs)  # of two names for one thing that which the file had
            same = isinstance(known, str | bool) and key.values.get(known) == value
            value = known if same else next((t for t, o in key.values.items() if o == value), key.default)
        if key.power is not None and value is not None:
            value = round(value ** (1 / key.power), 6)
            value = int(value) if value == int(value) else value
        if key.per is not None and value is not None:
            value *= config[key.per]
        absent = key.default if key.ours.startswith(DELTA) else key.neutral
        config[key.theirs] = absent if value is None else value
    if family.branch is not None:
        config[family.branch] = _factor_of_branches(whole)
    if config.get("head_dim") is None or (family.model_type == "olmo2" and model.head_dim == model.hidden_size // model.num_heads):
        config.pop("head_dim", None)
    config |= {key: allowed[0] for key, allowed in family.fixed.items()}
    config[family.length] = seq_len
    if family.model_type == "t5":
        config |= t5.keys(model)
    if family.segments is not None:
        rows = config.get("type_vocab_size")
        config["type_vocab_size"] = rows if type(rows) is int and 0 < rows < LONGEST else 2
    known = (original or {}).get(family.length)
    return config | layer_keys(family, whole, max(seq_len, known) if type(known) is int and family.theta is not None else seq_len)
