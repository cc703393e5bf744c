"""What combines with what: one table of data, read by validation, by the docs and by the tests.

A rule is a sentence about a resolved config. It refuses when `applies` is true; whatever no rule refuses, runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megascale.config.dsp import plan_cuts
from megascale.config.layout import axis_sizes, data_parts, expert_mesh_fits, micro_batches
from megascale.config.schema import Config
from megascale.config.stages import V_SHAPED
from megascale.errors import UsageError


@dataclass(frozen=True)
class Rule:
    """`keys` disagree when `applies(config, ranks)`; `why` and `fix` complete the sentence. `later`: planned, not yet built."""

    name: str
    keys: tuple[str, ...]
    applies: Callable[[Config, int], bool]
    why: str
    fix: str
    later: bool = False


RULES: tuple[Rule, ...] = (
    Rule(
        "family",
        ("model.family",),
        lambda c, n: c.model.family == "encoder_decoder",
        "this version trains decoders, encoders, and transformers over grids",
        "use decoder, encoder or spacetime",
        True,
    ),
    Rule(
        "encoder_position",
        ("model.family", "model.position"),
        lambda c, n: c.model.family == "encoder" and c.model.position in ("xpos", "alibi"),
        "xPos and ALiBi weigh how far back a token looks, and an encoder looks both ways",
        "use rope or learned",
    ),
    Rule(
        "encoder_window",
        ("model.family", "model.sliding_window"),
        lambda c, n: c.model.family == "encoder" and c.model.sliding_window is not None,
        "the window ends at the token itself, and an encoder looks both ways",
        "remove sliding_window",
    ),
    Rule(
        "encoder_context",
        ("model.family", "parallel.cp"),
        lambda c, n: c.model.family == "encoder" and c.parallel.cp > 1,
        "tokens of other ranks are met in causal order",
        "set cp to 1",
    ),
    Rule(
        "mask_fraction",
        ("data.mask_fraction", "model.family"),
        lambda c, n: c.data.mask_fraction is not None and c.model.family != "encoder",
        "tokens are masked for encoders only",
        "remove mask_fraction, or use family encoder",
    ),
    Rule(
        "spacetime_fields",
        ("model.family", "model.spacetime"),
        lambda c, n: (c.model.family == "spacetime") != (c.model.spacetime is not None),
        "model.spacetime says what the grid of the spacetime family is, and of no other",
        "give both or neither",
    ),
    Rule(
        "spacetime_tokens",
        ("model.spacetime", "train.seq_len"),
        lambda c, n: _grid(c) and c.train.seq_len != c.model.spacetime.tokens,  # type: ignore[union-attr]
        "a sample has as many tokens as its grid has patches, the product of shape ÷ patch",
        "set train.seq_len to that product",
    ),
    Rule(
        "spacetime_text",
        ("model.spacetime", "model.position", "model.sliding_window", "model.tie_embeddings", "train.packing"),
        lambda c, n: (
            _grid(c)
            and (
                c.model.position not in ("rope", "learned")
                or c.model.sliding_window is not None
                or c.model.tie_embeddings
                or c.train.packing != "concat"
            )
        ),
        "windows, documents, ALiBi, XPos and tied embeddings are for text",
        "use position rope or learned, without sliding_window and tie_embeddings, and packing concat",
    ),
    Rule(
        "spacetime_block",
        ("model.spacetime", "model.residual", "model.norm", "model.linear", "model.moe"),
        lambda c, n: (
            _grid(c)
            and (
                c.model.residual not in ("pre", "post", "mus")
                or c.model.norm == "dyt"
                or c.model.linear != "dense"
                or c.model.moe is not None
            )
        ),
        "blocks over grids are plain pre- or post-norm ones so far",
        "use residual pre or post, norm rmsnorm or layernorm, linear dense, and no moe",
    ),
    Rule(
        "residual",
        ("model.residual",),
        lambda c, n: c.model.residual == "mus",
        "res-post-norm comes with unit scaling, which is not built yet",
        "use pre, or deepnorm or deepscale for very deep models",
        True,
    ),
    Rule(
        "branchnorm_period",
        ("model.residual", "model.branchnorm_period"),
        lambda c, n: (c.model.residual == "branchnorm") != (c.model.branchnorm_period is not None),
        "BranchNorm, and nothing else, has a period: the steps over which its branches come in",
        "set branchnorm_period (4000 is quoted from its paper; less for short runs) for branchnorm, or leave it out",
    ),
    Rule(
        "moe_top_k",
        ("model.moe.top_k", "model.moe.num_experts"),
        lambda c, n: c.model.moe is not None and c.model.moe.top_k > c.model.moe.num_experts,
        "a token cannot choose more experts than there are",
        "choose a smaller top_k or more experts",
    ),
    Rule(
        "moe_bias",
        ("model.moe", "model.bias"),
        lambda c, n: c.model.moe is not None and c.model.bias,
        "experts have no biases",
        "set model.bias to false",
    ),
    Rule(
        "moe_sublayer",
        ("model.moe", "model.residual", "model.linear"),
        lambda c, n: c.model.moe is not None and (c.model.residual == "subln" or c.model.linear != "dense"),
        "experts have neither inner norms nor quantized products",
        "use another residual scheme than subln and linear dense, or remove model.moe",
    ),
    Rule(
        "moe_every",
        ("model.moe.every", "model.num_layers"),
        lambda c, n: c.model.moe is not None and c.model.moe.every > c.model.num_layers,
        "no layer would have experts",
        "choose a smaller every, or remove model.moe",
    ),
    Rule(
        "moeut_groups",
        ("model.moeut.group_size", "model.num_layers"),
        lambda c, n: c.model.moeut is not None and c.model.num_layers % c.model.moeut.group_size != 0,
        "a group of layers is repeated a whole number of times",
        "choose a group_size that divides num_layers",
    ),
    Rule(
        "moeut_top_k",
        ("model.moeut.attention_top_k", "model.moeut.attention_experts"),
        lambda c, n: c.model.moeut is not None and c.model.moeut.attention_top_k > c.model.moeut.attention_experts,
        "a head cannot choose more experts than it has",
        "choose a smaller attention_top_k or more attention_experts",
    ),
    Rule(
        "moeut_layers",
        ("model.moeut", "model.moe"),
        lambda c, n: c.model.moeut is not None and (c.model.moe is None or c.model.moe.every > 1),
        "every layer of MoEUT has experts in its feed-forward sublayer",
        "set model.moe with every 1",
    ),
    Rule(
        "moeut_block",
        ("model.moeut", "model.family", "model.norm", "model.residual", "model.num_kv_heads", "model.num_heads", "model.qk_norm"),
        lambda c, n: (
            c.model.moeut is not None
            and (
                (c.model.family, c.model.residual, c.model.qk_norm) != ("decoder", "pre", False)
                or c.model.norm == "dyt"
                or c.model.num_kv_heads != c.model.num_heads
            )
        ),
        "MoEUT is a decoder with a block of its own, with its own norms and a key for every query head",
        "set family to decoder, norm to rmsnorm or layernorm, residual to pre and qk_norm to false, and leave num_kv_heads out",
    ),
    Rule(
        "moeut_axes",
        ("model.moeut", "parallel.tp", "parallel.pp", "parallel.accumulation"),
        lambda c, n: c.model.moeut is not None and (c.parallel.tp > 1 or c.parallel.pp > 1 or c.parallel.accumulation == "layered"),
        "layers that share their weights stay together, and their heads are not cut yet",
        "use the data axes, cp and ep",
    ),
    Rule(
        "stages_without_pipeline",
        ("parallel.pp", "parallel.pp_virtual"),
        lambda c, n: c.parallel.pp == 1 and (c.parallel.pp_virtual > 1 or c.parallel.pp_layers is not None),
        "several stages a rank (pp_virtual, pp_layers) are for pipelines",
        "set pp_virtual to 1 and leave pp_layers out, or choose pp of at least 2",
    ),
    Rule(
        "one_stage_schedules",
        ("parallel.pp_schedule", "parallel.pp_virtual"),
        lambda c, n: c.parallel.pp > 1 and c.parallel.pp_schedule in ("gpipe", "1f1b") and c.parallel.pp_virtual > 1,
        "gpipe and 1f1b have one stage a rank",
        "use looped_bfs for gpipe and interleaved_1f1b for 1f1b, or pp_virtual 1",
    ),
    Rule(
        "v_schedules",
        ("parallel.pp_schedule", "parallel.pp_virtual"),
        lambda c, n: c.parallel.pp > 1 and c.parallel.pp_schedule in V_SHAPED and c.parallel.pp_virtual > 2,
        "zbv and dualpipev have two stages a rank, one on the way down and one on the way up",
        "leave pp_virtual out, or use interleaved_zero_bubble",
    ),
    Rule(
        "stages_and_layers",
        ("parallel.pp", "parallel.pp_virtual", "model.num_layers"),
        lambda c, n: c.parallel.pp > 1 and c.model.num_layers < c.parallel.pp * c.parallel.stages_per_rank,
        "there are more stages (pp × stages per rank) than layers",
        "choose a smaller pp or pp_virtual",
    ),
    Rule(
        "stage_layers",
        ("parallel.pp_layers", "model.num_layers"),
        lambda c, n: c.parallel.pp > 1 and not _stage_layers_fit(c),
        "pp_layers names the layers of each of the pp × stages-per-rank stages, all layers once and none empty between first and last",
        "give one number a stage with the sum num_layers, or leave it out",
    ),
    Rule(
        "interleaved_rounds",
        ("parallel.pp_schedule", "parallel.pp", "train.global_batch_size"),
        lambda c, n: (
            c.parallel.pp > 1
            and c.parallel.pp_schedule in ("interleaved_1f1b", "interleaved_zero_bubble")
            and (m := micro_batches(c, n)) % max(1, m // c.parallel.pp) != 0
        ),
        "interleaved schedules take micro-batches in equal rounds, ⌊m/pp⌋ of them, and m = global_batch_size ÷ (micro_batch_size × data "
        "ranks) does not divide",
        "choose a global_batch_size that makes m a multiple of pp, or looped_bfs or zbv",
    ),
    Rule(
        "dualpipev_fill",
        ("parallel.pp_schedule", "parallel.pp", "train.global_batch_size"),
        lambda c, n: c.parallel.pp > 1 and c.parallel.pp_schedule == "dualpipev" and micro_batches(c, n) < 2 * c.parallel.pp,
        "dualpipev needs at least 2·pp micro-batches to fill both ways",
        "choose a larger global_batch_size, a smaller micro_batch_size, or zbv",
    ),
    Rule(
        "dsp_dimensions",
        ("parallel.cp", "parallel.cp_method", "model.family"),
        lambda c, n: c.parallel.cp > 1 and c.parallel.cp_method == "dsp" and c.model.family != "spacetime",
        "dsp moves the cut from one dimension of the sequence to another, and text has one",
        "use cp_method ring or ulysses",
    ),
    Rule(
        "ulysses_heads",
        ("parallel.cp", "parallel.cp_method", "parallel.cp_ulysses", "parallel.tp", "model.num_heads"),
        lambda c, n: c.parallel.cp > 1 and c.parallel.heads_over > c.model.num_heads // c.parallel.tp,
        "ranks that trade heads need at least one query head each, and there are num_heads ÷ tp",
        "use cp_method ring with cp_ulysses of at most that number, a ring of cp ÷ cp_ulysses going beyond it",
    ),
    Rule(
        "ring_places",
        ("parallel.cp", "parallel.cp_method", "parallel.cp_ulysses"),
        lambda c, n: c.parallel.cp % c.parallel.cp_ulysses != 0 or (c.parallel.cp_ulysses > 1 and c.parallel.cp_method != "ring"),
        "cp_ulysses cuts a ring of cp ranks into groups of equal size",
        "choose a divisor of cp, or leave cp_ulysses out",
    ),
    Rule(
        "cp_sequence",
        ("parallel.cp", "parallel.tp", "train.seq_len"),
        lambda c, n: (
            c.parallel.cp > 1 and not _grid(c) and c.train.seq_len // (c.parallel.tp if c.parallel.tp_sequence else 1) < 2 * c.parallel.cp
        ),
        "every rank holds an early and a late piece of the sequence, of at least one position for each rank that tp_sequence cuts it over",
        "choose a seq_len of at least 2·cp (2·cp·tp with tp_sequence), or a smaller cp",
    ),
    Rule(
        "ep_without_experts",
        ("parallel.ep", "parallel.etp", "model.moe"),
        lambda c, n: c.model.moe is None and (c.parallel.ep > 1 or c.parallel.etp is not None),
        "there are no experts to deal out",
        "set ep to 1 and leave etp out, or give the model experts with model.moe",
    ),
    Rule(
        "ep_experts",
        ("parallel.ep", "model.moe.num_experts"),
        lambda c, n: c.model.moe is not None and c.model.moe.num_experts % c.parallel.ep != 0,
        "every rank of ep holds equally many experts",
        "choose an ep that divides num_experts",
    ),
    Rule(
        "etp",
        ("parallel.etp", "parallel.tp"),
        lambda c, n: c.model.moe is not None and c.parallel.expert_tp not in (1, c.parallel.tp),
        "an expert is cut like dense weights or not at all",
        "set etp to 1, or leave it out to take tp",
    ),
    Rule(
        "etp_sequence",
        ("parallel.etp", "parallel.tp", "parallel.tp_sequence"),
        lambda c, n: c.model.moe is not None and c.parallel.expert_tp == 1 < c.parallel.tp and not c.parallel.tp_sequence,
        "with whole experts each tensor rank routes tokens of its own, and without tp_sequence all have the same ones",
        "set tp_sequence to true, or leave etp out",
    ),
    Rule(
        "expert_mesh",
        ("parallel.ep", "parallel.etp", "parallel.dp_shard", "parallel.cp", "parallel.tp"),
        lambda c, n: c.model.moe is not None and c.parallel.expert_tp in (1, c.parallel.tp) and not expert_mesh_fits(c.parallel, n),
        "experts lie on the ranks of one replica, dp_shard × cp × tp = edp × ep × etp, and ep × etp does not divide them",
        "choose a smaller ep, or a dp_shard that makes dp_shard × cp × tp a multiple of ep × etp",
    ),
    Rule(
        "ep_engine",
        ("parallel.engine", "parallel.ep", "parallel.etp"),
        lambda c, n: c.model.moe is not None and c.parallel.engine == "ddp" and _own_expert_axes(c),
        "expert axes are built on FSDP2",
        "use engine fsdp2, or set ep to 1 and leave etp out",
    ),
    Rule(
        "moe_deepspeed",
        ("model.moe", "parallel.engine"),
        lambda c, n: c.model.moe is not None and c.parallel.engine == "deepspeed",
        "DeepSpeed steps by itself, and routers are settled and seen after our own steps only",
        "use engine fsdp2 or ddp",
    ),
    Rule(
        "etp_width",
        ("parallel.etp", "parallel.tp", "model.moe.ffn_size"),
        lambda c, n: c.model.moe is not None and bool(_expert_width(c) % c.parallel.expert_tp or _shared_width(c) % c.parallel.tp),
        "the width of an expert is cut over etp, that of shared experts over tp",
        "choose a moe.ffn_size that is a multiple of tp",
    ),
    Rule(
        "capacity_cut",
        ("model.moe.capacity_factor", "parallel.cp", "parallel.etp", "parallel.tp"),
        lambda c, n: (
            c.model.moe is not None
            and c.model.moe.capacity_factor is not None
            and (c.parallel.cp > 1 or (c.parallel.expert_tp == 1 < c.parallel.tp and c.parallel.tp_sequence))
        ),
        "capacity is counted over whole sequences, and with cp or with whole experts on tensor ranks each rank routes a part of them",
        "set cp to 1 and leave etp out, or remove capacity_factor to drop nothing",
    ),
    Rule(
        "grid_lengths",
        ("parallel.cp", "parallel.cp_method", "model.spacetime"),
        lambda c, n: c.parallel.cp > 1 and _grid(c) and not _grid_cuts(c),
        "a dimension is cut over the cp ranks, under dsp always one that the layer does not attend over, and each rank needs a position",
        "choose cp of at most the second longest dimension of shape ÷ patch (the longest for ring and ulysses), or smaller patches",
    ),
    Rule(
        "grid_exchange",
        ("parallel.cp", "parallel.cp_ulysses", "parallel.tp_sequence", "model.family"),
        lambda c, n: c.parallel.cp > 1 and _grid(c) and (c.parallel.cp_ulysses > 1 or c.parallel.tp_sequence),
        "on a grid the stream is cut along one of its dimensions, by one method",
        "set cp_ulysses to 1 and tp_sequence to false",
    ),
    Rule(
        "layered_engine",
        ("parallel.accumulation", "parallel.engine"),
        lambda c, n: c.parallel.accumulation == "layered" and c.parallel.engine != "fsdp2",
        "layered accumulation decides itself when weights are gathered and gradients reduced, and this engine does",
        "use engine fsdp2, or accumulation depth_first",
    ),
    Rule(
        "layered_pipeline",
        ("parallel.accumulation", "parallel.pp"),
        lambda c, n: c.parallel.accumulation == "layered" and c.parallel.pp > 1,
        "over pipeline ranks, layered accumulation is the schedule looped_bfs",
        "use accumulation depth_first with pp_schedule looped_bfs and as many pp_virtual as layers allow, or pp 1",
    ),
    Rule(
        "breadth_without_layers",
        ("parallel.breadth_first", "parallel.accumulation"),
        lambda c, n: (c.parallel.breadth_first or 1) > 1 and c.parallel.accumulation == "depth_first",
        "depth-first accumulation takes one micro-batch at a time",
        "use accumulation layered, or leave breadth_first out",
    ),
    Rule(
        "breadth_divides",
        ("parallel.breadth_first", "train.global_batch_size", "train.micro_batch_size"),
        lambda c, n: c.parallel.accumulation == "layered" and micro_batches(c, n) % (c.parallel.breadth_first or 1) != 0,
        "breadth_first micro-batches go through a layer together, and the step's m = global_batch_size ÷ (micro_batch_size × data ranks) "
        "do not divide into such groups",
        "choose breadth_first that divides m, or leave it out so that all of them go together",
    ),
    Rule(
        "update_in_backward",
        ("parallel.update_in_backward", "parallel.accumulation", "parallel.breadth_first", "parallel.offload", "train.clip", "optim.name"),
        lambda c, n: (
            c.parallel.update_in_backward
            and (
                c.parallel.accumulation != "layered"
                or (c.parallel.breadth_first or micro_batches(c, n)) != micro_batches(c, n)
                or bool({"optimizer", "parameters"} & set(c.parallel.offload))
                or c.train.clip != 0
                or c.optim.name == "muon"
            )
        ),
        "a layer can be updated during backward where its gradient comes at once and nothing of the other layers is needed for it",
        "use accumulation layered without breadth_first, clip 0, adamw or lion, and no offload of their state; or leave it out",
    ),
    Rule(
        "deepspeed_axes",
        ("parallel.engine", "parallel.pp", "parallel.cp", "parallel.dp_replicate"),
        lambda c, n: (
            c.parallel.engine == "deepspeed"
            and (max(c.parallel.pp, c.parallel.cp, c.parallel.dp_replicate) > 1 or not _weights_can_be_cut(c, n))
        ),
        "DeepSpeed is built in for data ranks on dp_shard, at least two, with tp beside them",
        "put the ranks on dp_shard and tp, or use engine fsdp2",
    ),
    Rule(
        "deepspeed_family",
        ("parallel.engine", "model.family"),
        lambda c, n: c.parallel.engine == "deepspeed" and c.model.family != "decoder",
        "DeepSpeed has been tried with text only",
        "use engine fsdp2",
    ),
    Rule(
        "deepspeed_update",
        ("parallel.engine", "optim.name", "precision.compute"),
        lambda c, n: (
            c.parallel.engine == "deepspeed" and (c.optim.name != "adamw" or c.precision.compute == "fp64" or c.precision.storage != "fp32")
        ),
        "DeepSpeed is built in with AdamW and fp32 masters, computing in bf16 or fp32",
        "use optim.name adamw with precision.compute bf16 or fp32 and without precision.master, or engine fsdp2",
    ),
    Rule(
        "zero_offload",
        ("parallel.engine", "parallel.zero_stage", "parallel.offload"),
        lambda c, n: c.parallel.engine == "deepspeed" and "parameters" in c.parallel.offload and c.parallel.zero_stage < 3,
        "only ZeRO 3 cuts weights, so only there can they be away",
        "set zero_stage to 3, or offload optimizer",
    ),
    Rule(
        "offload_dir",
        ("parallel.offload_dir", "parallel.engine", "parallel.offload"),
        lambda c, n: (
            c.parallel.offload_dir is not None
            and (c.parallel.engine != "deepspeed" or not {"optimizer", "parameters"} & set(c.parallel.offload))
        ),
        "state goes to a disk with DeepSpeed only, and only where offload says what",
        "use engine deepspeed with offload optimizer or parameters, or leave offload_dir out for host memory",
    ),
    Rule(
        "offload_inputs",
        ("parallel.offload", "parallel.recompute"),
        lambda c, n: "activations" in c.parallel.offload and c.parallel.recompute != "full",
        "block inputs are what full recomputation keeps; without it more would have to move than the link carries",
        "set parallel.recompute to full, or leave activations out of offload",
    ),
    Rule(
        "offload_parameters",
        ("parallel.offload", "parallel.engine", "parallel.dp_shard", "parallel.dp_replicate"),
        lambda c, n: "parameters" in c.parallel.offload and c.parallel.engine != "deepspeed" and not _sharded(c, n),
        "FSDP2 moves parameters, so there must be at least two ranks with other tokens for it to cut them over",
        "use engine fsdp2 on at least two data ranks, or offload optimizer",
    ),
    Rule(
        "offload_experts",
        ("parallel.offload", "parallel.ep", "parallel.etp"),
        lambda c, n: c.model.moe is not None and "parameters" in c.parallel.offload and _own_expert_axes(c),
        "FSDP2 moves the parameters that it cuts, and experts with axes of their own may have nothing left to cut",
        "set ep to 1 and leave etp out, or leave parameters out of offload",
    ),
    Rule(
        "offload_muon",
        ("parallel.offload", "optim.name"),
        lambda c, n: c.optim.name == "muon" and bool({"optimizer", "parameters"} & set(c.parallel.offload)),
        "Muon multiplies whole matrices, which a host does far too slowly",
        "use adamw or lion, or offload activations only",
    ),
    Rule("fp8", ("precision.fp8",), lambda c, n: c.precision.fp8 != "false", "FP8 is not built yet", "use false", True),
    Rule(
        "base_width",
        ("optim.base_width",),
        lambda c, n: c.optim.base_width is not None,
        "learning-rate transfer over width comes with unit scaling, which is not built yet",
        "remove it",
        True,
    ),
    Rule(
        "ddp_shard",
        ("parallel.engine", "parallel.dp_shard"),
        lambda c, n: c.parallel.engine == "ddp" and c.parallel.dp_shard > 1,
        "DDP keeps whole copies and cannot shard",
        "put the ranks on parallel.dp_replicate, or use engine fsdp2",
    ),
    Rule(
        "kv_heads",
        ("model.num_heads", "model.num_kv_heads"),
        lambda c, n: c.model.num_heads % (c.model.num_kv_heads or 1) != 0,
        "each KV head serves an equal group of query heads",
        "choose num_kv_heads that divides num_heads",
    ),
    Rule(
        "rope_pairs",
        ("model.position", "model.head_dim"),
        lambda c, n: c.model.position in ("rope", "xpos") and (c.model.head_dim or 0) % 2 != 0,
        "rotations act on pairs of channels",
        "choose an even head_dim, or position alibi or learned",
    ),
    Rule(
        "tp_heads",
        ("parallel.tp", "model.num_heads"),
        lambda c, n: c.model.num_heads % c.parallel.tp != 0,
        "query heads are cut over the tensor ranks",
        "choose tp that divides num_heads",
    ),
    Rule(
        "tp_ffn",
        ("parallel.tp", "model.ffn_size"),
        lambda c, n: (c.model.ffn_size or 0) % c.parallel.tp != 0,
        "the feed-forward width is cut over the tensor ranks",
        "choose an ffn_size that is a multiple of tp",
    ),
    Rule(
        "tp_sequence",
        ("parallel.tp", "train.seq_len"),
        lambda c, n: c.parallel.tp_sequence and c.train.seq_len % c.parallel.tp != 0,
        "with tp_sequence the sequence is cut over the tensor ranks",
        "choose a seq_len that is a multiple of tp, or tp_sequence false",
    ),
    Rule(
        "vocabulary_parts",
        ("parallel.tp", "model.vocab_size"),
        lambda c, n: c.model.vocab_size is not None and c.model.vocab_size < c.parallel.tp,
        "each tensor rank needs at least one row of the vocabulary",
        "choose a smaller tp",
    ),
    Rule(
        "master",
        ("precision.compute", "precision.master"),
        lambda c, n: (
            (c.precision.compute, c.precision.storage) not in {("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16"), ("fp64", "fp64")}
        ),
        "stored weights are as precise as the computation, and fp32 or bf16 under bf16",
        "leave precision.master out",
    ),
    Rule(
        "rope_context",
        ("model.rope_scaling", "model.position"),
        lambda c, n: c.model.rope_scaling is not None and c.model.position not in ("rope", "xpos"),
        "rope_scaling stretches rotary frequencies",
        "remove rope_scaling, or use position rope",
    ),
    Rule(
        "valid_twice",
        ("data.valid", "data.valid_fraction"),
        lambda c, n: c.data.valid is not None and c.data.valid_fraction > 0,
        "validation is either files of its own or a fraction split off the training files",
        "remove one of them",
    ),
    Rule(
        "eval_without_data",
        ("train.eval_every", "data.valid_fraction"),
        lambda c, n: c.train.eval_every > 0 and c.data.valid is None and c.data.valid_fraction == 0,
        "there is nothing to evaluate on",
        "set data.valid or data.valid_fraction, or eval_every to 0",
    ),
)


def _own_expert_axes(config: Config) -> bool:
    return config.parallel.ep > 1 or config.parallel.expert_tp != config.parallel.tp


def _expert_width(config: Config) -> int:
    return config.model.moe.ffn_size or 0 if config.model.moe else 0


def _shared_width(config: Config) -> int:
    return config.model.moe.num_shared * _expert_width(config) if config.model.moe else 0


def _sharded(config: Config, ranks: int) -> bool:
    """Whether FSDP2 cuts the weights."""
    return config.parallel.engine == "fsdp2" and _weights_can_be_cut(config, ranks)


def _weights_can_be_cut(config: Config, ranks: int) -> bool:
    """Whether ranks with other tokens hold the same weights; true where the axes do not fit the ranks, which is refused on its own."""
    try:
        sizes = axis_sizes(config.parallel, ranks)
    except UsageError:
        return True
    return sizes["dp_shard"] * sizes["dp_replicate"] * sizes["cp"] > 1


def _grid(config: Config) -> bool:
    return config.model.family == "spacetime" and config.model.spacetime is not None


def _grid_cuts(config: Config) -> bool:
    """Whether every layer's stream can be cut over cp."""
    model, cp = config.model, config.parallel.cp
    assert model.spacetime is not None
    if config.parallel.cp_method != "dsp":
        return max(model.spacetime.grid) >= cp
    return plan_cuts([model.attended(i) for i in range(model.num_layers)], model.spacetime.grid, cp) is not None


