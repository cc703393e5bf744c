"""Context parallelism: ring, Ulysses and both together equal one process, share the work, and send what their formulas say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megascale.comm.mesh import build_mesh
from megascale.config.layout import axis_sizes
from megascale.config.schema import Parallel
from megascale.model.ops import attention_tiles
from megascale.model.ops.attention_tiles import AttentionMask, add_block, add_block_gradients, document_starts, tiles, visible_pairs
from megascale.parallel.context import Spread, places, take, total
from megascale.parallel.recompute import KEPT
from megascale.parallel.ring import Ring, ring_attention
from tests.layouts import CPU, Case, build, fake_batch, tiny, train, worst
from tests.planned import assert_planned
from tests.ranks import run_ranks
from tests.test_layouts import MODELS, assert_equal, single

pytestmark = pytest.mark.dist

METHODS: dict[str, tuple[int, Parallel]] = {
    "ring": (3, Parallel(cp=3)),
    "ulysses": (4, Parallel(cp=4, cp_method="ulysses")),
    "ulysses, heads that do not divide": (3, Parallel(cp=3, cp_method="ulysses")),
    "both": (4, Parallel(cp=4, cp_ulysses=2)),
}
PRODUCTS: dict[str, tuple[int, Parallel]] = {
    "ring of five pieces": (2, Parallel(cp=2, cp_pieces=5)),
    "ring x zero3": (4, Parallel(cp=2, dp_shard=2)),
    "ring x hsdp x full recompute": (4, Parallel(cp=2, dp_replicate=2, dp_shard=1, recompute="full")),
    "ring x tp sequence": (4, Parallel(cp=2, tp=2, tp_sequence=True)),
    "ring x tp beyond kv heads": (8, Parallel(cp=2, tp=4)),
    "ring x zbv": (4, Parallel(cp=2, pp=2, pp_schedule="zbv")),
    "ring x ddp x selective": (4, Parallel(cp=2, dp_replicate=2, dp_shard=1, engine="ddp", recompute="selective")),
    "ulysses x zero2 x selective": (
        4,
        Parallel(cp=2, cp_method="ulysses", dp_shard=2, reshard_after_forward=False, recompute="selective"),
    ),
    "ulysses x tp": (4, Parallel(cp=2, cp_method="ulysses", tp=2)),
    "ulysses x 1f1b": (4, Parallel(cp=2, cp_method="ulysses", pp=2)),
    "ring x layered": (4, Parallel(cp=2, dp_shard=2, accumulation="layered")),
    "both x ddp x pp": (8, Parallel(cp=4, cp_ulysses=2, engine="ddp", pp=2)),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_equals_one_process(method: str, model: str) -> None:
    """Catches positions, dropout masks, slopes and document numbers taken from a token's place on its rank; 13 tokens divide by nothing."""
    ranks, parallel = METHODS[method]
    assert_equal(Case(MODELS[model], parallel, seq_len=13, packed=model in ("llama", "odd")), ranks)


@pytest.mark.parametrize("product", PRODUCTS)
def test_products_equal_one_process(product: str) -> None:
    """Catches gradients summed over cp twice or not at all, a loss counted once per rank, and a stage whose stream has another length."""
    ranks, parallel = PRODUCTS[product]
    model = tiny(num_layers=4 if parallel.pp > 1 else 2, dropout=0.1, position="xpos" if parallel.tp > 1 else "rope")
    assert_equal(Case(model, parallel, seq_len=14 if parallel.tp_sequence else 13, packed=True, steps=2), ranks)


@st.composite
def random_case(draw: st.DrawFn) -> tuple[int, Case]:
    cp = draw(st.sampled_from([2, 3, 4]))
    other = draw(st.sampled_from([{}, {"tp": 2, "tp_sequence": True}, {"dp_shard": 2}, {"pp": 2}])) if cp == 2 else {}
    parallel = Parallel(
        cp=cp,
        cp_method=draw(st.sampled_from(["ring", "ulysses"])) if "tp" not in other else "ring",
        recompute=draw(st.sampled_from(["none", "selective", "full"])),
        engine=draw(st.sampled_from(["fsdp2", "ddp"])) if "dp_shard" not in other else "fsdp2",
        **other,
    )
    model = tiny(
        num_heads=draw(st.sampled_from([4, 6])),
        hidden_size=24,
        num_kv_heads=draw(st.sampled_from([1, 2])),
        position=draw(st.sampled_from(["rope", "alibi", "learned", "xpos"])),
        sliding_window=draw(st.sampled_from([None, 1, 6])),
        qk_norm=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.1])),
        tie_embeddings=draw(st.booleans()),
    )
    length = draw(st.integers(4, 10)) * 2 + (draw(st.integers(0, 1)) if parallel.tp == 1 else 0)
    case = Case(model, parallel, seq_len=length, micro_batch=draw(st.integers(1, 2)), packed=draw(st.booleans()), steps=2)
    return cp * parallel.tp * max(1, parallel.dp_shard) * parallel.pp, case


