"""Importance of a trained model's channels, neurons and heads on given tokens, and of its blocks by leaving one out.

The model runs layer by layer, as in verify.py, so that it is never in memory as a whole. Shapes: b sequences, s positions, d hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascale.config.schema import Model
from megascale.config.stages import StagePart, layered_parts
from megascale.expand.apply import Read
from megascale.expand.verify import LATE, fill
from megascale.model.block import Block
from megascale.model.families import build_part
from megascale.model.feedforward import FeedForward
from megascale.model.layers import Linear
from megascale.model.shape import Shape


@dataclass(frozen=True)
class Importance:
    """Importance of each channel of the stream [d] and of each layer's neurons [f] and heads [h] (empty if the layer has experts), and the
    loss without each block, None if not requested.
    """

    stream: Tensor
    neurons: list[Tensor]
    heads: list[Tensor]
    loss: float
    without: list[float] | None


@torch.no_grad()
def measure(model: Model, seq_len: int, read: Read, tokens: Tensor, blocks: bool) -> Importance:
    """Measures on tokens [b, s] in fp32. A channel's importance is its mean size over tokens and layers, equally weighted; a neuron's or
    head's the mean size of its output times that of the weights that take it. `blocks`: also the loss without each inner block.
    """
    parts = layered_parts(model.num_layers)
    first, *inner, last = parts
    stream = _load(model, seq_len, read, first)(tokens)
    channels, neurons, heads, before = torch.zeros(stream.shape[-1]), [], [], []
    for part in inner:
        channels += _shares(stream)
        before.append(stream)
        module = _load(model, seq_len, read, part)
        block = module.blocks[str(part.layers.start)]
        assert isinstance(block, Block)
        seen: dict[str, Tensor] = {}
        assert isinstance(block.attention.o, Linear)
        _watch(block.attention.o, "heads", seen)
        down = block.ffn.down if isinstance(block.ffn, FeedForward) and isinstance(block.ffn.down, Linear) else None
        if down is not None:
            _watch(down, "neurons", seen)
        stream = module(tokens, stream=stream)
        per_channel = seen["heads"] * block.attention.o.weight.norm(dim=0)
        heads.append(per_channel.unflatten(0, (model.num_heads, -1)).sum(1))
        neurons.append(seen["neurons"] * down.weight.norm(dim=0) if down is not None else torch.empty(0))
    channels += _shares(stream)
    end = _load(model, seq_len, read, last)
    whole = _loss(end(tokens, stream=stream), tokens)
    without = None
    if blocks:
        without = [float("inf")] * model.num_layers
        for dropped in range(1, model.num_layers - 1):
            x = before[dropped]
            for part in inner[dropped + 1 :]:
                x = _load(model, seq_len, read, part)(tokens, stream=x)
            without[dropped] = _loss(end(tokens, stream=x), tokens)
    return Importance(channels, neurons, heads, whole, without)


def _load(model: Model, seq_len: int, read: Read, part: StagePart) -> Any:
    module = build_part(model, Shape(seq_len, torch.float32, torch.float32), part)
    module.to_empty(device="cpu")
    module.eval()
    fill(module, read)
    module.at_step(LATE)
    return module


def _watch(product: nn.Module, name: str, seen: dict[str, Tensor]) -> None:
    """Records the mean size over tokens of each input [in] of a product."""
    inner: Callable[[Tensor], Tensor] = product.product  # type: ignore[assignment]

    def watched(x: Tensor) -> Tensor:
        seen[name] = x.abs().flatten(0, -2).mean(0)
        return inner(x)

    product.product = watched  # type: ignore[assignment]


def _shares(stream: Tensor) -> Tensor:
    size = stream.abs().flatten(0, 1).mean(0)
    return size / size.mean()


def _loss(logits: Tensor, tokens: Tensor) -> float:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()


def ranked(importance: Tensor, keep: int, ranking: str, seed: int) -> list[int]:
    """The `keep` indices to retain, in their old order: the most important ones, or for comparison random ones, the least important ones,
    or the first (`prefix`).
    """
    if ranking == "prefix":
        return list(range(keep))
    order = importance.argsort(descending=ranking != "reversed", stable=True)
    if ranking == "random":
        order = torch.randperm(len(importance), generator=torch.Generator().manual_seed(seed))
    return sorted(order[:keep].tolist())
