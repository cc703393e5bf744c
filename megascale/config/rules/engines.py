"""When weights move and where they are stored: layered accumulation, DeepSpeed, offload."""

from __future__ import annotations

from megascale.config.layout import axis_sizes, micro_batches
from megascale.config.optimizers import optimizers
from megascale.config.rules.rule import Rule, own_expert_axes
from megascale.config.schema import Config
from megascale.config.stages import SPLIT_BACKWARD
from megascale.errors import UsageError

ENGINE_RULES: tuple[Rule, ...] = (
    Rule(
        "layered_engine",
        ("parallel.accumulation", "parallel.engine"),
        lambda c, n: c.parallel.accumulation == "layered" and c.parallel.engine != "fsdp2",
        "layered accumulation schedules gathers and reductions itself, but this engine uses its own schedule",
        "use engine fsdp2, or accumulation depth_first",
    ),
    Rule(
        "layered_pipeline",
        ("parallel.accumulation", "parallel.pp"),
        lambda c, n: c.parallel.accumulation == "layered" and c.parallel.pp > 1,
        "with pp, layered accumulation is the schedule looped_bfs",
        "use accumulation depth_first with pp_schedule looped_bfs and as many pp_virtual as layers allow, or pp 1",
    ),
    Rule(
        "dp_comm",
        ("parallel.dp_comm", "parallel.engine", "parallel.accumulation"),
        lambda c, n: c.parallel.dp_comm != "shared" and (c.parallel.engine != "fsdp2" or c.parallel.accumulation == "layered"),
        "dp_comm is about FSDP2's groups, and layered accumulation would need one for each layer",
        "leave dp_comm out, or use engine fsdp2 with accumulation depth_first",
    ),
    Rule(
        "pp_reduce_every",
        ("parallel.pp_reduce_every", "parallel.pp", "parallel.pp_schedule", "parallel.engine"),
        lambda c, n: (
            c.parallel.pp_reduce_every is not None
            and (c.parallel.pp == 1 or c.parallel.engine != "fsdp2" or c.parallel.pp_schedule in SPLIT_BACKWARD)
        ),
        "pp_reduce_every is about FSDP2 in a pipeline, and schedules that split the backward pass have no gradients of weights at its end",
        "leave pp_reduce_every out, or use pp above 1 with engine fsdp2 and pp_schedule 1f1b or interleaved_1f1b",
    ),
    Rule(
        "breadth_without_layers",
        ("parallel.breadth_first", "parallel.accumulation"),
        lambda c, n: (c.parallel.breadth_first or 1) > 1 and c.parallel.accumulation == "depth_first",
        "breadth_first groups micro-batches, but depth-first accumulation runs one at a time",
        "use accumulation layered, or leave breadth_first out",
    ),
    Rule(
        "breadth_divides",
        ("parallel.breadth_first", "train.global_batch_size", "train.micro_batch_size"),
        lambda c, n: c.parallel.accumulation == "layered" and micro_batches(c, n) % (c.parallel.breadth_first or 1) != 0,
        "breadth_first micro-batches pass a layer together, but the step's m = global_batch_size ÷ (micro_batch_size × data ranks) "
        "is not a multiple of it",
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
                or optimizers()[c.optim.name].whole_matrices
            )
        ),
        "a layer can be updated during backward only if its gradient is complete at once and the update needs nothing from other layers",
        "use accumulation layered, leave breadth_first out, set train.clip to 0, choose adamw or lion, and offload activations at most; or "
        "leave update_in_backward out",
    ),
    Rule(
        "skip_spikes",
        ("train.skip_spikes", "parallel.update_in_backward", "parallel.engine"),
        lambda c, n: c.train.skip_spikes is not None and (c.parallel.update_in_backward or c.parallel.engine == "deepspeed"),
        "a step can be skipped for its gradient norm only where weights are updated after the whole of it is known, by our own optimizers",
        "leave skip_spikes out, or use engine fsdp2 or ddp without update_in_backward",
    ),
    Rule(
        "deepspeed_axes",
        ("parallel.engine", "parallel.pp", "parallel.cp", "parallel.dp_replicate"),
        lambda c, n: (
            c.parallel.engine == "deepspeed"
            and (max(c.parallel.pp, c.parallel.cp, c.parallel.dp_replicate) > 1 or not _weights_can_be_cut(c, n))
        ),
        "DeepSpeed supports at least two data ranks on dp_shard, optionally with tp",
        "put the ranks on dp_shard and tp, or use engine fsdp2",
    ),
    Rule(
        "deepspeed_family",
        ("parallel.engine", "model.family"),
        lambda c, n: c.parallel.engine == "deepspeed" and c.model.family == "spacetime",
        "DeepSpeed supports text models only",
        "use engine fsdp2",
    ),
    Rule(
        "deepspeed_update",
        ("parallel.engine", "optim.name", "precision.compute", "optim.moments"),
        lambda c, n: (
            c.parallel.engine == "deepspeed"
            and (
                not optimizers()[c.optim.name].deepspeed
                or c.optim.moments is not None
                or c.precision.compute == "fp64"
                or c.precision.storage != "fp32"
            )
        ),
        "DeepSpeed supports AdamW with fp32 master weights and moments, computing in bf16 or fp32",
        "use optim.name adamw with precision.compute bf16 or fp32 and without precision.master and optim.moments, or engine fsdp2",
    ),
    Rule(
        "zero_offload",
        ("parallel.engine", "parallel.zero_stage", "parallel.offload"),
        lambda c, n: c.parallel.engine == "deepspeed" and "parameters" in c.parallel.offload and c.parallel.zero_stage < 3,
        "weights can be offloaded only under ZeRO-3, which shards them",
        "set zero_stage to 3, or offload optimizer",
    ),
    Rule(
        "offload_dir",
        ("parallel.offload_dir", "parallel.engine", "parallel.offload"),
        lambda c, n: (
            c.parallel.offload_dir is not None
            and (c.parallel.engine != "deepspeed" or not {"optimizer", "parameters"} & set(c.parallel.offload))
        ),
        "only DeepSpeed offloads to a disk, and offload must say what",
        "use engine deepspeed with offload optimizer or parameters, or leave offload_dir out for host memory",
    ),
    Rule(
        "offload_inputs",
        ("parallel.offload", "parallel.recompute"),
        lambda c, n: "activations" in c.parallel.offload and c.parallel.recompute != "full",
        "activations can be offloaded only with full recomputation, which keeps block inputs alone; otherwise more would have to move "
        "than the link can carry",
        "set parallel.recompute to full, or leave activations out of offload",
    ),
    Rule(
        "recompute_nested",
        ("parallel.recompute", "parallel.accumulation", "parallel.engine", "model.family", "model.moeut"),
        lambda c, n: (
            c.parallel.recompute == "nested"
            and (
                c.parallel.accumulation == "layered"
                or c.parallel.engine == "deepspeed"
                or c.model.family == "spacetime"
                or c.model.moeut is not None
            )
        ),
        "nested recomputation groups consecutive blocks of one stack that run one after another",
        "use recompute full, or a text model with depth_first accumulation under engine fsdp2 or ddp",
    ),
    Rule(
        "recompute_budget",
        ("parallel.recompute", "parallel.compile", "parallel.pp_schedule", "parallel.engine", "model.moe"),
        lambda c, n: (
            c.parallel.recompute == "budget"
            and (
                not c.parallel.compile
                or c.model.moe is not None
                or c.parallel.engine == "deepspeed"
                or (c.parallel.pp > 1 and c.parallel.pp_schedule in SPLIT_BACKWARD)
            )
        ),
        "the compiler chooses what a block recomputes, so each must be one compiled graph: no experts, no split-backward schedule",
        "set parallel.compile true, or use recompute selective",
    ),
    Rule(
        "activation_budget",
        ("parallel.activation_budget", "parallel.recompute"),
        lambda c, n: c.parallel.activation_budget is not None and c.parallel.recompute != "budget",
        "only recompute budget reads it",
        "use parallel.recompute budget, or leave activation_budget out",
    ),
    Rule(
        "offload_parameters",
        ("parallel.offload", "parallel.engine", "parallel.dp_shard", "parallel.dp_replicate"),
        lambda c, n: "parameters" in c.parallel.offload and c.parallel.engine != "deepspeed" and not _sharded(c, n),
        "FSDP2 offloads the parameters that it shards, so it needs at least two data ranks",
        "use engine fsdp2 on at least two data ranks, or offload optimizer",
    ),
    Rule(
        "offload_experts",
        ("parallel.offload", "parallel.ep", "parallel.etp"),
        lambda c, n: c.model.moe is not None and "parameters" in c.parallel.offload and own_expert_axes(c),
        "FSDP2 offloads the parameters that it shards, but with ep or etp there may be nothing left to shard",
        "set ep to 1 and leave etp out, or leave parameters out of offload",
    ),
    Rule(
        "offload_muon",
        ("parallel.offload", "optim.name"),
        lambda c, n: optimizers()[c.optim.name].whole_matrices and bool({"optimizer", "parameters"} & set(c.parallel.offload)),
        "this optimizer multiplies whole matrices, which a host does far too slowly",
        "use adamw or lion, or offload activations only",
    ),
    Rule(
        "multipliers_deepspeed",
        ("optim.multipliers", "optim.groups", "parallel.engine"),
        lambda c, n: bool(c.optim.multipliers or c.optim.groups) and c.parallel.engine == "deepspeed",
        "DeepSpeed computes the gradient norm itself and ignores multipliers and groups",
        "use engine fsdp2 or ddp, or leave multipliers and groups out",
    ),
    Rule(
        "ema_deepspeed",
        ("optim.ema", "parallel.engine"),
        lambda c, n: bool(c.optim.ema) and c.parallel.engine == "deepspeed",
        "DeepSpeed owns the weights and their updates, and keeps no averages",
        "use engine fsdp2 or ddp, or leave ema out and merge checkpoints (megascale merge)",
    ),
)


def _sharded(config: Config, ranks: int) -> bool:
    """Whether FSDP2 shards the weights."""
    return config.parallel.engine == "fsdp2" and _weights_can_be_cut(config, ranks)


def _weights_can_be_cut(config: Config, ranks: int) -> bool:
    """Whether ranks with other tokens hold the same weights; True if the axes do not fit the ranks, which another rule refuses."""
    try:
        sizes = axis_sizes(config.parallel, ranks)
    except UsageError:
        return True
    return sizes["dp_shard"] * sizes["dp_replicate"] * sizes["cp"] > 1
