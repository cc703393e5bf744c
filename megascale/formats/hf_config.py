"""config.json ↔ the model section. Nothing is guessed: what the table does not understand is refused with its key and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from megascale.config.load import flatten
from megascale.config.schema import Model
from megascale.errors import UsageError
from megascale.formats import hf_t5
from megascale.formats.hf_families import BY_TYPE, FAMILIES, NOT_HERE, Family

# Keys of a config.json that no logit depends on: sizes of caches, training, files, and what generation_config.json says again.
HARMLESS = frozenset(
    [
        "architectures",
        "model_type",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "use_cache",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "unk_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "attention_dropout",
        "attn_pdrop",
        "embd_pdrop",
        "resid_pdrop",
        "pretraining_tp",
        "output_router_logits",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "max_window_layers",
        "task_specific_params",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "_name_or_path",
        "tokenizer_class",
        "is_decoder",
        "is_encoder_decoder",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "gradient_checkpointing",
        "torchscript",
        "reorder_and_upcast_attn",
        "n_ctx",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "classifier_dropout",
        "type_vocab_size",  # segments but the first are not read
        "directionality",
        "pooler_fc_size",
        "pooler_num_attention_heads",
        "pooler_num_fc_layers",
        "pooler_size_per_head",
        "pooler_type",
        "dropout_rate",
        "initializer_factor",
        "output_past",
        "dense_act_fn",  # what feed_forward_proj says again, as is_gated_act
        "is_gated_act",
        "scale_decoder_outputs",  # read with tie_word_embeddings (hf_t5.py)
    ]
)
ROPE = frozenset({"rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"})
WINDOW = frozenset({"sliding_window", "use_sliding_window", "layer_types"})
# Keys of the model section that no logit of a finished model depends on: how it starts and how it is trained. An export drops no token.
TRAINING = frozenset(
    [
        "init_std",
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
    ]
)


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family that a config.json is of. Raises UsageError for one that is not known."""
    kind = config.get("model_type")
    known = ", ".join(f.model_type for f in FAMILIES)
    if not isinstance(kind, str) or kind not in BY_TYPE:
        reason = f" ({NOT_HERE[kind]})" if isinstance(kind, str) and kind in NOT_HERE else ""
        raise UsageError(f"{where}: model_type is {kind!r}{reason}, and models of {known} can be read: use one of these")
    family = BY_TYPE[kind]
    named = config.get("architectures")
    if named and family.architecture not in named:
        raise UsageError(
            f"{where}: architectures is {named}, and of {kind} it is {family.architecture} that can be read: use its language model"
        )
    return family


def model_section(config: Mapping[str, Any], where: str) -> tuple[Model, int | None]:
    """config.json → the model section and the longest sequence, None where it does not say.

    where  the file, for messages

    Raises UsageError naming every key that is not understood.
    """
    family = family_of(config, where)
    mapped = {k.theirs for k in family.keys} | {k.also for k in family.keys if k.also is not None}
    known = mapped | HARMLESS | family.fixed.keys() | WINDOW | {family.length}
    known |= ROPE if family.theta is not None else set()
    problems = [f"{k} is {v!r}, which is not understood" for k, v in config.items() if k not in known and v is not None]
    for key, allowed in family.fixed.items():
        value = config.get(key, allowed[0])
        if value not in allowed:
            problems.append(f"{key} is {value!r}, and only {allowed[0]!r} can be had here")
    flat: dict[str, Any] = {"family": "decoder", **family.ours}
    for known_key in family.keys:
        value = config.get(known_key.theirs, config.get(known_key.also or known_key.theirs, known_key.default))
        if known_key.values is None:
            flat[known_key.ours] = value
        elif value in known_key.values:
            flat[known_key.ours] = known_key.values[value]
        else:
            problems.append(f"{known_key.theirs} is {value!r}, and {', '.join(map(repr, known_key.values))} can be had here")
    window, problem = _window(family, config, flat.get("num_layers"))
    flat["sliding_window"] = window
    length = config.get(family.length, family.default_length)
    if family.theta is not None:
        flat["rope_theta"], flat["rope_scaling"], trouble = _rope(config, family.theta, length)
        problems += trouble
    problems += [problem] if problem else []
    rows = config.get("type_vocab_size", 2)
    if family.model_type == "t5":
        flat["head_scale"] = hf_t5.head_scale(config)
        problems += hf_t5.problems(config)
    if family.segments is not None and (not isinstance(rows, int) or rows < 1):
        problems.append(f"type_vocab_size is {rows!r}, and there is one segment at least")
    if problems:
        raise UsageError(f"{where} describes a {family.model_type} model that cannot be read: {'; '.join(problems)}")
    return _validated(flat, where), length if isinstance(length, int) else None


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
        said = f"model.{key} would be {first['input']!r}: {said}" if key else said
        raise UsageError(f"{where} describes a model that cannot be: {said}") from None