@given(random_case())
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_random_layouts(drawn: tuple[int, Case]) -> None:
    """Catches what nobody thought of combining."""
    assert_equal(drawn[1], drawn[0])


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 2e-5), ("bf16", 2e-2)])
@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_single_and_mixed_precision(precision: str, bound: float, method: str) -> None:
    """Catches blocks merged, or gradients on the road summed, in bf16."""
    ranks, parallel = METHODS[method]
    case = Case(MODELS["llama"], parallel, precision=precision, seq_len=13)
    reference, got = single(case), run_ranks(ranks, train, case)[0]
    assert max(abs(a - b) / abs(b) for a, b in zip(got["loss"], reference["loss"])) <= bound
    assert worst(got["grad"], reference["grad"])[0] <= 4 * bound


# Tiles and blocks, on one process


def plain(q: Tensor, k: Tensor, v: Tensor, seen: AttentionMask) -> Tensor:
    """softmax(cap(q·kᵀ/√e) − slope·distance)·v with every pair at once, beside a sink if there is one."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    n = torch.arange(q.shape[2])
    back = n[:, None] - n[None, :]
    hidden = torch.zeros(1, 1, *back.shape, dtype=torch.bool)
    if seen.causal:
        hidden = hidden | (back < 0)
    if seen.window is not None:
        hidden = hidden | (back >= seen.window)
    if seen.documents is not None:
        hidden = hidden | (seen.documents[:, None, :, None] != seen.documents[:, None, None, :])
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    if seen.softcap is not None:
        scores = seen.softcap * torch.tanh(scores / seen.softcap)
    if seen.slopes is not None:
        scores = scores - seen.slopes.view(1, -1, 1, 1) * back
    scores = scores.masked_fill(hidden, float("-inf"))
    if seen.sinks is not None:
        scores = torch.cat((scores, seen.sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
    return torch.softmax(scores, -1)[..., : k.shape[2]] @ v


def inputs(length: int, batch: int = 2, heads: int = 4, kv_heads: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(batch, heads, length, 6), (batch, kv_heads, length, 6), (batch, kv_heads, length, 6), (batch, heads, length, 6)]
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


SEEN: dict[str, AttentionMask] = {
    "causal": AttentionMask(),
    "full": AttentionMask(causal=False),
    "window": AttentionMask(window=4),
    "documents": AttentionMask(documents=torch.tensor([[0] * 9 + [1] * 3 + [2] * 11, [4] * 1 + [6] * 22])),
    "alibi": AttentionMask(slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625]), window=17),
}


@pytest.mark.parametrize("seen", SEEN)
def test_blocks_in_any_order_are_plain_attention(seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a wrong merge of blocks, a tile's mask shifted by one, and rows that see nothing in a block turning into NaN."""
    monkeypatch.setattr(attention_tiles, "SCORES", 100)
    monkeypatch.setattr(attention_tiles, "ROWS", 3)
    rules, length = SEEN[seen], 23
    q, k, v, d_out = inputs(length)
    for x in (q, k, v):
        x.requires_grad_()
    expected = plain(q, k, v, rules)
    wanted = torch.autograd.grad(expected, (q, k, v), d_out)
    whole, blocks = [range(length)], [[range(9, 14)], [range(4), range(20, 23)], [range(14, 20), range(4, 9)]]
    out, lse = torch.zeros_like(d_out), torch.full((2, 4, length, 1), float("-inf"), dtype=torch.float64)
    pick = lambda x, ranges: torch.cat([x[:, :, r.start : r.stop] for r in ranges], 2)  # noqa: E731
    for block in blocks:
        add_block(out, lse, q, pick(k, block), pick(v, block), whole, block, rules)
    assert (out - expected).abs().max() <= 1e-13
    delta, d_q = (d_out * out).sum(-1, keepdim=True), torch.zeros_like(q)
    for block in blocks:
        d_k, d_v = torch.zeros_like(pick(k, block)), torch.zeros_like(pick(v, block))
        parts = (d_q, d_k, d_v)
        add_block_gradients(parts, d_out, delta, lse, q, pick(k, block), pick(v, block), whole, block, rules)
        assert (d_k - pick(wanted[1], block)).abs().max() <= 1e-12
        assert (d_v - pick(wanted[2], block)).abs().max() <= 1e-12
    assert (d_q - wanted[0]).abs().max() <= 1e-12


