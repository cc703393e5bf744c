"""The section `parallel`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from megascale.config.schema.section import NonNegative, Positive, Ranks, Section


def _words(value: Any) -> Any:
    """`none`, one word, or a list of words → a list without repetitions."""
    words = value if isinstance(value, list | tuple) else [value]
    return [w for i, w in enumerate(words) if w not in ("none", None, *words[:i])]


_OFFLOADED: dict[str, Any] = {"enum": ["none", "optimizer", "parameters", "activations"]}
_OFFLOAD: dict[str, Any] = {"anyOf": [_OFFLOADED, {"type": "array", "items": _OFFLOADED}]}


class Parallel(Section):
    dp_replicate: Ranks = 1
    """Data-parallel replicas: groups of ranks that each hold all shards (HSDP)."""
    dp_shard: Annotated[int, Field(ge=-1, le=2**20)] = -1
    """Data-parallel ranks over which weights, gradients and optimizer state are sharded. -1: all ranks that the other axes leave."""
    reshard_after_forward: bool | Annotated[int, Field(ge=2, le=2**20)] = True
    """Free gathered weights between forward and backward (ZeRO-3). `false` keeps them (ZeRO-2): less traffic, more memory. A number keeps
    them sharded over that many neighbouring ranks, so that backward gathers inside a node: 8 for nodes with 8 GPUs.
    """
    dp_comm: Literal["shared", "separate", "symmetric"] = "shared"
    """How FSDP2 communicates: gathers and reductions over one group, over a group each (NCCL then overlaps them, with more memory), or
    from buffers in NCCL's symmetric memory.
    """
    tp: Ranks = 1
    """Tensor-parallel ranks."""
    tp_sequence: bool = False
    """Shard the residual stream over the tensor-parallel ranks between sublayers (Megatron's sequence parallelism)."""
    tp_async: bool = False
    """Under `compile` and `tp_sequence`: overlap each gather and reduction with the product beside it, through symmetric memory (CUDA)."""
    cp: Ranks = 1
    """Context-parallel ranks, which share each sequence."""
    cp_method: Literal["ring", "ulysses", "dsp"] = "ring"
    """How context-parallel ranks exchange: key-value blocks around a ring, heads by all-to-all (Ulysses), or grid dimensions (`dsp`,
    `spacetime` only).
    """
    cp_ulysses: Ranks = 1
    """With `cp_method: ring`: ranks that exchange heads inside each group; the groups form the ring."""
    cp_pieces: Annotated[int, Field(ge=2, le=4096)] = 2
    """Pieces of a sequence that each place of a ring holds. Two even out causal attention to a whole sequence, more (16 or 32) also that
    to packed documents.
    """
    pp: Ranks = 1
    """Pipeline-parallel ranks."""
    pp_schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev"] = "1f1b"
    """Order of forward and backward passes in the pipeline."""
    pp_virtual: Ranks = 1
    """Pipeline stages per rank. `zbv` and `dualpipev` always have two."""
    pp_layers: tuple[NonNegative, ...] | None = None
    """Layers of each stage, in order. Default: balanced by estimated cost; `megascale balance` measures it."""
    pp_reduce_every: Positive | None = None
    """Micro-batches after which a pipeline's stage reduces its gradients under FSDP2. Until then it keeps their sum unsharded, 4 bytes per
    weight of the stage; 1 keeps that of one layer at a time, and each reduction sends as much again. Default: once per step.
    """
    ep: Ranks = 1
    """Expert-parallel ranks, over which experts are distributed."""
    etp: Ranks | None = None
    """Tensor-parallel ranks within one expert. Default: `tp`."""
    ep_rows: Annotated[float, Field(ge=1, le=2**20)] | None = None
    """Exchange rows of experts in rounds of a fixed size, so that the host never waits for their number: each expert-parallel rank has room
    for this many times an even load, and ep / ep_rows rounds take all of them. Default: one exchange of the exact number.
    """
    ep_kernels: Literal["torch", "deepep"] = "torch"
    """What exchanges rows of experts: torch's collectives, or DeepEP's kernels, where that package is installed (CUDA, bf16)."""
    ep_overlap: bool = False
    """Under `pp_schedule: dualpipev`: let the forward pass of one micro-batch compute while rows for experts of another's backward pass
    travel, and the other way round. Both passes of a pair then wait for both of their messages.
    """
    accumulation: Literal["depth_first", "layered"] = "depth_first"
    """Order of micro-batches: all layers for one micro-batch after the other, or all micro-batches for one layer after the other."""
    breadth_first: Positive | None = None
    """Micro-batches that pass through a layer together under `accumulation: layered`. Default: all of a step."""
    engine: Literal["fsdp2", "ddp", "deepspeed"] = "fsdp2"
    """What shards or replicates: FSDP2, DDP, or DeepSpeed (extra `deepspeed`)."""
    recompute: Literal["none", "selective", "full", "nested", "budget"] = "none"
    """What is recomputed in backward: nothing, all but the results of products and attention, whole blocks, segments of √n blocks
    (`nested`), or what the compiler chooses to stay within `activation_budget` (`budget`).
    """
    activation_budget: Annotated[float, Field(ge=0, le=1)] | None = None
    """`recompute: budget` only: share of a compiled block's activations that is kept. 0 keeps its input alone. Default: 0.5."""
    update_in_backward: bool = False
    """Under `accumulation: layered`: update a layer as soon as its gradient is ready. Needs `train.clip: 0`."""
    zero_stage: Literal[1, 2, 3] = 3
    """DeepSpeed only: shard optimizer state (1), gradients as well (2), or weights as well (3)."""
    offload: Annotated[
        tuple[Literal["optimizer", "parameters", "activations"], ...], BeforeValidator(_words), WithJsonSchema(_OFFLOAD)
    ] = ()
    """What is kept in host memory: one of the names, a list of them, or `none`."""
    offload_dir: str | None = None
    """DeepSpeed only: a folder on NVMe to use instead of host memory."""
    compile: bool = False
    """Compile the blocks with torch.compile."""

    @property
    def budget(self) -> float:
        """The share of activations that `recompute: budget` keeps."""
        return 0.5 if self.activation_budget is None else self.activation_budget

    @property
    def expert_tp(self) -> int:
        """Ranks that share one expert."""
        return self.etp or self.tp

    @property
    def heads_over(self) -> int:
        """Number of cp ranks that exchange heads with each other; the ring has cp divided by it places."""
        return self.cp if self.cp_method == "ulysses" else self.cp_ulysses

    @property
    def stages_per_rank(self) -> int:
        return 2 if self.pp_schedule in ("zbv", "dualpipev") and self.pp > 1 else self.pp_virtual
