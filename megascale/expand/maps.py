"""The axis maps of a growth, by the names in the plan's table, and their consequences for norms, gates and the config."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from megascale.config.schema import Model
from megascale.errors import UsageError
from megascale.expand.axes import FRESH, MEAN, ZERO, AxisMap, axis, cancelling, circular, inside, repeated, same, shared
from megascale.expand.depth import Layer
from megascale.expand.heads import Channels, Heads, cancelling_heads, channel_rows, grow_channels, grow_heads
from megascale.expand.options import GrowthOptions, Sizes
from megascale.expand.stack import gates_of, growth_of
from megascale.model.position import alibi_slopes
from megascale.model.residual import ends


@dataclass
class Maps:
    """axes        by name
    target      the target's config with changes for heads and vocabulary
    eps_factor  by norm: "stream", "qk_norm", "attention_inner_norm", "ffn_inner_norm"
    gain        η for every norm over the stream; `fold` is the last norm's additional factor
    gate_sum    factor on an expert's output product; `router_bias`: on the bias of the choice; `parts` that a source expert is cut into;
                `uniform_router`: whether all gates must be equal
    by_layer    axes that differ between source layers, as name@layer
    lossy       sentences about what cannot be exact, with an exact alternative; `dead`: what never gets a gradient; `notes` for the report
    """

    axes: dict[str, AxisMap]
    target: Model
    eps_factor: dict[str, float] = field(default_factory=dict)
    gain: float = 1.0
    fold: float = 1.0
    gate_sum: float = 1.0
    parts: int = 1
    router_bias: float = 1.0
    uniform_router: bool = False
    by_layer: frozenset[str] = frozenset()
    lossy: list[str] = field(default_factory=list)
    dead: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def build_maps(
    source: Model, target: Model, seq_lens: tuple[int, int], sizes: Sizes, options: GrowthOptions, layers: tuple[Layer, ...]
) -> Maps:
    """All maps between two configs. Raises UsageError for rows without a map; what is merely lossy is in `lossy`."""
    maps = Maps({"one": same(1), "routing": routing_space(target), "plain": same(target.hidden_size)}, target)
    _stream(maps, source, options, source.residual_row.norm)
    silent = source.residual_row.inner_norms
    heads, channels = _heads(maps, source, options, silent, bool(source.qk_norm or source.residual_row.qk_norm))
    _widths(maps, source, options, silent)
    if any(layer.mode == "cancel" for layer in layers):
        _pairs(maps, heads, channels, source)
    _experts(maps, source, sizes)
    _ends(maps, source, seq_lens, options)
    if source.linear == "bitlinear":
        _quantized(maps, options)
    if source.tokenformer is not None and maps.target.tokenformer is not None:
        # Zero keys have zero scores, so their values may start anywhere.
        n, more = source.tokenformer.tokens, maps.target.tokenformer.tokens - source.tokenformer.tokens
        tokens = axis([*range(n), *[FRESH] * more], n)
        maps.axes |= {"new_keys": tokens.filled(ZERO), "new_values": tokens}
    copied = any(a.shared and (a.copies > 1).any() for a in maps.axes.values())
    if copied and options.symmetry == "none" and options.split[0] == options.split[1]:
        maps.notes.append("copies with equal shares and no noise stay identical, so the new width adds no capacity")
    if source.branchnorm_period is not None:
        maps.notes.append(
            f"a new run counts its steps from 1, and BranchNorm's period with them: set branchnorm_period 1 if the source was past step "
            f"{source.branchnorm_period}"
        )
    return maps


def _stream(maps: Maps, source: Model, options: GrowthOptions, position: str) -> None:
    """The residual stream, its norms and the last norm's further factor."""
    old, new = source.hidden_size, maps.target.hidden_size
    copies = new // old if options.width == "duplicate" else 1
    rest = new - copies * old
    norm, growth = source.norm_row, growth_of(source)
    fill = MEAN if norm.centres and options.width != "zero" else ZERO
    if options.width == "average" and new > old:
        fill = MEAN
        if not norm.centres:
            maps.lossy.append(
                f"--width-method average under {source.norm}: the mean of the others moves its statistics; zero and duplicate are exact"
            )
    if rest and norm.centres:
        where = f"hidden_size {old} → {new} under {source.norm}"
        if position != "before":
            maps.lossy.append(
                f"{where} after the sum: {rest} channels cannot have the mean of the others after a gain; choose a multiple of {old}"
            )
        elif fill == ZERO:
            maps.lossy.append(f"{where} with zeros: they move its mean; average and duplicate are exact")
    stream = repeated(old, new, copies, fill)
    fresh = stream.filled(FRESH)
    maps.gain = growth.gain(copies * old / new)
    maps.eps_factor["stream"] = growth.eps(maps.gain)
    maps.axes |= {
        "stream": stream,
        "read": shared(fresh, options.split),
        "gain": fresh.scaled(maps.gain),
        "shift": fresh,
        "scale": fresh,
        "values": same(source.spacetime.values if source.spacetime else 1),
    }
    maps.fold = ends(source).hidden_factor / ends(maps.target).hidden_factor
    if source.tie_embeddings:
        maps.fold /= copies


