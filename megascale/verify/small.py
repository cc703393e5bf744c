"""A config with its model made small: the same parts in the same order, a few channels, heads, experts and layers of each.

What decides how ranks split and exchange stays: kinds of layers and their pattern, grouped heads, experts with groups and shared ones, the
residual scheme, tied tables, windows, the optimizer. Whatever only makes the model large is cut.
"""

from __future__ import annotations

import math
from typing import Any

from megascale.config.load import build_config
from megascale.config.schema import Config

WIDTH, HEADS, HEAD_DIM, FFN, EXPERT_FFN = 32, 4, 8, 48, 16
LAYERS, SEQ_LEN, SOURCE_LEN, BATCH, STEPS = 4, 16, 8, 8, 3
VOCABULARY, SOURCE_VOCABULARY, ENABLED = 61, 43, 53  # primes, so that tables are padded
STD = 0.2  # of weights: at a few channels, smaller ones would leave the residual stream alone
Plain = dict[str, Any]


def small(config: Config) -> Config:
    """The small config, in fp64, for one process. Raises UsageError if it is no valid config."""
    plain = config.plain()
    model, optim = model_of(plain["model"]), dict(plain["optim"])
    optim |= {"lr": 1e-3, "warmup_steps": 0, "decay": "constant", "decay_steps": None, "multipliers": {}}
    if optim.get("base_width") is not None:
        optim["base_width"] = WIDTH // 2
    data = {k: v for k, v in plain["data"].items() if k in ("objective", "mask_fraction", "mean_span") and v is not None}
    train = {"steps": STEPS, "global_batch_size": BATCH, "seq_len": SEQ_LEN, "clip": 0.5, "packing": plain["train"]["packing"]}
    if model.get("spacetime") is not None:
        fields = model["spacetime"]
        train["seq_len"] = math.prod(n // p for n, p in zip(fields["shape"], fields["patch"]))
    if model.get("encoder_layers"):
        train["source_len"] = SOURCE_LEN
    return build_config(
        {
            "run": {"seed": 7, "kernels": "torch", "device": plain["run"]["device"]},
            "model": model,
            "train": train,
            "optim": optim,
            "data": {"train": "none", **data},
            "precision": {"compute": "fp64"},
        }
    )


def model_of(m: Plain) -> Plain:
    """The section `model`, as a resolved config has it, made small."""
    sized = {**block_of(m, m), **layers_of(m)}
    kinds = {name: block_of(kind, m) for name, kind in m.get("kinds", {}).items()}
    sized |= {"hidden_size": WIDTH, "init_std": STD, "relative_buckets": 6, "relative_distance": 7}
    if kinds:
        sized["kinds"] = kinds
    for key, size in (("vocab_size", VOCABULARY), ("source_vocab_size", SOURCE_VOCABULARY), ("vocab_enabled", ENABLED)):
        if key == "vocab_size" or m.get(key) is not None:
            sized[key] = size
    if m.get("spacetime") is not None:
        sized["spacetime"] = grid_of(m["spacetime"])
        sized["vocab_size"] = None
    if m.get("branchnorm_period") is not None:
        sized["branchnorm_period"] = 2 * STEPS
    return sized


def block_of(given: Plain, m: Plain) -> Plain:
    """The keys that shape a block; `given` has all of them, or those in which a kind differs from the model `m`."""
    found = dict(given)
    whole = {**m, **given}
    if "num_heads" in given or "num_kv_heads" in given:
        heads, kv = whole["num_heads"], whole["num_kv_heads"]
        found |= {"num_heads": HEADS, "num_kv_heads": HEADS if kv == heads else 1 if kv == 1 else HEADS // 2}
    if "head_dim" in given:
        found["head_dim"] = HEAD_DIM
    if "ffn_size" in given:
        found["ffn_size"] = FFN
    if given.get("latent") is not None:
        latent = given["latent"]
        found["latent"] = {**latent, "kv_rank": 16, "rope_dim": 4}
        found["latent"] |= {key: size for key, size in (("query_rank", 12), ("value_dim", HEAD_DIM)) if latent.get(key) is not None}
    if given.get("delta") is not None:
        grouped = given["delta"]["value_heads"] > given["delta"]["key_heads"]
        sizes = {"key_heads": HEADS, "value_heads": (2 if grouped else 1) * HEADS, "key_dim": 8, "value_dim": 8}
        found["delta"] = {**given["delta"], **sizes, "conv_size": min(4, given["delta"].get("conv_size", 4))}
    if given.get("sliding_window") is not None:
        found["sliding_window"] = min(5, given["sliding_window"])
    if given.get("rope_exponents") is not None:
        found["rope_exponents"] = spread(given["rope_exponents"], int(HEAD_DIM * whole.get("rope_fraction", 1.0)) // 2)
    if given.get("alibi_slopes") is not None:
        found["alibi_slopes"] = spread(given["alibi_slopes"], HEADS)
    if given.get("rope_scaling") is not None:
        found["rope_scaling"] = {**given["rope_scaling"], "original_seq_len": SEQ_LEN // 2}
    if given.get("moe") is not None:
        found["moe"] = experts_of(given["moe"], m.get("moe") or {})
    if given.get("tokenformer") is not None:
        found["tokenformer"] = {**given["tokenformer"], "tokens": 24, "scale": None}
    if given.get("matformer") is not None:
        found["matformer"] = {**given["matformer"], "sizes": [FFN // 2]}
    if given.get("moeut") is not None:
        found["moeut"] = {**given["moeut"], "group_size": 2, "attention_experts": 4, "attention_top_k": 2}
    return found


def experts_of(given: Plain, m: Plain) -> Plain:
    """Eight experts, or as few as there are, in up to four groups. `given` may be a kind's; `m` is the model's."""
    found, whole = dict(given), {**m, **given}
    count = min(8, whole.get("num_experts") or 8)
    limits = {"num_experts": count, "top_k": min(4 if count == 8 else 2, count), "num_shared": 2, "every": 2, "groups": min(4, count // 2)}
    for key, most in (*limits.items(), ("top_groups", 2)):
        if given.get(key) is not None:
            found[key] = min(given[key], most)
    if "ffn_size" in given:
        found["ffn_size"] = EXPERT_FFN
    if given.get("capacity_factor") is not None:
        found["capacity_factor"] = given["capacity_factor"]
    return found


def layers_of(m: Plain) -> Plain:
    """Four layers, or one whole pattern with what stands before and after it; settings of single layers for those that are left."""
    found: Plain = {}
    if m.get("kinds"):
        first, last = (tuple(dict.fromkeys(m[key])) for key in ("pattern_first", "pattern_last"))
        turn = tuple(m["pattern"])
        turns = max(1, -(-(LAYERS - len(first) - len(last)) // len(turn))) if turn else 0
        found |= {"pattern_first": first, "pattern_last": last, "num_layers": len(first) + turns * len(turn) + len(last)}
    else:
        found["num_layers"] = min(LAYERS, m["num_layers"]) if m.get("moeut") is None else LAYERS
    count = found["num_layers"]
    if m.get("encoder_layers") is not None:
        found["encoder_layers"] = min(LAYERS, m["encoder_layers"])
    if m.get("ffn_sizes") is not None:
        most = max(m["ffn_sizes"])
        found["ffn_sizes"] = [max(8, round(FFN * n / most / 8) * 8) for n in spread(m["ffn_sizes"], count)]
    if m.get("layer_coefficients") is not None:
        found["layer_coefficients"] = spread(m["layer_coefficients"], count)
    found["norm_eps_of"] = {key: eps for key, eps in m.get("norm_eps_of", {}).items() if not key.startswith("blocks.")}
    return found


def grid_of(fields: Plain) -> Plain:
    """A grid of at most four patches in each dimension."""
    patch = [min(2, p) for p in fields["patch"]]
    grid = [min(4, n // p) for n, p in zip(fields["shape"], fields["patch"])]
    found = {**fields, "patch": patch, "shape": [n * p for n, p in zip(grid, patch)], "channels": min(3, fields["channels"])}
    return found if fields.get("text_len") is None else {**found, "text_len": 6, "text_vocab_size": 31}


def spread(values: Any, count: int) -> list[Any]:
    """`count` of the values, the first and the last among them."""
    return [values[round(i * (len(values) - 1) / max(1, count - 1))] for i in range(count)]
