"""Every weight of a model as plain data: shapes, cuts over tensor ranks, groups of FSDP. The model's own modules declare them, without
memory, once for a search: so the planner knows every family and kind of layer. Torch is imported for that, and only then.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Literal

from megascale.config.layout import even_dim
from megascale.config.schema import Config, Model
from megascale.config.stages import StagePart
from megascale.errors import UsageError

if TYPE_CHECKING:
    from megascale.model.spec import ParamSpec

# As `model.spec.Cut`: a dimension; or "tokens", "heads" (every tensor rank holds all), "kv_heads" (a dimension if there are heads for all).
Cut = int | Literal["tokens", "heads", "kv_heads"]
LOOKED_UP = ("position", "relative", "coefficient", "norm", "bias", "scale")  # roles that no token is multiplied with as a matrix


@dataclass(frozen=True)
class Weight:
    """One weight: unsharded `shape` and how tensor parallelism splits it.

    matrix   an optimizer of hidden matrices takes it
    product  tokens are multiplied with it
    experts  dimension 0 counts experts
    uses     uses of an element per token
    """

    name: str
    shape: tuple[int, ...]
    cut: Cut
    matrix: bool = False
    product: bool = False
    experts: bool = False
    uses: float = 1.0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Cuts:
    """Sizes that decide which part of a weight a rank holds: tensor ranks, those within an expert, expert ranks, and the ranks over which
    FSDP shards dense weights and experts (1: it does not).
    """

    tp: int = 1
    etp: int = 1
    ep: int = 1
    shard: int = 1
    edp: int = 1
    own_experts: bool = False

    def local(self, w: Weight, kv_heads: int) -> tuple[int, ...]:
        """Shape of a tensor rank's part, padding included, before FSDP shards it. `kv_heads`: those of its layer."""
        shape = list(w.shape)
        if w.experts:
            shape[0] //= self.ep
            if self.etp > 1 and isinstance(w.cut, int):
                shape[w.cut] //= self.etp
        else:
            cut = self.cut(w, kv_heads)
            if isinstance(cut, int):
                shape[cut] = -(-shape[cut] // self.tp)
        return tuple(shape)

    def cut(self, w: Weight, kv_heads: int) -> Cut:
        """How a weight is split, once it is known whether there are KV heads for all tensor ranks."""
        return (0 if kv_heads % self.tp == 0 else "heads") if w.cut == "kv_heads" else w.cut

    def ranks(self, w: Weight) -> int:
        """Ranks over which FSDP shards the weight."""
        return self.edp if w.experts and self.own_experts else self.shard

    def gathered(self, w: Weight, kv_heads: int) -> int:
        """Elements of the gathered weight, padded as FSDP pads it."""
        shape, ranks, dim = self.local(w, kv_heads), self.ranks(w), self.sharded_dim(w, kv_heads)
        return math.prod(shape) // shape[dim] * (-(-shape[dim] // ranks) * ranks)

    def columns(self, w: Weight, kv_heads: int) -> int:
        """Columns of a rank's part."""
        shape = self.local(w, kv_heads)
        sharded = self.sharded_dim(w, kv_heads) == len(shape) - 1
        return -(-shape[-1] // self.ranks(w)) if sharded else shape[-1]

    def sharded_dim(self, w: Weight, kv_heads: int) -> int:
        """The dimension along which FSDP shards the weight."""
        shape, ranks = self.local(w, kv_heads), self.ranks(w)
        if w.experts:
            return 1 if shape[0] % ranks and shape[1] % ranks == 0 else 0
        return even_dim(shape, ranks) if w.matrix else 0


@dataclass(frozen=True, eq=False)
class Unit:
    """A group of weights that are gathered and reduced together; `experts` form a group of their own if they have axes of their own.
    `model` is the config of its layer, of which `sparse` ones have experts; `source`: its tokens are those of an encoder's source.
    """

    weights: tuple[Weight, ...]
    model: Model
    layer: bool = True
    source: bool = False

    @cached_property
    def names(self) -> dict[str, Weight]:
        return {w.name: w for w in self.weights}

    @cached_property
    def sparse(self) -> bool:
        return any(w.experts for w in self.weights)

    @cached_property
    def crossed(self) -> bool:
        """Whether it also attends to a memory."""
        return any(w.name.startswith("cross.") for w in self.weights)

    @property
    def parameters(self) -> int:
        return sum(w.numel for w in self.weights)

    @property
    def active(self) -> float:
        return sum(w.numel * min(1.0, w.uses) for w in self.weights)


@dataclass(frozen=True, eq=False)
class Units:
    """The units of a model in order: what stands before the layers, each layer's kind (an encoder's come first), and what stands after
    them, the final norm with the head.

    ahead    blocks of multi-token prediction, in the last stage
    beside   by a layer's number, weights that its stage holds, such as the norm after an encoder
    copy     the table again, where a last stage holds a copy of it
    repeats  how often a group of layers is passed (MoEUT), whose layers are stored once
    flops    training FLOPs of a token
    """

    front: Unit
    layers: tuple[Unit, ...]
    tail: Unit
    ahead: tuple[Unit, ...]
    beside: dict[int, Unit]
    copy: Unit | None
    repeats: int
    flops: float

    def between(self, layers: range) -> tuple[tuple[Unit, int], ...]:
        """The kinds of some layers with how many of each there are."""
        return self._counted(layers.start, layers.stop)

    @lru_cache(maxsize=4096)  # noqa: B019  models are few, and kept by a cache anyway
    def _counted(self, start: int, stop: int) -> tuple[tuple[Unit, int], ...]:
        return tuple(Counter(self.layers[start:stop]).items())

    @cached_property
    def stored(self) -> tuple[Unit, ...]:
        """Every unit once."""
        return (self.front, *self.layers[: len(self.layers) // self.repeats], *self.beside.values(), self.tail, *self.ahead)

    @property
    def parameters(self) -> int:
        return sum(u.parameters for u in self.stored)

    @property
    def active(self) -> int:
        return round(sum(u.active for u in self.stored))


class Same:
    """A model as a key of a cache: the very object, which a search shares among its layouts."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def __hash__(self) -> int:
        return id(self.model)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.model is self.model


def units_of(config: Config) -> Units:
    """The units of a config's model. Raises UsageError if its vocabulary is not known."""
    m = config.model
    if m.spacetime is None and (m.vocab_size is None or not (m.share_embeddings or m.source_vocab_size)):
        key = "vocab_size" if m.vocab_size is None else "source_vocab_size"
        raise UsageError(f"model.{key} is absent and there may be no tokenizer yet: add it to plan, such as model.{key}=32000")
    return _units(Same(m), config.train.seq_len, config.train.source_length if m.encoder_layers else 0)


@lru_cache(maxsize=64)
def _units(key: Same, seq_len: int, source_len: int) -> Units:
    import torch

    from megascale.measure.compute import flops_per_token
    from megascale.model.families import build_part
    from megascale.model.shape import Shape
    from megascale.model.spec import specs_of

    m = key.model
    shape = Shape(seq_len, torch.float32, torch.bfloat16, source_len)
    whole = build_part(m, shape)
    specs, shared = specs_of(whole), whole.shared_weight
    first = specs_of(build_part(m, shape, StagePart(range(0), True, False)))
    prefixes = [name for name, _ in whole.units()]
    of_unit: dict[str, list[tuple[str, ParamSpec]]] = {name: [] for name in prefixes}
    ends: dict[str, ParamSpec] = {}
    for name, spec in specs.items():
        prefix = next((".".join(parts[:n]) for parts in [name.split(".")] for n in (2, 3) if ".".join(parts[:n]) in of_unit), None)
        if prefix is None:
            ends[name] = spec
        else:
            of_unit[prefix].append((name.removeprefix(f"{prefix}."), spec))
    kinds: dict[tuple[object, ...], Unit] = {}

    def unit(prefix: str) -> Unit:
        stack, number = prefix.split(".")[:2]
        # Layers of multi-token prediction are of the last layer's kind.
        layer = m.num_layers - 1 if stack == "mtp" else int(number)
        own = m.at_layer(layer) if stack != "encoder" else m
        weights = tuple(_weight(name, spec, m) for name, spec in of_unit[prefix])
        kind = (stack, weights, m.kind_at(layer) if m.kinds and stack != "encoder" else "")
        if kind not in kinds:
            kinds[kind] = Unit(weights, own, source=stack == "encoder")
        return kinds[kind]

    layers = tuple(unit(name) for name in prefixes if not name.startswith("mtp."))
    repeats = m.total_layers // len(layers)
    before = {n: s for n, s in ends.items() if n in first}
    joined = {n: s for n, s in ends.items() if n.startswith("encoder_norm.")}
    after = {n: s for n, s in ends.items() if n not in before and n not in joined}

    def end(found: dict[str, ParamSpec]) -> Unit:
        return Unit(tuple(_weight(name, spec, m) for name, spec in found.items()), m, layer=False)

    return Units(
        end(before),
        layers * repeats,
        end(after),
        tuple(unit(name) for name in prefixes if name.startswith("mtp.")),
        {(m.encoder_layers or 0) - 1: end(joined)} if joined else {},
        end({shared: ends[shared]}) if shared else None,
        repeats,
        flops_per_token(m, specs, seq_len, source_len),
    )


def _weight(name: str, spec: ParamSpec, m: Model) -> Weight:
    from megascale.model.spec import MATRICES

    looked_up = spec.role in LOOKED_UP or (spec.role == "embedding" and not (m.tie_embeddings or m.spacetime is not None))
    product = len(spec.shape) > 1 and not looked_up
    return Weight(name, spec.shape, spec.cut, spec.role in MATRICES, product, spec.experts, spec.uses)
