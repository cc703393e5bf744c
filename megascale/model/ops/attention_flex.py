"""The same attention as attention_masked.py on GPUs: torch's FlexAttention, which skips fully masked tiles of the square.

The tiles follow from the starts of documents, without ever building a mask of [s, s]. A cap on scores is part of the kernel, and sinks
follow from its log Σ exp. Queries and keys may be any parts of a sequence, as ranks of a ring have them; each result then comes with its
log Σ exp, and merges like those of attention_fused.py.

Shapes: b micro-batch, h heads, g KV heads dividing h, s sequence, n queries, t keys, e head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megascale.model.ops.attention_tiles import AttentionMask, Ranges, document_starts
from megascale.model.ops.compiled import compile_static

TILE = 128  # queries and keys of a tile
NUMBERS = 8  # tensors of a BlockMask: how many tiles and which, partial and whole ones, by queries and by keys
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Bias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


class Sight(NamedTuple):
    """What queries at `queries` [n] attend to: keys from position `first` to `last`, [n] or [b, n]; both grow with the query."""

    queries: Tensor
    first: Tensor
    last: Tensor


class Part(NamedTuple):
    """One block of keys, at `keys` [t], for those queries: the tensors of torch's BlockMask."""

    keys: Tensor
    tiles: list[Tensor]


def flex_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """q [b, h, s, e], k and v [b, g, s, e] → [b, h, s, e]; `mask` must have its blocks."""
    assert mask.blocks is not None
    place = None if mask.slopes is None else torch.arange(q.shape[2], device=q.device)
    options = {"score_mod": _bias(mask, place, place), "block_mask": mask.blocks, "enable_gqa": q.shape[1] != k.shape[1]}
    if mask.sinks is None:
        return _kernel(q.device.type)(q, k, v, **options)
    from torch.nn.attention.flex_attention import AuxRequest

    out, aux = _kernel(q.device.type)(q, k, v, **options, return_aux=AuxRequest(lse=True))
    # What the keys keep of the softmax; the kernel's backward pass takes the gradient of the log-sum-exp too.
    return out * torch.sigmoid(aux.lse - mask.sinks.view(1, -1, 1)).unsqueeze(-1).to(out.dtype)  # type: ignore[no-any-return]


def block_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, sight: Sight, part: Part) -> tuple[Tensor, Tensor]:
    """q [b, h, n, e] over one block k and v [b, g, t, e] → [b, h, n, e] and log Σ exp [b, h, n, 1], −∞ where nothing is seen."""
    from torch.nn.attention.flex_attention import AuxRequest

    bias, blocks = _bias(mask, sight.queries, part.keys), _block_mask(mask, sight, part)
    grouped = q.shape[1] != k.shape[1]
    out, aux = _kernel(q.device.type)(q, k, v, score_mod=bias, block_mask=blocks, enable_gqa=grouped, return_aux=AuxRequest(lse=True))
    return out, aux.lse.unsqueeze(-1)


def block_gradients(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: AttentionMask, sight: Sight, part: Part
) -> Gradients:
    """This block's parts of the gradients of q, k and v, from `out` [b, h, n, e] and `lse` [b, h, n, 1] merged over all blocks."""
    bias, blocks = _bias(mask, sight.queries, part.keys), _block_mask(mask, sight, part)
    given = [x.detach() for x in (d_out, q, k, v, out, lse.squeeze(-1))]
    with _autograd_inside_operators(), _real_among_fakes(), torch.enable_grad():  # torch derives the bias
        return _backward_kernel(q.device.type)(*given, bias, blocks)  # type: ignore[no-any-return]


def with_blocks(mask: AttentionMask, seq_len: int, device: torch.device) -> AttentionMask:
    """`mask` with torch's BlockMask for whole sequences, if it is causal or its scores are capped."""
    if not mask.causal and mask.softcap is None:
        return mask
    everything = torch.arange(seq_len, device=device)
    sight = sight_of(mask, everything)
    tiles = tiles_of(mask, sight, everything)
    return mask._replace(blocks=_block_mask(mask, sight, Part(everything, tiles), everywhere=True))


