"""YAML 1.2 file + `section.key=value` overrides → a validated `Config`; every mistake becomes one readable sentence."""

from __future__ import annotations

import datetime
import difflib
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from megascale.config.bounds import NUMBER, TOO_DEEP, check_document, check_values, read_small_file
from megascale.config.paths import check_paths
from megascale.config.saved import hint_of_newer, plugins_of_run
from megascale.config.schema import Config, DataSource, Kind
from megascale.config.schema.section import types_in
from megascale.errors import UsageError
from megascale.plugins import gone, nearest

# Other systems' names, in lower case with underscores: too different in spelling for a nearest match.
ELSEWHERE = {
    # Megatron-LM
    "tensor_model_parallel_size": "parallel.tp",
    "pipeline_model_parallel_size": "parallel.pp",
    "context_parallel_size": "parallel.cp",
    "expert_model_parallel_size": "parallel.ep",
    "expert_tensor_parallel_size": "parallel.etp",
    "sequence_parallel": "parallel.tp_sequence",
    "num_layers_per_virtual_pipeline_stage": "parallel.pp_virtual",
    "virtual_pipeline_model_parallel_size": "parallel.pp_virtual",
    "recompute_granularity": "parallel.recompute",
    "ffn_hidden_size": "model.ffn_size",
    "kv_channels": "model.head_dim",
    "num_attention_heads": "model.num_heads",
    "num_query_groups": "model.num_kv_heads",
    "seq_length": "train.seq_len",
    "max_position_embeddings": "train.seq_len",
    "train_iters": "train.steps",
    "clip_grad": "train.clip",
    "eval_interval": "train.eval_every",
    "eval_iters": "train.eval_steps",
    "log_interval": "train.log_every",
    "lr_warmup_iters": "optim.warmup_steps",
    "lr_decay_style": "optim.decay",
    "lr_decay_iters": "optim.decay_steps",
    "save_interval": "checkpoint.every",
    "load": "checkpoint.resume",
    "data_path": "data.train",
    "layernorm_epsilon": "model.norm_eps",
    "rotary_base": "model.rope_theta",
    "init_method_std": "model.init_std",
    "qk_layernorm": "model.qk_norm",
    "moe_router_topk": "model.moe.top_k",
    "moe_router_num_groups": "model.moe.groups",
    "moe_router_group_topk": "model.moe.top_groups",
    "moe_router_topk_scaling_factor": "model.moe.routed_scale",
    "untie_embeddings_and_output_weights": "model.tie_embeddings",
    # Hugging Face
    "num_hidden_layers": "model.num_layers",
    "n_layer": "model.num_layers",
    "n_embd": "model.hidden_size",
    "n_head": "model.num_heads",
    "d_model": "model.hidden_size",
    "decoder_layers": "model.num_layers",
    "share_encoder_decoder_embeddings": "model.share_embeddings",
    "max_source_length": "train.source_len",
    "max_target_length": "train.seq_len",
    "noise_density": "data.mask_fraction",
    "mean_noise_span_length": "data.mean_span",
    "num_key_value_heads": "model.num_kv_heads",
    "intermediate_size": "model.ffn_size",
    "hidden_act": "model.ffn",
    "rms_norm_eps": "model.norm_eps",
    "layer_norm_eps": "model.norm_eps",
    "tie_word_embeddings": "model.tie_embeddings",
    "initializer_range": "model.init_std",
    "num_local_experts": "model.moe.num_experts",
    "num_experts_per_tok": "model.moe.top_k",
    "n_group": "model.moe.groups",
    "topk_group": "model.moe.top_groups",
    "routed_scaling_factor": "model.moe.routed_scale",
    "norm_topk_prob": "model.moe.renormalize",
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.decay",
    "max_steps": "train.steps",
    "max_grad_norm": "train.clip",
    "per_device_train_batch_size": "train.micro_batch_size",
    "gradient_checkpointing": "parallel.recompute",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep_last",
    "resume_from_checkpoint": "checkpoint.resume",
    # TorchTitan, DeepSpeed, and common names
    "optimizer": "optim",
    "training": "train",
    "trainer": "train",
    "parallelism": "parallel",
    "lr_scheduler": "optim.decay",
    "activation_checkpoint": "parallel.recompute",
    "tensor_parallel": "parallel.tp",
    "tensor_parallel_size": "parallel.tp",
    "pipeline_parallel_size": "parallel.pp",
    "context_parallel_degree": "parallel.cp",
    "expert_parallel_degree": "parallel.ep",
    "data_parallel_shard_degree": "parallel.dp_shard",
    "data_parallel_replicate_degree": "parallel.dp_replicate",
    "tensor_parallel_degree": "parallel.tp",
    "pipeline_parallel_degree": "parallel.pp",
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_clipping": "train.clip",
}


