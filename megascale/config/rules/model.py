"""Rules about models: families, residual schemes, feed-forwards."""

from __future__ import annotations

import re

from megascale.config.rules.pairs import spans_asked
from megascale.config.rules.rule import Rule, grid
from megascale.config.schema import AHEAD_NORMS, BLOCK_NORMS, OUTER_NORMS, Config, Model
from megascale.config.stages import SPLIT_BACKWARD

ENCODERS = ("encoder", "encoder_decoder")  # families with bidirectional attention

MODEL_RULES: tuple[Rule, ...] = (
    Rule(
        "encoder_position",
        ("model.family", "model.position"),
        lambda c, n: c.model.family in ENCODERS and c.model.position_row.one_way,
        "xPos and ALiBi depend on the distance to past tokens, but an encoder attends in both directions",
        "use rope or learned",
    ),
    Rule(
        "encoder_window",
        ("model.family", "model.sliding_window"),
        lambda c, n: c.model.family in ENCODERS and c.model.sliding_window is not None,
        "the window covers past tokens only, but an encoder attends in both directions",
        "remove sliding_window",
    ),
    Rule(
        "encoder_attention",
        ("model.family", "model.attention"),
        lambda c, n: c.model.family in ENCODERS and not c.model.attention_row.both_ways,
        "this kind of attention looks at past tokens only, but an encoder attends in both directions",
        "use attention grouped, or family decoder",
    ),
    Rule(
        "relative_context",
        ("model.position", "parallel.cp"),
        lambda c, n: c.model.position_row.distances and c.parallel.cp > 1,
        "relative position biases are computed for whole sequences, but cp splits sequences over ranks",
        "set cp to 1; tp with tp_sequence splits sequences outside attention",
        True,
    ),
    Rule(
        "mask_fraction",
        ("data.mask_fraction", "model.family", "data.objective"),
        lambda c, n: c.data.mask_fraction is not None and c.model.family != "encoder" and not spans_asked(c),
        "only an encoder, or an encoder_decoder with objective span_corruption, is trained on masked tokens",
        "remove mask_fraction, or use family encoder, or encoder_decoder with objective span_corruption",
    ),
    Rule(
        "mask_token",
        ("data.mask_token", "model.family"),
        lambda c, n: c.data.mask_token is not None and c.model.family != "encoder",
        "only an encoder has one mask token that replaces the tokens to predict",
        "remove mask_token, or use family encoder",
    ),
    Rule(
        "spacetime_fields",
        ("model.family", "model.spacetime"),
        lambda c, n: (c.model.family == "spacetime") != (c.model.spacetime is not None),
        "model.spacetime describes the grid; set it exactly when model.family is spacetime",
        "give both or neither",
    ),
    Rule(
        "spacetime_tokens",
        ("model.spacetime", "train.seq_len"),
        lambda c, n: grid(c) and c.train.seq_len != c.model.spacetime.tokens,  # type: ignore[union-attr]
        "a sample has one token per patch of its grid, which is the product of shape ÷ patch",
        "set train.seq_len to that product",
    ),
    Rule(
        "spacetime_text",
        (
            "model.spacetime",
            "model.position",
            "model.sliding_window",
            "model.tie_embeddings",
            "model.embedding_factor",
            "model.head_scale",
            "train.packing",
        ),
        lambda c, n: (
            grid(c)
            and (
                not c.model.position_row.grid
                or c.model.sliding_window is not None
                or c.model.tie_embeddings
                or c.model.head_scale is not None
                or c.model.embedding_factor is not None
                or c.train.packing != "concat"
            )
        ),
        "sliding windows, packed documents, ALiBi, XPos, relative biases and vocabulary heads are for text only",
        "use position rope or learned, without sliding_window, tie_embeddings, embedding_factor and head_scale, and packing concat",
    ),
    Rule(
        "spacetime_texts",
        ("model.spacetime.text_len", "model.spacetime.text_vocab_size", "parallel.tp"),
        lambda c, n: grid(c) and not _texts_fit(c),
        "each sample comes with a text of text_len tokens; every tensor rank needs a row of its vocabulary, and tp_sequence splits its "
        "tokens",
        "set text_len and text_vocab_size together, with tp at most text_vocab_size and, under tp_sequence, text_len a multiple of tp",
    ),
    Rule(
        "spacetime_block",
        ("model.spacetime", "model.residual", "model.attention", "model.norm", "model.linear", "model.moe"),
        lambda c, n: (
            grid(c)
            and (
                not (c.model.residual_row.grid and c.model.attention_row.grid)
                or not c.model.norm_row.plain
                or c.model.linear != "dense"
                or c.model.moe is not None
            )
        ),
        "blocks over grids support only plain pre- or post-norm and grouped attention so far",
        "use residual pre or post, attention grouped, norm rmsnorm or layernorm, linear dense, and no moe",
    ),
    Rule(
        "mus_block",
        ("model.residual", "model.norm", "model.linear", "model.moe.init"),
        lambda c, n: (
            c.model.residual_row.unit_scaled
            and (not c.model.norm_row.divides or c.model.linear != "dense" or (c.model.moe is not None and c.model.moe.init != "model"))
        ),
        "unit scaling prescribes the initial weights and needs a norm that scales every branch to unit size",
        "use norm rmsnorm or layernorm, linear dense and moe.init model",
    ),
    Rule(
        "mus_tau",
        ("model.mus_tau", "model.residual"),
        lambda c, n: c.model.mus_tau is not None and "mus_tau" not in c.model.residual_row.reads,
        "only unit-scaled blocks have a τ",
        "remove mus_tau, or use residual mus",
    ),
    Rule(
        "branchnorm_period",
        ("model.residual", "model.branchnorm_period"),
        lambda c, n: ("branchnorm_period" in c.model.residual_row.reads) != (c.model.branchnorm_period is not None),
        "branchnorm_period is the number of steps over which branches are scaled up; only residual branchnorm uses it, and needs it",
        "set branchnorm_period (4000 is quoted from its paper; less for short runs) for branchnorm, or leave it out",
    ),
    Rule(
        "deepscale_unit",
        ("model.deepscale_unit", "model.residual"),
        lambda c, n: c.model.deepscale_unit != "variance" and "deepscale_unit" not in c.model.residual_row.reads,
        "deepscale_unit chooses what DeepScaleLM's feed-forward keeps at unit size; other schemes have no such choice",
        "remove deepscale_unit, or use residual deepscale or deepscale_post",
    ),
    Rule(
        "ends_of_pairs",
        ("model.embedding_norm", "model.mlm_head", "model.family"),
        lambda c, n: (c.model.embedding_norm or c.model.mlm_head) and c.model.family not in ("decoder", "encoder"),
        "embedding_norm and mlm_head are only for text models with one stack",
        "use family encoder or decoder, or leave both out",
    ),
    Rule(
        "mlm_head_scaled",
        ("model.mlm_head", "model.residual", "model.head_scale"),
        lambda c, n: c.model.mlm_head and (c.model.residual_row.unit_scaled or c.model.head_scale is not None),
        "unit scaling and head_scale scale the input of the head, but the norm of mlm_head cancels any scale",
        "use another residual without head_scale, or leave mlm_head out",
    ),
    Rule(
        "norm_eps_of",
        ("model.norm_eps_of", "model.num_layers", "model.moeut"),
        lambda c, n: any(not _is_norm(c.model, name) for name in c.model.norm_eps_of),
        "norm_eps_of sets the epsilon of a norm by name: "
        + ", ".join(OUTER_NORMS)
        + ", or "
        + ", ".join(BLOCK_NORMS)
        + ", of all layers or of one existing layer (blocks.3.ffn_norm); MoEUT has one epsilon for all norms",
        "use such names, or leave norm_eps_of out",
    ),
    Rule(
        "layer_coefficients",
        ("model.layer_coefficients", "model.num_layers", "model.moeut"),
        lambda c, n: (
            c.model.layer_coefficients is not None
            and (len(c.model.layer_coefficients) != c.model.num_layers or c.model.moeut is not None or c.model.family == "encoder_decoder")
        ),
        "layer_coefficients needs one pair per layer, and MoEUT has none",
        "give num_layers pairs [skip, branch], or leave layer_coefficients out",
    ),
    Rule(
        "rope_exponents",
        ("model.rope_exponents", "model.position", "model.head_dim"),
        lambda c, n: (
            c.model.rope_exponents is not None
            and (not c.model.position_row.rotates or 2 * len(c.model.rope_exponents) != c.model.rotary_dim)
        ),
        "rope_exponents needs one exponent per rotated pair of channels",
        "give head_dim ÷ 2 of them with position rope or xpos, or leave rope_exponents out",
    ),
    Rule(
        "alibi_slopes",
        ("model.alibi_slopes", "model.position", "model.num_heads"),
        lambda c, n: (
            c.model.alibi_slopes is not None and (not c.model.position_row.slopes or len(c.model.alibi_slopes) != c.model.num_heads)
        ),
        "alibi_slopes needs one slope per head",
        "give num_heads of them with position alibi, or leave alibi_slopes out",
    ),
    Rule(
        "tokenformer",
        ("model.linear", "model.tokenformer", "model.residual", "parallel.tp", "precision.fp8"),
        lambda c, n: (
            (c.model.linear == "tokenformer") != (c.model.tokenformer is not None)
            or (c.model.tokenformer is not None and (c.model.residual_row.unit_scaled or c.parallel.tp > 1 or c.precision.fp8 != "false"))
            or (c.model.tokenformer is not None and (c.model.spacetime is not None or c.model.moeut is not None))
        ),
        "TokenFormer needs its number of parameter tokens and cannot be sharded by tp",
        "set model.linear tokenformer and model.tokenformer together, without unit scaling, FP8, tp, grids or MoEUT",
    ),
    Rule(
        "matformer",
        ("model.matformer", "model.ffn_size", "model.moe", "model.residual", "model.linear", "parallel.tp"),
        lambda c, n: (
            c.model.matformer is not None
            and (
                max(c.model.matformer.sizes, default=1) > c.model.ffn_size
                or c.model.moe is not None
                or c.model.residual_row.inner_norms
                or c.model.linear != "dense"
                or c.model.family in ("spacetime", "encoder_decoder")
                or c.model.ffn_sizes is not None
                or c.parallel.tp > 1
                or c.precision.fp8 != "false"
            )
        ),
        "MatFormer's nested widths are prefixes of one dense feed-forward, which must not be sharded",
        "choose sizes below ffn_size, without experts, inner norms, quantized products, FP8, ffn_sizes and tp",
    ),
    Rule(
        "matformer_sum",
        ("model.matformer", "parallel.pp", "parallel.pp_schedule", "parallel.accumulation", "parallel.recompute"),
        lambda c, n: (
            c.model.matformer is not None
            and (
                (
                    c.model.matformer.train == "sum"
                    and (c.parallel.pp > 1 or c.parallel.accumulation == "layered" or c.parallel.recompute != "none")
                )
                or (c.parallel.pp > 1 and c.parallel.pp_schedule in SPLIT_BACKWARD)
            )
        ),
        "split-backward schedules need full-width weights, pipeline stages run each micro-batch once, and recomputation would run at "
        "a different width",
        "set matformer.train to sample, and use a schedule without split backward, or data axes without recompute",
    ),
    Rule(
        "ffn_sizes",
        ("model.ffn_sizes", "model.num_layers", "model.moe", "model.family", "parallel.tp"),
        lambda c, n: (
            c.model.ffn_sizes is not None
            and (
                len(c.model.ffn_sizes) != c.model.num_layers
                or c.model.moe is not None
                or c.model.family in ("spacetime", "encoder_decoder")
                or any(f % c.parallel.tp for f in c.model.ffn_sizes)
            )
        ),
        "ffn_sizes needs one width per layer, each a multiple of tp, in a text model without experts",
        "give num_layers of them, or leave ffn_sizes out",
    ),
    Rule(
        "vocab_enabled",
        ("model.vocab_enabled", "model.vocab_size", "model.family"),
        lambda c, n: (
            c.model.vocab_enabled is not None
            and (c.model.spacetime is not None or c.model.vocab_enabled > (c.model.vocab_size or c.model.vocab_enabled))
        ),
        "vocab_enabled needs a text vocabulary of at least that size",
        "choose at most vocab_size, or leave vocab_enabled out",
    ),
)


def _is_norm(model: Model, name: str) -> bool:
    """Whether `model.norm_eps_of` may use the name."""
    if model.moeut is not None or model.family == "encoder_decoder":
        return False
    if name in OUTER_NORMS or name in BLOCK_NORMS:
        return True
    match = re.fullmatch(r"(blocks|mtp)\.(\d+)\.(\w+)", name)
    count, norms = (model.mtp_depth, AHEAD_NORMS) if match and match[1] == "mtp" else (model.num_layers, BLOCK_NORMS)
    return match is not None and int(match[2]) < count and match[3] in norms


def _texts_fit(config: Config) -> bool:
    fields, parallel = config.model.spacetime, config.parallel
    assert fields is not None
    if fields.text_len is None:
        return fields.text_vocab_size is None
    rows = fields.text_vocab_size is None or fields.text_vocab_size >= parallel.tp
    return rows and not (parallel.tp_sequence and fields.text_len % parallel.tp)
