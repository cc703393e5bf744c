"""Rules about latent and linear attention, sinks, caps and gates, partly rotated heads, multi-token prediction, and layers of different
kinds.
"""

from __future__ import annotations

from megascale.config.attentions import OPTIONS
from megascale.config.rules.rule import Rule, changed, grid
from megascale.config.schema import Config, Model

# Keys that only attention with a score for each pair of tokens reads.
PAIRWISE = (
    "rope_theta",
    "rope_fraction",
    "rope_interleaved",
    "rope_scaling",
    "rope_exponents",
    "alibi_slopes",
    "attention_scale",
    "sliding_window",
    "qk_norm",
    *OPTIONS,
)

KIND_RULES: tuple[Rule, ...] = (
    Rule(
        "latent",
        (
            "model.attention",
            "model.latent",
            "model.num_kv_heads",
            "model.qk_norm",
            "model.attention_bias",
            "model.residual",
            "model.rope_fraction",
        ),
        lambda c, n: ("latent" in c.model.attention_row.reads) != (c.model.latent is not None) or not _latent_fits(c),
        "latent attention has one key and value per query head, norms of its own and an even number of channels that rotate",
        "set attention latent and model.latent together (latent: null in kinds without it), leave num_kv_heads, qk_norm and rope_fraction "
        "out, with attention_bias true or false and a residual scheme without norms inside attention",
    ),
    Rule(
        "delta",
        ("model.attention", "model.delta", "model.residual"),
        lambda c, n: ("delta" in c.model.attention_row.reads) != (c.model.delta is not None) or not _delta_fits(c),
        "gated_delta needs its sizes, with value_heads a multiple of key_heads, and has norms of its own",
        "set attention gated_delta and model.delta together (delta: null in kinds without it), and a residual scheme without norms inside "
        "attention",
    ),
    Rule(
        "scanned_keys",
        ("model.kinds", *(f"model.{key}" for key in PAIRWISE)),
        lambda c, n: bool(_unread(c.model)),
        "attention that keeps a state has no positions, windows, scores nor heads of such sizes, and would ignore these keys",
        "leave them out of kinds with attention gated_delta, and out of models whose layers are all of it",
        whole=True,
    ),
    Rule(
        "attention_options",
        ("model.attention", *(f"model.{key}" for key in OPTIONS)),
        lambda c, n: (
            not c.model.attention_row.scans and any(changed(c.model, key) and key not in c.model.attention_row.options for key in OPTIONS)
        ),
        "this kind of attention does not say that it follows all of these keys",
        "leave out what is set of them, or use attention grouped or latent",
    ),
    Rule(
        "options_family",
        ("model.family", "model.moeut", *(f"model.{key}" for key in OPTIONS), "model.logit_softcap"),
        lambda c, n: (
            changed(c.model, *OPTIONS, "logit_softcap") and (c.model.family not in ("decoder", "encoder") or c.model.moeut is not None)
        ),
        "sinks, caps and gates are for text models with one stack; MoEUT has its own attention",
        "use family decoder or encoder without moeut, or leave these keys out",
    ),
    Rule(
        "rope_fraction",
        ("model.rope_fraction", "model.head_dim", "model.position", "model.moeut", "model.family"),
        lambda c, n: c.model.rope_fraction != 1.0 and not _rotates_part(c),
        "rope_fraction of a head's channels must be an even number, in a text model whose position rotates; MoEUT rotates half of them",
        "choose a fraction that gives an even number, or leave rope_fraction out",
    ),
    Rule(
        "mtp_family",
        ("model.mtp_depth", "model.family", "model.moeut", "model.matformer", "model.mlm_head", "model.position", "parallel.engine"),
        lambda c, n: c.model.mtp_depth > 0 and not _looks_ahead(c),
        "multi-token prediction is for decoders; MoEUT, MatFormer, mlm_head and relative positions have parts that it cannot share",
        "set mtp_depth to 0, or use family decoder without moeut, matformer and mlm_head, with another position and engine fsdp2 or ddp",
    ),
    Rule(
        "kinds_family",
        ("model.kinds", "model.family", "model.moeut", "model.matformer"),
        lambda c, n: (
            bool(c.model.kinds)
            and (c.model.family not in ("decoder", "encoder") or c.model.moeut is not None or c.model.matformer is not None)
        ),
        "layers of different kinds are for text models with one stack; MoEUT and MatFormer have one kind of layer",
        "use family decoder or encoder without moeut and matformer, or remove kinds and pattern",
        whole=True,
    ),
    Rule(
        "kinds_widths",
        ("model.kinds", "model.ffn_sizes"),
        lambda c, n: c.model.ffn_sizes is not None and any("ffn_size" in kind.model_fields_set for kind in c.model.kinds.values()),
        "ffn_sizes gives every layer its width, and a kind of layers has another",
        "leave ffn_sizes out, or ffn_size in kinds",
        whole=True,
    ),
    Rule(
        "interleaved",
        ("model.rope_interleaved", "model.position"),
        lambda c, n: c.model.rope_interleaved and not c.model.position_row.rotates,
        "only positions that rotate have channels to interleave",
        "use position rope or xpos, or leave rope_interleaved out",
    ),
    Rule(
        "kinds_tables",
        ("model.kinds", "model.position"),
        lambda c, n: any(_tables(m) != _tables(c.model) for m in c.model.variants.values()),
        "a table of positions belongs to the whole model: either all kinds of layers use it or none",
        "use only rope, alibi, xpos and none in kinds, or the model's own position",
        whole=True,
    ),
    Rule(
        "kinds_residual",
        ("model.kinds", "model.residual"),
        lambda c, n: any(_stream(m) != _stream(c.model) for m in c.model.variants.values()),
        "kinds of layers share one stream, and these residual schemes start or end it differently",
        "use schemes with the same start and end in one model, such as pre and parallel",
        whole=True,
    ),
)


