"""The plan of a growth: the source of every target tensor's elements, and changes of the config. Plain data, made from two model configs
without reading a weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megascale.config.activations import activations
from megascale.config.positions import positions
from megascale.config.schema import Config, Data, Model, Optim, Train
from megascale.config.support import check
from megascale.errors import UsageError
from megascale.expand.axes import AxisMap
from megascale.expand.depth import Layer, NormChange, norm_chain
from megascale.expand.maps import Maps, build_maps
from megascale.expand.options import GrowthOptions, Sizes, check_options, check_times, target_model
from megascale.expand.stack import attention_growth, growth_of, plan_layers, row_of, specs
from megascale.model.spec import MATRICES, ParamSpec

NORM_AXES = {"weight": ("gain",), "bias": ("shift",), "alpha": ("one",)}
# The axes of every tensor, by its name after the layer's number. Banks of experts have theirs in front; attention's are in its row.
AXES: dict[str, tuple[str, ...]] = {
    "embedding.weight": ("vocabulary", "stream"),
    "position.weight": ("positions", "stream"),
    "embedding_scale": ("one",),
    "head.weight": ("vocabulary", "read"),
    **{f"{norm}.{part}": axes for norm in ("attention_norm", "ffn_norm", "final_norm") for part, axes in NORM_AXES.items()},
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
    "ffn.shared.up.weight": ("together", "read"),
    "ffn.shared.gate.weight": ("together", "read"),
    "ffn.shared.down.weight": ("stream", "together_out"),
    "ffn.router.weight": ("routes", "read"),
    "ffn.router.project": ("routing", "read"),
    "ffn.router.temperature": ("one",),
    "ffn.router.bias": ("routes",),
}
WRITERS = ("ffn.down.weight", "ffn.down.values", "ffn.down.bias", "ffn.experts.down.weight", "ffn.shared.down.weight")
# Inner rows of a layer whose outputs cancel come in pairs.
PAIRED = {
    "query": "pair_query", "key": "pair_key", "value": "pair_value", "heads": "pair_heads", "heads_gain": "pair_heads_gain",
    "heads_shift": "pair_heads_shift", "ffn": "pair_ffn", "ffn_out": "pair_ffn_out", "ffn_gain": "pair_ffn_gain",
    "ffn_shift": "pair_ffn_shift", "expert": "pair_expert", "expert_out": "pair_expert_out", "together": "pair_together",
    "together_out": "pair_together_out",
}  # fmt: skip
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
        return text if self.scale == 1.0 else f"{self.scale:.6g} · {text}"


@dataclass(frozen=True)
class Growth:
    """A growth as data: `tensors` refer to `axes` by name. `lossy`: what cannot be exact and why; `dead`: parameters that never get a
    gradient; `notes`: for the report.
    """

    source: Model
    target: Model
    seq_lens: tuple[int, int]
    layers: tuple[Layer, ...]
    axes: dict[str, AxisMap]
    tensors: tuple[TensorPlan, ...]
    symmetry: str
    seed: int
    lossy: tuple[str, ...]
    dead: tuple[str, ...]
    notes: tuple[str, ...]

    def axes_of(self, tensor: TensorPlan) -> tuple[AxisMap, ...]:
        return tuple(self.axes[name] for name in tensor.axes)


def plan_growth(source: Model, seq_len: int, sizes: Sizes, options: GrowthOptions) -> Growth:
    """The plan that grows `source`, trained at `seq_len`. Raises UsageError for what is impossible or refused under `options.lossless`."""
    check_options(options)
    if source.moeut is not None:
        raise UsageError("model.moeut is set: growth is not built for layers whose weights repeat in depth; grow a decoder without it")
    if source.family == "encoder_decoder":
        raise UsageError(
            "model.family is encoder_decoder: growth is not built for two stacks; grow decoders, encoders or models over grids"
        )
    if source.ffn_sizes is not None:
        raise UsageError(
            "model.ffn_sizes is set: growth is not built for layers of different widths; grow the model that they were cut from"
        )
    refuse_unknown_parts(source)
    target = target_model(source, sizes, options.router)
    seq_lens = (seq_len, sizes.seq_len or seq_len)
    if seq_lens[1] < seq_lens[0]:
        raise UsageError(f"--seq-len is {seq_lens[1]} but the source was trained at {seq_lens[0]}: growth does not shrink")
    check_times("--seq-len", *seq_lens)
    layers, target, depth_lossy = plan_layers(source, target, options)
    maps = build_maps(source, target, seq_lens, sizes, options, layers)
    skips = [in_fp32(row_of(maps.target, i).skip) for i in range(target.num_layers)]
    power = growth_of(target).power
    chain = norm_chain(layers, skips, power) if target.residual_row.norm == "after" and power is not None else {}
    target = with_epsilons(maps.target, source, layers, chain, maps)
    # The support table decides whether the model is allowed.
    check(Config(model=target, train=Train(steps=1, seq_len=seq_lens[1]), data=Data(train="-"), optim=Optim(weight_decay=0.0)), 1)
    tensors = plan_tensors(source, target, seq_lens, layers, maps, chain)
    lossy = (*depth_lossy, *maps.lossy)
    told = (lossy, tuple(maps.dead), tuple(maps.notes))
    growth = Growth(source, target, seq_lens, layers, maps.axes, tensors, options.symmetry, options.seed, *told)
    _refuse(growth, options, depth_lossy)
    return growth


def in_fp32(value: float) -> float:
    """The value of an inserted layer's coefficient in any dtype that may store it, on which epsilons rely."""
    return float(np.float32(value))


