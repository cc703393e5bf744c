"""Small and grown model on the same tokens, layer by layer, so that neither is ever in memory as a whole.

Shapes: b sequences, s positions, d hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascale.config.schema import Model
from megascale.config.stages import layered_parts
from megascale.expand.apply import Read
from megascale.expand.plan import Growth
from megascale.model.families import build_part
from megascale.model.shape import Shape

LATE = 1 << 40  # a step at which every scheme that follows the step has arrived
EXACT = 1e-10  # on logits, in fp64, before anything is stored: of their size, where that is above 1
UNITS = 1.0  # in the last place: rounding once makes half of one


@dataclass(frozen=True)
class Passed:
    """What a model makes of tokens [b, s]: the stream [b, s, d] behind the embedding and behind every layer, and logits [b, s, V]."""

    streams: list[Tensor]
    logits: Tensor


@torch.no_grad()
def run(
    model: Model, seq_len: int, read: Read, dtype: torch.dtype, tokens: Tensor, keep: Callable[[int], bool] = lambda layer: True
) -> Passed:
    """One part of the model at a time is built, filled by `read`, asked and let go. `keep`: layers whose stream is wanted."""
    shape, stream, streams = Shape(seq_len, dtype, dtype), None, []
    for number, part in enumerate(layered_parts(model.num_layers)):
        module = build_part(model, shape, part)
        module.to_empty(device="cpu")
        module.eval()
        fill(module, read)
        module.at_step(LATE)
        stream = module(tokens, stream=stream)
        if not part.last:
            streams.append(stream if keep(number - 1) else stream.new_empty(0))
    assert stream is not None
    return Passed(streams, stream)


def fill(module: nn.Module, read: Read) -> None:
    """Weights and states by their canonical names, in the module's own dtypes."""
    for name, tensor in [*module.named_parameters(), *((n, b) for n, b in module.named_buffers() if n != "warm")]:
        tensor.data.copy_(read(name, (0,) * tensor.ndim, tuple(tensor.shape)))


def checkpoints(growth: Growth) -> dict[int, int]:
    """Target layer → source layer behind which the streams must be the same: where inserted layers are done."""
    layers = growth.layers
    if [x.source for x in layers if x.mode == "keep"] != list(range(growth.source.num_layers)):
        return {}
    return {i: x.source for i, x in enumerate(layers) if i == len(layers) - 1 or layers[i + 1].mode == "keep"}


def compare(growth: Growth, small: Passed, grown: Passed, tokens: Tensor) -> dict[str, Any]:
    """Largest and mean |Δ| of the old tokens' logits, of the loss, and of the stream layer by layer."""
    old_ids = growth.axes["vocabulary"].source if growth.source.spacetime is None else np.arange(small.logits.shape[-1])
    new_ids = torch.from_numpy(np.flatnonzero(old_ids >= 0))
    a = small.logits[..., torch.from_numpy(old_ids[old_ids >= 0])].to(torch.float64)
    b = grown.logits[..., new_ids].to(torch.float64)
    difference = (a - b).abs()
    found: dict[str, Any] = {"logits_max": difference.max().item(), "logits_mean": difference.mean().item(), "logits_std": a.std().item()}
    found["logits_typical"] = typical(a, b)
    if growth.source.spacetime is None and tokens.shape[1] > 1:
        was, now = (loss(x.logits, tokens) for x in (small, grown))
        found |= {"loss": was, "loss_change": now - was}
    layers, first = [], None
    known = growth.axes["stream"]
    here, source = torch.from_numpy(np.flatnonzero(known.known)), torch.from_numpy(known.source[known.known])
    for target_layer, source_layer in {-1: -1, **checkpoints(growth)}.items():
        x, y = small.streams[source_layer + 1], grown.streams[target_layer + 1]
        if x.numel() and y.numel():
            gap, size = (x[..., source] - y[..., here]).abs().max().item(), x.abs().max().item()
            layers.append({"layer": target_layer, "of": source_layer, "max": gap})
            first = target_layer if first is None and gap > 1e-9 * size else first
    return {**found, "streams": layers, "first_diverging_layer": first}


def loss(logits: Tensor, tokens: Tensor) -> float:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).to(torch.float64), tokens[:, 1:].flatten()).item()


@dataclass(frozen=True)
class Measured:
    """What a verdict depends on: how far logits of a typical size `size` moved.

    transform   largest |Δ| in fp64, the grown model straight from the transform
    units       largest distance of a stored number from the transform's, in units of the last place of the dtype that it is stored in
    own, stored    largest |Δ| from the small model in fp64: of the small model and of the stored grown one, in the run's dtype
    own_typical, stored_typical    the same, of a typical token (`typical`)
    slack       how many times the small model's own rounding error the grown one's may be
    """

    size: float
    transform: float
    units: float
    own: float
    stored: float
    own_typical: float
    stored_typical: float
    slack: float

    @property
    def allowed(self) -> float:
        """Of `stored_typical`; where the run is in fp64 both models are exact, and what is left is a few roundings."""
        return self.slack * self.own_typical + limit(self.size)


def limit(size: float) -> float:
    """How far fp64 may move logits of a typical size: sums in another order move them by some 1e-14 of it, nothing exact by more."""
    return EXACT * max(1.0, size)


def slack(growth: Growth) -> float:
    """How many times the small model's own rounding error the grown one's may be. Rounding errors add up over layers and over the terms of
    a sum, in the worst case as many times as there are more of these; four times that is beyond any chance for the error of a typical
    token, an average over a vocabulary and a median over tokens.
    """
    a, b = growth.source, growth.target
    widths = (b.hidden_size / a.hidden_size, b.num_heads * b.head_dim / (a.num_heads * a.head_dim), b.ffn_size / a.ffn_size)
    return 4 * max(1.0, *widths) * max(1.0, b.total_layers / a.total_layers)


def typical(found: Tensor, true: Tensor) -> float:
    """Of a typical token: the median over tokens of the root mean square over the vocabulary. A token whose experts another rounding has
    chosen, and what comes behind it, do not count.
    """
    return (found.to(torch.float64) - true.to(torch.float64)).square().mean(-1).sqrt().median().item()


def verdict(found: Measured) -> str:
    """exact: the transform is, and what is stored is the transform, rounded; rounding: the transform moves logits by less than the small
    model's own rounding error; else lossy.

    What is exact cannot miss this by chance: in fp64 it stays orders of magnitude below the limit, each stored number is the transform's,
    rounded once, and the error in the run's dtype, which chance has a say in, is judged by its typical size.
    """
    if not (found.units <= UNITS and found.stored_typical <= found.allowed):
        return "lossy"
    if found.transform <= limit(found.size):
        return "exact"
    return "rounding" if found.transform <= found.own else "lossy"
