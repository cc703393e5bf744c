"""The plan of every tensor of a larger or smaller model: the source of its elements, by the maps of its dimensions. Plain data."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from megascale.config.schema import Model
from megascale.errors import UsageError
from megascale.expand.block import BlockMaps
from megascale.expand.depth import Layer, NormChange
from megascale.expand.maps import Maps
from megascale.expand.normed import offset_of
from megascale.expand.said import attention_growth
from megascale.expand.stack import specs
from megascale.model.spec import MATRICES, ParamSpec

OUTER = ("attention_norm", "attention_post_norm", "ffn_norm", "ffn_post_norm", "final_norm", "hidden_norm", "token_norm", "norm")
NORM_AXES = {"weight": ("gain",), "bias": ("shift",), "alpha": ("one",)}
# The axes of every tensor, by its name after the layer's number. Banks of experts have theirs in front; attention's are in its row.
AXES: dict[str, tuple[str, ...]] = {
    "embedding.weight": ("vocabulary", "stream"),
    "position.weight": ("positions", "stream"),
    "embedding_scale": ("one",),
    "head.weight": ("vocabulary", "read"),
    **{f"{norm}.{part}": axes for norm in OUTER for part, axes in NORM_AXES.items()},
    "join.weight": ("stream", "read_both"),
    # Attention over parameters: keys are read, values are written.
    "ffn.up.keys": ("new_keys", "read"),
    "ffn.up.values": ("new_values", "ffn"),
    "ffn.gate.keys": ("new_keys", "read"),
    "ffn.gate.values": ("new_values", "ffn"),
    "ffn.down.keys": ("new_keys", "ffn_out"),
    "ffn.down.values": ("new_values", "stream"),
    "attention_scale": ("scale",),
    "ffn_scale": ("scale",),
    "ffn.up.weight": ("ffn", "read"),
    "ffn.up.bias": ("ffn",),
    "ffn.gate.weight": ("ffn", "read"),
    "ffn.gate.bias": ("ffn",),
    "ffn.down.weight": ("stream", "ffn_out"),
    "ffn.down.bias": ("stream",),
    "ffn.inner_norm.weight": ("ffn_gain",),
    "ffn.inner_norm.bias": ("ffn_shift",),
    "ffn.inner_norm.alpha": ("one",),
    "ffn.experts.up.weight": ("experts", "expert", "read"),
    "ffn.experts.gate.weight": ("experts", "expert", "read"),
    "ffn.experts.down.weight": ("experts", "stream", "expert_out"),
    "ffn.experts.up.bias": ("experts", "expert"),
    "ffn.experts.gate.bias": ("experts", "expert"),
    "ffn.experts.down.bias": ("experts", "stream"),
    "ffn.shared_gate.weight": ("one", "read"),
    "ffn.shared.up.weight": ("together", "read"),
    "ffn.shared.gate.weight": ("together", "read"),
    "ffn.shared.down.weight": ("stream", "together_out"),
    "ffn.router.weight": ("routes", "read"),
    "ffn.router.project": ("routing", "read"),
    "ffn.router.temperature": ("one",),
    "ffn.router.bias": ("routes",),
    "ffn.router.logit_bias": ("routes",),
    "ffn.router.share": ("routes",),
}
DOWN_BIASES = ("ffn.down.bias", "ffn.experts.down.bias")
WRITERS = (*DOWN_BIASES, "ffn.down.weight", "ffn.down.values", "ffn.experts.down.weight", "ffn.shared.down.weight")
UNIT_SCALED = (*MATRICES, "router")  # roles of products that unit scaling multiplies by 1/√fan_in


@dataclass(frozen=True)
class TensorPlan:
    """target[i, j, …] = scale · w_i·w_j·… · source[map(i), map(j), …], with noise if copies share a source.

    name, source  canonical, without "model."; source None: `constant` everywhere, or the target's initial values if that is also None
    parts         each source matrix is split into this many along its `parts_dim` and stacked: finer experts
    lifted        the source is one matrix, the target a bank of them
    drawn         the source is not a stored tensor but initial values of this spec, by the target's name
    mean_by       source tensor with weights for MEAN rows: a learned factor per channel that follows them
    inserted      belongs to a new layer, so its optimizer state starts fresh
    offset        the norm adds it to its weight: the map is of their sum
    """

    name: str
    spec: ParamSpec
    axes: tuple[str, ...] = ()
    source: str | None = None
    scale: float = 1.0
    constant: float | None = None
    parts: int = 1
    parts_dim: int = 0
    lifted: bool = False
    drawn: ParamSpec | None = None
    mean_by: str | None = None
    inserted: bool = False
    offset: float = 0.0

    @property
    def formula(self) -> str:
        """One line for the report."""
        if self.constant is not None:
            return f"{self.constant:g}"
        if self.source is None and self.drawn is None:
            return "the target's own start"
        text = f"{self.source or 'a start'}[{', '.join(self.axes)}]"
        if self.parts > 1:
            text = f"{text} of {self.parts} parts"
        text = f"(1 + {text})" if self.offset == 1.0 else text if not self.offset else f"({self.offset:g} + {text})"
        text = text if self.scale == 1.0 else f"{self.scale:.6g} · {text}"
        return text if not self.offset else f"{text} − {self.offset:g}"


def in_fp32(value: float) -> float:
    """The value of an inserted layer's coefficient in any dtype that may store it, on which epsilons rely."""
    return float(np.float32(value))