def _stage_layers_fit(config: Config) -> bool:
    layers = config.parallel.pp_layers
    if layers is None:
        return True
    right = len(layers) == config.parallel.pp * config.parallel.stages_per_rank and sum(layers) == config.model.num_layers
    return right and all(n > 0 for n in layers[1:-1])


def refusals(config: Config, ranks: int) -> list[Rule]:
    """The rules that refuse this config on this many ranks."""
    return [rule for rule in RULES if rule.applies(config, ranks)]


def check(config: Config, ranks: int) -> Config:
    """The config with its data axes resolved for `ranks`. Raises UsageError naming every disagreeing key, its value and the fix."""
    refused = refusals(config, ranks)
    if refused:
        lines = []
        for rule in refused:
            values = ", ".join(f"{key} is {_value(config, key)}" for key in rule.keys)
            lines.append(f"{values}: {rule.why}; {rule.fix}")
        raise UsageError("\n  ".join(["this combination does not work:", *lines]) if len(lines) > 1 else lines[0])
    sizes = axis_sizes(config.parallel, ranks)
    resolved = config.parallel.model_copy(update={"dp_shard": sizes["dp_shard"], "dp_replicate": sizes["dp_replicate"]})
    return config.model_copy(update={"parallel": resolved})


def markdown_table() -> str:
    """The table as it stands in docs/layouts.md."""
    lines = ["| keys | refused because | do instead | |", "|---|---|---|---|"]
    for rule in RULES:
        keys = ", ".join(f"`{key}`" for key in rule.keys)
        lines.append(f"| {keys} | {rule.why} | {rule.fix} | {'planned' if rule.later else ''} |")
    return "\n".join(lines)


def padding_note(config: Config) -> str | None:
    """A sentence when a step's samples do not fill the micro-batches of all ranks; the empty places cost time and change nothing."""
    batch, slots = config.train.global_batch_size, config.train.micro_batch_size * data_parts(config.parallel)
    places = -(-batch // slots) * slots
    if places == batch:
        return None
    return (
        f"global_batch_size {batch} does not fill {places} places (micro_batch_size {config.train.micro_batch_size} × "
        f"{data_parts(config.parallel)} data ranks × {places // slots} micro-batches): {100 * (places - batch) / places:.0f} % of the "
        "work is padding; the loss is not affected"
    )


def _value(config: Config, key: str) -> object:
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return value
