"""The section `parallel`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from megascale.config.schema.section import NonNegative, Positive, Ranks, Section


def _words(value: Any) -> Any:
    """`none`, one word, or a list of words → a list without repetition."""
    words = value if isinstance(value, list | tuple) else [value]
    return [w for i, w in enumerate(words) if w not in ("none", None, *words[:i])]


class Parallel(Section):
    dp_replicate: Ranks = 1
    dp_shard: Annotated[int, Field(ge=-1, le=2**20)] = -1  # -1: the ranks that the other axes leave
    reshard_after_forward: bool = True  # True is ZeRO-3; False keeps the gathered weights until backward (ZeRO-2)
    tp: Ranks = 1
    tp_sequence: bool = False
    cp: Ranks = 1
    cp_method: Literal["ring", "ulysses", "dsp"] = "ring"
    cp_ulysses: Ranks = 1  # with ring: so many neighbours trade heads, and the groups of them pass blocks around
    pp: Ranks = 1
    pp_schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev"] = "1f1b"
    pp_virtual: Ranks = 1  # stages per rank; zbv and dualpipev always have two
    pp_layers: tuple[NonNegative, ...] | None = None  # layers of each stage in order; absent: balanced by estimated cost
    ep: Ranks = 1  # ranks over which the experts are dealt out
    etp: Ranks | None = None  # ranks over which one expert is cut; tp if absent
    accumulation: Literal["depth_first", "layered"] = "depth_first"
    breadth_first: Positive | None = None  # micro-batches that pass a layer together under layered; all of the step if absent
    engine: Literal["fsdp2", "ddp", "deepspeed"] = "fsdp2"
    # What lives from forward to backward, of a block: all, results of products and attention, its input; nested: every √n-th block's input
    recompute: Literal["none", "selective", "full", "nested"] = "none"
    update_in_backward: bool = False  # under layered: a layer's weights move as soon as its gradient is there; needs train.clip 0
    zero_stage: Literal[1, 2, 3] = 3  # of engine deepspeed: it cuts optimizer state, gradients too, weights too
    offload: Annotated[tuple[Literal["optimizer", "parameters", "activations"], ...], BeforeValidator(_words)] = ()  # one or a list; none
    offload_dir: str | None = None  # of engine deepspeed: a folder on NVMe instead of host memory
    compile: bool = False

    @property
    def expert_tp(self) -> int:
        """Ranks over which one expert is cut."""
        return self.etp or self.tp

    @property
    def heads_over(self) -> int:
        """Ranks of cp that trade heads with each other; cp divided by it is the length of the ring."""
        return self.cp if self.cp_method == "ulysses" else self.cp_ulysses

    @property
    def stages_per_rank(self) -> int:
        return 2 if self.pp_schedule in ("zbv", "dualpipev") and self.pp > 1 else self.pp_virtual
