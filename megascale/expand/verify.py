"""Compares the small and the grown model on the same tokens, layer by layer, so that neither is ever in memory as a whole.

Shapes: b sequences, s positions, d hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascale.config.schema import Model
from megascale.config.stages import layered_parts
from megascale.expand.apply import Read
from megascale.expand.plan import Growth
from megascale.model.ahead import ahead_of
from megascale.model.decoder import Decoder
from megascale.model.families import build_part
from megascale.model.layers import linear
from megascale.model.shape import Shape

LATE = 1 << 40  # a step by which every scheme that depends on the step has settled
EXACT = 1e-10  # tolerance for logits in fp64 before storing; relative to their size if that is above 1
UNITS = 1.0  # units in the last place: rounding once gives at most half of one


@dataclass(frozen=True)
class Passed:
    """A model's results on tokens [b, s]: the stream [b, s, d] after the embedding and after every layer, logits [b, s, V], and those of
    each module of multi-token prediction.
    """

    streams: list[Tensor]
    logits: Tensor
    ahead: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def run(
    model: Model, seq_len: int, read: Read, dtype: torch.dtype, tokens: Tensor, keep: Callable[[int], bool] = lambda layer: True
) -> Passed:
    """Builds, fills with `read`, runs and frees one part of the model at a time. `keep`: layers whose stream is kept."""
    shape, stream, streams, further = Shape(seq_len, dtype, dtype), None, [], []
    for number, part in enumerate(layered_parts(model.num_layers)):
        module = build_part(model, shape, part)
        module.to_empty(device="cpu")
        module.eval()
        fill(module, read)
        module.at_step(LATE)
        if stream is not None and isinstance(module, Decoder) and module.mtp:
            further = predicted_ahead(module, tokens, stream)
        stream = module(tokens, stream=stream)
        if not part.last:
            streams.append(stream if keep(number - 1) else stream.new_empty(0))
    assert stream is not None
    return Passed(streams, stream, further)


def predicted_ahead(module: Decoder, tokens: Tensor, stream: Tensor) -> list[Tensor]:
    """Logits [b, s, V] of each module of multi-token prediction, from the stream [b, s, d] after the last block."""
    mask_of = partial(module.attention_mask, documents=None, seq_len=tokens.shape[1], device=tokens.device)
    layers = range(module.cfg.num_layers, module.cfg.num_layers + len(module.mtp))
    contexts = module.contexts(layers, tokens, mask_of, None, None, None)
    x = stream if module.final_norm is None else module.final_norm(stream)
    return [linear(predicting, module.head_weight()) for _, _, predicting in ahead_of(module, x, tokens, contexts)]


def fill(module: nn.Module, read: Read) -> None:
    """Fills weights and states by their canonical names, in the module's own dtypes."""
    for name, tensor in [*module.named_parameters(), *((n, b) for n, b in module.named_buffers() if n != "warm")]:
        tensor.data.copy_(read(name, (0,) * tensor.ndim, tuple(tensor.shape)))


def checkpoints(growth: Growth) -> dict[int, int]:
    """Target layer → source layer after which the streams must be equal: after all inserted layers there."""
    layers = growth.layers
    if [x.source for x in layers if x.mode == "keep"] != list(range(growth.source.num_layers)):
        return {}
    return {i: x.source for i, x in enumerate(layers) if i == len(layers) - 1 or layers[i + 1].mode == "keep"}


def compare(growth: Growth, small: Passed, grown: Passed, tokens: Tensor) -> dict[str, Any]:
    """Largest and mean |Δ| of the old tokens' logits, of the loss, and of the stream per layer. Modules of multi-token prediction that both
    models have count in the largest.
    """
    old_ids = growth.axes["vocabulary"].source if growth.source.spacetime is None else np.arange(small.logits.shape[-1])
    new_ids = torch.from_numpy(np.flatnonzero(old_ids >= 0))
    same = torch.from_numpy(old_ids[old_ids >= 0])
    a = small.logits[..., same].to(torch.float64)
    b = grown.logits[..., new_ids].to(torch.float64)
    difference = (a - b).abs()
    found: dict[str, Any] = {"logits_max": difference.max().item(), "logits_mean": difference.mean().item(), "logits_std": a.std().item()}
    ahead = [
        (x[..., same].to(torch.float64) - y[..., new_ids].to(torch.float64)).abs().max().item() for x, y in zip(small.ahead, grown.ahead)
    ]
    if ahead:
        found |= {"logits_max": max(found["logits_max"], *ahead), "mtp_max": ahead}
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
    """Measurements for the verdict: how far logits of a typical size `size` moved.

    transform   largest |Δ| in fp64, with the grown model directly from the transform
    units       largest distance of a stored number from the transform's, in units of the last place of the stored dtype
    own, stored    largest |Δ| from the small model in fp64: of the small model and of the stored grown one, in the run's dtype
    own_typical, stored_typical    the same for a typical token (`typical`)
    slack       allowed ratio of the grown model's rounding error to the small model's
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
        """Limit of `stored_typical`; in fp64 both models are exact up to a few roundings."""
        return self.slack * self.own_typical + limit(self.size)


def limit(size: float) -> float:
    """Allowed change in fp64 of logits of a typical size: reordering sums changes them by about 1e-14 of it, nothing exact by more."""
    return EXACT * max(1.0, size)


def slack(growth: Growth) -> float:
    """Allowed ratio of the grown model's rounding error to the small model's. Rounding errors add up over layers and over the terms of a
    sum, in the worst case in proportion to their numbers; four times that cannot happen by chance for a typical token, an average over a
    vocabulary and a median over tokens.
    """
    source, target = growth.source, growth.target
    widths = [
        width
        for kind, b in target.variants.items()
        for a in (source.of_kind(kind) if kind else source,)
        for width in (b.hidden_size / a.hidden_size, b.num_heads * b.head_dim / (a.num_heads * a.head_dim), b.ffn_size / a.ffn_size)
    ]
    return 4 * max(1.0, *widths) * max(1.0, target.total_layers / source.total_layers)


def typical(found: Tensor, true: Tensor) -> float:
    """For a typical token: the median over tokens of the root mean square over the vocabulary. So tokens whose experts changed because of
    rounding, and the tokens after them, do not count.
    """
    return (found.to(torch.float64) - true.to(torch.float64)).square().mean(-1).sqrt().median().item()


def verdict(found: Measured) -> str:
    """exact: the transform is exact, and the stored numbers are the transform's, rounded; rounding: the transform moves logits by less than
    the small model's own rounding error; else lossy.

    An exact growth cannot fail this by chance: in fp64 it stays orders of magnitude below the limit, each stored number is the transform's,
    rounded once, and the error in the run's dtype, which is random, is judged by its typical size.
    """
    if not (found.units <= UNITS and found.stored_typical <= found.allowed):
        return "lossy"
    if found.transform <= limit(found.size):
        return "exact"
    return "rounding" if found.transform <= found.own else "lossy"
