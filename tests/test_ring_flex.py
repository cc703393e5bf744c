"""Attention over parts of a sequence by FlexAttention, as rings use it on GPUs for documents, windows, slopes and padding."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megascale.comm.mesh import build_mesh
from megascale.config.layout import axis_sizes
from megascale.config.schema import Parallel
from megascale.model.ops import attention_flex
from megascale.model.ops.attention_flex import block_attention, block_gradients, taken_apart, with_parts
from megascale.model.ops.attention_fused import merge
from megascale.model.ops.attention_tiles import AttentionMask, Ranges
from megascale.parallel import ring
from megascale.parallel.context import Spread
from megascale.parallel.ring import Ring, ring_attention
from tests.ranks import run_ranks
from tests.test_sequence import plain

pytestmark = [pytest.mark.filterwarnings("ignore:flex_attention called without"), pytest.mark.dist]
LENGTH, BATCH, HEADS = 600, 2, 4
HERE: Ranges = [range(130, 290), range(460, 600)]
BLOCKS: list[Ranges] = [HERE, [range(130), range(290, 360)], [range(360, 460)]]


def documents() -> Tensor:
    return (torch.rand(BATCH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.01).cumsum(1)


MASKS: dict[str, AttentionMask] = {
    "documents": AttentionMask(documents=documents()),
    "window": AttentionMask(window=150),
    "alibi": AttentionMask(slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625])),
    "all": AttentionMask(documents=documents(), window=40, slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625]), softcap=1.5),
    "cap": AttentionMask(softcap=0.7),
    "documents, not causal": AttentionMask(False, documents()),
    "padding": AttentionMask(False, valid=torch.arange(LENGTH) < torch.tensor([[333], [LENGTH]])),
}


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(BATCH, heads, LENGTH, 16, generator=generator).to(dtype) for heads in (HEADS, 2, 2, HEADS)]


def reference(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    if mask.valid is None:
        return plain(q, k, v, mask)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask.valid[:, None, None], enable_gqa=True)


def pick(x: Tensor, ranges: Ranges) -> Tensor:
    return torch.cat([x[:, :, r.start : r.stop] for r in ranges], 2)


def in_blocks(mask: AttentionMask) -> tuple[list[Tensor], list[Tensor]]:
    """The result of the queries HERE, block by block, and the gradients of q, k and v; and the same by plain attention."""
    q, k, v, d_out = inputs()
    whole = [x.requires_grad_() for x in (q, k, v)]
    everything = reference(*whole, mask)
    wanted = torch.autograd.grad(pick(everything, HERE), whole, pick(d_out, HERE))
    expected = [pick(everything, HERE), pick(wanted[0], HERE), *(torch.cat([pick(g, b) for b in BLOCKS], 2) for g in wanted[1:])]
    sight, parts = taken_apart(with_parts(mask, q.device, HERE, BLOCKS).blocks)
    mine, kv = pick(q, HERE).detach(), [(pick(k, b).detach(), pick(v, b).detach()) for b in BLOCKS]
    out, lse = torch.zeros_like(mine), torch.full((*mine.shape[:3], 1), float("-inf"), dtype=mine.dtype)
    for block, part in zip(kv, parts):
        merge(out, lse, *block_attention(mine, *block, mask, sight, part))
    grads = [block_gradients(pick(d_out, HERE), mine, *block, out, lse, mask, sight, part) for block, part in zip(kv, parts)]
    d_q, d_k, d_v = zip(*grads)
    return [out, torch.stack(d_q).sum(0), torch.cat(d_k, 2), torch.cat(d_v, 2)], expected


@pytest.mark.parametrize("name", ["all", "padding"])
def test_blocks_are_plain_attention(name: str) -> None:
    """Catches a rule by local index, a skipped tile of which a pair is seen, rows that see nothing turning into NaN, and a backward pass of
    a block that takes its own log-sum-exp for that of all, and a cap without its slope.
    """
    torch._dynamo.reset()  # it gives up after a few shapes of one function
    for got, expected in zip(*in_blocks(MASKS[name])):
        assert (got - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("name", MASKS)
def test_tiles_without_a_pair_are_skipped(name: str) -> None:
    """Catches a tile that is visited for nothing, where its positions follow each other, and a whole one in which a pair is hidden."""
    mask = MASKS[name]
    here: Ranges = [range(256, 512)]
    sight, (part, *_) = taken_apart(with_parts(mask, torch.device("cpu"), here, [[range(384)]]).blocks)
    rule = attention_flex._rule(sight, part.keys, mask.valid)
    batch, query, key = torch.arange(BATCH)[:, None, None], torch.arange(256)[:, None], torch.arange(384)
    pairs = rule(batch, batch, query, key).expand(BATCH, -1, -1).unflatten(2, (3, 128)).unflatten(1, (2, 128))
    some, every = pairs.any(4).any(2), pairs.all(4).all(2)
    partial, whole = (_dense(*part.tiles[i : i + 2]) for i in (0, 2))
    assert not (whole & ~every).any() and not (whole & partial).any()
    assert torch.equal(partial | whole, some) or (mask.valid is not None and ((partial | whole) | ~some).all())


def _dense(count: Tensor, order: Tensor) -> Tensor:
    """[b, rows, columns]: which tiles a BlockMask visits."""
    visited = torch.arange(order.shape[-1]) < count[..., None]
    return torch.zeros_like(visited).scatter(-1, order.long(), visited)[:, 0].expand(BATCH, -1, -1)


def ring_errors() -> dict[str, float]:
    """By mask the largest difference of this rank's part from plain attention, gradients included."""
    import torch.nn.attention.flex_attention as module

    module._validate_device = lambda *_: None  # type: ignore[assignment]  # it refuses CPUs where gradients are wanted
    axis = build_mesh(axis_sizes(Parallel(cp=dist.get_world_size()), dist.get_world_size()), "cpu")["cp_ring"]
    met = Spread.of(LENGTH, axis.size, 1, 1).met
    one, found = Ring.of(axis, met), {}
    for name, mask in MASKS.items():
        torch._dynamo.reset()
        *qkv, d_out = inputs()
        whole, local = [x.clone().requires_grad_() for x in qkv], [pick(x, met[axis.rank]).requires_grad_() for x in qkv]
        expected = reference(*whole, mask)
        got = ring_attention(*local, ring.with_parts(mask, LENGTH, d_out.device, axis, {LENGTH: met}), one)
        wanted = torch.autograd.grad(expected, whole, d_out)
        grads = torch.autograd.grad(got, local, pick(d_out, met[axis.rank]))
        found[name] = max((a - pick(b, met[axis.rank])).abs().max().item() for a, b in zip((got, *grads), (expected, *wanted)))
    return found


def test_the_ring_by_flex_is_plain_attention() -> None:
    """Catches blocks in another order than they arrive, and a mask that never reaches the kernel."""
    for errors in run_ranks(2, ring_errors):
        assert errors.keys() == MASKS.keys() and max(errors.values()) <= 1e-12
