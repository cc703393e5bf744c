"""The axis maps of one kind of layer: its attention, feed-forward and experts, by the names in the plan's table."""

from __future__ import annotations

from dataclasses import dataclass, field

from megascale.config.schema import Model
from megascale.errors import UsageError
from megascale.expand.attention import AttentionMaps
from megascale.expand.axes import FRESH, ZERO, AxisMap, axis, cancelling, circular, same, shared
from megascale.expand.normed import inner_norm
from megascale.expand.options import GrowthOptions
from megascale.expand.said import attention_growth, gates_of
from megascale.plugins import resolve


@dataclass
class BlockMaps:
    """Of the layers of one kind, with the configs `source` and `target` of models that have no other layers.

    axes        by name; those of layers whose outputs cancel begin with `pair_`
    eps_factor  by norm: qk_norm, latent_norm, attention_inner_norm, ffn_inner_norm
    gate_sum    factor on an expert's output product; `router_bias`: on the bias of the choice; `load_share`: on an expert's share of the
                load; `parts` that a source expert is cut into; `uniform_router`: whether all gates must be equal
    lossy       sentences about what cannot be exact, with an exact alternative; `dead`: what never gets a gradient; `notes` for the report
    """

    source: Model
    target: Model
    axes: dict[str, AxisMap] = field(default_factory=dict)
    eps_factor: dict[str, float] = field(default_factory=dict)
    gate_sum: float = 1.0
    parts: int = 1
    router_bias: float = 1.0
    load_share: float = 1.0
    uniform_router: bool = False
    lossy: list[str] = field(default_factory=list)
    dead: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def block_maps(source: Model, target: Model, parts: int, read: AxisMap, options: GrowthOptions, cancel: bool) -> BlockMaps:
    """All maps of one kind. Raises UsageError for what has none.

    parts   that every expert is cut into
    read    map of the columns that read the stream
    cancel  also for layers whose outputs cancel
    """
    maps = BlockMaps(source, target, {"routing": routing_space(target), "plain": same(target.hidden_size)}, parts=parts)
    of_row = resolve(attention_growth(source).maps, f"growth of the attention {source.attention}")
    attention: AttentionMaps = of_row(source, target, options, read)
    maps.axes |= attention.axes
    maps.target = target = target.model_copy(update=attention.changes)
    maps.eps_factor |= attention.eps
    maps.lossy += attention.lossy
    maps.dead += attention.dead
    _widths(maps, options)
    if cancel:
        maps.axes |= {f"pair_{name}": paired for name, paired in attention.pairs.items()}
        _pairs(maps)
    _experts(maps)
    if source.tokenformer is not None and target.tokenformer is not None:
        # Zero keys have zero scores, so their values may start anywhere.
        n, more = source.tokenformer.tokens, target.tokenformer.tokens - source.tokenformer.tokens
        tokens = axis([*range(n), *[FRESH] * more], n)
        maps.axes |= {"new_keys": tokens.filled(ZERO), "new_values": tokens}
    return maps


