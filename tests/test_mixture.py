"""The mixture on one process and its bank of experts: rows, grouped products, starts, against plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import megascale.model.ops.grouped_matmul
from megascale.comm.piece import Piece
from megascale.model.experts import readings
from megascale.model.init import initialize
from megascale.model.ops.grouped_matmul import Permutation, by_expert, grouped_product, in_one, sum_of_rows
from megascale.model.spec import ParamSpec, specs_of
from tests.layouts import tiny
from tests.test_router import B, E, K, S, declared, filled, mixture


@pytest.mark.parametrize("kind", ["swiglu", "gelu", "relu"])
def test_the_mixture_against_a_loop(kind: str) -> None:
    """Catches a token that meets the wrong expert, a gate on the wrong row, and shared experts that are left out or gated."""
    cfg = tiny(ffn=kind, moe={"num_experts": E, "top_k": K, "ffn_size": 16, "num_shared": 2})
    moe = filled(declared(cfg))
    x = torch.randn(B, S, 24, dtype=torch.float64)
    got = moe(x, None)

    def ffn(v: Tensor, up: Tensor, gate: Tensor | None, down: Tensor) -> Tensor:
        y = up @ v
        if gate is not None:
            y = torch.nn.functional.silu(gate @ v) * y
        else:
            y = torch.nn.functional.gelu(y) if kind == "gelu" else y.relu()
        return down @ y

    bank = moe.experts
    for b in range(B):
        for s in range(S):
            scores = moe.router.weight @ x[b, s]
            chosen = scores.topk(K).indices.tolist()
            gates = torch.softmax(scores[chosen], 0)
            want = sum(
                g * ffn(x[b, s], bank.up.weight[e], None if bank.gate is None else bank.gate.weight[e], bank.down.weight[e])
                for g, e in zip(gates, chosen)
            )
            shared = moe.shared
            want = want + ffn(x[b, s], shared.up.weight, None if shared.gate is None else shared.gate.weight, shared.down.weight)
            torch.testing.assert_close(got[b, s], want)
    assert shared.up.weight.shape == (32, 24)


def test_order_of_tokens_changes_nothing() -> None:
    """Catches a combination that depends on where a token stands in its expert's block."""
    moe = mixture()
    x = torch.randn(1, 20, 24, dtype=torch.float64)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(moe(x[:, order], None), moe(x, None)[:, order], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dropped_tokens_pass_by(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches garbage of rows without an expert in results or gradients, expert by expert and by the grouped product, which leaves them
    undefined: with all tokens alike only the first find room, the others get zero, and so do their gradients.
    """
    monkeypatch.setattr(megascale.model.ops.grouped_matmul, "by_expert", lambda x, weight: dtype == torch.float64)
    monkeypatch.setattr(megascale.model.ops.grouped_matmul, "in_one", with_garbage)
    moe = mixture(capacity_factor=0.5, top_k=1).to(dtype)
    x = torch.randn(1, 1, 24, dtype=dtype).repeat(1, 20, 1).requires_grad_()
    y = moe(x, torch.ones(1, 20, dtype=dtype))
    room = math.ceil(20 * 1 / E * 0.5)
    assert (y[0, :room].abs().amax(-1) > 0).all() and torch.all(y[0, room:] == 0)
    y.sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()
    assert float(moe.metrics.totals["dropped"]) == 20 - room


def with_garbage(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The grouped product where its memory held no numbers before."""
    beyond = torch.arange(len(x)) >= counts.sum()
    return in_one(x, weight, counts).masked_fill(beyond.unsqueeze(1), math.nan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(4, 0, 7, 1, 0), (12, 0, 0, 0, 0), (0, 0, 0, 0, 12)])
def test_the_grouped_product_equals_the_loop(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    """Catches offsets that are off by one expert, and empty experts whose gradient is not zero."""
    torch.manual_seed(0)
    counts = torch.tensor(sizes)
    x, w = torch.randn(12, 16), torch.randn(5, 8, 16)
    outcomes = []
    for kind in (dtype, torch.float64):
        a, b = (t.to(dtype).to(kind).clone().requires_grad_() for t in (x, w))
        y = (grouped_product if kind == torch.float64 else in_one)(a, b, counts)
        (y * torch.arange(8)).sum().backward()
        outcomes.append([t.to(torch.float64) for t in (y.detach(), a.grad, b.grad)])
    bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]  # sums of 16 products in each type
    for fast, plain in zip(*outcomes):
        assert (fast - plain).abs().max() <= bound * plain.abs().max()
    assert torch.all(outcomes[0][2][counts == 0] == 0)


@pytest.mark.parametrize("top_k", [1, 3])
def test_combined_by_gates(top_k: int) -> None:
    """Catches gates of other rows, forward or backward."""
    generator = torch.Generator().manual_seed(3)
    sort = Permutation.of(torch.randint(0, E, (7, top_k), generator=generator))
    rows = torch.randn(7 * top_k, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    gates = torch.rand(7, top_k, dtype=torch.float64, generator=generator, requires_grad=True)
    want = torch.einsum("tk,tkd->td", gates, sort.gather(rows))
    g = torch.randn(want.shape, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(sort.unpermute(rows, gates), want, rtol=0, atol=1e-14)
    for ours, theirs in zip(
        torch.autograd.grad(sort.unpermute(rows, gates), (rows, gates), g), torch.autograd.grad(want, (rows, gates), g)
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_sums_of_rows_are_rounded_once(top_k: int) -> None:
    """Catches sums in bf16 that round after every row, or halves always away from zero."""
    torch.manual_seed(0)
    rows, places = torch.randn(512 * top_k, 32).bfloat16(), torch.randperm(512 * top_k).view(512, top_k)
    assert torch.equal(sum_of_rows(rows, places), rows[places].double().sum(1).bfloat16())


def test_st_moes_start() -> None:
    """Catches a start without truncation, or of the wrong deviation: √(0.1/fan_in), within two deviations."""

    cfg = tiny(moe={"num_experts": E, "ffn_size": 16, "init": "st_moe"})
    specs = specs_of(declared(cfg))
    for name, fan_in in (("router.weight", 24), ("experts.up.weight", 24), ("experts.down.weight", 16)):
        assert specs[name].std == pytest.approx(math.sqrt(0.1 / fan_in)) and specs[name].truncated
    spec = ParamSpec((3, 300, 400), "up", 1, 0.5, truncated=True)
    whole = torch.empty(spec.shape)
    initialize(Piece(spec.shape, (0, 0, 0), whole), "w", spec, 1)
    assert 0.98 < whole.abs().max() <= 1.0
    assert whole.std().item() == pytest.approx(0.5 * 0.8796, rel=0.01)  # of a normal cut at two deviations


def test_readings_of_a_layer() -> None:
    """Catches ratios that depend on how often the same tokens were counted, and an entropy that is not a share."""
    raw = {
        n: torch.tensor(v, dtype=torch.float64)
        for n, v in {"dropped": 3.0, "counted": 2.0, "balance": 4.0, "z": 1.0, "logits": 5.0}.items()
    }
    seen = readings({**raw, "counts": torch.tensor([6.0, 2.0, 2.0, 2.0])})
    assert seen["load_max_over_mean"] == 2.0 and seen["dropped_share"] == 0.25 and seen["aux_loss"] == 2.0 and seen["router_logits"] == 5.0
    assert readings({**raw, "counts": torch.full((4,), 3.0)})["load_entropy"] == pytest.approx(1.0)
    assert readings({**raw, "counts": torch.tensor([12.0, 0, 0, 0])})["load_entropy"] == 0.0


@pytest.mark.parametrize("sizes", [[3, 0, 4, 1, 0], [0, 0, 8, 0, 0]])
@pytest.mark.parametrize("hooked", [False, True])
def test_rounding_one_expert_at_a_time(sizes: list[int], hooked: bool) -> None:
    """Catches a gradient that later micro-batches replace or a hook never sees, one of an expert without rows that is no zero, and a
    difference of one bit to rounding the whole bank.
    """
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(E, 24, 16, generator=generator)
    grads, outputs, seen = [], [], []
    for whole in (False, True):
        weight, generator = start.clone().requires_grad_(), torch.Generator().manual_seed(6)
        if hooked and not whole:
            weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad is not None))
        for _ in range(3):
            x = torch.randn(10, 16, generator=generator).bfloat16().requires_grad_()
            y = grouped_product(x, weight.bfloat16() if whole else weight, torch.tensor(sizes))[: sum(sizes)]
            y.backward(torch.randn(sum(sizes), 24, generator=generator).bfloat16())
            assert x.grad is not None
            outputs.append((y.detach(), x.grad[: sum(sizes)]))
        grads.append(weight.grad)
    for (y, into_x), (want_y, want_into_x) in zip(outputs[:3], outputs[3:]):
        assert torch.equal(y, want_y) and torch.equal(into_x, want_into_x)
    assert torch.equal(*grads)
    assert len(seen) == (3 if hooked else 0)


@pytest.mark.parametrize("name", ["product_by_expert", "weight_gradient_by_expert", "fp8_by_expert", "fp8_weight_gradient_by_expert"])
def test_operators_describe_their_results(name: str) -> None:
    """Catches an operator without a fake, or with one of another shape or dtype, which no graph, dry run or fake device could contain."""
    import megascale.model.experts  # noqa: F401  it declares them

    counts, x, g, w = torch.tensor([3, 0, 5]), torch.randn(8, 16), torch.randn(8, 32), torch.randn(3, 32, 16)
    x8, w8, g8 = (t.to(torch.float8_e4m3fn) for t in (x, w, g))
    inputs: dict[str, tuple[Any, ...]] = {
        "product_by_expert": (x, w, counts, False),
        "weight_gradient_by_expert": (w, x, g, counts),
        "fp8_by_expert": (x8, w8, counts, 2.0, torch.bfloat16, False),
        "fp8_weight_gradient_by_expert": (g8.to(torch.float8_e5m2), x8, counts, 2.0, torch.bfloat16),
    }
    torch.library.opcheck(getattr(torch.ops.megascale, name).default, inputs[name], test_utils="test_faketensor")


@pytest.mark.parametrize(("dtype", "one_by_one"), [(torch.float32, True), (torch.float64, True), (torch.bfloat16, False)])
def test_experts_on_a_gpu(dtype: torch.dtype, one_by_one: bool) -> None:
    """Catches fp32 experts that claim the grouped kernel, which takes bf16 only: on CUDA they could be neither traced nor compiled, and
    torch's own loop makes the host wait for every expert.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, weight = torch.empty(24, 16, dtype=dtype, device="cuda"), torch.empty(5, 8, 16, device="cuda")
        counts = torch.empty(5, dtype=torch.int64, device="cuda")
        assert by_expert(x, weight) == one_by_one
        y = grouped_product(x, weight, counts)
    assert (y.shape, y.dtype, y.device.type) == ((24, 8), dtype, "cuda")
