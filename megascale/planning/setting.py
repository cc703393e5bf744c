"""A checked config on a number of ranks, taken apart once: sizes of axes, cuts of weights, tokens of a rank, stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from megascale.config.axes import data_parts
from megascale.config.layout import axis_sizes
from megascale.config.schema import Config, Parallel
from megascale.config.stages import StagePart, stage_parts, stages_of_rank
from megascale.errors import UsageError
from megascale.planning.weights import Cuts, Same, Unit, Units, Weight, units_of

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp64": 8}


@dataclass(frozen=True)
class Setting:
    """Facts of a checked config on `ranks`. Tokens are those of one micro-batch on one rank. `cpu`: it computes on CPUs, whose kernels keep
    other tensors.
    """

    config: Config
    ranks: int
    sizes: dict[str, int] = field(hash=False)
    cuts: Cuts
    units: Units
    cpu: bool = False
    layer_memo: dict[tuple[Unit, str], float] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def micro_batches(self) -> int:
        train = self.config.train
        return -(-train.global_batch_size // (train.micro_batch_size * data_parts(self.sizes)))

    def tokens(self, unit: Unit | None = None) -> float:
        """Tokens that a rank's sublayers see in a layer, those of the whole tensor group; without a unit those of the loss."""
        train, grid = self.config.train, self.config.model.spacetime
        length = train.source_length if unit is not None and unit.source else train.seq_len if grid is None else grid.tokens
        return train.micro_batch_size * length / self.config.parallel.cp

    def memory(self, unit: Unit) -> float:
        """Tokens that a layer attends to beside its own: those of a source or of a text, whole on every rank."""
        train, grid = self.config.train, self.config.model.spacetime
        length = 0 if not unit.crossed else train.source_length if grid is None else grid.text_len or 0
        return float(train.micro_batch_size * length)

    def stream(self, unit: Unit | None = None) -> float:
        """Tokens of the residual stream on this rank."""
        return self.tokens(unit) / (self.config.parallel.tp if self.config.parallel.tp_sequence else 1)

    @property
    def message(self) -> float:
        """Tokens that stages send: of both streams if there are two, and of a text."""
        train, p, grid = self.config.train, self.config.parallel, self.config.model.spacetime
        more = train.source_length if self.config.model.encoder_layers else 0
        text = (grid.text_len or 0) if grid is not None else 0
        cut = p.tp if p.tp_sequence else 1
        return self.stream() + train.micro_batch_size * (more / p.cp + text) / cut

    def rows(self, unit: Unit) -> float:
        """Rows that a rank's experts process, if they are equally busy."""
        moe, p = unit.model.moe, self.config.parallel
        if moe is None or not unit.sparse:
            return 0.0
        return moe.top_k * (self.tokens(unit) if p.expert_tp == p.tp else self.stream(unit))

    @cached_property
    def item(self) -> int:
        """Bytes of a number in the compute format."""
        return ITEMSIZE[self.config.precision.compute]

    @cached_property
    def saved(self) -> int:
        """Bytes fewer for a number of a hidden matrix that is gathered in FP8."""
        return self.item - 1 if self.config.precision.fp8 == "static" else 0

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
            return [[StagePart(range(self.config.model.total_layers))]]
        parts = stage_parts_of(self.config)
        return [[parts[i] for i in stages_of_rank(p.pp_schedule, p.pp, p.pp_virtual, r)] for r in range(p.pp)]

    @cached_property
    def distinct(self) -> list[int]:
        """Pipeline ranks that differ in what they hold: the first and the last of each kind."""
        kinds: dict[tuple[tuple[object, ...], ...], list[int]] = {}
        for rank, parts in enumerate(self.stages):
            key = tuple((tuple((id(u), n) for u, n in self.units.between(p.layers)), p.first, p.last) for p in parts)
            kinds.setdefault(key, []).append(rank)
        return sorted({r for ranks in kinds.values() for r in (ranks[0], ranks[-1])})

    def layers_of(self, parts: Sequence[StagePart]) -> list[tuple[Unit, int]]:
        """The kinds of layers in some stages, each with the number of passes through it."""
        found = [pair for part in parts for pair in self.units.between(part.layers)]
        return found + [(unit, 1) for part in parts if part.last for unit in self.units.ahead]

    def stored_of(self, parts: Sequence[StagePart]) -> list[tuple[Unit, int]]:
        """The units whose weights some stages hold, each with their number."""
        layers = [(u, n // self.units.repeats) for u, n in self.layers_of(parts)]
        return [*layers, *((u, 1) for u in self.ends_of(parts))]

    def ends_of(self, parts: Sequence[StagePart]) -> list[Unit]:
        """The units of some stages that are no layers. A shared table stands at both ends if these are different stages."""
        found = []
        for part in parts:
            if part.first:
                found.append(self.units.front)
            found += [unit for layer, unit in self.units.beside.items() if layer in part.layers]
            if part.last and self.units.copy and (not part.first or self.config.parallel.accumulation == "layered"):
                found.append(self.units.copy)
            found += [self.units.tail] if part.last and self.units.tail.weights else []
        return found


def stage_parts_of(config: Config) -> tuple[StagePart, ...]:
    """`stage_parts`, computed once for each number of stages of a model."""
    p, train = config.parallel, config.train
    return _parts(Same(config.model), p.pp, p.pp_schedule, p.pp_virtual, p.pp_layers, train.seq_len, train.source_length)


@lru_cache(maxsize=4096)
def _parts(
    key: Same, pp: int, schedule: str, virtual: int, layers: tuple[int, ...] | None, seq_len: int, source_len: int
) -> tuple[StagePart, ...]:
    # Without the config's rules: a search asks for thousands.
    parallel = Parallel().model_copy(update={"pp": pp, "pp_schedule": schedule, "pp_virtual": virtual, "pp_layers": layers})
    return tuple(stage_parts(key.model, parallel, seq_len, source_len if key.model.encoder_layers else 0))


def setting_of(config: Config, ranks: int, cpu: bool = False) -> Setting:
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
    )
    return Setting(config, ranks, sizes, cuts, units_of(config), cpu)
