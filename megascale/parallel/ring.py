"""Ring attention (arXiv 2310.01889): queries stay on their rank, keys and values pass from rank to rank.

While a rank attends to one block, the next is already on its way. Blocks without documents, windows, slopes or a cap use torch's fused
kernels (model/ops/attention_fused.py). Others use FlexAttention (attention_flex.py), or on CPUs run tile by tile. Sinks are merged before
the first block. It is a custom operator, so that torch.compile and selective recomputation treat it as a whole.

Shapes: b micro-batch, h query heads, g KV heads, s local positions, e head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from megascale.comm.collectives import Passing, pass_on
from megascale.comm.mesh import Axis
from megascale.model.ops import attention_flex
from megascale.model.ops.attention_fused import block_attention, block_gradients, merge, takes
from megascale.model.ops.attention_tiles import AttentionMask, Ranges, add_block, add_block_gradients, begun, sink_gradient

# An operator takes tensors, numbers and strings only, so it gets a ring by its name, as torch's operators get process groups.
RINGS: WeakValueDictionary[str, Ring] = WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class Ring:
    """The ranks of `axis`, and the positions that each place of the ring holds in attention."""

    axis: Axis
    held: list[list[range]]

    @staticmethod
    def of(axis: Axis, held: list[list[range]]) -> Ring:
        """One ring for all layers."""
        ring = Ring(axis, held)
        known = RINGS.get(ring.name)
        if known is None or known.axis is not axis:
            RINGS[ring.name] = known = ring
        return known

    @property
    def name(self) -> str:
        group = self.axis.group
        return f"{group.group_name if group is not None else ''}/{self.held}"

    @property
    def here(self) -> Ranges:
        return self.held[self.axis.rank]

    def length(self, place: int) -> int:
        return sum(map(len, self.held[place % self.axis.size]))

    def around(self, block: Tensor) -> Iterator[tuple[Tensor, int, int]]:
        """Yields (keys and values [2, b, g, t, e], the place they belong to, step), this rank's own first, while the next are under way."""
        for step in range(self.axis.size):
            owner = (self.axis.rank - step) % self.axis.size
            coming = pass_on(block, self.shape(block, owner - 1), self.axis) if step < self.axis.size - 1 else None
            yield block, owner, step
            if coming is not None:
                block = coming.wait()

    def shape(self, block: Tensor, place: int) -> list[int]:
        """The shape of such a block [2, b, g, t, e] of another place."""
        return [*block.shape[:3], self.length(place), block.shape[4]]


@dataclass(frozen=True)
class Rectangle:
    """Queries `rows` against `keys`, by local index: all pairs, or (`causal`) for each query the keys up to its own."""

    rows: slice
    keys: slice
    causal: bool


def rectangles(queries: Ranges, keys: Ranges, causal: bool) -> list[Rectangle]:
    """The pairs of a query and a key that it attends to, as rectangles. Both have the same ranges of positions, or none in common."""
    n, t = sum(map(len, queries)), sum(map(len, keys))
    if not causal or list(queries) == list(keys):
        return [Rectangle(slice(0, n), slice(0, t), causal)]
    found: list[Rectangle] = []
    row = 0
    for part in queries:
        seen = sum(len(block) for block in keys if block.stop <= part.start)  # these keys come first
        if seen and found and found[-1].keys.stop == seen and found[-1].rows.stop == row:
            found[-1] = Rectangle(slice(found[-1].rows.start, row + len(part)), slice(0, seen), False)
        elif seen:
            found.append(Rectangle(slice(row, row + len(part)), slice(0, seen), False))
        row += len(part)
    return found


def ring_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, ring: Ring, causal: bool = True) -> Tensor:
    """q [b, h, s, e], k and v [b, g, s, e] of this rank's positions → [b, h, s, e].

    causal  if `mask` is None: whether a token attends to itself and all before it, or to all
    """
    mask = mask or AttentionMask(causal)
    masking = mask.documents, mask.slopes, mask.valid, mask.window, mask.softcap, mask.causal, mask.blocks or []
    return _attention(q, k, v, mask.sinks, *masking, ring.name)[0]  # type: ignore[no-any-return]


def with_parts(mask: AttentionMask, seq_len: int, device: torch.device, axis: Axis, met: dict[int, list[list[range]]]) -> AttentionMask:
    """`mask` for FlexAttention with this rank's queries and the blocks of keys in the order of their arrival. `met`: by length of the
    sequence, what each place of the ring holds. Under an older torch, whose kernels cannot be merged in backward, the tiles for CPUs run.
    """
    if not attention_flex.takes_merged():
        return mask
    held = met[seq_len]
    arriving = [held[(axis.rank - step) % axis.size] for step in range(axis.size)]
    return attention_flex.with_parts(mask, device, held[axis.rank], arriving)


