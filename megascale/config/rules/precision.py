"""FP8, unit scaling and its effect on optimizers."""

from __future__ import annotations

from megascale.config.optimizers import optimizers, rows_of
from megascale.config.rules.rule import Rule
from megascale.config.schema import Config, Optim
from megascale.config.stages import SPLIT_BACKWARD

LARGEST_DECAY = 0.02  # per step
TRANSFERRED = [("pre", "decoder", "dense", name) for name in ("adamw", "lion")]
LARGEST_BF16_BETA = 0.996
ALIGNED = 16  # CUDA's FP8 products need every dimension to be a multiple of it

PRECISION_RULES: tuple[Rule, ...] = (
    Rule(
        "reduce_engine",
        ("precision.reduce", "parallel.engine"),
        lambda c, n: c.precision.reduce is not None and c.parallel.engine != "fsdp2",
        "only FSDP2 sums gradients in another format than the weights'",
        "use parallel.engine fsdp2, or leave reduce out",
    ),
    Rule(
        "fp8_static",
        ("precision.fp8", "model.residual"),
        lambda c, n: c.precision.fp8 == "static" and not c.model.residual_row.unit_scaled,
        "static FP8 scales need a unit-scaled model",
        "use model.residual mus, or precision.fp8 dynamic, which measures its scales",
    ),
    Rule(
        "fp8_compute",
        ("precision.fp8", "precision.compute"),
        lambda c, n: c.precision.fp8 != "false" and c.precision.compute == "fp64",
        "FP8 products return bf16 or fp32",
        "use precision.compute bf16 or fp32",
    ),
    Rule(
        "fp8_hidden_size",
        ("precision.fp8", "model.hidden_size"),
        lambda c, n: _unaligned(c, c.model.hidden_size),
        f"FP8 products need multiples of {ALIGNED}",
        "choose such a hidden_size",
    ),
    Rule(
        "fp8_heads",
        ("precision.fp8", "model.num_heads", "model.num_kv_heads", "model.head_dim", "model.attention_gate", "parallel.tp"),
        lambda c, n: (
            (widths := c.model.attention_row.widths) is not None
            and c.model.attention_sized
            and _unaligned(c, *widths(c.model, c.parallel.tp))
        ),
        f"FP8 products need a multiple of {ALIGNED} for head_dim × a rank's query heads, and × its KV heads, and for a gate's rows",
        "choose such sizes, a smaller tp, or attention_gate channel",
    ),
    Rule(
        "fp8_attention",
        ("precision.fp8", "model.attention"),
        lambda c, n: c.precision.fp8 != "false" and c.model.attention_row.widths is None,
        "this kind of attention does not say how wide its products are, which FP8 must know",
        "use model.attention grouped, or precision.fp8 false",
    ),
    Rule(
        "fp8_ffn",
        ("precision.fp8", "model.ffn_size", "parallel.tp"),
        lambda c, n: _unaligned(c, c.model.ffn_size // c.parallel.tp),
        f"FP8 products need a multiple of {ALIGNED} for a rank's part of the feed-forward width",
        "choose such a ffn_size, or a smaller tp",
    ),
    Rule(
        "fp8_experts",
        ("precision.fp8", "model.moe.ffn_size", "parallel.etp"),
        lambda c, n: c.model.moe is not None and _unaligned(c, (c.model.moe.ffn_size or 0) // c.parallel.expert_tp),
        f"FP8 products need a multiple of {ALIGNED} for a rank's part of an expert's width",
        "choose such a moe.ffn_size, or a smaller etp",
    ),
    Rule(
        "fp8_linear",
        ("precision.fp8", "model.linear", "model.family"),
        lambda c, n: c.precision.fp8 != "false" and (c.model.linear != "dense" or c.model.family == "spacetime"),
        "quantized products and blocks over grids have no FP8 form",
        "use model.linear dense and a text family, or precision.fp8 false",
    ),
    Rule(
        "fp8_dynamic_parts",
        ("precision.fp8", "model.moe", "parallel.pp_schedule"),
        lambda c, n: (
            c.precision.fp8 == "dynamic" and (c.model.moe is not None or (c.parallel.pp > 1 and c.parallel.pp_schedule in SPLIT_BACKWARD))
        ),
        "dynamic FP8 scales do not support experts or split-backward schedules",
        "use precision.fp8 static with model.residual mus, no experts, or another schedule",
    ),
    Rule(
        "fp8_engine",
        ("precision.fp8", "parallel.engine", "parallel.offload"),
        lambda c, n: c.precision.fp8 != "false" and (c.parallel.engine == "deepspeed" or "parameters" in c.parallel.offload),
        "FP8 products need their weights on the device, from FSDP2, DDP or one process",
        "use engine fsdp2 or ddp without offload of parameters",
        True,
    ),
    Rule(
        "fp8_recipe",
        ("precision.fp8_recipe", "precision.fp8"),
        lambda c, n: c.precision.fp8_recipe != "tensorwise" and c.precision.fp8 != "dynamic",
        "fp8_recipe chooses per-tensor or per-row scales for precision.fp8 dynamic only",
        "leave fp8_recipe out, or use precision.fp8 dynamic",
    ),
    Rule(
        "loss_scale",
        ("precision.loss_scale", "precision.fp8"),
        lambda c, n: c.precision.loss_scale is not None and c.precision.fp8 != "static",
        "loss_scale applies to static FP8 only",
        "remove loss_scale, or use precision.fp8 static",
    ),
    Rule(
        "base_width",
        ("optim.base_width", "optim.base_depth", "optim.transfer", "model.residual"),
        lambda c, n: (
            (c.optim.base_width is not None and not c.model.residual_row.unit_scaled and c.optim.transfer_width is None)
            or (c.optim.base_depth is not None and c.optim.transfer_depth is None)
        ),
        "learning rates are transferred between widths under unit scaling or optim.transfer, and between depths under optim.transfer only",
        "remove base_width and base_depth, set transfer.width or transfer.depth, or use model.residual mus",
    ),
    Rule(
        "transfer_base",
        ("optim.transfer", "optim.base_width", "optim.base_depth"),
        lambda c, n: _without_base(c.optim),
        "rates are transferred from the sizes for which they were tuned",
        "set base_width for transfer.width, and base_depth for transfer.depth",
    ),
    Rule(
        "transfer_model",
        ("optim.transfer", "model.residual", "model.family", "model.linear", "model.moe", "optim.name", "parallel.engine", "grow"),
        lambda c, n: (
            c.optim.transfer is not None
            and (
                (c.model.residual, c.model.family, c.model.linear, c.optim.name) not in TRANSFERRED
                or c.model.moe is not None
                or c.parallel.engine == "deepspeed"
                or bool(c.grow)
            )
        ),
        "rules for the transfer of rates are known for dense pre-norm decoders under AdamW and Lion",
        "use model.residual pre with dense products, optim.name adamw or lion and engine fsdp2 or ddp, without moe and grow; or remove "
        "transfer",
    ),
    Rule(
        "mus_optimizer",
        ("model.residual", "optim.name"),
        lambda c, n: c.model.residual_row.unit_scaled and not optimizers()[c.optim.name].unit_scaling,
        "steps of this optimizer do not follow weights of unit variance",
        "use optim.name adamw, lion or muon",
    ),
    Rule(
        "muon_settings",
        ("optim.muon", "optim.name"),
        lambda c, n: c.optim.muon is not None and not optimizers()[c.optim.name].muon,
        "optim.muon has the settings of matrices that are orthogonalized",
        "use optim.name muon or normuon, or remove muon",
    ),
    Rule(
        "own_average",
        ("optim.name", "optim.decay", "optim.betas", "precision.master"),
        lambda c, n: (
            optimizers()[c.optim.name].average is not None
            and (c.optim.decay != "constant" or c.optim.betas[0] == 0 or c.precision.storage == "bf16")
        ),
        "this optimizer is evaluated at an average of its weights, which takes the place of a decay and divides by the first beta, and "
        "whose steps bf16 would round away",
        "set optim.decay constant, a first beta above 0, and leave precision.master out",
    ),
    Rule(
        "moments",
        ("optim.moments", "optim.name"),
        lambda c, n: c.optim.moments is not None and not all(row.small_moments for row in rows_of(c.optim.name)),
        "smaller moments are AdamW's",
        "use optim.name adamw, or remove moments",
    ),
    Rule(
        "moments_decay",
        ("optim.moments", "optim.betas"),
        lambda c, n: c.optim.moments == "bf16" and max(c.optim.betas) > LARGEST_BF16_BETA,
        "a moment in bf16 decays only if 1 − β is more than half the spacing of its numbers, 1/256",
        f"set both betas to at most {LARGEST_BF16_BETA}, or use moments int8 or none",
    ),
    Rule(
        "moments_growth",
        ("optim.moments", "grow"),
        lambda c, n: c.optim.moments == "int8" and bool(c.grow),
        "growth does not know how blocks of 8-bit moments grow",
        "use moments bf16, or remove grow",
    ),
    Rule(
        "mus_decay",
        ("model.residual", "optim.weight_decay", "optim.independent_decay"),
        lambda c, n: c.model.residual_row.unit_scaled and c.optim.weight_decay > 0 and not c.optim.independent_decay,
        "weight decay multiplied by the learning rate would change with the width; unit scaling needs one that does not",
        "set optim.independent_decay true and weight_decay to the fraction removed per step at the peak learning rate, such as 1e-4; or "
        "weight_decay 0",
    ),
    Rule(
        "decay_a_step",
        ("optim.independent_decay", "optim.weight_decay"),
        lambda c, n: c.optim.independent_decay and c.optim.weight_decay > LARGEST_DECAY,
        f"with independent_decay, weight_decay is the fraction removed from a weight per step, and more than {LARGEST_DECAY} would keep "
        "the model from learning",
        "set weight_decay to about optim.lr times the usual one, such as 1e-4",
    ),
)


def _without_base(optim: Optim) -> bool:
    """Whether rates are to be transferred along a size whose base is not given."""
    t = optim.transfer
    return t is not None and ((t.width is not None and optim.base_width is None) or (t.depth is not None and optim.base_depth is None))


def _unaligned(c: Config, *widths: int) -> bool:
    return c.precision.fp8 != "false" and any(width % ALIGNED for width in widths)