MISTAKES = 20  # listed in one message
# A config has one key of each pair: setting it on the command line removes the other from the file.
ONE_OF = (("train", "steps", "tokens"),)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Reads `path`, applies overrides in order, validates. Raises UsageError naming the key, the value and the fix."""
    config = build_from(Path(path), apply_overrides(read_yaml(Path(path)), overrides))
    check_paths(config)
    return config


def build_from(path: Path | None, values: dict[str, Any]) -> Config:
    """`build_config` of what a file says, whose version is told where that may be why it is not understood."""
    try:
        return build_config(values)
    except UsageError as error:
        newer = None if path is None else hint_of_newer(path)
        if newer is None:
            raise
        raise UsageError(f"{error}\n  {newer}") from None


def build_config(values: dict[str, Any], plugins: Mapping[str, str] | None = None) -> Config:
    """Nested plain values → `Config`. `plugins`: those of the checkpoint that the values come from; as the run's own one says if None."""
    check_values(values)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        found = _of_the_kind_meant(error.errors())
        lines = [_sentence(item) for item in found[:MISTAKES]]
        if len(found) > MISTAKES:
            lines.append(f"… and {len(found) - MISTAKES:,} more")
        if any(e["type"] == "row_name" for e in found) and (absent := gone(plugins_of_run(values) if plugins is None else plugins)):
            lines.append(f"the checkpoint there is was {absent}")
        raise UsageError("\n  ".join(["the config cannot be used:", *lines])) from None


def _of_the_kind_meant(errors: list[Any]) -> list[Any]:
    """Drops the errors that a list or section is not text where others say what is wrong inside it."""

    def beside(error: Any) -> bool:
        place = error["loc"][:-1]
        return any(e is not error and e["loc"][: len(place)] == place for e in errors)

    return [e for e in errors if not (e["loc"][-1:] == ("str",) and isinstance(e.get("input"), list | dict) and beside(e))]


def parse_yaml(text: str) -> Any:
    """Parses one YAML 1.2 document, so 1e-3 is a number and `no` a word. Raises ValueError if invalid, UsageError if too large."""
    try:
        constructor, _ = YAML(typ="safe", pure=True).get_constructor_parser(io.StringIO(text))
        root = constructor.composer.get_single_node()
        check_document(root)
        return None if root is None else constructor.construct_document(root)
    except RecursionError:
        raise UsageError(TOO_DEEP) from None
    # ruamel's constructors do not check what they look up and take apart: `!!bool maybe` is a KeyError.
    except (YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        wrong = None if isinstance(error, YAMLError) else _wrong_scalar(root)
        raise ValueError(wrong or " ".join(f"{error}".split())) from None


def _wrong_scalar(root: Node) -> str | None:
    """The first scalar that its tag cannot read, and its line."""
    constructor, _ = YAML(typ="safe", pure=True).get_constructor_parser(io.StringIO())  # one that has not failed yet
    nodes, seen = [root], set[int]()
    while nodes:
        node = nodes.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, ScalarNode):
            try:
                constructor.construct_object(node, deep=True)
            except (YAMLError, ValueError, LookupError, TypeError, AttributeError):
                return f"{_short(node.value)} in line {node.start_mark.line + 1} cannot be read as {str(node.tag).rsplit(':', 1)[-1]}"
        elif isinstance(node, MappingNode):
            nodes += [child for pair in reversed(node.value) for child in reversed(pair)]
        elif isinstance(node, SequenceNode):
            nodes += reversed(node.value)
    return None