def _widths(maps: BlockMaps, options: GrowthOptions) -> None:
    """Feed-forward, experts and shared experts: inputs by rows, outputs by columns."""
    source, target = maps.source, maps.target
    silent = source.residual_row.inner_norms
    widths = {"ffn": (source.ffn_size, target.ffn_size)}
    if target.moe is not None and target.moe.ffn_size is not None:
        moe = source.moe
        before = (moe.ffn_size if moe else None) or source.ffn_size
        cut = before // target.moe.ffn_size if target.moe.ffn_size < before else 1
        widths["expert"] = (before // cut, target.moe.ffn_size)
        if moe is not None and moe.num_shared:
            widths["together"] = (moe.num_shared * before, target.moe.num_shared * target.moe.ffn_size)
            if cut > 1:
                raise UsageError(
                    "model.moe.num_shared is set: experts with shared ones are not cut into finer ones; grow without granularity"
                )
        if cut > 1 and moe is not None and moe.expert_bias:
            raise UsageError("model.moe.expert_bias is set: experts with biases are not cut into finer ones; grow without granularity")
    if source.matformer is not None and target.ffn_size != source.ffn_size:
        maps.notes.append("the whole feed-forward keeps its function; its nested prefixes stay those of the source")
    for name, (old, new) in widths.items():
        if options.ffn == "duplicate":
            rows = circular(old, new)
            out = shared(rows, options.split)
        else:
            rows = axis([*range(old), *[ZERO if silent else FRESH] * (new - old)], old)
            out = rows.filled(FRESH if silent else ZERO)
        maps.axes |= {name: rows, f"{name}_out": out}
    if silent:
        inner = inner_norm("ffn", maps.axes["ffn"], source)
        maps.axes |= {"ffn_gain": inner.gain, "ffn_shift": inner.shift}
        maps.eps_factor["ffn_inner_norm"] = inner.eps
        maps.lossy += [inner.lossy] if inner.lossy else []


def _pairs(maps: BlockMaps) -> None:
    """For inserted layers whose outputs cancel: pairs of neurons, the second with the opposite output."""
    for name in ("ffn", "expert", "together"):
        if name in maps.axes:
            rows, out = cancelling(maps.axes[name])
            maps.axes |= {f"pair_{name}": rows, f"pair_{name}_out": out}
    if "ffn_gain" in maps.axes:
        whole = maps.axes["pair_ffn"].filled(FRESH)
        maps.axes |= {"pair_ffn_gain": whole, "pair_ffn_shift": whole}


def _experts(maps: BlockMaps) -> None:
    moe, was, parts = maps.target.moe, maps.source.moe, maps.parts
    if moe is None:
        return
    before = was.num_experts if was else 1
    copies = moe.num_experts // (before * parts)
    numbers = [(e, s) for _ in range(copies) for e in range(before) for s in range(parts)]
    if moe.groups is not None:  # a group stays together
        numbers = [(e, s) for _ in range(copies) for s in range(parts) for e in range(before)]
    maps.axes |= {
        "experts": axis([e * parts + s for e, s in numbers], before * parts),
        "routes": axis([e for e, _ in numbers], before),
        "route_parts": axis([i // parts for i in range(moe.num_experts)], moe.num_experts // parts),
    }
    if was is None:
        _upcycled(maps, copies, moe.top_k // parts)
        return
    if moe.num_experts == was.num_experts:
        if moe.top_k != was.top_k:
            maps.lossy.append(
                f"top_k {was.top_k} → {moe.top_k} of {was.num_experts} experts: tokens would reach others; more experts are exact"
            )
        return
    gates = gates_of(was)
    if moe.top_k != was.top_k * copies * parts:
        maps.lossy.append(
            f"experts {was.num_experts} → {moe.num_experts} with top_k {moe.top_k}: a token would reach only a part of the experts it "
            "reached before; "
            f"top_k {was.top_k * copies * parts} is exact"
        )
    if was.top_k == 1 and gates.normed and (gates.alone is not None or before > 1):
        maps.lossy.append(
            f"experts under the {was.router} router with top_k 1: its gate is not divided by a sum, and with more experts it is"
        )
    maps.gate_sum = 1 / copies if gates.own else float(parts)  # all copies and parts split any other gate
    maps.load_share = 1 / (copies * parts)
    if gates.by_share:
        maps.router_bias = 1 / (copies * parts)  # it is added to scores, which the copies split
    if moe.capacity_factor is not None:
        maps.notes.append("capacity is counted for every copy of an expert as it was for the one")
    maps.notes.append(f"the {copies * parts} successors of an expert are always chosen together until noise on the router parts them")


def routing_space(model: Model) -> AxisMap:
    """The space in which tokens are compared with experts' rows, where it is not the stream."""
    of = model.moe.router_row.directions if model.moe is not None else None
    return same(1 if of is None else of.dim)


def _upcycled(maps: BlockMaps, experts: int, chosen: int) -> None:
    """Handles experts made from a dense layer: gates must add up to one, or equal gates are compensated."""
    moe, parts = maps.target.moe, maps.parts
    assert moe is not None
    gates = gates_of(moe)
    maps.gate_sum = float(parts)
    if gates.normed and moe.top_k > 1:
        return
    if parts > 1:
        maps.lossy.append(
            f"--granularity {parts} with router {moe.router}: equal gates do not choose all parts of an expert; topk_softmax does"
        )
    maps.gate_sum = experts / chosen if gates.alone is None else 1 / gates.alone / chosen
    if moe.router_row.directions is not None:
        maps.lossy.append(
            f"dense → experts under the {moe.router} router with top_k {moe.top_k}: directions have no zero at which its gates would be "
            "equal"
        )
        return
    maps.uniform_router = True
    maps.notes.append(f"the router starts at zero: under {moe.router} equal gates are the only exact ones")