def _heads(maps: Maps, source: Model, options: GrowthOptions, silent: bool, normed: bool) -> tuple[Heads, Channels]:
    target = maps.target
    old, new = (source.num_heads, source.num_kv_heads), (target.num_heads, target.num_kv_heads)
    heads = grow_heads(old, new, options.heads, options.split, silent)
    rotary = source.position_row.rotates
    wide = source.qk_norm == "width"
    if target.head_dim != source.head_dim:
        _check_head_size(source, target.head_dim)
    channels = grow_channels(
        source.head_dim,
        target.head_dim,
        source.norm_row if normed and not wide else None,
        rotary,
        source.rope_exponents,
        options.heads,
        silent,
    )
    if channels.dead:
        maps.dead.append(channels.dead)
    if target.head_dim != source.head_dim:
        maps.target = maps.target.model_copy(update={"rope_exponents": channels.exponents})
    if normed:
        maps.eps_factor["qk_norm"] = channels.norm_eps_factor
    maps.axes |= {
        "query": channel_rows(heads.query, channels.query),
        "key": channel_rows(heads.key_value, channels.key),
        "value": channel_rows(heads.key_value, channels.value),
        "heads": channel_rows(heads.out, channels.out),
        "query_norm": channels.query_norm,
        "key_norm": channels.key_norm,
    }
    if wide:
        for name, of_heads in (("query", heads.query), ("key", heads.key_value)):
            whole = channel_rows(of_heads, channels.query).filled(FRESH)
            if whole.uniform_copies is None or not whole.known.all():
                maps.lossy.append(
                    f"{name} heads {of_heads.old} → {of_heads.size} under qk_norm width: its statistics would move; choose a multiple"
                )
            maps.axes[f"{name}_norm"] = whole
    if silent:
        _inner_norm(maps, "heads", "attention_inner_norm", channel_rows(replace(heads.query), channels.value), source)
    if source.position_row.slopes and new[0] != old[0]:
        slopes = source.alibi_slopes or alibi_slopes(old[0])
        fresh = alibi_slopes(new[0])
        own = tuple(slopes[s] if s >= 0 else fresh[i] for i, s in enumerate(heads.query.source.tolist()))
        maps.target = maps.target.model_copy(update={"alibi_slopes": own})
    return heads, channels


def _check_head_size(source: Model, new: int) -> None:
    """Raises UsageError for heads whose size enters something that does not grow with it."""
    if source.qk_norm == "width":
        raise UsageError(
            f"--head-dim is {new} and model.qk_norm is width: new channels would move the norm over all heads; grow num_heads instead"
        )
    if source.rope_scaling is not None and source.rope_scaling.type == "yarn":
        raise UsageError(f"--head-dim is {new} and model.rope_scaling is yarn, whose ramp counts channels; grow num_heads instead")