def to_yaml(values: dict[str, Any]) -> str:
    """Plain values as YAML, keys in their order."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    out = io.StringIO()
    yaml.dump(values, out)
    return out.getvalue()


def read_yaml(path: Path, kind: str = "config file") -> dict[str, Any]:
    """Reads a YAML file whose top level is a mapping; `kind` is what messages call it. Raises UsageError naming file and line."""
    try:
        text = read_small_file(path)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UsageError(f"there is no {kind} {path}{hint}") from None
    try:
        values = parse_yaml(text)
        if not isinstance(values, dict):
            raise UsageError(f"it holds a {type(values).__name__}, not sections such as `model:` and `train:`")
        check_values(values)
    except ValueError as error:
        raise UsageError(f"{path} is not valid YAML 1.2: {error}") from None
    except UsageError as error:
        raise UsageError(f"{path} cannot be used: {error}") from None
    return values


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Sets `section.key=value` in nested values; `grow=[…]`, `phases=[…]` and `evaluate=[…]` have no section. Values are YAML 1.2. Returns
    new dicts.
    """
    result, given = _copy(values), list(overrides)
    for item in given:
        key, equals, text = item.partition("=")
        path = key.strip().removeprefix("--").split(".")
        if not equals or not all(path) or (len(path) < 2 and path not in (["grow"], ["phases"], ["evaluate"])):
            raise UsageError(f"cannot use the argument {_short(item)}: write section.key=value, for example train.steps=100{_suggest(key)}")
        try:
            value = parse_yaml(text) if text.strip() else None
        except ValueError:
            value = text
            digits = text.strip().lstrip("+-")
            if digits.isdecimal() and not _takes_text(path):
                raise UsageError(f"{'.'.join(path)} is a number of {len(digits):,} digits: whole numbers go to {NUMBER:.0e} here") from None
        except UsageError as error:
            raise UsageError(f"{'.'.join(path)} cannot be used: {error}") from None
        if isinstance(value, int | float | datetime.date) and _takes_text(path):
            value = text.strip()  # 007, 1e3 and 2024-11-30 are valid names
        node = result
        for part in path[:-1]:
            child = node.get(part)
            if child is None:
                child = node[part] = {}
            if not isinstance(child, dict):
                raise UsageError(f"cannot set {'.'.join(path)}: {part} is {_short(child)}, not a section")
            node = child
        node[path[-1]] = value
    asked = {item.partition("=")[0].strip().removeprefix("--") for item in given}
    for section, *pair in ONE_OF:
        for key, other in (pair, pair[::-1]):
            there = result.get(section)
            if f"{section}.{key}" in asked and f"{section}.{other}" not in asked and isinstance(there, dict) and there.get(key) is not None:
                there.pop(other, None)
    return result


def known_keys() -> list[str]:
    """Every key of the config as `section.key`."""
    return [".".join(p) for p in _keys(Config, ())]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts → {"section.key": value}; lists are values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, name + ".") if isinstance(value, dict) else {name: value})
    return flat


def _takes_text(path: list[str]) -> bool:
    """Whether the key accepts any word; a key with a fixed set of choices does not."""
    model: type[BaseModel] | None = Config
    kinds: tuple[Any, ...] = ()
    for part in path:
        field = None if model is None else next((f for n, f in model.model_fields.items() if part in (n, f.alias)), None)
        if field is None:
            return False
        kinds = (field.annotation, *get_args(field.annotation))
        model = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
    return str in (kinds[1:] if get_origin(kinds[0]) in (Union, UnionType) else kinds[:1])


def _copy(values: dict[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, dict) else v for k, v in values.items()}