def ring_errors(seen: AttentionMask, length: int) -> list[float]:
    """Largest differences of this rank's part from plain attention: result, then gradients of q, k, v."""
    mesh = build_mesh(axis_sizes(Parallel(cp=dist.get_world_size()), dist.get_world_size()), "cpu")
    axis = mesh["cp_ring"]
    met = Spread.of(length, axis.size, 1, 1).met
    mine = lambda x: torch.cat([x[:, :, r.start : r.stop] for r in met[axis.rank]], 2)  # noqa: E731
    q, k, v, d_out = inputs(length)
    whole, local = [x.clone().requires_grad_() for x in (q, k, v)], [mine(x).clone().requires_grad_() for x in (q, k, v)]
    ring = Ring.of(axis, met)
    expected, got = plain(*whole, seen), ring_attention(*local, seen, ring)
    wanted = torch.autograd.grad(expected, whole, d_out)
    grads = torch.autograd.grad(got, local, mine(d_out))
    return [(a - mine(b)).abs().max().item() for a, b in zip((got, *grads), (expected, *wanted))]


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_ring_is_plain_attention(seen: str, ranks: int) -> None:
    """Catches blocks under a wrong owner's positions, and gradients that come home to another rank's keys."""
    for errors in run_ranks(ranks, ring_errors, SEEN[seen], 23):
        assert max(errors) <= 1e-12


# Who holds what


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(0, 200), st.integers(2, 9))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_places_cover_the_sequence_once(ring: int, ulysses: int, grain: int, extra: int, pieces: int) -> None:
    """Catches positions lost or held twice where lengths do not divide, and parts that tp_sequence cannot cut."""
    length = (pieces * ring * ulysses + extra) * grain
    held = places(length, ring, ulysses, grain, pieces)
    assert len(held) == ring * ulysses
    assert sorted(p for ranges in held for r in ranges for p in r) == list(range(length))
    assert all(total(ranges) % grain == 0 and total(ranges) > 0 for ranges in held)
    assert max(map(total, held)) - min(map(total, held)) <= (pieces + 1) * grain
    assert take(torch.arange(length)[None], held[-1]).tolist() == [[p for r in held[-1] for p in r]]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("window", [None, 100])
def test_no_rank_works_more_than_a_tenth_above_the_mean(ranks: int, window: int | None) -> None:
    """Catches a sequence cut in order, where the last rank does nearly twice the mean; every pair is computed by exactly one rank."""
    length = 997
    held = places(length, ranks)
    work = [sum(visible_pairs(mine, block, window=window) for block in held) for mine in held]
    assert sum(work) == sum(min(n + 1, window or length) for n in range(length))
    assert max(work) <= 1.1 * sum(work) / ranks
    # Each step of the ring is balanced too: ranks wait for each other in every one of them.
    if window is None:
        for step in range(1, ranks):
            in_step = [visible_pairs(held[r], held[(r - step) % ranks]) for r in range(ranks)]
            assert max(in_step) <= 1.1 * sum(in_step) / ranks


