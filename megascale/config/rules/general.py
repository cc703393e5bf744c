"""Sizes that must divide, precision, data."""

from __future__ import annotations

from megascale.config.decays import decays
from megascale.config.rules.rule import Rule

GENERAL_RULES: tuple[Rule, ...] = (
    Rule(
        "evaluate_family",
        ("model.family", "evaluate"),
        lambda c, n: c.model.family != "decoder" and bool(c.evaluate),
        "evaluations score the continuation of a text, which only a decoder gives",
        "leave evaluate out, or choose family decoder",
        whole=True,
    ),
    Rule(
        "evaluate_names",
        ("evaluate",),
        lambda c, n: len({e.name for e in c.evaluate}) < len(c.evaluate),
        "two evaluations have the same name, and metrics know them by it",
        "give each a name of its own",
        whole=True,
    ),
    Rule(
        "ddp_shard",
        ("parallel.engine", "parallel.dp_shard"),
        lambda c, n: c.parallel.engine == "ddp" and c.parallel.dp_shard > 1,
        "DDP replicates the model and cannot shard it",
        "put the ranks on parallel.dp_replicate, or use engine fsdp2",
    ),
    Rule(
        "kv_heads",
        ("model.num_heads", "model.num_kv_heads"),
        lambda c, n: c.model.num_heads % c.model.num_kv_heads != 0,
        "each KV head serves an equal group of query heads",
        "choose num_kv_heads that divides num_heads",
    ),
    Rule(
        "rope_pairs",
        ("model.position", "model.head_dim"),
        lambda c, n: c.model.position_row.rotates and c.model.head_dim % 2 != 0,
        "rope rotates pairs of channels, so head_dim must be even",
        "choose an even head_dim, or position alibi or learned",
    ),
    Rule(
        "tp_heads",
        ("parallel.tp", "model.num_heads"),
        lambda c, n: c.model.num_heads % c.parallel.tp != 0,
        "query heads are split over the tensor ranks",
        "choose tp that divides num_heads",
    ),
    Rule(
        "tp_attention",
        ("parallel.tp", "model.attention"),
        lambda c, n: c.parallel.tp > 1 and not c.model.attention_row.tp,
        "this kind of attention cannot be split by heads",
        "set tp to 1, or use attention grouped",
    ),
    Rule(
        "tp_key_heads",
        ("parallel.tp", "model.delta.key_heads"),
        lambda c, n: c.model.delta is not None and c.model.delta.key_heads % c.parallel.tp != 0,
        "linear attention's key heads, with their value heads, are split over the tensor ranks",
        "choose tp that divides key_heads",
    ),
    Rule(
        "qk_norm_width",
        ("model.qk_norm", "parallel.tp", "model.num_kv_heads"),
        lambda c, n: c.model.qk_norm == "width" and c.model.num_kv_heads % c.parallel.tp != 0,
        "qk_norm width needs an equal number of query and KV heads on every tensor rank",
        "choose tp that divides num_kv_heads",
    ),
    Rule(
        "tp_ffn",
        ("parallel.tp", "model.ffn_size"),
        lambda c, n: c.model.ffn_size % c.parallel.tp != 0,
        "the feed-forward width is split over the tensor ranks",
        "choose an ffn_size that is a multiple of tp",
    ),
    Rule(
        "tp_sequence",
        ("parallel.tp", "train.seq_len"),
        lambda c, n: c.parallel.tp_sequence and c.train.seq_len % c.parallel.tp != 0,
        "with tp_sequence the sequence is split over the tensor ranks",
        "choose a seq_len that is a multiple of tp, or tp_sequence false",
    ),
    Rule(
        "vocabulary_parts",
        ("parallel.tp", "model.vocab_size", "model.source_vocab_size"),
        lambda c, n: any(size is not None and size < c.parallel.tp for size in (c.model.vocab_size, c.model.source_vocab_size)),
        "each tensor rank needs at least one row of each vocabulary",
        "choose a smaller tp",
    ),
    Rule(
        "master",
        ("precision.compute", "precision.master"),
        lambda c, n: (
            (c.precision.compute, c.precision.storage) not in {("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16"), ("fp64", "fp64")}
        ),
        "master weights have the dtype of the computation; under bf16 they may be fp32 or bf16",
        "leave precision.master out",
    ),
    Rule(
        "rope_context",
        ("model.rope_scaling", "model.position"),
        lambda c, n: c.model.rope_scaling is not None and not c.model.position_row.rotates,
        "rope_scaling stretches rotary frequencies",
        "remove rope_scaling, or use position rope",
    ),
    Rule(
        "init_ema",
        ("checkpoint.init_ema", "checkpoint.init_from"),
        lambda c, n: c.checkpoint.init_ema is not None and c.checkpoint.init_from is None,
        "init_ema names an average of the run that init_from starts from",
        "set init_from, or leave init_ema out",
    ),
    Rule(
        "init_schedule",
        ("checkpoint.init_schedule", "checkpoint.init_from", "optim.decay"),
        lambda c, n: (
            c.checkpoint.init_schedule == "lemon" and (c.checkpoint.init_from is None or decays()[c.optim.decay].decay_steps != "end")
        ),
        "init_schedule lemon shortens the decay of a run that starts from a grown model's weights",
        "set init_from and a decay that ends, such as cosine or linear, or leave init_schedule out",
    ),
    Rule(
        "decay_ends",
        ("optim.decay", "optim.decay_steps", "optim.warmup_steps"),
        lambda c, n: (
            decays()[c.optim.decay].decay_steps == "end" and c.optim.decay_steps is not None and c.optim.decay_steps <= c.optim.warmup_steps
        ),
        "the decay would end before the warm-up does, so the learning rate would drop to its minimum in one step (decay_steps counts from "
        "the run's first step)",
        "set decay_steps beyond warmup_steps, or leave it out to decay until the last step",
    ),
    Rule(
        "decay_length",
        ("optim.decay", "optim.decay_steps", "optim.warmup_steps", "train.steps", "train.tokens"),
        lambda c, n: (
            decays()[c.optim.decay].decay_steps == "length"
            and c.optim.decay_steps is not None
            and 0 < c.train.total_steps - c.optim.warmup_steps < c.optim.decay_steps
        ),
        "the last decay_steps of the run would begin within the warm-up, so the learning rate would jump at its end",
        "set decay_steps to at most the run's steps less warmup_steps",
    ),
    Rule(
        "decay_unused",
        ("optim.decay", "optim.decay_steps"),
        lambda c, n: decays()[c.optim.decay].decay_steps == "unused" and c.optim.decay_steps is not None,
        "this decay, such as a constant rate, has no use for decay_steps",
        "choose another decay, such as cosine or wsd, or remove decay_steps (optim.decay_steps=null)",
    ),
    Rule(
        "grow_steps",
        ("grow", "train.steps", "train.tokens"),
        lambda c, n: [g.step for g in c.grow] != sorted({g.step for g in c.grow if g.step < c.train.total_steps}),
        "growths must be in order of their steps, each before the run's last step",
        "give every growth a later step than the one before, and fewer than the run has",
    ),
    Rule(
        "grow_engine",
        ("grow", "parallel.engine"),
        lambda c, n: bool(c.grow) and c.parallel.engine == "deepspeed",
        "DeepSpeed keeps flat buffers that cannot grow",
        "use engine fsdp2 or ddp",
    ),
    Rule(
        "valid_twice",
        ("data.valid", "data.valid_fraction"),
        lambda c, n: c.data.valid is not None and c.data.valid_fraction > 0,
        "validation data are either separate files or a fraction held out of the training files",
        "remove one of them",
    ),
    Rule(
        "megatron_order",
        ("data.order", "model.family"),
        lambda c, n: c.data.order == "megatron" and c.model.family in ("spacetime", "encoder_decoder"),
        "data.order megatron does not exist for grids and encoder-decoders",
        "use order megascale",
    ),
    Rule(
        "chunk",
        ("data.chunk", "train.seq_len"),
        lambda c, n: c.data.chunk is not None and c.data.chunk < c.train.seq_len,
        "samples are cut from pieces of data.chunk tokens",
        "choose a chunk of at least seq_len, or leave it out",
    ),
    Rule(
        "eval_without_data",
        ("train.eval_every", "data.valid_fraction"),
        lambda c, n: c.train.eval_every > 0 and c.data.valid is None and c.data.valid_fraction == 0,
        "eval_every is set, but there are no validation data",
        "set data.valid or data.valid_fraction, or eval_every to 0",
    ),
)