def refuse_unknown_parts(source: Model) -> None:
    """Refuses what neither growth nor shrinking supports: BERT's ends, T5's attention, and parts whose rows do not say how they grow."""
    if source.mtp_depth:
        raise UsageError("model.mtp_depth is set: a model with multi-token prediction keeps its sizes; set it to 0 in the source's config")
    if source.kinds:
        raise UsageError("model.kinds is set: a model whose layers differ keeps its sizes; grow or shrink one without a pattern")
    for key, plain in (("rope_fraction", 1.0), ("rope_interleaved", False), ("residual", None)):
        if getattr(source, key) != plain and (plain is not None or source.residual_row.norm == "around"):
            raise UsageError(f"model.{key} is {getattr(source, key)}: a model with it keeps its sizes for now; use one without")
    growth_of(source)
    attention_growth(source)
    if not source.ffn_row.grows:
        known = ", ".join(name for name, row in activations().items() if row.grows)
        raise UsageError(
            f"model.ffn is {source.ffn}, whose row does not say that it grows: a model with it cannot change its sizes; set `grows` "
            f"in its row, or use a model with one of {known}"
        )
    for key in ("embedding_norm", "mlm_head", "attention_scale", "attention_sink", "attention_softcap", "attention_gate", "logit_softcap"):
        if getattr(source, key):
            raise UsageError(f"model.{key} is set: a model with it cannot change its sizes; use one without")
    if not source.position_row.grows:
        known = ", ".join(name for name, row in positions().items() if row.grows)
        raise UsageError(f"model.position is {source.position}: a model with it cannot change its sizes; use one of {known}")


def _refuse(growth: Growth, options: GrowthOptions, asked: tuple[str, ...]) -> None:
    """Under `require` refuses everything lossy; under `prefer` allows only what was requested by name (a depth method)."""
    refused = growth.lossy if options.lossless == "require" else tuple(x for x in growth.lossy if x not in asked)
    if refused and options.lossless != "off":
        lines = "\n  ".join(refused)
        raise UsageError(f"this growth would not keep the function (--lossless {options.lossless}):\n  {lines}\n--lossless off allows it")


def suffix_of(name: str) -> tuple[int | None, str]:
    """blocks.3.ffn.up.weight → (3, ffn.up.weight); head.weight → (None, head.weight)."""
    if not name.startswith("blocks."):
        return None, name
    _, number, rest = name.split(".", 2)
    return int(number), rest


def with_epsilons(target: Model, source: Model, layers: tuple[Layer, ...], chain: dict[str, NormChange], maps: Maps) -> Model:
    """Sets every norm's epsilon with as few exceptions as possible."""
    stream = maps.eps_factor["stream"]
    plain = source.norm_eps * stream
    own: dict[str, float] = {}
    old_final = source.eps_of("final_norm")
    if old_final * stream != plain:
        own["final_norm"] = old_final * stream
    for i, layer in enumerate(layers):
        for norm, factor in (
            ("attention_norm", stream),
            ("ffn_norm", stream),
            *((n, f) for n, f in maps.eps_factor.items() if n != "stream"),
        ):
            eps = source.eps_of(norm, layer.source) * factor
            change = chain.get(f"blocks.{i}.{norm}")
            if change is not None:
                eps = eps * change.factor if change.factor is not None else (change.absolute or 0.0) * factor
            if eps != own.get(norm, plain):
                own[f"blocks.{i}.{norm}"] = eps
    return target.model_copy(update={"norm_eps": plain, "norm_eps_of": _by_kind(own, len(layers))})


def _by_kind(own: dict[str, float], layers: int) -> dict[str, float]:
    """Merges equal exceptions of all layers into one for the norm's kind."""
    kinds: dict[str, list[float]] = {}
    for name, eps in own.items():
        if name.startswith("blocks."):
            kinds.setdefault(name.split(".", 2)[2], []).append(eps)
    alike = {norm: values[0] for norm, values in kinds.items() if len(values) == layers and len(set(values)) == 1}
    return {**{n: e for n, e in own.items() if n.split(".", 2)[-1] not in alike or not n.startswith("blocks.")}, **alike}


