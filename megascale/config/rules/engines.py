"""When weights move and where they lie: layered accumulation, DeepSpeed, offload."""

from __future__ import annotations

from megascale.config.layout import axis_sizes, micro_batches
from megascale.config.optimizers import optimizers
from megascale.config.rules.rule import Rule, own_expert_axes
from megascale.config.schema import Config
from megascale.errors import UsageError

ENGINE_RULES: tuple[Rule, ...] = (
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
                or optimizers()[c.optim.name].whole_matrices
            )
        ),
        "a layer can be updated during backward where its gradient comes at once and nothing of the other layers is needed for it",
        "use accumulation layered, leave breadth_first out, set train.clip to 0, choose adamw or lion, and offload activations at most; or "
        "leave update_in_backward out",
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
        lambda c, n: c.parallel.engine == "deepspeed" and c.model.family == "spacetime",
        "DeepSpeed has been tried with text only",
        "use engine fsdp2",
    ),
    Rule(
        "deepspeed_update",
        ("parallel.engine", "optim.name", "precision.compute"),
        lambda c, n: (
            c.parallel.engine == "deepspeed"
            and (not optimizers()[c.optim.name].deepspeed or c.precision.compute == "fp64" or c.precision.storage != "fp32")
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
        "groups are runs of a stack's own blocks that pass one after another",
        "use recompute full, or a text model with depth_first accumulation under engine fsdp2 or ddp",
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
        lambda c, n: c.model.moe is not None and "parameters" in c.parallel.offload and own_expert_axes(c),
        "FSDP2 moves the parameters that it cuts, and experts with axes of their own may have nothing left to cut",
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
        ("optim.multipliers", "parallel.engine"),
        lambda c, n: bool(c.optim.multipliers) and c.parallel.engine == "deepspeed",
        "DeepSpeed counts the gradient norm itself, every weight once",
        "use engine fsdp2 or ddp, or leave multipliers out",
    ),
)


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
