"""Every weight of a text model as plain data, without building it: shapes, cuts over tensor ranks, groups of FSDP. Imports no torch.

`tests/planning/test_weights.py` holds it equal to what the model's modules declare.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

from megascale.config.attentions import GROUPED, gate_width
from megascale.config.layout import even_dim
from megascale.config.schema import Config, Model
from megascale.config.stages import has_experts
from megascale.errors import UsageError

# As `model.spec.Cut`: a dimension; or "tokens", "heads" (every tensor rank holds all), "kv_heads" (a dimension if there are heads for all).
Cut = int | Literal["tokens", "heads", "kv_heads"]


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
    kv_cut: bool = True

    def local(self, w: Weight) -> tuple[int, ...]:
        """Shape of a tensor rank's part, padding included, before FSDP shards it."""
        shape = list(w.shape)
        if w.experts:
            shape[0] //= self.ep
            if self.etp > 1 and isinstance(w.cut, int):
                shape[w.cut] //= self.etp
        else:
            cut = (0 if self.kv_cut else "heads") if w.cut == "kv_heads" else w.cut
            if isinstance(cut, int):
                shape[cut] = -(-shape[cut] // self.tp)
        return tuple(shape)

    def ranks(self, w: Weight) -> int:
        """Ranks over which FSDP shards the weight."""
        return self.edp if w.experts and self.own_experts else self.shard

    def gathered(self, w: Weight) -> int:
        """Elements of the gathered weight, padded as FSDP pads it."""
        shape, ranks = self.local(w), self.ranks(w)
        if w.experts:
            dim = 1 if shape[0] % ranks and shape[1] % ranks == 0 else 0
        else:
            dim = even_dim(shape, ranks) if w.matrix else 0
        return math.prod(shape) // shape[dim] * (-(-shape[dim] // ranks) * ranks)

    def held(self, w: Weight) -> int:
        """Elements on the first rank, which holds most."""
        return self.gathered(w) // self.ranks(w)


@dataclass(frozen=True, eq=False)
class Unit:
    """A group of weights that are gathered and reduced together; `experts` form a group of their own if they have axes of their own."""

    weights: tuple[Weight, ...]
    layer: bool = True
    sparse: bool = False

    @property
    def parameters(self) -> int:
        return sum(w.numel for w in self.weights)

    @property
    def active(self) -> float:
        return sum(w.numel * min(1.0, w.uses) for w in self.weights)


@dataclass(frozen=True, eq=False)
class Units:
    """The units of a model in order: what stands before the layers, each layer's kind, and the final norm with the head."""

    front: Unit
    layers: tuple[Unit, ...]
    tail: Unit
    tied: bool

    @cached_property
    def copy(self) -> Unit:
        """The table again, where a pipeline's last stage holds a copy of it as its head."""
        return Unit(self.front.weights[:1], False)

    def between(self, layers: range) -> tuple[tuple[Unit, int], ...]:
        """The kinds of some layers with how many of each there are."""
        return self._counted(layers.start, layers.stop)

    @lru_cache(maxsize=4096)  # noqa: B019  models are few, and kept by a cache anyway
    def _counted(self, start: int, stop: int) -> tuple[tuple[Unit, int], ...]:
        return tuple(Counter(self.layers[start:stop]).items())

    @property
    def parameters(self) -> int:
        return sum(u.parameters for u in (self.front, *self.layers, self.tail))

    @property
    def active(self) -> int:
        return round(sum(u.active for u in (self.front, *self.layers, self.tail)))


def check_family(model: Model) -> None:
    """Raises UsageError for models whose weights this file does not know."""
    unknown = {
        f"family {model.family}": model.family not in ("decoder", "encoder"),
        "moeut": model.moeut is not None,
        f"attention {model.attention}": model.attention_row is not GROUPED,
        "kinds of layers": bool(model.kinds),
        "multi-token prediction": model.mtp_depth > 0,
    }
    for what, there in unknown.items():
        if there:
            raise UsageError(
                f"megascale plan knows decoders and encoders with equal blocks of grouped attention, but not {what}: `megascale train "
                "CONFIG --dry-run` reports the memory of every model, one layout at a time"
            )
    if model.vocab_size is None:
        raise UsageError("model.vocab_size is absent and there may be no tokenizer yet: add it to plan, such as model.vocab_size=32000")


def units_of(config: Config) -> Units:
    """The units of a config's model."""
    check_family(config.model)
    return _units(_Key(config.model), config.train.seq_len)


class _Key:
    """A model as a key of a cache: pydantic's models hash by value, which is slow."""

    def __init__(self, model: Model) -> None:
        self.model, self.text = model, model.model_dump_json()

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other.text == self.text


@lru_cache(maxsize=64)
def _units(key: _Key, seq_len: int) -> Units:
    m = key.model
    kinds: dict[tuple[int, bool], Unit] = {}
    layers = []
    for i in range(m.num_layers):
        at = m.at_layer(i)
        sparse = has_experts(m, i)
        kind = (at.ffn_size, sparse)
        if kind not in kinds:
            kinds[kind] = Unit(tuple(_block(at, sparse)), True, sparse)
        layers.append(kinds[kind])
    return Units(Unit(tuple(_front(m, seq_len)), False), tuple(layers), Unit(tuple(_tail(m)), False), m.tie_embeddings)


def _norm(m: Model, name: str, dim: int, cut: Cut, bias: bool) -> Iterator[Weight]:
    yield Weight(f"{name}.weight", (dim,), cut)
    if m.norm_row.bias and bias:
        yield Weight(f"{name}.bias", (dim,), cut)
    if m.norm_row.scale:
        yield Weight(f"{name}.alpha", (1,), "heads" if cut == 0 else cut)


def _product(m: Model, name: str, out_dim: int, in_dim: int, cut: Cut, bias: bool) -> Iterator[Weight]:
    if m.tokenformer is not None:
        yield Weight(f"{name}.keys", (m.tokenformer.tokens, in_dim), "tokens", True, True)
        yield Weight(f"{name}.values", (m.tokenformer.tokens, out_dim), "tokens", True, True)
    else:
        yield Weight(f"{name}.weight", (out_dim, in_dim), cut, True, True)
    if bias:
        yield Weight(f"{name}.bias", (out_dim,), "tokens" if cut == 1 or m.tokenformer is not None else cut)


def _attention(m: Model) -> Iterator[Weight]:
    d, q, kv, e = m.hidden_size, m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim, m.head_dim
    scheme = m.residual_row
    biased = m.bias if m.attention_bias is None else m.attention_bias
    gate = (("gate", "gate", gate_width(m), d, 0),) if m.attention_gate is not None else ()
    inner = (("q", "query", q, d, 0), ("k", "key", kv, d, "kv_heads"), ("v", "value", kv, d, "kv_heads"), *gate)
    roles = (*inner, ("o", "attention_out", d, q, 1))
    for name, role, out, into, cut in roles:
        bias = (role in ("query", "key", "value") if biased == "qkv" else bool(biased)) and role not in scheme.unbiased
        yield from _product(m, f"attention.{name}", out, into, cut, bias)  # type: ignore[arg-type]
    if m.attention_sink == "learned":
        yield Weight("attention.sinks", (m.num_heads,), 0)
    norm_bias = m.bias and "norm" not in scheme.unbiased
    if m.qk_norm or scheme.qk_norm:
        wide = m.qk_norm == "width"
        yield from _norm(m, "attention.q_norm", q if wide else e, 0 if wide else "heads", norm_bias)
        yield from _norm(m, "attention.k_norm", kv if wide else e, 0 if wide else "heads", norm_bias)
    if scheme.inner_norms:
        yield from _norm(m, "attention.inner_norm", q, 0, norm_bias)


def _feed_forward(m: Model, name: str, width: int) -> Iterator[Weight]:
    d = m.hidden_size
    yield from _product(m, f"{name}.up", width, d, 0, m.bias)
    if m.gated:
        yield from _product(m, f"{name}.gate", width, d, 0, m.bias)
    yield from _product(m, f"{name}.down", d, width, 1, m.bias)
    if m.residual_row.inner_norms:
        yield from _norm(m, f"{name}.inner_norm", width, 0, m.bias)


def _experts(m: Model) -> Iterator[Weight]:
    moe, d = m.moe, m.hidden_size
    assert moe is not None and moe.ffn_size is not None
    n, f, uses = moe.num_experts, moe.ffn_size, moe.top_k / moe.num_experts
    of = moe.router_row.directions
    if of is not None:
        yield Weight("ffn.router.project", (of.dim, d), "heads", product=True)
        yield Weight("ffn.router.temperature", (1,), "heads")
    yield Weight("ffn.router.weight", (n, d if of is None else of.dim), "heads", product=True)
    if moe.router_bias:
        yield Weight("ffn.router.logit_bias", (n,), "heads")
    for name, out, into, cut in (("up", f, d, 1), *((("gate", f, d, 1),) if m.gated else ()), ("down", d, f, 2)):
        yield Weight(f"ffn.experts.{name}.weight", (n, out, into), cut, True, True, True, uses)
        if moe.expert_bias:
            yield Weight(f"ffn.experts.{name}.bias", (n, out), 1 if cut == 1 else "heads", experts=True, uses=uses)
    if moe.shared_gate:
        yield Weight("ffn.shared_gate.weight", (1, d), "heads", product=True)
    if moe.num_shared:
        yield from _feed_forward(m, "ffn.shared", moe.num_shared * f)


def _block(m: Model, sparse: bool) -> Iterator[Weight]:
    d, scheme = m.hidden_size, m.residual_row
    bias = m.bias and "norm" not in scheme.unbiased
    yield from _norm(m, "attention_norm", d, "tokens", bias)
    yield from _attention(m)
    if not scheme.one_norm:
        yield from _norm(m, "ffn_norm", d, "tokens", bias)
    yield from _experts(m) if sparse else _feed_forward(m, "ffn", m.ffn_size)
    if scheme.norm == "around":
        yield from _norm(m, "attention_post_norm", d, "tokens", bias)
        yield from _norm(m, "ffn_post_norm", d, "tokens", bias)
    if m.residual_row.channel_scales:
        yield Weight("attention_scale", (d,), "tokens")
        yield Weight("ffn_scale", (d,), "tokens")


def _front(m: Model, seq_len: int) -> Iterator[Weight]:
    assert m.vocab_size is not None
    yield Weight("embedding.weight", (m.vocab_size, m.hidden_size), 0, product=m.tie_embeddings)
    if m.position_row.table:
        yield Weight("position.weight", (seq_len, m.hidden_size), "tokens")
    if m.position_row.distances:
        yield Weight("relative.weight", (m.relative_buckets, m.num_heads), 1)
    if not m.norm_row.divides:
        yield Weight("embedding_scale", (1,), "tokens")
    if m.embedding_norm:
        yield from _norm(m, "embedding_norm", m.hidden_size, "tokens", m.bias)


def _tail(m: Model) -> Iterator[Weight]:
    assert m.vocab_size is not None
    if m.residual_row.final_norm:
        yield from _norm(m, "final_norm", m.hidden_size, "tokens", m.bias)
    if m.mlm_head:
        yield Weight("mlm.dense.weight", (m.hidden_size, m.hidden_size), "tokens", product=True)
        if m.bias:
            yield Weight("mlm.dense.bias", (m.hidden_size,), "tokens")
            yield Weight("mlm.bias", (m.vocab_size,), 0)
        yield from _norm(m, "mlm.norm", m.hidden_size, "tokens", m.bias)
    if not m.tie_embeddings:
        yield Weight("head.weight", (m.vocab_size, m.hidden_size), 0, product=True)
