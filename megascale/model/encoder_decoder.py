"""The encoder–decoder family: an encoder reads a source, a decoder writes its target and attends to the encoder's output.

Layers are numbered through both stacks, encoder first, so that passes, stages and schedules see one list of blocks. Stages exchange one
tensor [b, t + s, d]: the source's tokens, which the decoder's layers only read, and the target's, which the encoder's layers only pass on.
So both are embedded in the first stage, the only one with tables of the vocabulary.

Shapes: b micro-batch, t source, s target, d hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from megascale.config.schema import Model
from megascale.config.stages import StagePart, has_experts
from megascale.model.block import Block, Memory, key_padding_mask
from megascale.model.decoder import Decoder
from megascale.model.family import Unit
from megascale.model.layers import Norm
from megascale.model.relative import attach, biased
from megascale.model.residual import Stack, ends, residual
from megascale.model.shape import Shape
from megascale.model.spec import ParamSpec
from megascale.model.tables import Table


class EncoderDecoder(Decoder):
    """A decoder, whose blocks also attend to a memory, and the encoder that makes it; or the `part` of both that forms a stage.

    `share_embeddings`: whether sources use the targets' table or their own, with their own vocabulary.
    """

    def __init__(self, cfg: Model, shape: Shape, part: StagePart | None = None) -> None:
        super().__init__(cfg, shape, part)
        assert cfg.encoder_layers is not None
        dtype, d, at_ends = shape.storage, cfg.hidden_size, ends(cfg)
        stack, count = Stack("encoder", cfg.encoder_layers, cfg.num_layers), cfg.encoder_layers
        if self.part.first and not cfg.share_embeddings:
            assert cfg.source_vocab_size is not None
            self.source_embedding = Table(ParamSpec((cfg.source_vocab_size, d), "embedding", 0, at_ends.embedding), dtype)
        if self.part.first and cfg.position_row.table:
            self.source_position = Table(ParamSpec((shape.source_len, d), "position", "tokens", at_ends.embedding), dtype)
        self.source_relative: Table | None = None
        if self.part.first and cfg.position_row.distances:
            self.source_relative = Table(ParamSpec((cfg.relative_buckets, cfg.num_heads), "relative", 1, cfg.init_std), dtype)
        self.encoder = nn.ModuleDict(
            {str(i): Block(cfg, residual(cfg, stack, i), stack, dtype, has_experts(cfg, i)) for i in self.part.of_stack(0, count)}
        )
        self.encoder_norm: Norm | None = None
        if count - 1 in self.part.layers and cfg.residual_row.final_norm:
            self.encoder_norm = Norm(d, cfg.norm, cfg.norm_eps, "tokens", dtype, cfg.bias, cfg.dyt_alpha[1])

    def stream_shapes(self, batch: torch.Size) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        b = batch[0]
        here = sum(self.held(torch.empty(b, n, device="meta")) for n in (self.shape.source_len, batch[1]))
        shape = b, here + self.rows_behind, self.cfg.hidden_size
        return shape, shape

    def held(self, x: Tensor) -> int:
        """Number of local tokens of x [b, t or s]."""
        return self.here(x).shape[1]

    @property
    def tables_behind(self) -> int:
        return 2 * super().tables_behind

    def tables(self) -> list[Tensor]:
        own = super().tables()
        return own if self.source_relative is None else [self.source_relative.weight.to(self.shape.compute), *own]

    def units(self) -> Iterator[tuple[str, Unit]]:
        for number, block in self.encoder.items():
            yield f"encoder.{number}", block  # type: ignore[misc]  # a ModuleDict's values are modules
        yield from super().units()

    def length_of(self, unit: str) -> int:
        return self.shape.source_len if unit.startswith("encoder.") else self.shape.seq_len

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
        """`Decoder.forward` of the target's tokens [b, s] with a source [b, t], negative beyond its end; documents must be None.

        Stages exchange a stream [b, t_here + s_here, d], with tables appended if positions are relative.
        """
        assert source is not None and documents is None
        valid = source >= 0
        if stream is None:
            read, written, tables = self.embed_source(source), self.embed(tokens, positions), self.tables()
        else:
            stream, tables = self.taken(stream)
            length = self.held(source)
            read, written = stream.split([length, stream.shape[1] - length], 1)
        read = self.encode(read, source, valid, samples, self.counted_sources(targets, valid, scale), tables)
        written = self.decode(written, tokens, self.memory(read, valid), positions, samples, self.loss_weights(targets, scale), tables)
        return self.finish(written, targets, scale) if self.part.last else attach(torch.cat((read, written), 1), tables)

    def embed_source(self, source: Tensor) -> Tensor:
        """source [b, t] → [b, t_here, d] in the compute dtype; positions beyond its end are masked as keys and may hold any token."""
        places = self.source_position if self.cfg.position_row.table else None
        table = self.embedding if self.cfg.share_embeddings else self.source_embedding
        return self.look_up(source.clamp(min=0), None, table, places)

    def encode(
        self,
        x: Tensor,
        source: Tensor,
        valid: Tensor,
        samples: Tensor | None,
        loss_weights: Tensor | None,
        tables: Sequence[Tensor] = (),
    ) -> Tensor:
        """The stream of the source's tokens [b, t_here, d] through the local encoder blocks, and the norm after the last."""
        assert self.cfg.encoder_layers is not None
        layers = self.part.of_stack(0, self.cfg.encoder_layers)
        mask = key_padding_mask(valid)
        if source.device.type != "cpu":
            mask = self.exchanges.with_blocks(mask, source.shape[1], source.device)
        if tables and layers:
            mask = biased(self.cfg, tables[0], source.shape[1], False, valid=mask.valid)
        contexts = self.contexts(layers, source, lambda _: mask, None, samples, loss_weights)
        x = self.exchanges.pass_blocks(x, zip(self.encoder.values(), contexts))
        return x if self.encoder_norm is None else self.encoder_norm(x)

    def memory(self, read: Tensor, valid: Tensor) -> Memory | None:
        """The memory of the local decoder blocks, whole on every tensor and context rank; gathered once for all of them."""
        return Memory(self.exchanges.enter_memory(read), key_padding_mask(valid)) if self.blocks else None

    def decode(
        self,
        x: Tensor,
        tokens: Tensor,
        memory: Memory | None,
        positions: Tensor | None = None,
        samples: Tensor | None = None,
        loss_weights: Tensor | None = None,
        tables: Sequence[Tensor] = (),
    ) -> Tensor:
        """The stream of the target's tokens [b, s_here, d] through the local decoder blocks."""
        before, mine = self.cfg.encoder_layers or 0, self.part.of_stack(self.cfg.encoder_layers or 0, self.cfg.num_layers)
        layers = range(before + mine.start, before + mine.stop)
        mask_of = partial(
            self.attention_mask, documents=None, seq_len=tokens.shape[1], device=tokens.device, tables=tables if layers else ()
        )
        contexts = self.contexts(layers, tokens, mask_of, positions, samples, loss_weights, memory)
        return self.exchanges.pass_blocks(x, zip(self.blocks.values(), contexts))

    def counted_sources(self, targets: Tensor | None, valid: Tensor, scale: float) -> Tensor | None:
        """The weight [b, t_here] of each source's token in auxiliary losses: a whole source weighs as much as its whole target."""
        asked = self.weights(targets, scale)
        if asked is None:
            return None
        return self.exchanges.sequence_here(valid * (asked.sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)))