def _window(family: Family, config: Mapping[str, Any], layers: Any) -> tuple[int | None, str | None]:
    """The window of every layer, and what is wrong where layers differ."""
    value = config.get("sliding_window", family.default_window)
    kinds = config.get("layer_types")
    if family.window == "never":
        value = None if config.get("sliding_window") is None else config["sliding_window"]
        return (None, None) if value is None else (None, f"sliding_window is {value!r}, which {family.model_type} does not have")
    if family.window == "asked" and not config.get("use_sliding_window", False):
        value = None
    elif family.window == "asked" and kinds is None:
        first = config.get("max_window_layers", 28)
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers if isinstance(layers, int) else 0)]
    wanted = "full_attention" if value is None else "sliding_attention"
    if kinds is not None and any(k != wanted for k in kinds):
        return None, f"layer_types is {sorted(set(map(str, kinds)))} with sliding_window {value!r}, and all layers see alike here"
    return value, None


def _rope(config: Mapping[str, Any], default: float, length: Any) -> tuple[Any, dict[str, Any] | None, list[str]]:
    """θ, our scaling, and problems; transformers wrote rope_theta and rope_scaling until 4, rope_parameters since 5."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        return default, None, [f"rope_scaling is {given!r}, which is no mapping"]
    rest = dict(given)
    theta = rest.pop("rope_theta", None) or config.get("rope_theta") or default
    kind, other = rest.pop("rope_type", None), rest.pop("type", None)
    kind = kind or other or "default"
    share = rest.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
    problems = [] if share == 1.0 else [f"partial_rotary_factor is {share!r}, and all channels of a head turn here"]
    original = rest.pop("original_max_position_embeddings", None) or length
    if kind == "default":
        return theta, None, problems
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
        return theta, None, [*problems, f"rope_type is {kind!r}, and default, linear, llama3 and yarn can be had here"]
    problems += [f"rope_scaling.{k} is {v!r}, which is not understood" for k, v in rest.items() if v is not None]
    problems += [f"rope_scaling.{k} is absent" for k, v in wanted.items() if v is None and k != "attention_factor"]
    return theta, None if problems else wanted, problems


def functional(model: Model) -> dict[str, Any]:
    """{"section.key": value} of what a finished model's logits depend on."""
    flat = flatten({k: v for k, v in model.model_dump(mode="json").items() if v is not None})
    balance = flat.pop("moe.balance", None)
    if balance == "bias":
        flat["moe.balance"] = balance  # it adds a bias to the choice of experts
    if model.moe is not None and model.moe.every == 1:
        flat.pop("ffn_size", None)  # no layer is dense
    if model.position != "rope":
        flat.pop("rope_theta", None)
    if model.position != "relative":
        flat.pop("relative_buckets")
        flat.pop("relative_distance")
    return {k: v for k, v in flat.items() if k not in TRAINING and v is not None}


