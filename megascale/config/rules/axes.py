"""Axes that split a model and its sequences: pipelines, context, experts."""

from __future__ import annotations

from megascale.config.dsp import plan_cuts
from megascale.config.layout import expert_mesh_fits, micro_batches, reshard_fits
from megascale.config.rules.rule import Rule, grid, own_expert_axes
from megascale.config.schema import Config
from megascale.config.stages import V_SHAPED

AXIS_RULES: tuple[Rule, ...] = (
    Rule(
        "tp_async",
        ("parallel.tp_async", "parallel.tp", "parallel.tp_sequence", "parallel.compile"),
        lambda c, n: c.parallel.tp_async and not (c.parallel.tp > 1 and c.parallel.tp_sequence and c.parallel.compile),
        "tp_async joins the gathers and reduce-scatters of tp_sequence with products, in compiled graphs",
        "set tp of at least 2, tp_sequence and compile, or leave tp_async out",
    ),
    Rule(
        "stages_without_pipeline",
        ("parallel.pp", "parallel.pp_virtual"),
        lambda c, n: c.parallel.pp == 1 and (c.parallel.pp_virtual > 1 or c.parallel.pp_layers is not None),
        "pp_virtual and pp_layers configure pipeline stages, but pp is 1",
        "set pp_virtual to 1 and leave pp_layers out, or choose pp of at least 2",
    ),
    Rule(
        "one_stage_schedules",
        ("parallel.pp_schedule", "parallel.pp_virtual"),
        lambda c, n: c.parallel.pp > 1 and c.parallel.pp_schedule in ("gpipe", "1f1b") and c.parallel.pp_virtual > 1,
        "gpipe and 1f1b have one stage per rank",
        "use looped_bfs for gpipe and interleaved_1f1b for 1f1b, or pp_virtual 1",
    ),
    Rule(
        "v_schedules",
        ("parallel.pp_schedule", "parallel.pp_virtual"),
        lambda c, n: c.parallel.pp > 1 and c.parallel.pp_schedule in V_SHAPED and c.parallel.pp_virtual > 2,
        "zbv and dualpipev always have two stages per rank, one on each arm of the V",
        "leave pp_virtual out, or use interleaved_zero_bubble",
    ),
    Rule(
        "stages_and_layers",
        ("parallel.pp", "parallel.pp_virtual", "model.num_layers", "model.encoder_layers"),
        lambda c, n: c.parallel.pp > 1 and c.model.total_layers < c.parallel.pp * c.parallel.stages_per_rank,
        "there are more stages (pp × stages per rank) than layers",
        "choose a smaller pp or pp_virtual",
    ),
    Rule(
        "stage_layers",
        ("parallel.pp_layers", "model.num_layers", "model.encoder_layers"),
        lambda c, n: c.parallel.pp > 1 and not _stage_layers_fit(c),
        "pp_layers needs one number of layers for each of the pp × stages-per-rank stages, with the model's layers as their sum; only "
        "the first and the last may be 0",
        "give one number per stage with the sum num_layers (plus encoder_layers, if any), or leave it out",
    ),
    Rule(
        "interleaved_rounds",
        ("parallel.pp_schedule", "parallel.pp", "train.global_batch_size"),
        lambda c, n: (
            c.parallel.pp > 1
            and c.parallel.pp_schedule in ("interleaved_1f1b", "interleaved_zero_bubble")
            and (m := micro_batches(c, n)) % max(1, m // c.parallel.pp) != 0
        ),
        "interleaved schedules run micro-batches in ⌊m/pp⌋ equal rounds, but m = global_batch_size ÷ (micro_batch_size × data "
        "ranks) is not a multiple of that",
        "choose a global_batch_size that makes m a multiple of pp, or looped_bfs or zbv",
    ),
    Rule(
        "dualpipev_fill",
        ("parallel.pp_schedule", "parallel.pp", "train.global_batch_size"),
        lambda c, n: c.parallel.pp > 1 and c.parallel.pp_schedule == "dualpipev" and micro_batches(c, n) < 2 * c.parallel.pp,
        "dualpipev needs at least 2·pp micro-batches to fill both directions",
        "choose a larger global_batch_size, a smaller micro_batch_size, or zbv",
    ),
    Rule(
        "dsp_dimensions",
        ("parallel.cp", "parallel.cp_method", "model.family"),
        lambda c, n: c.parallel.cp > 1 and c.parallel.cp_method == "dsp" and c.model.family != "spacetime",
        "dsp switches the split between dimensions of the sequence, but text has only one",
        "use cp_method ring or ulysses",
    ),
    Rule(
        "cp_attention",
        ("parallel.cp", "parallel.cp_method", "parallel.cp_ulysses", "model.attention"),
        lambda c, n: c.parallel.cp > 1 and not _cut_by(c) <= set(c.model.attention_row.cp),
        "this kind of attention does not meet tokens of other ranks by this method",
        "use another cp_method, cp 1, or attention grouped",
    ),
    Rule(
        "ulysses_heads",
        ("parallel.cp", "parallel.cp_method", "parallel.cp_ulysses", "parallel.tp", "model.num_heads"),
        lambda c, n: c.parallel.cp > 1 and c.parallel.heads_over > c.model.num_heads // c.parallel.tp,
        "Ulysses needs at least one query head per rank that exchanges heads, and each tensor rank has num_heads ÷ tp",
        "use cp_method ring with cp_ulysses of at most that number; the ring then has cp ÷ cp_ulysses places",
    ),
    Rule(
        "ulysses_key_heads",
        ("parallel.cp", "parallel.cp_method", "parallel.cp_ulysses", "parallel.tp", "model.delta.key_heads"),
        lambda c, n: c.parallel.cp > 1 and c.model.delta is not None and c.parallel.heads_over > c.model.delta.key_heads // c.parallel.tp,
        "Ulysses needs at least one key head of linear attention per rank that exchanges heads, and each tensor rank has key_heads ÷ tp",
        "use cp_method ring, which passes states, with cp_ulysses of at most that number",
    ),
    Rule(
        "ring_places",
        ("parallel.cp", "parallel.cp_method", "parallel.cp_ulysses"),
        lambda c, n: c.parallel.cp % c.parallel.cp_ulysses != 0 or (c.parallel.cp_ulysses > 1 and c.parallel.cp_method != "ring"),
        "cp_ulysses splits the cp ranks of cp_method ring into equal groups that exchange heads, so it must divide cp",
        "choose a divisor of cp and cp_method ring, or leave cp_ulysses out",
    ),
    Rule(
        "cp_pieces",
        ("parallel.cp_pieces", "parallel.cp", "parallel.cp_method", "model.family"),
        lambda c, n: c.parallel.cp_pieces != 2 and (c.parallel.cp_method != "ring" or c.parallel.cp == c.parallel.cp_ulysses or grid(c)),
        "cp_pieces deals pieces of a text's sequences to the places of a ring, but there is none",
        "leave cp_pieces out, or use cp_method ring on a text with cp larger than cp_ulysses",
    ),
    Rule(
        "cp_sequence",
        ("parallel.cp", "parallel.cp_pieces", "parallel.tp", "train.seq_len", "train.source_len"),
        lambda c, n: c.parallel.cp > 1 and not grid(c) and _shortest(c) < c.parallel.cp_pieces * c.parallel.cp,
        "every cp rank holds cp_pieces pieces of the sequence, an early and a late one by default, and each piece needs at least one "
        "position per tensor rank under tp_sequence",
        "choose lengths of at least cp_pieces·cp (times tp with tp_sequence), or a smaller cp",
    ),
    Rule(
        "ep_without_experts",
        ("parallel.ep", "parallel.etp", "model.moe"),
        lambda c, n: not c.model.has_experts and (c.parallel.ep > 1 or c.parallel.etp is not None),
        "ep and etp distribute experts, but the model has none",
        "set ep to 1 and leave etp out, or give the model experts with model.moe",
        whole=True,
    ),
    Rule(
        "ep_experts",
        ("parallel.ep", "model.moe.num_experts"),
        lambda c, n: c.model.moe is not None and c.model.moe.num_experts % c.parallel.ep != 0,
        "every ep rank holds the same number of experts",
        "choose an ep that divides num_experts",
    ),
    Rule(
        "ep_rows",
        ("parallel.ep_rows", "parallel.ep"),
        lambda c, n: c.parallel.ep_rows is not None and c.parallel.ep == 1,
        "ep_rows bounds what expert-parallel ranks exchange, and with ep 1 they exchange nothing",
        "leave ep_rows out, or set ep",
    ),
    Rule(
        "etp",
        ("parallel.etp", "parallel.tp"),
        lambda c, n: c.model.moe is not None and c.parallel.expert_tp not in (1, c.parallel.tp),
        "an expert is either sharded over all tensor ranks or not at all",
        "set etp to 1, or leave it out to take tp",
    ),
    Rule(
        "etp_sequence",
        ("parallel.etp", "parallel.tp", "parallel.tp_sequence"),
        lambda c, n: c.model.moe is not None and c.parallel.expert_tp == 1 < c.parallel.tp and not c.parallel.tp_sequence,
        "with etp 1 each tensor rank routes its own tokens, but without tp_sequence all tensor ranks hold the same tokens",
        "set tp_sequence to true, or leave etp out",
    ),
    Rule(
        "expert_mesh",
        ("parallel.ep", "parallel.etp", "parallel.dp_shard", "parallel.cp", "parallel.tp"),
        lambda c, n: c.model.moe is not None and c.parallel.expert_tp in (1, c.parallel.tp) and not expert_mesh_fits(c.parallel, n),
        "the ranks of a replica form dp_shard × cp × tp = edp × ep × etp, but ep × etp does not divide their number",
        "choose a smaller ep, or a dp_shard that makes dp_shard × cp × tp a multiple of ep × etp",
    ),
    Rule(
        "reshard_ranks",
        ("parallel.reshard_after_forward", "parallel.dp_shard", "parallel.cp"),
        lambda c, n: not reshard_fits(c.parallel, n),
        "a number of ranks that keep weights between forward and backward must divide dp_shard × cp, over which they are sharded",
        "choose a divisor, such as the number of GPUs of a node, or true or false",
    ),
    Rule(
        "ep_engine",
        ("parallel.engine", "parallel.ep", "parallel.etp"),
        lambda c, n: c.model.moe is not None and c.parallel.engine == "ddp" and own_expert_axes(c),
        "expert parallelism needs FSDP2",
        "use engine fsdp2, or set ep to 1 and leave etp out",
    ),
    Rule(
        "ep_kernels",
        ("parallel.ep_kernels", "parallel.ep", "parallel.ep_rows", "parallel.ep_overlap", "parallel.compile", "precision.compute"),
        lambda c, n: (
            c.parallel.ep_kernels == "deepep"
            and (
                c.parallel.ep == 1
                or c.parallel.ep_rows is not None
                or c.parallel.ep_overlap
                or c.parallel.compile
                or c.precision.compute != "bf16"
            )
        ),
        "DeepEP exchanges rows of experts in bf16, in one round, as eager code",
        "use ep_kernels torch, or ep above 1 with precision.compute bf16 and without compile, ep_rows and ep_overlap",
    ),
    Rule(
        "ep_overlap",
        ("parallel.ep_overlap", "parallel.ep", "parallel.pp", "parallel.pp_schedule"),
        lambda c, n: c.parallel.ep_overlap and (c.parallel.ep == 1 or c.parallel.pp == 1 or c.parallel.pp_schedule != "dualpipev"),
        "ep_overlap is about exchanges between experts' ranks in the pairs of passes that dualpipev has",
        "leave ep_overlap out, or use pp_schedule dualpipev with pp and ep above 1",
    ),
    Rule(
        "moe_deepspeed",
        ("model.moe", "parallel.engine"),
        lambda c, n: c.model.moe is not None and c.parallel.engine == "deepspeed",
        "DeepSpeed runs its own optimizer step, so router biases would not be updated nor expert metrics collected",
        "use engine fsdp2 or ddp",
    ),
    Rule(
        "etp_width",
        ("parallel.etp", "parallel.tp", "model.moe.ffn_size"),
        lambda c, n: c.model.moe is not None and bool(_expert_width(c) % c.parallel.expert_tp or _shared_width(c) % c.parallel.tp),
        "an expert's width is sharded over etp, and that of shared experts over tp",
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
        "capacity is counted per whole sequence, but with cp, or with etp 1 on tensor ranks, each rank routes only a part of it",
        "set cp to 1 and leave etp out, or remove capacity_factor for dropless routing",
    ),
    Rule(
        "grid_lengths",
        ("parallel.cp", "parallel.cp_method", "model.spacetime"),
        lambda c, n: c.parallel.cp > 1 and grid(c) and not _grid_cuts(c),
        "cp splits one dimension of the grid (under dsp, one that the layer does not attend over), and every rank needs a position of it",
        "choose cp of at most the second longest dimension of shape ÷ patch (the longest for ring and ulysses), or smaller patches",
    ),
    Rule(
        "grid_exchange",
        ("parallel.cp", "parallel.cp_ulysses", "parallel.tp_sequence", "model.family"),
        lambda c, n: c.parallel.cp > 1 and grid(c) and (c.parallel.cp_ulysses > 1 or c.parallel.tp_sequence),
        "on a grid the residual stream is split along one dimension, by one method",
        "set cp_ulysses to 1 and tp_sequence to false",
    ),
)


def _cut_by(c: Config) -> set[str]:
    """How tokens of a text meet over cp: in a ring, by heads, or both. Of a grid the row has one fact for all methods."""
    if grid(c):
        return set()
    return {c.parallel.cp_method, *(["ulysses"] if c.parallel.cp_ulysses > 1 else [])} - {"dsp"}


def _shortest(config: Config) -> int:
    """Length of the shortest sequence that cp splits, in units of the tokens that tp_sequence spreads over its ranks."""
    shortest = min(config.train.seq_len, config.train.source_len or config.train.seq_len)
    return shortest // (config.parallel.tp if config.parallel.tp_sequence else 1)


def _expert_width(config: Config) -> int:
    return config.model.moe.ffn_size or 0 if config.model.moe else 0


def _shared_width(config: Config) -> int:
    return config.model.moe.num_shared * _expert_width(config) if config.model.moe else 0


def _grid_cuts(config: Config) -> bool:
    """Whether every layer's stream can be split over cp."""
    model, cp = config.model, config.parallel.cp
    assert model.spacetime is not None
    if config.parallel.cp_method != "dsp":
        return max(model.spacetime.grid) >= cp
    return plan_cuts([model.attended(i) for i in range(model.num_layers)], model.spacetime.grid, cp) is not None


def _stage_layers_fit(config: Config) -> bool:
    layers = config.parallel.pp_layers
    if layers is None:
        return True
    right = len(layers) == config.parallel.pp * config.parallel.stages_per_rank and sum(layers) == config.model.total_layers
    return right and all(n > 0 for n in layers[1:-1])