def with_parts(mask: AttentionMask, device: torch.device, here: Ranges, blocks: Sequence[Ranges]) -> AttentionMask:
    """`mask` for queries at the positions `here` and `blocks` of keys that come one after the other: see `taken_apart`."""
    sight = sight_of(mask, positions_of(here, device))
    found: list[Tensor] = [*sight]
    for block in blocks:
        keys = positions_of(block, device)
        found += [keys, *tiles_of(mask, sight, keys)]
    return mask._replace(blocks=found)


def taken_apart(blocks: Sequence[Tensor]) -> tuple[Sight, list[Part]]:
    """What `with_parts` has put together; an operator takes tensors only."""
    rest = [blocks[i : i + 1 + NUMBERS] for i in range(3, len(blocks), 1 + NUMBERS)]
    return Sight(*blocks[:3]), [Part(keys, list(tiles)) for keys, *tiles in rest]


def takes_merged() -> bool:
    """Whether torch's backward kernel takes rules as functions, and so another log Σ exp than its own: from 2.13 on."""
    from torch._dynamo.variables import higher_order_ops
    from torch._subclasses import fake_tensor

    derives = hasattr(getattr(higher_order_ops, "FlexAttentionBackwardHighOrderVariable", None), "_derive_joint_graph")
    return derives and hasattr(torch._C, "_ForceDispatchKeyGuard") and hasattr(fake_tensor, "fake_tensor_tls")


def _autograd_inside_operators() -> Any:
    """Undoes that torch turns autograd off inside an operator of ours."""
    keys = torch._C.DispatchKey
    without = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.AutogradOther):
        without = without.remove(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), without)


@contextmanager
def _real_among_fakes() -> Iterator[None]:
    """Deriving a rule, torch 2.13 makes the gradient of its result a real tensor, which the derivative of a cap multiplies with a fake."""
    from torch._subclasses.fake_tensor import fake_tensor_tls as local

    before, local.allow_non_fake_inputs_override = local.allow_non_fake_inputs_override, True
    try:
        yield
    finally:
        local.allow_non_fake_inputs_override = before


def positions_of(ranges: Ranges, device: torch.device) -> Tensor:
    return torch.cat([torch.arange(r.start, r.stop, device=device) for r in ranges])


def sight_of(mask: AttentionMask, queries: Tensor) -> Sight:
    first, last = torch.zeros_like(queries), queries
    if mask.documents is not None:
        first = document_starts(mask.documents)[:, queries]
    if mask.window is not None:
        first = torch.maximum(first, queries - mask.window + 1)
    if not mask.causal:
        last = torch.full_like(queries, torch.iinfo(torch.int64).max)
        if mask.documents is not None:
            last = mask.documents.shape[1] - 1 - document_starts(mask.documents.flip(1)).flip(1)[:, queries]
    return Sight(queries, first, last)


def tiles_of(mask: AttentionMask, sight: Sight, keys: Tensor) -> list[Tensor]:
    """The tensors of a BlockMask.

    A tile is whole if its last query attends to its first key and its first query to its last key: then all attend to all. It is skipped if
    its keys are all before what its first query attends to, or after what its last one does. In between the rule is evaluated per pair.
    """
    first_key, last_key = _ends(keys)
    low, low_of_last = (x[..., :, None] for x in _ends(sight.first))
    high_of_first, high = (x[..., :, None] for x in _ends(sight.last))
    seen = (last_key >= low) & (first_key <= high)
    whole = (first_key >= low_of_last) & (last_key <= high_of_first)
    if mask.valid is not None:
        whole = torch.zeros_like(whole)
    if seen.ndim == 2:
        seen, whole = seen[None], whole[None]
    from torch.nn.attention.flex_attention import BlockMask  # imports the compiler

    partial = _ordered((seen & ~whole)[:, None])
    made = BlockMask.from_kv_blocks(*partial, *_ordered(whole[:, None]), BLOCK_SIZE=TILE, seq_lengths=(len(sight.queries), len(keys)))
    q_side = [made.q_num_blocks, made.q_indices, made.full_q_num_blocks, made.full_q_indices]
    k_side = [made.kv_num_blocks, made.kv_indices, made.full_kv_num_blocks, made.full_kv_indices]
    return [*k_side, *q_side]  # type: ignore[list-item]