@torch.library.custom_op(
    "megascale::ring_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? documents, Tensor? slopes, Tensor? valid, int? window, float? softcap, "
    "bool causal, Tensor[] blocks, str ring) -> (Tensor, Tensor)",
)
def _attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *masking: Any) -> tuple[Tensor, Tensor]:
    mask, ring = _read(*masking)
    out, lse = begun(q, sinks)
    sight, parts = _sight(mask)
    for block, owner, step in ring.around(torch.stack((k, v))):
        if sight is not None:
            merge(out, lse, *attention_flex.block_attention(q, block[0], block[1], mask, sight, parts[step]))
        elif _fused(q, mask):
            add_fused(out, lse, q, block, rectangles(ring.here, ring.held[owner], mask.causal))
        else:
            add_block(out, lse, q, block[0], block[1], ring.here, ring.held[owner], mask)
    return out.to(q.dtype), lse


@torch.library.custom_op(
    "megascale::ring_attention_backward",
    mutates_args=(),
    schema="(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? documents, Tensor? slopes, Tensor? valid, "
    "int? window, float? softcap, bool causal, Tensor[] blocks, str ring) -> (Tensor, Tensor)",
)
def _attention_backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *masking: Any) -> tuple[Tensor, Tensor]:
    """Gradients of q and, as one tensor [2, b, g, s, e], of k and v. Keys and values go around again, and their gradients follow one step
    behind. A rank adds its own block's part locally, so that the gradients travel one step less.
    """
    mask, ring = _read(*masking)
    d_q = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
    home = torch.zeros((2, *k.shape), dtype=lse.dtype, device=q.device)
    sight, parts = _sight(mask)
    delta = None if sight is not None or _fused(q, mask) else (d_out.to(lse.dtype) * out).sum(-1, keepdim=True)
    on_the_road: Passing | None = None
    for block, owner, step in ring.around(torch.stack((k, v))):
        part = torch.zeros(block.shape, dtype=lse.dtype, device=q.device) if step else home
        grads = (d_q, part[0], part[1])
        if sight is not None:
            found = attention_flex.block_gradients(d_out, q, block[0], block[1], out, lse, mask, sight, parts[step])
            for total, gradient in zip(grads, found):
                total += gradient
        elif delta is None:
            add_fused_gradients(grads, d_out, q, block, out, lse, rectangles(ring.here, ring.held[owner], mask.causal))
        else:
            add_block_gradients(grads, d_out, delta, lse, q, block[0], block[1], ring.here, ring.held[owner], mask)
        if step:
            if on_the_road is not None:
                part += on_the_road.wait()
            on_the_road = pass_on(part, ring.shape(block, owner - 1), ring.axis)
    if on_the_road is not None:
        home += on_the_road.wait()
    return d_q.to(q.dtype), home.to(k.dtype)


def add_fused(out: Tensor, lse: Tensor, q: Tensor, block: Tensor, parts: list[Rectangle]) -> None:
    """Merges the attention of q over the parts of one block [2, b, g, t, e] into `out` and `lse`."""
    for part in parts:
        rows, keys = part.rows, part.keys
        result = block_attention(q[:, :, rows], block[0][:, :, keys], block[1][:, :, keys], part.causal)
        merge(out[:, :, rows], lse[:, :, rows], *result)


def add_fused_gradients(
    grads: tuple[Tensor, Tensor, Tensor], d_out: Tensor, q: Tensor, block: Tensor, out: Tensor, lse: Tensor, parts: list[Rectangle]
) -> None:
    for part in parts:
        rows, keys = part.rows, part.keys
        k, v = block[0][:, :, keys], block[1][:, :, keys]
        found = block_gradients(d_out[:, :, rows], q[:, :, rows], k, v, out[:, :, rows], lse[:, :, rows], part.causal)
        for total, gradient, where in zip(grads, found, (rows, keys, keys)):
            total[:, :, where] += gradient


@_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty((*q.shape[:3], 1), dtype=wide)


@_attention_backward.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), k.new_empty((2, *k.shape))


def _read(
    documents: Tensor | None,
    slopes: Tensor | None,
    valid: Tensor | None,
    window: int | None,
    softcap: float | None,
    causal: bool,
    blocks: list[Tensor],
    ring: str,
) -> tuple[AttentionMask, Ring]:
    return AttentionMask(causal, documents, window, slopes, blocks or None, valid, softcap=softcap), RINGS[ring]


def _sight(mask: AttentionMask) -> tuple[attention_flex.Sight | None, list[attention_flex.Part]]:
    """What FlexAttention needs; None if the mask was not made for it."""
    return (None, []) if mask.blocks is None else attention_flex.taken_apart(mask.blocks)


def _fused(q: Tensor, mask: AttentionMask) -> bool:
    return takes(q) and mask.fused


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sinks, documents, slopes, valid, *ctx.rest, blocks, ctx.ring = inputs
    ctx.save_for_backward(sinks, q, k, v, *output, documents, slopes, valid, *blocks)


def _backward(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Any, ...]:
    sinks, *saved = ctx.saved_tensors  # recomputation allows it once
    blocks = list(saved[8:])
    into_sinks = sink_gradient(d_out, saved[3], saved[4], sinks)
    d_q, (d_k, d_v) = _attention_backward(d_out, *saved[:8], *ctx.rest, blocks, ctx.ring)
    return d_q, d_k, d_v, into_sinks, *[None] * 6, [None] * len(blocks), None


_attention.register_autograd(_backward, setup_context=_keep)
OPERATOR = torch.ops.megascale.ring_attention.default
