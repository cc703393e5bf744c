"""The decoder and encoder families: tokens in, the summed cross-entropy over this rank's valid targets out. They differ in attention masks
and in their side of the residual table; that an encoder predicts hidden tokens is a matter of its data.

Shapes: b micro-batch, s sequence, d hidden, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascale.comm.host import constant
from megascale.config.schema import Model
from megascale.config.stages import StagePart, has_experts
from megascale.model.ahead import Ahead, count_accepted, look_ahead
from megascale.model.auxiliary import ride_on
from megascale.model.block import Block, Context, Memory
from megascale.model.exchanges import Exchanges
from megascale.model.family import Family, Unit
from megascale.model.feedforward import FeedForward
from megascale.model.layers import Norm, linear
from megascale.model.loss import cross_entropy_sum, likeliest
from megascale.model.moeut import Masses, RepeatedBlock, repeats_loss
from megascale.model.ops.attention_fused import has_kernel
from megascale.model.ops.attention_tiles import AttentionMask
from megascale.model.position import Rotary, alibi_slopes, inverse_frequencies, pair_exponents, rotary
from megascale.model.relative import attach, biased, detach, rows_for
from megascale.model.residual import Stack, ends, residual
from megascale.model.shadow import product_weight
from megascale.model.shape import Shape
from megascale.model.spec import ParamSpec, declare
from megascale.model.tables import MaskedHead, Table, rows_of
from megascale.model.tally import Tally
from megascale.splitmix import mix64_signed


class Decoder(Family):
    """Embedding, blocks, final norm, head, or the `part` of them that makes a pipeline stage."""

    sequence = "tokens"
    warm: Tensor | None

    def __init__(self, cfg: Model, shape: Shape, part: StagePart | None = None) -> None:
        super().__init__()
        part = part or StagePart(range(cfg.total_layers))
        assert cfg.vocab_size is not None
        self.cfg, self.shape, self.part = cfg, shape, part
        at_ends, dtype, d = ends(cfg), shape.storage, cfg.hidden_size
        encoder_layers = cfg.encoder_layers or 0
        stack = Stack("decoder" if cfg.causal else "encoder", cfg.num_layers, encoder_layers)
        layers = part.of_stack(encoder_layers, cfg.num_layers)
        if part.first or (part.last and (cfg.tie_embeddings or cfg.mtp_depth)):
            self.embedding = Table(ParamSpec((cfg.vocab_size, d), "embedding", 0, at_ends.embedding), dtype)
        if part.first and cfg.position_row.table:
            self.position = Table(ParamSpec((shape.seq_len, d), "position", "tokens", at_ends.embedding), dtype)
        self.relative: Table | None = None
        if part.first and cfg.position_row.distances:
            self.relative = Table(ParamSpec((cfg.relative_buckets, cfg.num_heads), "relative", 1, cfg.init_std), dtype)
        self.embedding_scale: nn.Parameter | None = None
        if part.first and at_ends.embedding_scale is not None:
            self.embedding_scale = declare(ParamSpec((1,), "scale", "tokens", mean=at_ends.embedding_scale), dtype)
        # Keyed by global numbers, so that names do not depend on how layers are split into stages.
        self.blocks = nn.ModuleDict()
        for i in layers if cfg.moeut is None else range(cfg.moeut.group_size):
            if cfg.moeut is None:
                own = cfg.at_layer(i)
                self.blocks[str(i)] = Block(own, residual(own, stack, i), stack, dtype, has_experts(cfg, i))
            else:
                self.blocks[str(i)] = RepeatedBlock(cfg, dtype)
        self.embedding_norm: Norm | None = None
        if part.first and cfg.embedding_norm:
            self.embedding_norm = Norm(d, cfg.norm, cfg.eps_of("embedding_norm"), "tokens", dtype, cfg.bias, cfg.dyt_alpha[1])
            # Under layered accumulation the embedding's weights are not available in backward, and its table does not need them.
            self.embedding_norm.copied = True
        self.final_norm: Norm | None = None
        if part.last and cfg.residual_row.final_norm:
            self.final_norm = Norm(d, cfg.norm, cfg.eps_of("final_norm"), "tokens", dtype, cfg.bias, cfg.dyt_alpha[1])
        self.mlm = MaskedHead(cfg, at_ends.head, dtype) if part.last and cfg.mlm_head else None
        if part.last and not cfg.tie_embeddings:
            self.head = Table(ParamSpec((cfg.vocab_size, d), "head", 0, at_ends.head), dtype)
        self.mtp = nn.ModuleDict()
        if part.last:
            sparse = has_experts(cfg, cfg.num_layers - 1)
            self.mtp.update({str(k): Ahead(cfg, stack, dtype, sparse, k) for k in range(cfg.mtp_depth)})
        self.hidden_factor = at_ends.hidden_factor
        # BranchNorm's factor is a function of the step, so checkpoints do not store it: `at_step` sets it.
        warm = torch.empty(1, dtype=torch.promote_types(dtype, torch.float32), device="meta")
        self.register_buffer("warm", None if cfg.branchnorm_period is None else warm, persistent=False)
        self.exchanges = Exchanges()
        self.tally: Tally | None = None  # takes the losses of targets that have a group
        self.shared_weight = "embedding.weight" if cfg.tie_embeddings or cfg.mtp_depth else None
        self.width: int | None = None  # width of the feed-forward in training if its prefixes are trained too
        self.xpos_middle: int | None = None  # XPos's origin, if passes over parts of a text must share it

    @torch.no_grad()
    def at_step(self, step: int) -> None:
        """Sets the global step, counted from 1, for schemes that depend on it. A kernel argument, so neither a synchronization nor a
        recompilation. MatFormer draws the step's width from it.
        """
        if self.cfg.matformer is not None and self.cfg.matformer.train == "sample":
            sizes = self.cfg.nested_sizes
            self.width = sizes[int(mix64_signed(torch.tensor(step))) % len(sizes)]
        if self.warm is not None and self.cfg.branchnorm_period is not None:
            self.warm.fill_(min(1.0, step / self.cfg.branchnorm_period))

    def stream_shapes(self, batch: torch.Size) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Shapes of the stream [b, s, d] that this stage receives and sends, for a batch of tokens of this shape."""
        here = self.here(torch.empty(batch, device="meta"))
        shape = here.shape[0], here.shape[1] + self.rows_behind, self.cfg.hidden_size
        return shape, shape

    @property
    def rows_behind(self) -> int:
        """Rows of a stream between stages that hold tables of biases by distance."""
        return self.tables_behind * rows_for(self.cfg, len(self.exchanges.query_heads(self.cfg.num_heads)))

    @property
    def tables_behind(self) -> int:
        return int(self.cfg.position_row.distances)

    def tables(self) -> list[Tensor]:
        """Tables of biases by distance, [n, h here] each in the compute dtype, on the stage that has them."""
        return [] if self.relative is None else [self.relative.weight.to(self.shape.compute)]

    def taken(self, stream: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Splits the previous stage's output into the stream [b, s_here, d] and the tables appended to it."""
        return detach(self.cfg, stream, self.tables_behind, len(self.exchanges.query_heads(self.cfg.num_heads)))

    def units(self) -> Iterator[tuple[str, Unit]]:
        for number, block in self.blocks.items():
            yield f"blocks.{number}", block  # type: ignore[misc]  # a ModuleDict's values are modules
        for number, ahead in self.mtp.items():
            assert isinstance(ahead, Ahead)
            yield f"mtp.{number}.block", ahead.block

    def measured(self) -> Iterator[tuple[int, nn.Module]]:
        yield from super().measured()
        yield from enumerate(self.mtp.values(), self.cfg.num_layers)

    def joins(self) -> Iterator[Any]:
        yield from self.mtp.values()

    def here(self, x: Tensor) -> Tensor:
        """This rank's part [b, s] of a [b, S] tensor of whole sequences."""
        return self.exchanges.tokens_here(self.exchanges.sequence_here(x))

    @property
    def tail(self) -> list[nn.Module]:
        if not self.part.last or self.cfg.tie_embeddings:
            return []
        return [m for m in (self.final_norm, self.mlm, self.head) if m is not None]

    def head_weight(self) -> Tensor:
        """[V_here, d]; a tied head has no parameter of its own, so no pass can untie it."""
        return self.embedding.weight if self.cfg.tie_embeddings else self.head()  # type: ignore[no-any-return]

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        samples: Tensor | None = None,
        scale: float = 1.0,
        stream: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> Tensor:
        """tokens [b, s] → with targets [b, s] (negative: not counted) their summed loss times `scale`, else logits [b, s, V_here].

        A stage without the embedding takes the `stream` [b, s_here, d] of the previous stage, with tables appended if positions are
        relative; one without the head returns its own.

        documents [b, s] restrict attention to runs of equal numbers, positions [b, s] replace 0…s−1, samples [b] key the dropout masks
        while training. groups [b, s] number the targets' groups in the tally, where there is one.
        """
        if self.cfg.matformer is not None:
            widths: tuple[int | None, ...] = (None,)
            if self.training:
                widths = self.cfg.nested_sizes if self.cfg.matformer.train == "sum" else (self.width,)
            passes = [self._at_width(w, tokens, targets, documents, positions, samples, scale, stream, groups) for w in widths]
            return passes[0] if len(passes) == 1 else torch.stack(passes).mean(0)
        return self._forward(tokens, targets, documents, positions, samples, scale, stream, groups)

    def _at_width(self, width: int | None, *inputs: Any) -> Tensor:
        """`_forward` with only the first `width` channels of every feed-forward."""
        for _, block in self.units():
            if isinstance(block, Block) and isinstance(block.ffn, FeedForward):
                block.ffn.use(width)
        return self._forward(*inputs)

    def _forward(
        self,
        tokens: Tensor,
        targets: Tensor | None,
        documents: Tensor | None,
        positions: Tensor | None,
        samples: Tensor | None,
        scale: float,
        stream: Tensor | None,
        groups: Tensor | None = None,
    ) -> Tensor:
        """`forward` at the current width."""
        x, tables = (self.embed(tokens, positions), self.tables()) if stream is None else self.taken(stream)
        mask_of = partial(self.attention_mask, documents=documents, seq_len=tokens.shape[1], device=tokens.device, tables=tables)
        contexts = self.contexts(self.part.layers, tokens, mask_of, positions, samples, self.loss_weights(targets, scale))
        if self.cfg.moeut is None:
            x = self.exchanges.pass_blocks(x, zip(self.blocks.values(), contexts))
        else:
            x = self.repeat(x, contexts)
        if not self.part.last:
            return attach(x, tables)
        ahead = None
        if self.mtp and targets is not None and (torch.is_grad_enabled() or not self.training):
            layers = range(self.cfg.num_layers, self.cfg.num_layers + len(self.mtp))
            further = self.contexts(layers, tokens, mask_of, positions, samples, self.loss_weights(targets, scale))
            look = partial(look_ahead, self, scale=scale) if self.training else partial(count_accepted, self)
            ahead = partial(look, tokens=tokens, targets=targets, documents=documents, contexts=further)
        return self.finish(x, targets, scale, ahead, groups)

    def enter_head(self, x: Tensor) -> Tensor:
        """The normalized stream [b, s, d] → the head's input, with the tokens of all tensor ranks."""
        return self.exchanges.enter_head(x if self.hidden_factor == 1.0 else x * self.hidden_factor)

    @property
    def predicted(self) -> int:
        """Tokens that can be predicted: the first ones of the vocabulary."""
        rows = self.cfg.vocab_enabled or self.cfg.vocab_size
        assert rows is not None
        return rows

    def loss_of(
        self, x: Tensor, head: Tensor, targets: Tensor, scale: float, bias: Tensor | None = None, groups: Tensor | None = None
    ) -> Tensor:
        """The head's input x [b, s, d] and the local tokens' targets [b · s] → their summed loss times `scale`. `groups` [b · s]: their
        groups in the tally.
        """
        first, rows = self.exchanges.first_row(self.cfg.vocab_size), self.exchanges.rows
        shadow = (self.embedding if self.cfg.tie_embeddings else self.head).shadow
        how = self.exchanges.loss_backend, bias, shadow, self.cfg.logit_softcap
        told = None
        if groups is not None and self.tally is not None:
            if self.tally.adds == "tokens":
                kept = groups >= 0
                found = likeliest(x.flatten(0, 1)[kept], head, first, self.predicted, rows)
                self.tally.add(groups[kept], found)
            else:
                told = torch.empty(2, len(targets), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        loss = cross_entropy_sum(x.flatten(0, 1), head, targets, scale, first, self.predicted, rows, *how, told)
        if told is not None and groups is not None and self.tally is not None:
            counted = targets >= 0
            self.tally.add(groups, told[0], counted, told[1] * counted)
        return loss

    def likeliest(self, x: Tensor, head: Tensor) -> Tensor:
        """The head's input x [b, s, d] → the tokens [b, s] with the largest logits."""
        first, rows = self.exchanges.first_row(self.cfg.vocab_size), self.exchanges.rows
        return likeliest(x.flatten(0, 1), head, first, self.predicted, rows).view(x.shape[:2])

    def finish(
        self,
        x: Tensor,
        targets: Tensor | None,
        scale: float,
        ahead: Callable[[Tensor, Tensor], Tensor] | None = None,
        groups: Tensor | None = None,
    ) -> Tensor:
        """The stream after the last block → the result of `forward`. `ahead`: what it passes before the head, given the head's weight."""
        if self.final_norm is not None:
            x = self.final_norm(x)
        head, bias = self.head_weight(), None
        if ahead is not None:
            x = ahead(x, head)
        if self.mlm is not None:
            x, bias = self.mlm(x), self.mlm.bias
        x = self.enter_head(x)
        if targets is not None:
            here = self.exchanges.sequence_here
            return self.loss_of(x, head, here(targets).flatten(), scale, bias, None if groups is None else here(groups).flatten())
        logits = linear(x, head, bias)
        if self.cfg.logit_softcap is not None:
            exact = torch.promote_types(logits.dtype, torch.float32)
            logits = (self.cfg.logit_softcap * torch.tanh(logits.to(exact) / self.cfg.logit_softcap)).to(logits.dtype)
        if self.cfg.vocab_enabled is not None:
            logits[..., max(0, self.predicted - self.exchanges.first_row(self.cfg.vocab_size)) :] = float("-inf")
        return logits

    def repeat(self, x: Tensor, contexts: Iterator[Context]) -> Tensor:
        """Runs the group of blocks repeatedly through all layers. The experts' load is judged over all repeats, at the end."""
        moe, moeut = self.cfg.moe, self.cfg.moeut
        assert moe is not None and moeut is not None
        masses_of: dict[str, list[Masses]] = {name: [] for name in self.blocks}
        for (name, block), context in zip(itertools.cycle(self.blocks.items()), contexts):
            x, masses = block(x, context)
            if masses is not None:
                masses_of[name].append(masses)
        if not torch.is_grad_enabled() or not all(masses_of.values()):
            return x
        weight = moe.aux_loss if moe.balance == "entropy" else 0.0
        losses = []
        for name, every in masses_of.items():
            block = self.blocks[name]
            assert isinstance(block, RepeatedBlock)
            losses.append(repeats_loss(every, block, weight, moeut.attention_aux_loss))
        return ride_on(x, torch.stack(losses).sum(), 1.0)

    def embed(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        """tokens [b, S] → [b, s, d] in the compute dtype."""
        places = self.position if self.cfg.position_row.table else None
        x = self.look_up(tokens, positions, self.embedding, places)
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def look_up(self, tokens: Tensor, positions: Tensor | None, table: Table, places: Table | None) -> Tensor:
        """Tokens [b, S] in a table [V_here, d], plus vectors of their positions, → [b, s, d]. Rows of the vocabulary on other ranks count
        as zero before the sum.
        """
        exchanges = self.exchanges
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        positions = exchanges.sequence_here(positions)
        x = self.embedded(tokens, table)
        if self.cfg.embedding_factor is not None:
            x = x * self.cfg.embedding_factor
        if self.embedding_scale is not None:
            x = x * self.embedding_scale.to(x.dtype, copy=True)  # like embedding_norm's output
        return x if places is None else x + F.embedding(exchanges.tokens_here(positions), places.weight.to(x.dtype))

    def embedded(self, tokens: Tensor, table: Table) -> Tensor:
        """Tokens [b, S] in a table [V_here, d] → [b, s, d], as they stand there."""
        exchanges, weight = self.exchanges, product_weight(table).to(self.shape.compute)
        return exchanges.leave_embedding(rows_of(weight, exchanges.sequence_here(tokens), exchanges.first_row(table.rows), exchanges.rows))

    def weights(self, targets: Tensor | None, scale: float) -> Tensor | None:
        """The weight [b, S] of each token in auxiliary losses, if there are any."""
        if targets is None or not self.cfg.has_experts:
            return None
        return (targets >= 0).to(torch.promote_types(self.shape.compute, torch.float32)) * scale

    def loss_weights(self, targets: Tensor | None, scale: float) -> Tensor | None:
        """`weights` of the local tokens [b, s]."""
        weights = self.weights(targets, scale)
        return None if weights is None else self.exchanges.sequence_here(weights)

    def attention_mask(
        self, cfg: Model, documents: Tensor | None, seq_len: int, device: torch.device, tables: Sequence[Tensor] = ()
    ) -> AttentionMask | None:
        """The attention mask of layers with the config `cfg`; None if the kernel's default is right. `tables` of biases by distance: the
        stack's own is last.
        """
        slopes = None
        if cfg.attention_row.scans:
            return None if documents is None else AttentionMask(documents=documents)
        if tables:
            return biased(cfg, tables[-1], seq_len, cfg.causal, documents)._replace(softcap=cfg.attention_softcap)
        if cfg.position_row.slopes:
            every = cfg.alibi_slopes or alibi_slopes(cfg.num_heads)
            here = self.exchanges.query_heads(cfg.num_heads)
            slopes = constant(tuple(every[here.start : here.stop]), device, torch.float32)
        mask = AttentionMask(cfg.causal, documents, cfg.sliding_window, slopes, softcap=cfg.attention_softcap)
        # Where no fused kernel takes the heads, their sinks need the tiles of another.
        if mask.fused and (cfg.attention_sink is None or has_kernel(device, self.shape.compute, cfg.head_width)):
            return None
        if device.type == "cpu":
            return mask
        shape = cfg.causal, cfg.sliding_window, cfg.attention_softcap, cfg.position_row.slopes, cfg.alibi_slopes, cfg.num_heads
        return self.exchanges.remembered.of(
            documents, ("mask", *shape, seq_len, device), lambda: self.exchanges.with_blocks(mask, seq_len, device)
        )

    def contexts(
        self,
        layers: range,
        tokens: Tensor,
        mask_of: Callable[[Model], AttentionMask | None],
        positions: Tensor | None,
        samples: Tensor | None,
        loss_weights: Tensor | None,
        memory: Memory | None = None,
    ) -> Iterator[Context]:
        """The context of each of `layers`, by global numbers, for tokens [b, S]. Layers of one kind differ in their dropout keys only.
        `mask_of`: a layer's config → its mask.
        """
        keys = None
        if samples is not None and self.training and any(m.dropout > 0.0 for m in self.cfg.variants.values()):
            keys = self.here(mix64_signed(samples)[:, None] + torch.arange(tokens.shape[1], device=tokens.device))
        shared: dict[str, tuple[Rotary | None, AttentionMask | None]] = {}
        for layer in layers:
            kind = self.cfg.kind_at(layer) if self.cfg.kinds else ""
            if kind not in shared:
                own = self.cfg.of_kind(kind) if kind else self.cfg
                name = "angles", kind, tokens.shape[1], tokens.device, self.xpos_middle
                angles = self.exchanges.remembered.of(positions, name, partial(self.angles, own, tokens, positions))
                shared[kind] = angles, mask_of(own)
            of_layer = None if keys is None else mix64_signed(keys + (layer << 32))
            yield Context(*shared[kind], of_layer, self.warm, loss_weights, memory)

    def angles(self, cfg: Model, tokens: Tensor, positions: Tensor | None) -> Rotary | None:
        """The rotary angles of tokens [b, S] in layers with the config `cfg`, at `positions` [b, S] or one after the other."""
        if not cfg.position_row.rotates or cfg.attention_row.scans:
            return None
        device, seq_len = tokens.device, tokens.shape[1]
        exponents = pair_exponents(cfg.rotary_dim, cfg.rope_exponents, device)
        freq = inverse_frequencies(exponents, cfg.rope_theta, cfg.rope_scaling)
        where = torch.arange(seq_len, device=device)[None] if positions is None else positions
        xpos = None
        if cfg.position_row.decays:
            xpos = exponents, seq_len // 2 if self.xpos_middle is None else self.xpos_middle
        amplitude = 1.0 if cfg.rope_scaling is None else cfg.rope_scaling.amplitude
        return rotary(self.exchanges.sequence_here(where), freq, self.shape.compute, xpos, amplitude)
