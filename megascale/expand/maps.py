"""The axis maps of a growth: those of the stream and of the ends, and for each kind of layer those of its blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megascale.config.schema import Model
from megascale.errors import UsageError
from megascale.expand.axes import FRESH, MEAN, ZERO, AxisMap, axis, beside, repeated, same, shared
from megascale.expand.block import BlockMaps, block_maps
from megascale.expand.depth import Layer
from megascale.expand.kinds import with_kinds
from megascale.expand.options import GrowthOptions
from megascale.expand.said import growth_of
from megascale.model.residual import ends


@dataclass
class Maps:
    """axes        by name; those of a kind's blocks as name@kind, those of one layer as name@layer
    target      the target's config
    blocks      by kind, under an empty name if all layers are alike
    eps_factor  on the epsilon of norms over the stream; `gain` η: on their gains; `fold`: a further factor on those before the head
    lossy       sentences about what cannot be exact, with an exact alternative; `dead`: what never gets a gradient; `notes` for the report
    """

    axes: dict[str, AxisMap]
    target: Model
    blocks: dict[str, BlockMaps] = field(default_factory=dict)
    eps_factor: float = 1.0
    gain: float = 1.0
    fold: float = 1.0
    lossy: list[str] = field(default_factory=list)
    dead: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def axis_of(self, name: str, *scopes: str) -> str:
        """The name of an axis in the narrowest of the scopes that has its own: a layer, its kind, or the whole model."""
        return next((own for scope in scopes if (own := f"{name}@{scope}") in self.axes), name)


def build_maps(
    source: Model,
    target: Model,
    variants: Mapping[str, Model],
    parts: Mapping[str, int],
    seq_lens: tuple[int, int],
    options: GrowthOptions,
    layers: tuple[Layer, ...],
) -> Maps:
    """All maps between two configs. Raises UsageError for rows without a map; what is merely lossy is in `lossy`.

    variants  the target's config of each kind of layer
    parts     that each kind's experts are cut into
    """
    maps = Maps({"one": same(1)}, target)
    _stream(maps, source, options)
    cancel = any(layer.mode == "cancel" for layer in layers)
    for kind, own in source.variants.items():
        block = maps.blocks[kind] = block_maps(own, variants[kind], parts[kind], maps.axes["read"], options, cancel)
        maps.axes |= {f"{name}@{kind}" if kind else name: found for name, found in block.axes.items()}
        whose = f"kinds.{kind}: " if kind else ""
        maps.lossy += [whose + line for line in block.lossy]
        maps.dead += [whose + line for line in block.dead]
        maps.notes += [whose + line for line in block.notes]
    maps.target = with_kinds(target, source, {kind: block.target for kind, block in maps.blocks.items()})
    _ends(maps, source, seq_lens, options)
    if source.linear == "bitlinear":
        _quantized(maps, options)
    copied = any(a.shared and (a.copies > 1).any() for a in maps.axes.values())
    if copied and options.symmetry == "none" and options.split[0] == options.split[1]:
        maps.notes.append("copies with equal shares and no noise stay identical, so the new width adds no capacity")
    if source.branchnorm_period is not None:
        maps.notes.append(
            f"a new run counts its steps from 1, and BranchNorm's period with them: set branchnorm_period 1 if the source was past step "
            f"{source.branchnorm_period}"
        )
    return maps


def _stream(maps: Maps, source: Model, options: GrowthOptions) -> None:
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
        _off_centre(maps, source, rest, fill)
    stream = repeated(old, new, copies, fill)
    fresh = stream.filled(FRESH)
    maps.gain = growth.gain(copies * old / new)
    maps.eps_factor = growth.eps(maps.gain)
    read = shared(fresh, options.split)
    maps.axes |= {
        "stream": stream,
        "read": read,
        "read_both": beside(read, read),
        "gain": fresh.scaled(maps.gain),
        "shift": fresh,
        "scale": fresh,
        "values": same(source.spacetime.values if source.spacetime else 1),
    }
    maps.fold = ends(source).hidden_factor / ends(maps.target).hidden_factor
    if source.tie_embeddings:
        maps.fold /= copies


def _off_centre(maps: Maps, source: Model, rest: int, fill: int) -> None:
    """Channels beside whole copies, under a norm that subtracts the mean."""
    old = source.hidden_size
    where = f"hidden_size {old} → {maps.target.hidden_size} under {source.norm}"
    if any(m.residual_row.norm != "before" for m in source.variants.values()):
        maps.lossy.append(
            f"{where} after the sum: {rest} channels cannot have the mean of the others after a gain; choose a multiple of {old}"
        )
    elif source.mtp_depth:
        maps.lossy.append(
            f"{where} with mtp_depth {source.mtp_depth}: its modules normalize what the last norm has multiplied by gains; choose a "
            f"multiple of {old}"
        )
    elif fill == ZERO:
        maps.lossy.append(f"{where} with zeros: they move its mean; average and duplicate are exact")


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