def plan_tensors(
    source: Model, target: Model, seq_lens: tuple[int, int], layers: tuple[Layer, ...], maps: Maps, chain: dict[str, NormChange]
) -> tuple[TensorPlan, ...]:
    old, new = specs(source, seq_lens[0]), specs(target, seq_lens[1])
    last = f"blocks.{len(layers) - 1}.ffn_norm." if not target.residual_row.final_norm else "final_norm."
    plans = []
    for name, spec in new.items():
        number, suffix = suffix_of(name)
        layer = None if number is None else layers[number]
        origin = name if layer is None else f"blocks.{layer.source}.{suffix}"
        plan = _tensor(name, suffix, origin, spec, old, layer, source, target, maps)
        change = chain.get(name.rpartition(".")[0])
        if change is not None:
            plan = _chained(plan, change, maps)
        if name.startswith(last) and not name.endswith(".alpha"):
            plan = replace(plan, scale=plan.scale * maps.fold) if plan.constant is None else plan
        if target.residual_row.unit_scaled and plan.source is not None and plan.drawn is None:
            plan = replace(plan, scale=plan.scale * _unit_scale(old[plan.source], spec))
        plans.append(plan)
    return tuple(plans)


def _tensor(
    name: str,
    suffix: str,
    origin: str,
    spec: ParamSpec,
    old: dict[str, ParamSpec],
    layer: Layer | None,
    source: Model,
    target: Model,
    maps: Maps,
) -> TensorPlan:
    inserted = layer is not None and layer.mode != "keep"
    if spec.role == "coefficient":
        # The stored value, not the config's, which rounds to another fp32 number and would change a kept layer's logits.
        return TensorPlan(name, spec, constant=in_fp32(spec.mean), inserted=True) if inserted else TensorPlan(name, spec, ("one",), origin)
    attention = attention_growth(source)
    of_attention = suffix.removeprefix("attention.") if suffix.startswith("attention.") else ""
    axes = (grid_axes(suffix) if source.spacetime is not None else None) or AXES.get(suffix) or attention.axes.get(of_attention)
    if suffix == "ffn.router.weight" and target.moe is not None and target.moe.router_row.directions is not None:
        axes = ("routes", "routing")  # rows in a separate space
    if axes is None:
        raise UsageError(f"growth does not know what the dimensions of {name} are")
    if layer is not None and layer.mode == "identity":
        if (suffix in WRITERS or of_attention in attention.writers) and target.residual_row.norm in ("before", "after"):
            return TensorPlan(name, spec, constant=0.0, inserted=True)
        if target.residual_row.norm not in ("before", "after") and suffix.split(".")[0] in ("attention_norm", "ffn_norm"):
            return TensorPlan(name, spec, constant=0.0, inserted=True)
    if layer is not None and layer.mode == "cancel":
        # Under ALiBi every head has its own slope, under a norm over all heads its own gains: no two cancel.
        alone = target.position_row.slopes or target.qk_norm == "width"
        if suffix == "ffn.down.bias" or (of_attention in attention.writers and (alone or suffix.endswith(".bias"))):
            return TensorPlan(name, spec, constant=0.0, inserted=True)
        axes = tuple(PAIRED.get(a, a) for a in axes)
    if layer is not None:
        axes = tuple(f"{a}@{layer.source}" if a in maps.by_layer else a for a in axes)
    plan = TensorPlan(name, spec, axes, origin, inserted=inserted)
    if ".experts." in suffix:
        plan = _expert(plan, suffix, old, maps)
    elif ".router." in suffix and source.moe is None:
        plan = _router(plan, suffix, maps)
    elif suffix == "ffn.router.bias":
        plan = replace(plan, scale=maps.router_bias)
    scale = "attention_scale" if of_attention in attention.writers else "ffn_scale" if suffix.startswith("ffn.down.") else None
    if scale is not None and layer is not None and f"blocks.{layer.source}.{scale}" in old:
        plan = replace(plan, mean_by=f"blocks.{layer.source}.{scale}")
    if plan.source is not None and plan.source not in old:
        raise UsageError(f"growth finds no source for {name}: {plan.source} is not in the source model")
    return plan


def _expert(plan: TensorPlan, suffix: str, old: dict[str, ParamSpec], maps: Maps) -> TensorPlan:
    """A bank from a bank, or from one feed-forward that every expert copies; `down` compensates for the sum of gates."""
    assert plan.source is not None
    down = suffix.endswith("down.weight")
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


def _router(plan: TensorPlan, suffix: str, maps: Maps) -> TensorPlan:
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
        return replace(plan, source=None, axes=(), constant=change.gain * maps.gain if leaf == "weight" else 0.0)
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
