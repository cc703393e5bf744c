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
from megascale.model.decoder import Shape
from megascale.model.families import build_part
from megascale.model.kernels import choose_kernels

LATE = 1 << 40  # a step at which every scheme that follows the step has arrived
EXACT = 1e-10  # on logits, in fp64, before anything is stored


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
    kernel = choose_kernels("torch", model.norm, torch.device("cpu")).norm
    shape, stream, streams = Shape(seq_len, dtype, dtype), None, []
    for number, part in enumerate(layered_parts(model.num_layers)):
        module = build_part(model, shape, kernel, part)
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


def verdict(transform: float, stored: float, own: float, size: float) -> str:
    """exact: fp64, before storing, moved no logit; rounding: what is stored is within twice the model's own rounding error; else lossy."""
    close = stored <= 2 * max(own, 64 * torch.finfo(torch.float64).eps * size)
    if transform <= EXACT and close:
        return "exact"
    return "rounding" if close else "lossy"
