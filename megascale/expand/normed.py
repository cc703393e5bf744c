"""Maps of channels that a norm takes, and of the norm's weights: copies and zeros change what it divides by."""

from __future__ import annotations

from dataclasses import dataclass

from megascale.config.norms import NormGrowth
from megascale.config.schema import Model
from megascale.errors import UsageError
from megascale.expand.axes import FRESH, ZERO, AxisMap, repeated, shared
from megascale.expand.options import GrowthOptions
from megascale.expand.said import growth_of
from megascale.model.spec import ParamSpec


@dataclass(frozen=True)
class Normed:
    """Maps of the channels of a norm: of the rows that write them, of its gains and biases, and of the columns that read its output. `eps`
    is the factor on its epsilon; `lossy`: why it cannot be exact.
    """

    rows: AxisMap
    gain: AxisMap
    shift: AxisMap
    read: AxisMap
    eps: float = 1.0
    lossy: str | None = None


def grow_latent(old: int, new: int, model: Model, options: GrowthOptions, what: str) -> Normed:
    """A latent of `old` channels that one product writes, a norm divides and products read. Whole copies, then zeros; the rows are scaled
    so that the norm's statistics stay, and with them its epsilon.
    """
    if new < old:
        raise UsageError(f"{what} grows from {old} to {new}: choose at least {old}")
    copies = new // old if options.width == "duplicate" else 1
    rows = repeated(old, new, copies, ZERO)
    gain = growth_of(model).gain(copies * old / new)
    fresh = rows.filled(FRESH)
    lossy = None
    if model.norm_row.centres and copies * old != new:
        lossy = (
            f"{what} {old} → {new} under {model.norm}: zeros among the latent's channels would move its mean; choose a multiple of {old}"
        )
    return Normed(rows.scaled(1 / gain), fresh.scaled(gain), fresh, shared(fresh, options.split), lossy=lossy)


def inner_norm(name: str, channels: AxisMap, model: Model) -> Normed:
    """A norm over channels that are repeated evenly, or followed by zeros."""
    known = channels.filled(FRESH)
    copies, size = known.uniform_copies, known.size
    centres, growth = model.norm_row.centres, growth_of(model)
    lossy = None
    if copies is None or (centres and not known.known.all()):
        how = "zeros would move its mean" if copies is not None else "some channels would count more often than others"
        instead = "" if centres else f", or --{name}-method zero"
        lossy = f"{name} {known.old} → {size} under an inner {model.norm}: {how}; choose a multiple{instead}"
    share = 1.0 if growth.power is None or copies is None else copies * known.old / size
    return Normed(channels, known.scaled(growth.gain(share)), known, known, share, lossy)


def kept_gain(growth: NormGrowth, kept: AxisMap) -> AxisMap:
    """Gains of a norm over the kept channels, which are as large as if the others had been zero."""
    return kept.scaled(growth.gain(kept.old / kept.size))


def offset_of(spec: ParamSpec, leaf: str) -> float:
    """What a norm adds to this weight of it before using it: what its gains of 1 start without."""
    return 1.0 - spec.mean if leaf == "weight" else 0.0