@dataclass(frozen=True)
class Place:
    """A block of the target, or all that is outside of blocks (`layer` and `block` None).

    prefix  of its tensors' names; `origin`: of those in the source
    scopes  whose own axes it uses, the narrowest first: its source layer, its kind
    """

    prefix: str = ""
    origin: str = ""
    layer: Layer | None = None
    block: BlockMaps | None = None
    scopes: tuple[str, ...] = ()


def places(source: Model, layers: tuple[Layer, ...], maps: Maps) -> Iterator[Place]:
    """The blocks of the target, those of multi-token prediction included, and the rest. A module keeps its number."""

    def kind_of(layer: int) -> str:
        return source.kind_at(layer) if source.kinds else ""

    for i, layer in enumerate(layers):
        kind = kind_of(layer.source)
        yield Place(f"blocks.{i}.", f"blocks.{layer.source}.", layer, maps.blocks[kind], (str(layer.source), kind))
    last = source.num_layers - 1
    for k in range(min(source.mtp_depth, maps.target.mtp_depth)):
        block = maps.blocks[kind_of(last)]
        yield Place(f"mtp.{k}.block.", f"mtp.{k}.block.", Layer(last), block, (f"mtp.{k}", kind_of(last)))


def plan_tensors(
    source: Model, target: Model, seq_lens: tuple[int, int], layers: tuple[Layer, ...], maps: Maps, chain: Mapping[str, NormChange]
) -> tuple[TensorPlan, ...]:
    old, new = specs(source, seq_lens[0]), specs(target, seq_lens[1])
    by_prefix = {place.prefix: place for place in places(source, layers, maps)}
    plans = []
    for name, spec in new.items():
        match = re.match(r"blocks\.\d+\.|mtp\.\d+\.block\.", name)
        if name.startswith("mtp.") and int(name.split(".")[1]) >= source.mtp_depth:
            plan = TensorPlan(name, spec, inserted=True)  # a new module
        else:
            plan = _tensor(name, spec, by_prefix[match[0]] if match else Place(), old, source, target, maps)
        change = chain.get(name.rpartition(".")[0])
        if change is not None:
            plan = _chained(plan, change, maps)
        plan = _folded(plan, target, maps)
        if target.residual_row.unit_scaled and plan.source is not None and plan.drawn is None:
            plan = replace(plan, scale=plan.scale * _unit_scale(old[plan.source], spec))
        plans.append(plan)
    return tuple(plans)


def _folded(plan: TensorPlan, target: Model, maps: Maps) -> TensorPlan:
    """The norms before the head take its further factor; what reads the stream behind the last of them undoes it."""
    last = "final_norm" if target.residual_row.final_norm else f"blocks.{target.num_layers - 1}.ffn_norm"
    norm, _, leaf = plan.name.rpartition(".")
    if plan.source is None:
        return plan
    if leaf != "alpha" and (norm == last or re.fullmatch(r"mtp\.\d+\.norm", norm)):
        return replace(plan, scale=plan.scale * maps.fold)
    return replace(plan, scale=plan.scale / maps.fold) if plan.name == "mtp.0.hidden_norm.alpha" else plan


def _tensor(name: str, spec: ParamSpec, place: Place, old: Mapping[str, ParamSpec], source: Model, target: Model, maps: Maps) -> TensorPlan:
    suffix, layer, block = name.removeprefix(place.prefix), place.layer, place.block
    origin = place.origin + suffix
    inserted = layer is not None and layer.mode != "keep"
    if spec.role == "coefficient":
        # The stored value, not the config's, which rounds to another fp32 number and would change a kept layer's logits.
        return TensorPlan(name, spec, constant=in_fp32(spec.mean), inserted=True) if inserted else TensorPlan(name, spec, ("one",), origin)
    if block is None or layer is None:
        suffix = re.sub(r"^mtp\.\d+\.", "", suffix)
        axes = (grid_axes(suffix) if source.spacetime is not None else None) or AXES.get(suffix)
        writes = False
    else:
        of_attention = suffix.removeprefix("attention.") if suffix.startswith("attention.") else ""
        attention = attention_growth(block.source)
        writes = of_attention in attention.writers
        axes = AXES.get(suffix) or attention.axes.get(of_attention)
        if suffix == "ffn.router.weight" and block.target.moe is not None and block.target.moe.router_row.directions is not None:
            axes = ("routes", "routing")  # rows in a separate space
    if axes is None:
        raise UsageError(f"growth does not know what the dimensions of {name} are")
    if inserted and block is not None and layer is not None:
        silent = _silenced(spec, suffix, writes, layer, block)
        if silent is not None:
            return TensorPlan(name, spec, constant=silent, inserted=True)
        if layer.mode == "cancel":
            axes = tuple(f"pair_{a}" if f"pair_{a}" in block.axes else a for a in axes)
    offset = offset_of(spec, suffix.rpartition(".")[2]) if spec.role == "norm" else 0.0
    plan = TensorPlan(name, spec, axes, origin, inserted=inserted, offset=offset)
    if block is not None:
        plan = _of_experts(plan, suffix, old, block)
        scale = "attention_scale" if writes else "ffn_scale" if suffix.startswith("ffn.down.") else None
        if scale is not None and place.origin + scale in old:
            plan = replace(plan, mean_by=place.origin + scale)
    if plan.source is not None and plan.source not in old:
        raise UsageError(f"growth finds no source for {name}: {plan.source} is not in the source model")
    return replace(plan, axes=tuple(maps.axis_of(a, *place.scopes) for a in plan.axes))


