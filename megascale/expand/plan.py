"""The plan of a growth: the source of every target tensor's elements, and changes of the config. Plain data, made from two model configs
without reading a weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megascale.config.activations import activations
from megascale.config.positions import positions
from megascale.config.schema import AHEAD_NORMS, Config, Data, Model, Optim, Train
from megascale.config.support import check
from megascale.errors import UsageError
from megascale.expand.axes import AxisMap
from megascale.expand.depth import Layer, NormChange, norm_chain
from megascale.expand.kinds import target_kinds
from megascale.expand.maps import Maps, build_maps
from megascale.expand.options import GrowthOptions, Sizes, check_options, check_times
from megascale.expand.said import attention_growth, growth_of
from megascale.expand.stack import check_depth_method, check_layers, plan_layers, row_of, with_layers
from megascale.expand.tensors import TensorPlan, in_fp32, plan_tensors


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
    target, variants, parts, notes = target_kinds(source, sizes, options.router)
    seq_lens = (seq_len, sizes.seq_len or seq_len)
    if seq_lens[1] < seq_lens[0]:
        raise UsageError(f"--seq-len is {seq_lens[1]} but the source was trained at {seq_lens[0]}: growth does not shrink")
    check_times("--seq-len", *seq_lens)
    every = math.lcm(*(m.moe.every for m in variants.values() if m.moe is not None))
    layers, patterned = plan_layers(source, sizes, options, every)
    check_layers(source, with_layers(source, source, layers, patterned), layers)
    depth_lossy = check_depth_method(source, layers, options)
    maps = build_maps(source, with_layers(source, target, layers, patterned), variants, parts, seq_lens, options, layers)
    chain = chain_of(source, maps.target, layers)
    target = with_epsilons(maps.target, source, layers, chain, maps)
    # The support table decides whether the model is allowed.
    check(Config(model=target, train=Train(steps=1, seq_len=seq_lens[1]), data=Data(train="-"), optim=Optim(weight_decay=0.0)), 1)
    tensors = plan_tensors(source, target, seq_lens, layers, maps, chain)
    lossy = (*depth_lossy, *maps.lossy)
    told = (lossy, tuple(maps.dead), (*notes, *maps.notes))
    growth = Growth(source, target, seq_lens, layers, maps.axes, tensors, options.symmetry, options.seed, *told)
    _refuse(growth, options, depth_lossy)
    return growth


def chain_of(source: Model, target: Model, layers: tuple[Layer, ...]) -> dict[str, NormChange]:
    """The changes of norms after the sum that make inserted layers exact."""
    power = growth_of(target).power
    if target.residual_row.norm != "after" or power is None:
        return {}
    chain = norm_chain(layers, [in_fp32(row_of(target, i).skip) for i in range(len(layers))], power)
    if target.mtp_depth and any(name.startswith(f"blocks.{len(layers) - 1}.") for name in chain):
        raise UsageError(
            f"model.mtp_depth is {source.mtp_depth}, and its blocks have the last layer's epsilons, which layers inserted after a norm "
            "change: grow in width"
        )
    return chain


def refuse_unknown_parts(source: Model) -> None:
    """Refuses what neither growth nor shrinking supports: BERT's ends, T5's attention, and parts whose rows do not say how they grow."""
    for key in ("embedding_norm", "mlm_head"):
        if getattr(source, key):
            raise UsageError(f"model.{key} is set: a model with it cannot change its sizes; use one without")
    growth_of(source)
    for model in source.variants.values():
        attention_growth(model)
        if not model.ffn_row.grows:
            known = ", ".join(name for name, row in activations().items() if row.grows)
            raise UsageError(
                f"model.ffn is {model.ffn}, whose row does not say that it grows: a model with it cannot change its sizes; set `grows` "
                f"in its row, or use a model with one of {known}"
            )
        if not model.position_row.grows:
            known = ", ".join(name for name, row in positions().items() if row.grows)
            raise UsageError(f"model.position is {model.position}: a model with it cannot change its sizes; use one of {known}")


def _refuse(growth: Growth, options: GrowthOptions, asked: tuple[str, ...]) -> None:
    """Under `require` refuses everything lossy; under `prefer` allows only what was requested by name (a depth method)."""
    refused = growth.lossy if options.lossless == "require" else tuple(x for x in growth.lossy if x not in asked)
    if refused and options.lossless != "off":
        lines = "\n  ".join(refused)
        raise UsageError(f"this growth would not keep the function (--lossless {options.lossless}):\n  {lines}\n--lossless off allows it")


def with_epsilons(target: Model, source: Model, layers: tuple[Layer, ...], chain: Mapping[str, NormChange], maps: Maps) -> Model:
    """Sets every norm's epsilon with as few exceptions as possible."""
    stream = maps.eps_factor
    plain = source.norm_eps * stream
    found: dict[str, dict[int, float]] = {}
    for i, layer in enumerate(layers):
        block = maps.blocks[source.kind_at(layer.source) if source.kinds else ""]
        around = ("attention_post_norm", "ffn_post_norm") if block.source.residual_row.norm == "around" else ()
        factors = dict.fromkeys(("attention_norm", "ffn_norm", *around), stream)
        for norm, factor in {**factors, **block.eps_factor}.items():
            eps = source.eps_of(norm, layer.source) * factor
            change = chain.get(f"blocks.{i}.{norm}")
            if change is not None:
                eps = eps * change.factor if change.factor is not None else (change.absolute or 0.0) * factor
            found.setdefault(norm, {})[i] = eps
    own: dict[str, float] = {}
    final = source.eps_of("final_norm") * stream
    if final != plain:
        own["final_norm"] = final
    for norm, by_layer in found.items():
        alike = len(set(by_layer.values())) == 1
        named = {norm: next(iter(by_layer.values()))} if alike else {f"blocks.{i}.{norm}": eps for i, eps in by_layer.items()}
        own |= {name: eps for name, eps in named.items() if eps != plain}
    own |= _ahead_epsilons(source, target, final, maps)
    return target.model_copy(update={"norm_eps": plain, "norm_eps_of": own})


def _ahead_epsilons(source: Model, target: Model, final: float, maps: Maps) -> dict[str, float]:
    """Epsilons of the norms of multi-token prediction that differ from the final norm's. The first module reads the stream behind that."""
    own: dict[str, float] = {}
    power = growth_of(source).power
    for k in range(min(source.mtp_depth, target.mtp_depth)):
        for norm in AHEAD_NORMS:
            behind = maps.fold**power if (k, norm) == (0, "hidden_norm") and power is not None else 1.0
            eps = source.eps_ahead(k, norm) * maps.eps_factor * behind
            own |= {f"mtp.{k}.{norm}": eps} if eps != final else {}
    return own
