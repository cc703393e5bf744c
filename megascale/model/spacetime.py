"""The spacetime family: fields on a grid in, the summed squared error of predicted patches out.

A sample [s₁ … s_K, c] is cut into patches, each a token. Every layer attends along one dimension of the grid, in turn, so its cost grows
with the sum of the lengths rather than their product (axial attention, arXiv 1912.12180); everything else works token by token. The stream
stays [b, n, d], the tokens of the grid in row-major order. Its positions may differ from layer to layer: `grids` lists them, and `moves`
reshards the stream in between. If a text goes with each sample, every block also attends to its embedded tokens, which are whole on all
ranks that share a sample; between stages they are appended to the stream.

Shapes: b micro-batch, n tokens here, d hidden, v numbers of a patch, e head size, t tokens of the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from megascale.comm.collectives import sum_over_ranks
from megascale.config.schema import Model
from megascale.config.stages import StagePart
from megascale.model.attention import Attend, attend, attend_all, identity
from megascale.model.block import Block, Context, Memory, key_padding_mask
from megascale.model.exchanges import Exchanges
from megascale.model.family import Family, Unit
from megascale.model.layers import Norm, linear
from megascale.model.ops.attention_tiles import AttentionMask
from megascale.model.position import Rotary, inverse_frequencies, pair_exponents, rotary
from megascale.model.residual import Side, Stack, residual
from megascale.model.shadow import product_weight
from megascale.model.shape import Shape
from megascale.model.spec import ParamSpec
from megascale.model.tables import Table, rows_of
from megascale.splitmix import mix64_signed

Grid = Sequence[Sequence[range]]  # the local positions along every dimension


class Spacetime(Family):
    """Patch embedding, blocks, final norm, patch head, or the `part` of them that forms a stage. Tensor ranks split embedding and head
    along the numbers of a patch.
    """

    sequence = "grid"

    def __init__(self, cfg: Model, shape: Shape, part: StagePart | None = None) -> None:
        super().__init__()
        part = part or StagePart(range(cfg.num_layers))
        assert cfg.spacetime is not None
        self.cfg, self.shape, self.part, self.fields = cfg, shape, part, cfg.spacetime
        dtype, d, std = shape.storage, cfg.hidden_size, cfg.init_std
        side: Side = "decoder" if self.fields.objective == "next_step" else "encoder"
        stack = Stack(side, cfg.num_layers, cross_input=bool(self.fields.text_len))
        if part.first and self.fields.text_len:
            assert self.fields.text_vocab_size is not None
            self.text = Table(ParamSpec((self.fields.text_vocab_size, d), "embedding", 0, std), dtype)
            self.text_position = Table(ParamSpec((self.fields.text_len, d), "position", "tokens", std), dtype)
        if part.first:
            self.embedding = Table(ParamSpec((d, self.fields.values), "embedding", 1, std), dtype)
            if self.fields.objective == "masked":
                self.mask_token = Table(ParamSpec((d,), "position", "tokens", std), dtype)
            if cfg.position_row.table:
                self.position = nn.ModuleList(Table(ParamSpec((n, d), "position", "tokens", std), dtype) for n in self.fields.grid)
        self.blocks = nn.ModuleDict({str(i): Block(cfg, residual(cfg, stack, i), stack, dtype, False) for i in part.layers})
        self.final_norm: Norm | None = None
        if part.last and cfg.residual_row.final_norm:
            self.final_norm = Norm(d, cfg.norm, cfg.eps_of("final_norm"), "tokens", dtype, cfg.bias)
        if part.last:
            self.head = Table(ParamSpec((self.fields.values, d), "head", 0, std), dtype)
        self.exchanges = Exchanges()
        whole = [[range(n)] for n in self.fields.grid]
        # For every layer of the whole model, by global number.
        self.grids: list[Grid] = [whole] * cfg.num_layers
        self.moves: list[Callable[[Tensor], Tensor]] = [identity] * cfg.num_layers
        self.meet_along([self.alone(i) for i in range(cfg.num_layers)])

    def units(self) -> Iterator[tuple[str, Unit]]:
        for number, block in self.blocks.items():
            yield f"blocks.{number}", block  # type: ignore[misc]  # a ModuleDict's values are modules

    def alone(self, layer: int) -> Attend:
        """Attention along a layer's dimension if it is unsharded."""
        return attend if self.causal(layer) else attend_all

    def causal(self, layer: int) -> bool:
        """Whether the layer is causal: along time under next_step; attention in space is bidirectional."""
        return self.fields.objective == "next_step" and self.cfg.attended(layer) == 0

    def meet_along(self, attends: Sequence[Attend]) -> None:
        """Sets each layer's attention along its dimension on its local grid; one entry per layer."""
        for number, block in self.blocks.items():
            layer = int(number)
            block.attention.attend = partial(  # type: ignore[union-attr]
                along, dim=self.cfg.attended(layer), shape=sizes(self.grids[layer]), inner=attends[layer]
            )

    def stream_shapes(self, batch: torch.Size) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Shapes of the stream [b, n, d] that this stage receives and sends, for a batch of fields of this shape."""
        last = self.part.layers[-1] if len(self.part.layers) else self.part.layers.start - 1
        before, after = (math.prod(sizes(self.grids[max(0, i)])) for i in (self.part.layers.start - 1, last))
        text = self.exchanges.tokens_here(torch.empty(1, self.fields.text_len or 0, device="meta")).shape[1]
        here = [self.exchanges.tokens_here(torch.empty(1, n, device="meta")).shape[1] + text for n in (before, after)]
        return (batch[0], here[0], self.cfg.hidden_size), (batch[0], here[1], self.cfg.hidden_size)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        samples: Tensor | None = None,
        scale: float = 1.0,
        stream: Tensor | None = None,
        source: Tensor | None = None,
    ) -> Tensor:
        """Fields [b, frames, s₂ … s_K, c] in `tokens` → with targets [b, S₁·…·S_K] (negative: not counted) the squared error summed over
        the counted patches, as the mean over a patch's numbers, times `scale`; else the predicted patches [b, n, v] of local positions.

        Under the masked objective the counted patches are the hidden ones. A stage without the embedding takes the `stream` of the previous
        one; one without the head returns its own, with the text's tokens appended. `samples` [b] key the dropout masks in training;
        `source` [b, t] is the text, negative beyond its end.
        """
        x, text = (self.embed(tokens, targets), self.embed_text(source)) if stream is None else self._apart(stream, source)
        memory = None
        if text is not None and source is not None and self.blocks:
            memory = Memory(self.exchanges.enter_memory(text), key_padding_mask(source >= 0))
        for (number, block), context in zip(self.blocks.items(), self.contexts(tokens.device, samples, memory)):
            if stream is not None or int(number) > self.part.layers.start:
                x = self.moves[int(number)](x)
            x = block(x, context)
        if not self.part.last:
            return x if text is None else torch.cat((x, text), 1)
        if self.final_norm is not None:
            x = self.final_norm(x)
        predicted = linear(self.exchanges.enter_head(x), product_weight(self.head))
        return predicted if targets is None else self.error(predicted, tokens, targets) * scale

    def embed(self, fields: Tensor, targets: Tensor | None) -> Tensor:
        """[b, n, d] in the compute dtype."""
        grid, weight = self.grids[self.part.layers.start], product_weight(self.embedding).to(self.shape.compute)
        x = self.exchanges.leave_embedding(linear(self._values(fields[:, : self.fields.shape[0]], grid, weight.shape[1]), weight))
        if self.fields.objective == "masked" and targets is not None:
            hidden = self.exchanges.tokens_here(self._counted(targets, grid)).unsqueeze(-1)
            x = torch.where(hidden, self.mask_token.weight.to(x.dtype), x)
        if self.cfg.position_row.table:
            for dim, table in enumerate(self.position):
                assert isinstance(table, Table)
                where = self.exchanges.tokens_here(coordinate(grid, dim, fields.device)[None])
                x = x + nn.functional.embedding(where, table.weight.to(x.dtype))
        return x

    def embed_text(self, source: Tensor | None) -> Tensor | None:
        """The text [b, t] → [b, t_here, d] in the compute dtype."""
        if source is None or not self.fields.text_len:
            return None
        weight = product_weight(self.text).to(self.shape.compute)
        x = self.exchanges.leave_embedding(
            rows_of(weight, source.clamp(min=0), self.exchanges.first_row(self.fields.text_vocab_size), self.exchanges.rows)
        )
        where = self.exchanges.tokens_here(torch.arange(source.shape[1], device=source.device)[None])
        return x + nn.functional.embedding(where, self.text_position.weight.to(x.dtype))

    def _apart(self, stream: Tensor, source: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Splits a stage's input into the stream and the text's tokens appended to it."""
        if source is None or not self.fields.text_len:
            return stream, None
        text = self.exchanges.tokens_here(source).shape[1]
        x, behind = stream.split([stream.shape[1] - text, text], 1)
        return x, behind

    def error(self, predicted: Tensor, fields: Tensor, targets: Tensor) -> Tensor:
        """predicted [b, n, v here] against the fields, in at least fp32; the same on all tensor ranks."""
        grid, begin = self.grids[-1], fields.shape[1] - self.fields.shape[0]
        exact = torch.promote_types(predicted.dtype, torch.float32)
        wanted = self._values(fields[:, begin:], grid, predicted.shape[2])
        square = (predicted.to(exact) - wanted.to(exact)).square().sum(-1)
        loss = square.where(self._counted(targets, grid), square.new_zeros(())).sum() / self.fields.values
        return loss if self.exchanges.rows is None else sum_over_ranks(loss, self.exchanges.rows)

    def contexts(self, device: torch.device, samples: Tensor | None, memory: Memory | None = None) -> Iterator[Context]:
        """The context of each block: angles by position along its dimension, dropout keys by position in the whole grid."""
        cfg = self.cfg
        freq = None
        if cfg.position_row.rotates:
            exponents = pair_exponents(cfg.head_dim, cfg.rope_exponents, device)
            freq = inverse_frequencies(exponents, cfg.rope_theta, cfg.rope_scaling)
        for layer in self.part.layers:
            grid, angles, keys = self.grids[layer], None, None
            if freq is not None:
                where = coordinate(grid, cfg.attended(layer), device)[None]
                angles = Rotary(*rotary(where, freq, self.shape.compute, None))
            if samples is not None and cfg.dropout > 0.0 and self.training:
                place = torch.zeros((), dtype=torch.int64, device=device)
                for dim, length in enumerate(self.fields.grid):
                    place = place * length + coordinate(grid, dim, device)
                keys = mix64_signed(self.exchanges.tokens_here(mix64_signed(samples)[:, None] + place) + (layer << 32))
            yield Context(angles, None, keys, None, None, memory)

    def _values(self, fields: Tensor, grid: Grid, width: int) -> Tensor:
        """Fields [b, s₁ … s_K, c] → the numbers of the patches of `grid` [b, n, width] on this tensor rank, zero beyond the last."""
        patch = self.fields.patch
        for dim, (ranges, p) in enumerate(zip(grid, patch)):
            fields = torch.cat([fields.narrow(1 + dim, r.start * p, len(r) * p) for r in ranges], 1 + dim)
        k, b = len(patch), fields.shape[0]
        split = fields.reshape(b, *(x for n, p in zip(fields.shape[1:], patch) for x in (n // p, p)), fields.shape[-1])
        order = [0, *range(1, 2 * k, 2), *range(2, 2 * k + 1, 2), 2 * k + 1]
        first = self.exchanges.first_row(self.fields.values)
        values = split.permute(order).reshape(b, -1, self.fields.values)[:, :, first : first + width]
        return nn.functional.pad(values, (0, width - values.shape[2])).to(self.shape.compute)

    def _counted(self, targets: Tensor, grid: Grid) -> Tensor:
        """[b, S₁·…·S_K] → true where counted [b, n]"""
        counted = (targets >= 0).view(-1, *self.fields.grid)
        for dim, ranges in enumerate(grid):
            counted = torch.cat([counted.narrow(1 + dim, r.start, len(r)) for r in ranges], 1 + dim)
        return counted.flatten(1)


def sizes(grid: Grid) -> tuple[int, ...]:
    return tuple(sum(map(len, ranges)) for ranges in grid)


def coordinate(grid: Grid, dim: int, device: torch.device) -> Tensor:
    """The position along `dim` of each local token, [n]."""
    place = torch.cat([torch.arange(r.start, r.stop, device=device) for r in grid[dim]])
    shape = sizes(grid)
    return place.view([-1 if i == dim else 1 for i in range(len(shape))]).expand(shape).flatten()


def along(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, dim: int, shape: Sequence[int], inner: Attend) -> Tensor:
    """Attention of tokens [b, heads, n, e] of a grid of `shape` with those that differ only along `dim`; the other dimensions are batch."""
    q, k, v = (to_lines(x, shape, dim) for x in (q, k, v))
    return from_lines(inner(q, k, v, mask), shape, dim)


def to_lines(x: Tensor, shape: Sequence[int], dim: int) -> Tensor:
    """[b, h, n, e] → [b · n/S, h, S, e], S the length along `dim`."""
    grid = x.unflatten(2, tuple(shape)).movedim(1, -2).movedim(1 + dim, -2)
    return grid.flatten(0, -4)


def from_lines(x: Tensor, shape: Sequence[int], dim: int) -> Tensor:
    """The inverse of `to_lines`."""
    others = [n for i, n in enumerate(shape) if i != dim]
    grid = x.unflatten(0, (-1, *others)).movedim(-2, 1 + dim).movedim(-2, 1)
    return grid.flatten(2, -2)