def _ends(x: Tensor) -> tuple[Tensor, Tensor]:
    """[…, n] → the first and the last entry of each tile."""
    n = x.shape[-1]
    last = torch.arange(TILE - 1, n + TILE - 1, TILE, device=x.device).clamp_(max=n - 1)
    return x[..., ::TILE], x[..., last]


def _block_mask(mask: AttentionMask, sight: Sight, part: Part, everywhere: bool = False) -> Any:
    """torch's BlockMask; `everywhere`: queries and keys are at all positions of a sequence."""
    from torch.nn.attention.flex_attention import BlockMask

    lengths = len(sight.queries), len(part.keys)
    rule = _rule(sight, None if everywhere else part.keys, mask.valid)
    make: Any = BlockMask
    return make(lengths, *part.tiles, BLOCK_SIZE=(TILE, TILE), mask_mod=rule)


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """[…, n, n] booleans → how many of each row are true, and their numbers first."""
    numbers = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1).to(torch.int32), numbers.to(torch.int32)


def _rule(sight: Sight, keys: Tensor | None, valid: Tensor | None) -> Rule:
    _, first, last = sight

    def mask(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        place = key if keys is None else keys[key]
        begin, end = (x[query] if x.ndim == 1 else x[b, query] for x in (first, last))
        result = (place >= begin) & (place <= end)
        return result if valid is None else result & valid[b, place]

    return mask


def _bias(mask: AttentionMask, queries: Tensor | None, keys: Tensor | None) -> Bias | None:
    """What becomes of a score: it is capped, then biased by distance."""
    slopes, cap = mask.slopes, mask.softcap
    entry = torch.ops.aten.index.Tensor  # torch 2.13 derives no gradient of `slopes[h]`
    if slopes is None or queries is None or keys is None:
        return None if cap is None else lambda score, b, h, query, key: cap * torch.tanh(score / cap)
    if cap is None:
        return lambda score, b, h, query, key: score - entry(slopes, [h]) * (entry(queries, [query]) - entry(keys, [key]))
    return lambda score, b, h, query, key: (
        cap * torch.tanh(score / cap) - entry(slopes, [h]) * (entry(queries, [query]) - entry(keys, [key]))
    )


@cache
def _kernel(device: str) -> Any:
    """Compiled on CUDA, where it would otherwise materialize the scores; uncompiled elsewhere, for tests."""
    from torch.nn.attention.flex_attention import flex_attention as kernel

    return compile_static(kernel) if device == "cuda" else kernel


@cache
def _backward_kernel(device: str) -> Any:
    # Rules index tensors by tensors, which only the compiler's tracing understands.
    return compile_static(merged_gradients) if device == "cuda" else torch.compile(merged_gradients, backend="eager", dynamic=False)


def merged_gradients(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Bias | None, blocks: Any) -> Gradients:
    """torch's backward kernel by itself. The merged result and log-sum-exp (to base 2 here) make its part that of the whole gradient."""
    kernel = torch.ops.higher_order.flex_attention_backward
    given: Any = q, k, v, out, lse / math.log(2), d_out, None, bias or _as_is, None, blocks.as_tuple(), q.shape[-1] ** -0.5, {}, (), ()
    return kernel(*given)[:3]  # type: ignore[no-any-return]


def _as_is(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return score