def _silenced(spec: ParamSpec, suffix: str, writes: bool, layer: Layer, block: BlockMaps) -> float | None:
    """The constant of an inserted layer's tensor that makes its outputs zero, or lets them cancel; None: it is no such tensor."""
    scheme, target = block.target.residual_row, block.target
    if layer.mode == "cancel":
        # Under ALiBi every head has its own slope, under a norm over all heads its own gains: no two cancel.
        alone = target.position_row.slopes or target.qk_norm == "width"
        return 0.0 if suffix in DOWN_BIASES or (writes and (alone or suffix.endswith(".bias"))) else None
    if scheme.norm in ("before", "after"):
        return 0.0 if suffix in WRITERS or writes else None
    norm, _, leaf = suffix.rpartition(".")
    last = ("attention_norm", "ffn_norm") if scheme.norm == "within" else ("attention_post_norm", "ffn_post_norm")
    return -offset_of(spec, leaf) if norm in last and leaf != "alpha" else None


def _of_experts(plan: TensorPlan, suffix: str, old: Mapping[str, ParamSpec], block: BlockMaps) -> TensorPlan:
    if ".experts." in suffix:
        return _expert(plan, suffix, old, block)
    if ".router." in suffix and block.source.moe is None:
        return _router(plan, suffix, block)
    scales = {"ffn.router.bias": block.router_bias, "ffn.router.share": block.load_share}
    return replace(plan, scale=scales.get(suffix, plan.scale))


def _expert(plan: TensorPlan, suffix: str, old: Mapping[str, ParamSpec], maps: BlockMaps) -> TensorPlan:
    """A bank from a bank, or from one feed-forward that every expert copies; `down` compensates for the sum of gates."""
    assert plan.source is not None
    down = ".down." in suffix
    dense = plan.source.replace(".experts.", ".")
    lifted = plan.source not in old
    return replace(
        plan,
        source=dense if lifted else plan.source,
        lifted=lifted,
        parts=maps.parts,
        parts_dim=1 if down else 0,
        scale=maps.gate_sum if down else 1.0,
    )


def _router(plan: TensorPlan, suffix: str, maps: BlockMaps) -> TensorPlan:
    """The router of a formerly dense model: zero if gates must be equal, else initial rows that repeat over an expert's parts."""
    if suffix.endswith(".bias") or (suffix == "ffn.router.weight" and maps.uniform_router):
        return replace(plan, source=None, axes=(), constant=0.0)
    if suffix == "ffn.router.weight" and maps.parts > 1:
        rows = plan.spec.shape[0] // maps.parts
        return replace(
            plan,
            source=None,
            axes=("route_parts", "routing" if plan.axes[-1] == "routing" else "plain"),
            drawn=replace(plan.spec, shape=(rows, *plan.spec.shape[1:])),
        )
    return replace(plan, source=None, axes=())


def _chained(plan: TensorPlan, change: NormChange, maps: Maps) -> TensorPlan:
    """A norm of an inserted layer, or the norm before it (depth.py)."""
    leaf = plan.name.rpartition(".")[2]
    if change.affine is None:
        return replace(plan, source=None, axes=(), constant=change.gain * maps.gain - plan.offset if leaf == "weight" else 0.0)
    return replace(plan, source=f"{change.affine}.{leaf}", scale=change.gain if leaf == "weight" else 1.0)


def _unit_scale(old: ParamSpec, new: ParamSpec) -> float:
    """μS multiplies hidden products by fan_in^−½: weights compensate for a larger fan_in. The last norm handles the head's 1/fan_in."""
    return (new.shape[-1] / old.shape[-1]) ** 0.5 if new.role in UNIT_SCALED else 1.0


def grid_axes(suffix: str) -> tuple[str, ...] | None:
    """Axes of the spacetime family's own tensors: a table of positions per dimension."""
    first, _, rest = suffix.partition(".")
    if first == "position":
        return (f"positions.{rest.partition('.')[0]}", "stream")
    return {"embedding": ("stream", "values"), "head": ("values", "read"), "mask_token": ("stream",)}.get(first)