def differences(model: Model, other: Model) -> dict[str, tuple[Any, Any]]:
    """{"key": (of model, of other)} where their logits would differ."""
    mine, theirs = functional(model), functional(other)
    return {k: (mine.get(k), theirs.get(k)) for k in sorted({*mine, *theirs}) if mine.get(k) != theirs.get(k)}


def hf_config(model: Model, seq_len: int, original: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config.json of a model: of the first family that has exactly what it has.

    original  the config.json it once came from: its harmless keys are kept where the family is the same

    Raises UsageError naming what stands in the way of the family that comes nearest.
    """
    nearest: tuple[Family, dict[str, tuple[Any, Any]]] | None = None
    kind = (original or {}).get("model_type")
    for family in sorted(FAMILIES, key=lambda f: f.model_type != kind):
        found = _as_family(model, seq_len, family, original if family.model_type == kind else None)
        if found is None:
            continue
        other, _ = model_section(found, "the export")
        changed = differences(model, other)
        if not changed:
            return found
        if nearest is None or len(changed) < len(nearest[1]):
            nearest = (family, changed)
    if nearest is None:
        raise UsageError(f"model.family is {model.family}, and no Hugging Face family here is of that kind: export text models")
    family, changed = nearest
    said = ", ".join(f"model.{k} is {mine!r} (it has {theirs!r})" for k, (mine, theirs) in changed.items())
    raise UsageError(f"no Hugging Face family has what this model has; {family.model_type} comes nearest, but {said}")


def _as_family(model: Model, seq_len: int, family: Family, original: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The model's values under the family's keys; None where it is not even of its kind."""
    flat = {**flatten(model.model_dump(mode="json")), **({"moe.num_experts": None} if model.moe is None else {})}
    if model.family != family.ours.get("family", "decoder") or (model.moe is None) == any(k.ours.startswith("moe.") for k in family.keys):
        return None
    config: dict[str, Any] = {k: v for k, v in (original or {}).items() if k in HARMLESS}
    config |= {"architectures": [family.architecture], "model_type": family.model_type}
    for key in family.keys:
        value = flat.get(key.ours)
        if key.values is not None:
            value = next((t for t, o in key.values.items() if o == value), key.default)
        config[key.theirs] = value
    if config.get("head_dim") is None or (family.model_type == "olmo2" and model.head_dim == model.hidden_size // model.num_heads):
        config.pop("head_dim", None)
    config |= {key: allowed[0] for key, allowed in family.fixed.items()}
    config[family.length] = seq_len if family.theta is None else (original or {}).get(family.length, seq_len)
    if family.model_type == "t5":
        config |= hf_t5.keys(model)
    if family.segments is not None:
        config.setdefault("type_vocab_size", 2)
    if family.theta is not None:
        config |= _rope_keys(model, "rope_parameters" in (original or {}))
    if family.window != "never":
        config["sliding_window"] = model.sliding_window
    if family.window == "asked":
        kind = "full_attention" if model.sliding_window is None else "sliding_attention"
        config |= {"use_sliding_window": model.sliding_window is not None, "max_window_layers": 0, "layer_types": [kind] * model.num_layers}
    return config


def _rope_keys(model: Model, as_parameters: bool) -> dict[str, Any]:
    scaling = model.rope_scaling
    if scaling is None:
        return (
            {"rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta}}
            if as_parameters
            else {"rope_theta": model.rope_theta}
        )
    given: dict[str, Any] = {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type != "linear":
        given["original_max_position_embeddings"] = scaling.original_seq_len
    if scaling.type == "llama3":
        given |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.type == "yarn":
        given |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        given |= {} if scaling.attention_factor is None else {"attention_factor": scaling.attention_factor}
    if as_parameters:
        return {"rope_parameters": {**given, "rope_theta": model.rope_theta}}
    return {"rope_theta": model.rope_theta, "rope_scaling": given}