def _latent_fits(config: Config) -> bool:
    model = config.model
    if model.latent is None:
        return True
    plain = not (model.qk_norm or model.residual_row.qk_norm or model.residual_row.inner_norms) and model.rope_fraction == 1.0
    return plain and model.num_kv_heads == model.num_heads and model.latent.rope_dim % 2 == 0 and model.attention_bias != "qkv"


def _delta_fits(config: Config) -> bool:
    sizes, scheme = config.model.delta, config.model.residual_row
    plain = not (scheme.qk_norm or scheme.inner_norms)
    return sizes is None or (plain and sizes.value_heads % sizes.key_heads == 0 and config.model.attention_bias != "qkv")


def _unread(model: Model) -> list[str]:
    """Keys of pairwise attention that are set where tokens meet through a state: in such a kind, or in a model of nothing else."""
    kinds = [kind.model_fields_set for name, kind in model.kinds.items() if model.of_kind(name).attention_row.scans]
    alone = all(m.attention_row.scans for m in model.variants.values())
    return [key for key in PAIRWISE if any(key in given for given in kinds) or (alone and changed(model, key))]


def _looks_ahead(config: Config) -> bool:
    """Whether the model can have multi-token prediction."""
    model = config.model
    own = model.moeut is not None or model.matformer is not None or model.position_row.distances or model.mlm_head
    return model.family == "decoder" and not own and config.parallel.engine != "deepspeed"


def _rotates_part(config: Config) -> bool:
    """Whether a model can rotate only a part of each head, in whole pairs of channels."""
    model = config.model
    plain = model.position_row.rotates and model.moeut is None and not grid(config)
    return plain and model.rotary_dim % 2 == 0 and model.rotary_dim >= 2


def _tables(model: Model) -> tuple[bool, int]:
    """Whether the model has a table of learned positions, and for how many heads one of biases by distance."""
    return model.position_row.table, model.num_heads * model.position_row.distances


def _stream(model: Model) -> tuple[object, ...]:
    """What a residual scheme decides for the whole stream."""
    row = model.residual_row
    return row.ends, row.final_norm, row.unit_scaled, row.reads
