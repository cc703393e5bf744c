"""A checked config on a number of ranks, taken apart once: sizes of axes, cuts of weights, tokens of a rank, stages. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from megascale.config.axes import data_parts
from megascale.config.layout import axis_sizes
from megascale.config.schema import Config
from megascale.config.stages import StagePart, stage_parts, stages_of_rank
from megascale.errors import UsageError
from megascale.planning.weights import Cuts, Unit, Units, Weight, units_of

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp64": 8}


@dataclass(frozen=True)
class Setting:
    """Facts of a checked config on `ranks`. Tokens are those of one micro-batch on one rank; `stream` counts where tp_sequence splits
    them.
    """

    config: Config
    ranks: int
    sizes: dict[str, int] = field(hash=False)
    cuts: Cuts
    units: Units

    @cached_property
    def micro_batches(self) -> int:
        train = self.config.train
        return -(-train.global_batch_size // (train.micro_batch_size * data_parts(self.sizes)))

    @cached_property
    def tokens(self) -> float:
        """Tokens that a rank's attention and feed-forward see, those of the whole tensor group."""
        return self.config.train.micro_batch_size * self.config.train.seq_len / self.config.parallel.cp

    @cached_property
    def stream(self) -> float:
        """Tokens of the residual stream on this rank."""
        return self.tokens / (self.config.parallel.tp if self.config.parallel.tp_sequence else 1)

    @cached_property
    def rows(self) -> float:
        """Rows that a rank's experts process, if they are equally busy."""
        moe, p = self.config.model.moe, self.config.parallel
        if moe is None:
            return 0.0
        return moe.top_k * (self.tokens if p.expert_tp == p.tp else self.stream)

    @cached_property
    def item(self) -> int:
        """Bytes of a number in the compute format."""
        return ITEMSIZE[self.config.precision.compute]

    @cached_property
    def stored(self) -> int:
        """Bytes of a stored weight."""
        return ITEMSIZE[self.config.precision.storage]

    @cached_property
    def reduced(self) -> int:
        """Bytes of a gradient on its way through a reduce-scatter."""
        return ITEMSIZE[self.config.precision.reduce or self.config.precision.storage]

    @cached_property
    def sharded(self) -> bool:
        """FSDP2 wraps the weights: ranks with other tokens hold the same ones."""
        s = self.sizes
        return self.config.parallel.engine == "fsdp2" and s["dp_shard"] * s["cp"] * s["dp_replicate"] * s["edp"] > 1

    def shadowed(self, w: Weight) -> bool:
        """Whether a weight has a shadow: what a product multiplies with as it is, where nothing gathers it (parallel/shadows.py)."""
        model, fp8, s = self.config.model, self.config.precision.fp8, self.sizes
        hidden = w.matrix and (fp8 == "false" or (w.experts and fp8 == "dynamic"))
        as_it_is = hidden and model.tokenformer is None and (w.experts or model.linear != "bitlinear")
        own = w.experts and self.cuts.own_experts
        others = s["dp_replicate"] * s["edp"] * (1 if own else s["dp_shard"] * s["cp"])
        plain = self.config.parallel.engine == "ddp" or others == 1
        return self.config.shadows and plain and (as_it_is or w.name.endswith(("embedding.weight", "head.weight", "mlm.dense.weight")))

    @cached_property
    def stages(self) -> list[list[StagePart]]:
        """Parts by pipeline rank. Layered accumulation's finest stages are one part here."""
        p = self.config.parallel
        if p.pp == 1:
            return [[StagePart(range(self.config.model.num_layers))]]
        parts = stage_parts_of(self.config)
        return [[parts[i] for i in stages_of_rank(p.pp_schedule, p.pp, p.pp_virtual, r)] for r in range(p.pp)]

    @cached_property
    def distinct(self) -> list[int]:
        """Pipeline ranks that differ in what they hold: the first and the last of each kind."""
        kinds: dict[tuple[tuple[int, bool, bool], ...], list[int]] = {}
        for rank, parts in enumerate(self.stages):
            kinds.setdefault(tuple((len(p.layers), p.first, p.last) for p in parts), []).append(rank)
        same = self.config.model.moe is None and self.config.model.ffn_sizes is None
        return sorted({r for ranks in kinds.values() for r in (ranks[0], ranks[-1])}) if same else list(range(len(self.stages)))

    def layers_of(self, parts: Sequence[StagePart]) -> list[tuple[Unit, int]]:
        """The kinds of layers in some stages, each with its number."""
        return [pair for part in parts for pair in self.units.between(part.layers)]

    def ends_of(self, parts: Sequence[StagePart]) -> list[Unit]:
        """The units of some stages that are no layers. A tied table stands at both ends if these are different stages."""
        found = []
        for part in parts:
            if part.first:
                found.append(self.units.front)
            if part.last and self.units.tied and (not part.first or self.config.parallel.accumulation == "layered"):
                found.append(self.units.copy)
            found += [self.units.tail] if part.last and self.units.tail.weights else []
        return found


def stage_parts_of(config: Config) -> tuple[StagePart, ...]:
    """`stage_parts`, computed once for each number of stages of a model."""
    return _parts(_PartsKey(config))


class _PartsKey:
    """What the split of layers depends on."""

    def __init__(self, config: Config) -> None:
        self.config = config
        p, m = config.parallel, config.model
        sizes = (m.hidden_size, m.num_heads, m.num_kv_heads, m.head_dim, m.ffn_size, m.vocab_size, m.sliding_window, m.moe is None)
        moe = None if m.moe is None else (m.moe.ffn_size, m.moe.top_k, m.moe.num_shared, m.moe.every)
        self.key = (p.pp, p.stages_per_rank, p.pp_layers, config.train.seq_len, m.num_layers, sizes, moe, m.ffn, m.attention)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _PartsKey) and other.key == self.key


@lru_cache(maxsize=4096)
def _parts(key: _PartsKey) -> tuple[StagePart, ...]:
    c = key.config
    return tuple(stage_parts(c.model, c.parallel.model_copy(update={"accumulation": "depth_first"}), c.train.seq_len))


def setting_of(config: Config, ranks: int) -> Setting:
    """Takes a checked config apart. Raises UsageError for what the planner does not know."""
    p = config.parallel
    if p.engine == "deepspeed":
        raise UsageError("megascale plan knows engine fsdp2 and ddp, not deepspeed: leave parallel.engine out, or use --dry-run")
    sizes = axis_sizes(p, ranks)
    own = sizes["ep"] * sizes["edp"] > 1
    fsdp = p.engine == "fsdp2"
    cuts = Cuts(
        tp=p.tp,
        etp=p.tp if p.expert_tp == p.tp else 1,
        ep=sizes["ep"],
        shard=sizes["dp_shard"] * sizes["cp"] if fsdp else 1,
        edp=sizes["edp"] if fsdp else 1,
        own_experts=own,
        kv_cut=config.model.num_kv_heads % p.tp == 0,
    )
    return Setting(config, ranks, sizes, cuts, units_of(config))