def _keys(model: type[BaseModel], prefix: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        path = (*prefix, field.alias or name)
        inner = [
            a
            for a in (field.annotation, *(get_args(field.annotation) if get_origin(field.annotation) else ()))
            if isinstance(a, type) and issubclass(a, BaseModel)
        ]
        if inner:
            yield from _keys(inner[0], path)
        yield path


def _suggest(key: str) -> str:
    """ "; did you mean …?" for an unknown key: other systems' names first, then the nearest spelling."""
    plain = key.removeprefix("--").replace("-", "_").lower()
    last = plain.rsplit(".", 1)[-1]
    if last in ELSEWHERE:
        return f"; here it is called {ELSEWHERE[last]}"
    keys = [k for k in known_keys() if "." in k or "." not in plain]  # a dotted key is not a section
    near = difflib.get_close_matches(plain, keys, 1, 0.75)
    if not near:
        by_last = {k.rsplit(".", 1)[-1]: k for k in reversed(keys)}
        near = [by_last[m] for m in difflib.get_close_matches(last, list(by_last), 1, 0.6)]
    return f"; did you mean {near[0]}?" if near else "; `--dry-run --show-config` prints every key"


def _sentence(error: Any) -> str:
    """One pydantic error as: key, what is wrong, the value given, what is accepted."""
    # The location also names the types of a union's members; only real keys help the reader.
    parts = [str(p) for p in error["loc"] if not str(p).startswith(("list[", "function-", "DataSource", "literal["))]
    parts = [p for p in parts if p not in ("str", "int", "float", "bool")]
    key, value, kind = ".".join(parts), error.get("input"), error["type"]
    if kind == "extra_forbidden" and ":" in parts[-1]:
        return f"unknown key {key}: in YAML a space follows the colon: {{{parts[-1].replace(':', ': ', 1)}}}"
    if kind == "extra_forbidden" and "DataSource" in error["loc"]:
        near = difflib.get_close_matches(parts[-1], DataSource.model_fields, 1, 0.6)
        hint = f"did you mean {key.rpartition('.')[0]}.{near[0]}?" if near else f"a source has {', '.join(DataSource.model_fields)}"
        return f"unknown key {key} (= {_short(value)}); {hint}"
    if kind == "extra_forbidden" and parts[:2] == ["model", "kinds"]:
        fields, where = _fields_of_kind(parts[3:-1]), key.rpartition(".")[0]
        near = difflib.get_close_matches(parts[-1], fields, 1, 0.6)
        own = f"{where} has" if parts[3:-1] else "layers may differ in"
        hint = f"did you mean {where}.{near[0]}?" if near else f"{own} {', '.join(fields)}"
        return f"unknown key {key} (= {_short(value)}); {hint}"
    if kind == "extra_forbidden":
        return f"unknown key {key} (= {_short(value)}){_suggest(key)}"
    if kind == "missing":
        return f"{key} is required but missing"
    if kind == "value_error":
        return f"{key}: {error['ctx']['error']}"
    if kind in ("literal_error", "row_name"):
        return f"{key} is {_short(value)}: {_choice(error)}"
    text = error["msg"].replace("Input should be", "it should be").replace("a valid ", "").replace("should be tuple", "should be a list")
    if kind == "string_type" and isinstance(value, int | float):
        return f"{key} is {_short(value)}, but it must be text: put it in quotes"
    if kind == "model_type":
        return f"{key} is {_short(value)}: it should be a section with keys of its own"
    return f"{key} is {_short(value)}: {text}"


def _fields_of_kind(path: list[str]) -> Any:
    """The keys of a kind of layers, or of a section inside it."""
    section: Any = Kind
    for part in path:
        section = next(t for t in types_in(section.model_fields[part].annotation) if hasattr(t, "model_fields"))
    return section.model_fields


def _choice(error: Any) -> str:
    """The choices of a key, and the nearest to what was given."""
    expected, value = error["ctx"]["expected"], error["input"]
    near = nearest(value, re.findall(r"'([^']*)'", expected)) if isinstance(value, str) else ""
    asked = ""
    if error["type"] == "row_name" and not near:
        asked = f"; plugins may add more (installed: {error['ctx']['plugins']})"
    return f"it should be {expected}{near}{asked}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