def _widths(maps: Maps, source: Model, options: GrowthOptions, silent: bool) -> None:
    """Feed-forward, experts and shared experts: inputs by rows, outputs by columns."""
    target = maps.target
    kinds = {"ffn": (source.ffn_size, target.ffn_size)}
    if target.moe is not None and target.moe.ffn_size is not None:
        moe = source.moe
        before = (moe.ffn_size if moe else None) or source.ffn_size
        cut = before // target.moe.ffn_size if target.moe.ffn_size < before else 1
        kinds["expert"] = (before // cut, target.moe.ffn_size)
        if moe is not None and moe.num_shared:
            kinds["together"] = (moe.num_shared * before, target.moe.num_shared * target.moe.ffn_size)
            if cut > 1:
                raise UsageError(
                    "model.moe.num_shared is set: experts with shared ones are not cut into finer ones; grow without granularity"
                )
    if source.matformer is not None and target.ffn_size != source.ffn_size:
        maps.notes.append("the whole feed-forward keeps its function; its nested prefixes stay those of the source")
    for name, (old, new) in kinds.items():
        if options.ffn == "duplicate":
            rows = circular(old, new)
            out = shared(rows, options.split)
        else:
            rows = axis([*range(old), *[ZERO if silent else FRESH] * (new - old)], old)
            out = rows.filled(FRESH if silent else ZERO)
        maps.axes |= {name: rows, f"{name}_out": out}
    if silent:
        _inner_norm(maps, "ffn", "ffn_inner_norm", maps.axes["ffn"], source)


def _inner_norm(maps: Maps, name: str, norm: str, channels: AxisMap, source: Model) -> None:
    """A norm over channels that are repeated evenly, or followed by zeros."""
    known = channels.filled(FRESH)
    copies, size = known.uniform_copies, known.size
    centres, growth = source.norm_row.centres, growth_of(source)
    if copies is None or (centres and not known.known.all()):
        how = "zeros would move its mean" if copies is not None else "some channels would count more often than others"
        instead = "" if centres else f", or --{name}-method zero"
        maps.lossy.append(f"{name} {known.old} → {size} under an inner {source.norm}: {how}; choose a multiple{instead}")
    share = 1.0 if growth.power is None or copies is None else copies * known.old / size
    maps.eps_factor[norm] = share
    maps.axes |= {f"{name}_gain": known.scaled(growth.gain(share)), f"{name}_shift": known}


def _pairs(maps: Maps, heads: Heads, channels: Channels, source: Model) -> None:
    """For inserted layers whose outputs cancel: pairs of neighbours, the second with the opposite output."""
    target = maps.target
    paired = cancelling_heads(heads, target.num_heads, target.num_kv_heads)
    plain = replace(channels.out, weight=abs(channels.out.weight))
    maps.axes |= {
        "pair_query": channel_rows(paired.query, channels.query),
        "pair_key": channel_rows(paired.key_value, channels.key),
        "pair_value": channel_rows(paired.key_value, channels.value),
        "pair_heads": inside(paired.out, plain),
    }
    for name in ("ffn", "expert", "together"):
        if name in maps.axes:
            rows, out = cancelling(maps.axes[name])
            maps.axes |= {f"pair_{name}": rows, f"pair_{name}_out": out}
    if "heads_gain" in maps.axes:
        ffn = maps.axes["pair_ffn"].filled(FRESH)
        of_heads = channel_rows(paired.query, channels.value).filled(FRESH)
        for name, whole in (("heads", of_heads), ("ffn", ffn)):
            maps.axes |= {f"pair_{name}_gain": whole, f"pair_{name}_shift": whole}


def _experts(maps: Maps, source: Model, sizes: Sizes) -> None:
    moe, was = maps.target.moe, source.moe
    if moe is None:
        return
    before = was.num_experts if was else 1
    parts = maps.parts = sizes.granularity
    copies = moe.num_experts // (before * parts)
    numbers = [(e, s) for _ in range(copies) for e in range(before) for s in range(parts)]
    maps.axes |= {
        "experts": axis([e * parts + s for e, s in numbers], before * parts),
        "routes": axis([e for e, _ in numbers], before),
        "route_parts": axis([i // parts for i in range(moe.num_experts)], moe.num_experts // parts),
    }
    if was is None:
        _upcycled(maps, copies, moe.top_k // parts, parts)
        return
    if moe.num_experts == was.num_experts:
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
    if gates.by_share:
        maps.router_bias = 1 / (copies * parts)  # it is added to scores, which the copies split
    if moe.capacity_factor is not None:
        maps.notes.append("capacity is counted for every copy of an expert as it was for the one")
    maps.notes.append(f"the {copies * parts} successors of an expert are always chosen together until noise on the router parts them")


def routing_space(model: Model) -> AxisMap:
    """The space in which tokens are compared with experts' rows, where it is not the stream."""
    of = model.moe.router_row.directions if model.moe is not None else None
    return same(1 if of is None else of.dim)


def _upcycled(maps: Maps, experts: int, chosen: int, parts: int) -> None:
    """Handles experts made from a dense layer: gates must add up to one, or equal gates are compensated."""
    moe = maps.target.moe
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


def _ends(maps: Maps, source: Model, seq_lens: tuple[int, int], options: GrowthOptions) -> None:
    """Vocabulary and positions."""
    if source.spacetime is not None:
        maps.axes |= {f"positions.{dim}": same(n) for dim, n in enumerate(source.spacetime.grid)}
        if seq_lens[0] != seq_lens[1]:
            raise UsageError("--seq-len: a grid has as many tokens as patches; grow text models in context")
        return
    old, new = source.vocab_size, maps.target.vocab_size
    assert old is not None and new is not None
    ids = options.vocabulary or tuple(i if i < old else None for i in range(new))
    if source.family == "encoder" and new > old and options.vocabulary is None:
        ids = (*range(old - 1), *[None] * (new - old), old - 1)  # the mask token stays last
    if len(ids) != new or any(i is not None and not 0 <= i < old for i in ids):
        raise UsageError(
            f"the vocabulary map has {len(ids)} entries for a vocabulary of {new}: give the old id (below {old}) or null for each"
        )
    maps.axes["vocabulary"] = axis([FRESH if i is None else i for i in ids], old)
    lost = sorted(set(range(old)) - set(ids))
    if lost:
        maps.lossy.append(f"the vocabulary map leaves out {len(lost)} old tokens, the first of them {lost[0]}: keep every old id")
    if new > old:
        first_new = next(i for i, source_id in enumerate(ids) if source_id is None)
        prefix = all(i is None for i in ids[first_new:])
        if prefix and not options.enable_vocabulary:
            maps.target = maps.target.model_copy(update={"vocab_enabled": source.vocab_enabled or first_new})
            maps.notes.append(
                f"tokens from {first_new} on cannot be predicted (model.vocab_enabled) until you remove that key: the old ones keep their "
                "probabilities"
            )
        else:
            maps.lossy.append(
                f"vocabulary {old} → {new}: old logits stay, but new tokens enter the normalizer; new ids behind all old ones without "
                "--enable-vocabulary are exact"
            )
    maps.axes["positions"] = axis([i if i < seq_lens[0] else FRESH for i in range(seq_lens[1])], seq_lens[0])


def _quantized(maps: Maps, options: GrowthOptions) -> None:
    """BitLinear scales weights by their mean size and inputs by the largest: only whole, equal copies keep both."""
    uneven = [name for name, a in maps.axes.items() if not a.is_identity and (a.uniform_copies is None or not a.known.all())]
    uneven = [n for n in uneven if n not in ("vocabulary", "positions")]
    noisy = any(a.shared and (a.copies > 1).any() for a in maps.axes.values())
    maps.notes.append(
        "linear bitlinear: inputs are sums of whole numbers and can lie exactly between two steps, where the last bit decides"
    )
    if uneven:
        maps.lossy.append(f"linear bitlinear with {', '.join(uneven[:3])} not repeated a whole number of times: its rounding would change")
    elif noisy and (options.symmetry != "none" or options.split[0] != options.split[1]):
        maps.lossy.append("linear bitlinear: rounding depends on what distinguishes copies; --symmetry none with --split 1:1 is exact")
