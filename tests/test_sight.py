"""Attention masks of documents, windows and ALiBi against masks of [s, s]; and that no such mask is built."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megascale.config.schema import Parallel
from megascale.model.ops import attention_tiles
from megascale.model.ops.attention_flex import flex_attention, with_blocks
from megascale.model.ops.attention_masked import masked_attention
from megascale.model.ops.attention_tiles import AttentionMask, document_starts, tiles
from megascale.model.position import alibi_slopes
from tests.layouts import Case, build, fake_batch, tiny

HEADS, LENGTH = 4, 300
CASES: dict[str, tuple[bool, int | None, bool]] = {
    "documents": (True, None, False),
    "window": (False, 37, False),
    "alibi": (False, None, True),
    "documents x window": (True, 20, False),
    "all": (True, 11, True),
}


def made(case: str, length: int = LENGTH) -> AttentionMask:
    packed, window, biased = CASES[case]
    torch.manual_seed(0)
    documents = (torch.rand(2, length) < 0.05).cumsum(1) if packed else None
    return AttentionMask(True, documents, window, torch.tensor(alibi_slopes(HEADS)) if biased else None)


def hidden(seen: AttentionMask, length: int) -> Tensor:
    """[1 or b, 1, s, s]"""
    away = torch.arange(length)[:, None] - torch.arange(length)
    result = ((away < 0) if seen.window is None else (away < 0) | (away >= seen.window))[None, None]
    d = seen.documents
    return result if d is None else result | (d[:, None, :, None] != d[:, None, None, :])


def dense(q: Tensor, k: Tensor, v: Tensor, seen: AttentionMask) -> Tensor:
    """The same with the whole mask."""
    place = torch.arange(q.shape[2])
    away = (place[:, None] - place).to(q.dtype)
    bias = torch.zeros_like(away)[None, None] if seen.slopes is None else -seen.slopes.to(q.dtype)[None, :, None, None] * away
    mask = bias.masked_fill(hidden(seen, len(place)), float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def random_inputs(length: int = LENGTH) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, heads, length, 8, dtype=torch.float64, requires_grad=True) for heads in (HEADS, 2, 2)]


@pytest.mark.parametrize("budget", [1 << 10, 1 << 21])
@pytest.mark.parametrize("case", CASES)
def test_blocks_equal_the_whole_mask(case: str, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a block that misses a key at its edge, a bias with the wrong distance, and KV heads whose gradients lose a query head."""
    monkeypatch.setattr(attention_tiles, "SCORES", budget)
    seen, inputs = made(case), random_inputs()
    got, reference = masked_attention(*inputs, seen), dense(*inputs, seen)
    assert (got - reference).abs().max() <= 1e-13
    gradient = torch.randn_like(reference)
    for a, b in zip(torch.autograd.grad(got, inputs, gradient), torch.autograd.grad(reference, inputs, gradient)):
        assert (a - b).abs().max() <= 1e-13


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("case", CASES)
def test_tiles_on_gpus(case: str) -> None:
    """Catches a tile that is skipped though a pair in it is seen, or visited for nothing; and a rule other than the blocks'."""
    seen, (q, k, v) = made(case), [x.detach() for x in random_inputs()]
    tiled = with_blocks(seen, LENGTH, torch.device("cpu"))
    assert (flex_attention(q, k, v, tiled) - dense(q, k, v, seen)).abs().max() <= 1e-13
    n = -(-LENGTH // 128)
    visible = F.pad(~hidden(seen, LENGTH), (0, n * 128 - LENGTH, 0, n * 128 - LENGTH))
    pairs = visible.view(-1, 1, n, 128, n, 128)
    assert torch.equal(tiled.blocks.to_dense().bool(), pairs.any(5).any(3))


def test_documents_are_runs() -> None:
    """Catches a first document that begins nowhere, and a number that comes again being joined to its earlier run."""
    assert document_starts(torch.tensor([[7, 7, 3, 3, 3, 7], [0, 1, 1, 2, 2, 2]])).tolist() == [[0, 0, 2, 2, 2, 5], [0, 1, 1, 3, 3, 3]]


def test_memory_grows_with_the_length_only() -> None:
    """Catches a mask or scores of [s, s] kept for the backward pass, and blocks that reach back beyond their documents."""
    kept: dict[int, int] = {}
    for length in (512, 2048):
        seen, inputs = made("documents", length), random_inputs(length)
        sizes: list[int] = []

        def pack(x: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            masked_attention(*inputs, seen)
        kept[length] = sum(sizes)
        assert seen.documents is not None
        everything, starts = [range(length)], document_starts(seen.documents)[0].tolist()
        # Documents have 20 tokens on average: a tile's keys are its own queries and what one document reaches back.
        assert all(t.keys.stop - t.keys.start <= 128 + 200 for t in tiles(everything, everything, 128, True, None, starts))
    assert kept[2048] == 4 * kept[512]


class _Calls(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("recompute", "forwards"), [("none", 2), ("selective", 2), ("full", 4)])
def test_selective_recomputation_keeps_attention(recompute: str, forwards: int) -> None:
    """Catches selective recomputation that does the attention of packed documents again, as an operator it does not know."""
    case = Case(tiny(), Parallel(recompute=recompute), packed=True)  # type: ignore[arg-type]
    model, batch = build(case, 1), fake_batch(case, [0, 1])
    with _Calls() as calls:
        model.module(batch.tokens, batch.targets, batch.documents, batch.positions).backward()
    assert calls.seen["megascale.masked_attention.default"] == forwards
    assert calls.seen["megascale.masked_attention_backward.default"] == 2