def worst_share(pieces: int, ranks: int = 8, length: int = 2048) -> float:
    """Work of the busiest rank ÷ the mean, on average over packings of documents with very different lengths."""
    owner, shares = torch.empty(length, dtype=torch.int64), []
    for rank, ranges in enumerate(places(length, ranks, pieces=pieces)):
        for r in ranges:
            owner[r.start : r.stop] = rank
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        lengths = (torch.randn(length // 8, generator=generator) * 1.5 + 4.4).exp().long() + 1
        documents = torch.repeat_interleave(lengths)[:length]
        keys = torch.arange(length) - document_starts(documents[None])[0] + 1
        work = torch.zeros(ranks, dtype=torch.int64).index_add(0, owner, keys).float()
        shares.append((work.max() / work.mean()).item())
    return sum(shares) / len(shares)


def test_pieces_even_out_documents() -> None:
    """Catches pieces that are dealt in order: a rank with the end of a long document then works while the others wait."""
    shares = [worst_share(pieces) for pieces in (2, 8, 32)]
    assert shares[0] > 1.5 and 1.3 > shares[1] > 1.1 > shares[2]


def test_tiles_skip_what_nobody_sees() -> None:
    """Catches a sliding window that costs as much as the whole square."""
    computed = sum((t.rows.stop - t.rows.start) * (t.keys.stop - t.keys.start) for t in tiles([range(4096)], [range(4096)], 64, True, 128))
    assert computed <= 4096 * (64 + 128)


# What is sent and kept


def sent(parallel: Parallel, ranks: int, length: int, heads: int, kv_heads: int) -> list[dict[str, Any]]:
    model = tiny(num_layers=3, num_heads=heads, num_kv_heads=kv_heads, hidden_size=24 * heads // 4)
    case = Case(model, parallel, seq_len=length, batch=2, micro_batch=2, steps=1, keep_tensors=False)
    results = run_ranks(ranks, train, case)
    assert_planned(case, results)
    return results


@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_ring_sends_what_it_should(n: int) -> None:
    """Catches a block sent all the way home: K and V make n−1 steps forward, and again backward with their gradients beside them."""
    length, size = 24, 6
    kv = 2 * 2 * 2 * (length // n) * size * 8  # K and V, b, KV heads, positions here, head size, bytes
    for result in sent(Parallel(cp=n), n, length, 4, 2):
        assert result["sent"]["cp"] == 3 * (3 * (n - 1) * kv)
        assert result["calls"]["cp", "send"] == 3 * 3 * (n - 1)


@pytest.mark.parametrize("n", [2, 4])
def test_ulysses_sends_what_it_should(n: int) -> None:
    """Catches gathers in place of all-to-alls: 4·M·(n−1)/n² each way, and two messages an attention each way."""
    length, heads, size = 24, 4, 6
    m = 2 * length * heads * size * 8
    for result in sent(Parallel(cp=n, cp_method="ulysses"), n, length, heads, heads):
        assert result["sent"]["cp"] == 3 * 2 * 4 * m * (n - 1) // n**2
        assert result["calls"]["cp", "all_to_all"] == 3 * 2 * 2


def test_fewer_kv_heads_than_ranks_are_sent_where_they_are_used() -> None:
    """Catches all KV heads going to all ranks: with one KV head for two ranks each gets the one it uses."""
    n, length, size, b = 4, 24, 6, 2
    here, away = length // n, n - 1
    per_head = b * here * size * 8
    for result in sent(Parallel(cp=n, cp_method="ulysses"), n, length, 4, 2):
        assert result["sent"]["cp"] == 3 * 2 * away * (1 + 1 + 1 + 1) * per_head


def kept_bytes(case: Case) -> int:
    """Bytes of activations that autograd keeps on this rank, every storage once; weights left out."""
    model = build(case, dist.get_world_size() if dist.is_initialized() else 1)
    weights = {p.untyped_storage().data_ptr() for p in model.model.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    b = fake_batch(case, [0])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model.module(b.tokens, b.targets, None, None, b.samples)
    loss.backward()
    return sum(size for at, size in kept.items() if at not in weights)


class Operations(TorchDispatchMode):
    """The operations that selective recomputation would be asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func)
        return func(*args, **(kwargs or {}))


def test_selective_recomputation_keeps_no_scores() -> None:
    """Catches a product of tiles that selective recomputation takes for a layer's and keeps: the whole square would be in memory."""
    q, k, v, _ = inputs(32)
    whole = [range(32)]
    with Operations() as operations:
        add_block(torch.zeros_like(q), torch.zeros(2, 4, 32, 1, dtype=q.dtype), q, k, v, whole, whole, AttentionMask())
    assert operations.seen and not operations.seen & KEPT


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_memory_falls_with_the_ranks(method: str) -> None:
    """Catches scores that are kept, and a sequence that is whole on every rank somewhere between embedding and loss."""
    model = tiny(num_kv_heads=4, vocab_size=31)
    kept = {}
    for n in (2, 4):
        layout = Parallel(cp=n, cp_method=method, engine="ddp")  # type: ignore[arg-type]
        kept[n] = max(run_ranks(n, kept_bytes, Case(model, layout, seq_len=1536, precision="fp32")))
    assert kept[4] <= 0.55 * kept[2]


def test_there_is_a_group_for_each_direction() -> None:
    """Catches cp ranks that trade heads with ranks of another ring place."""
    found = run_ranks(8, both_axes)
    assert found == [(c // 2, c % 2, s * 4 + c) for s in range(2) for c in range(4)]


def both_axes() -> tuple[int, int, int]:
    mesh = build_mesh(axis_sizes(Parallel(cp=4, dp_shard=2), 8), CPU.type, 2)
    assert [mesh[n].size for n in ("cp_ring", "cp_ulysses", "shard", "cp", "dp_shard")] == [2, 2, 8, 4, 2]
    return mesh["cp_ring"].rank, mesh["cp_ulysses"].rank, mesh["shard"].rank
