"""Importance of a trained model's channels, neurons and heads on given tokens, and of its blocks by leaving one out.

The model runs layer by layer, as in verify.py, so that it is never in memory as a whole. Shapes: b sequences, s positions, d hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascale.config.schema import Model
from megascale.config.stages import StagePart, layered_parts
from megascale.expand.apply import Read
from megascale.expand.inner import inner_products, inner_scores
from megascale.expand.verify import LATE, fill, predicted_ahead
from megascale.model.block import Block
from megascale.model.families import build_part
from megascale.model.feedforward import FeedForward
from megascale.model.layers import Linear
from megascale.model.shape import Shape


@dataclass(frozen=True)
class Importance:
    """Importance of each channel of the stream [d] and of each layer's neurons [f] (empty if it has experts), heads [h] and what its
    attention has inside, by size (expand/inner.py), those of modules of multi-token prediction last; and the loss without each run of
    layers, None if not requested.
    """

    stream: Tensor
    neurons: list[Tensor]
    heads: list[Tensor]
    inner: list[dict[str, Tensor]]
    loss: float
    without: list[float] | None


@torch.no_grad()
def measure(model: Model, seq_len: int, read: Read, tokens: Tensor, runs: tuple[range, int] | None) -> Importance:
    """Measures on tokens [b, s] in fp32. A channel's importance is its mean size over tokens and layers, equally weighted; a neuron's or
    head's the mean size of its output times that of the weights that take it. `runs`: also the loss without each run of layers, given by
    its first layer; these, and the length of a run.
    """
    first, *inner, last = layered_parts(model.num_layers)
    stream = _load(model, seq_len, read, first)(tokens)
    channels, before = torch.zeros(stream.shape[-1]), []
    found: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
    for i, part in enumerate(inner):
        channels += _shares(stream)
        before.append(stream)
        module = _load(model, seq_len, read, part)
        watched = Watched(module.blocks[str(i)], model.at_layer(i))
        stream = module(tokens, stream=stream)
        found.append(watched.importance())
    channels += _shares(stream)
    end = _load(model, seq_len, read, last)
    kind = model.at_layer(model.num_layers - 1)
    modules = [Watched(ahead.block, kind) for ahead in end.mtp.values()] if model.mtp_depth else []
    if modules:
        predicted_ahead(end, tokens, stream)
    found += [watched.importance() for watched in modules]
    whole = _loss(end(tokens, stream=stream), tokens)
    without = None
    if runs is not None:
        without = [float("inf")] * model.num_layers
        for begin in runs[0]:
            x = before[begin]
            for part in inner[begin + runs[1] :]:
                x = _load(model, seq_len, read, part)(tokens, stream=x)
            without[begin] = _loss(end(tokens, stream=x), tokens)
    return Importance(channels, [n for n, _, _ in found], [h for _, h, _ in found], [i for _, _, i in found], whole, without)


class Watched:
    """A block whose products record the sizes of their inputs: those into the stream, and those of latents. `own`: its config."""

    def __init__(self, block: nn.Module, own: Model) -> None:
        assert isinstance(block, Block) and isinstance(block.attention.o, Linear)
        self.own, self.attention = own, block.attention
        self.out, self.seen = block.attention.o, dict[str, Tensor]()
        for name in inner_products(own):
            getattr(block.attention, name).register_forward_pre_hook(partial(_record, self.seen, name))
        self.down = block.ffn.down if isinstance(block.ffn, FeedForward) and isinstance(block.ffn.down, Linear) else None
        _watch(self.out, "heads", self.seen)
        if self.down is not None:
            _watch(self.down, "neurons", self.seen)

    def importance(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Of the neurons [f], empty under experts, of the heads [h], and inside of the attention."""
        out = self.seen["heads"] * self.out.weight.norm(dim=0)
        if self.own.attention_row.scans:  # num_heads are not its heads
            heads = torch.empty(0)
        else:
            heads = out.unflatten(0, (self.own.num_heads, -1)).sum(1)
        neurons = self.seen["neurons"] * self.down.weight.norm(dim=0) if self.down is not None else torch.empty(0)
        return neurons, heads, inner_scores(self.own, self.attention, self.seen, out)


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
        _record(seen, name, product, (x,))
        return inner(x)

    product.product = watched  # type: ignore[assignment]


def _record(seen: dict[str, Tensor], name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    seen[name] = inputs[0].abs().flatten(0, -2).mean(0)


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
