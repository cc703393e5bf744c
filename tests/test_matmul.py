"""Products of bf16 values on CPUs without instructions for them: computed in fp32, rounded once, nowhere left to torch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megascale.config.schema import Optim, Parallel
from megascale.generation.run import Sampling, generate
from megascale.measure import compute
from megascale.model.ops import matmul
from tests.layouts import Case, build, tiny, train
from tests.precision.test_unit_scaling import unit
from tests.runs import make_tokens, rows, run, settings
from tests.test_experts import sparse
from tests.test_moeut import repeated
from tests.test_spacetime import grid

BF16 = torch.bfloat16


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaves like a CPU without bf16 products."""
    monkeypatch.setattr(matmul, "NATIVE", False)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(BF16)


# name → (ours, what it computes in any precision, shapes)
PRODUCTS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "linear": (matmul.linear, F.linear, [(2, 24, 32), (48, 32)]),
    "biased": (matmul.linear, F.linear, [(2, 24, 32), (48, 32), (48,)]),
    "few rows": (matmul.linear, F.linear, [(1, 3, 32), (48, 32), (48,)]),
    "matrix": (matmul.matmul, torch.matmul, [(2, 24, 32), (32, 48)]),
    "batch": (matmul.matmul, torch.matmul, [(3, 24, 32), (3, 32, 48)]),
    "weighted sum": (matmul.weighted_sum, lambda w, v: (w.unsqueeze(-1) * v).sum(-2), [(8, 3, 4), (8, 3, 4, 16)]),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_rounded_once(name: str, without: None) -> None:
    """Catches sums that are rounded on the way, and a transpose, a bias or a gradient that is lost or rounded twice."""
    ours, reference, shapes = PRODUCTS[name]
    inputs = [drawn(*shape).requires_grad_() for shape in shapes]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    y, expected = ours(*inputs), reference(*wide)
    g = drawn(*expected.shape)
    found = [y, *torch.autograd.grad(y, inputs, g)]
    right = [expected, *torch.autograd.grad(expected, wide, g.double())]
    for mine, theirs in zip(found, right):
        assert mine.dtype == BF16 and mine.shape == theirs.shape
        # Half a unit in the last of eight places, and what fp32 sums of values up to 4 are off.
        assert ((mine.double() - theirs).abs() <= theirs.abs() * 2**-8 * (1 + 1e-3) + 1e-4).all()


def test_attention(without: None) -> None:
    """Catches attention that loses a mask, the causal order or a gradient on its way through fp32."""
    q, k, v = (drawn(2, 4, 16, 8).requires_grad_() for _ in range(3))
    mask = torch.zeros(16, 16).masked_fill(torch.ones(16, 16).triu(1).bool(), -math.inf).to(BF16)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*wide, is_causal=True)
    right = torch.autograd.grad(expected.square().sum(), wide)
    for given in ({"causal": True}, {"mask": mask}):
        y = matmul.attention(q, k, v, **given)  # type: ignore[arg-type]
        assert y.dtype == BF16 and (y - expected).abs().max() < 2**-7
        for mine, theirs in zip(torch.autograd.grad(y.float().square().sum(), (q, k, v)), right):
            assert (mine - theirs).abs().max() < 2**-5


def test_groups_of_heads_find_a_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches KV heads for groups of query heads under a mask, or in fp32, that on a GPU only torch's matrix of scores takes."""
    asked: list[bool] = []
    real = F.scaled_dot_product_attention

    def spy(*args: Tensor, enable_gqa: bool, **keys: Any) -> Tensor:
        asked.append(enable_gqa)
        return real(*args, enable_gqa=enable_gqa, **keys)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(matmul, "widens", lambda *_: False)
    for dtype, masked in ((torch.float32, False), (BF16, True), (BF16, False), (torch.float64, False)):
        q, k, v = (torch.randn(1, heads, 16, 8, dtype=dtype) for heads in (4, 2, 2))
        found = matmul.attention(q, k, v, torch.zeros(16, 16, dtype=dtype) if masked else None, grouped=True)
        wide = [x.double().repeat_interleave(4 // x.shape[1], 1) for x in (q, k, v)]
        assert (found - real(*wide)).abs().max() < 2**-6
    assert asked == [False, False, True, True]


class Bf16Products(TorchDispatchMode):
    """Products and attention that torch computes of bf16 numbers on a CPU, by name."""

    NAMES = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu")

    def __init__(self) -> None:
        super().__init__()
        self.met: set[str] = set()

    def __torch_dispatch__(self, function: object, types: object, args: tuple[object, ...] = (), kwargs: object = None) -> object:
        name = function.overloadpacket.__name__  # type: ignore[attr-defined]
        if name.startswith(self.NAMES) and any(isinstance(x, Tensor) and x.dtype == BF16 for x in args):
            self.met.add(name)
        return function(*args, **(kwargs or {}))  # type: ignore[operator]


def test_where_the_processor_can_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the way through fp32 on machines that have the instructions, on other devices, and for other dtypes."""
    monkeypatch.setattr(matmul, "NATIVE", True)
    with Bf16Products() as products:
        matmul.linear(drawn(8, 16), drawn(16, 16))
    assert products.met == {"mm"}
    monkeypatch.setattr(matmul, "NATIVE", False)
    assert matmul.widens(drawn(2)) and not matmul.widens(drawn(2).to("meta")) and not matmul.widens(drawn(2), drawn(2).float())
    assert (matmul.way_of(BF16), matmul.way_of(torch.float32)) == ("fp32", "native")


def test_the_limit_that_a_user_sets_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches bf16 given to oneDNN where ONEDNN_MAX_CPU_ISA leaves it no instructions: it then takes 2.5 times as long as fp32."""
    monkeypatch.setattr(matmul.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert [matmul.has_bf16_products(limit) for limit in ("", "avx512_core", "AVX512_CORE_VNNI", "AVX512_CORE_BF16")] == [
        True,
        False,
        False,
        True,
    ]


def test_the_rate_is_found_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that measures for minutes before its first step, as four products of 2048³ take where one takes 200 s."""
    now = [0.0]

    def slow(a: Tensor, b: Tensor) -> None:
        now[0] += 2 * len(a) ** 3 / 87e6

    monkeypatch.setattr(compute, "linear", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    rate = compute.gemm_rate(torch.device("cpu"), torch.float32)
    assert rate == pytest.approx(87e6) and now[0] <= compute.LIMIT


def test_a_fast_machine_is_measured_at_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rate of small products, which are slower, where large ones take no time; and one slow product taken for the rate."""
    now, sizes = [0.0], []

    def fast(a: Tensor, b: Tensor) -> None:
        sizes.append(len(a))
        now[0] += 2 * len(a) ** 3 / 1e12 + (0.1 if len(sizes) < 4 else 0.0)

    monkeypatch.setattr(compute, "linear", fast)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    assert compute.gemm_rate(torch.device("cpu"), torch.float32, 512) == pytest.approx(1e12)
    assert sizes[-1] == 512 and partial(compute.gemm_rate, repeats=1)(torch.device("cpu"), torch.float32, 100) == pytest.approx(1e12)


MUON = Optim(name="muon", lr=1e-3)
PAIR = {"family": "encoder_decoder", "encoder_layers": 1, "position": "relative", "num_layers": 1, "dropout": 0.1}
MODELS: dict[str, Case] = {
    "grouped": Case(tiny(num_layers=1), optim=MUON),
    "windowed": Case(tiny(num_layers=1, norm="layernorm", ffn="gelu", position="alibi", bias=True, sliding_window=5), packed=True),
    "long": Case(tiny(num_layers=1), seq_len=1040),  # beyond attention_cpu.py's reach
    "encoder": Case(tiny(num_layers=1, family="encoder", mlm_head=True)),
    "pair": Case(tiny(**PAIR)),
    "grid": Case(grid((4, 3, 4), "next_step", text=6, num_layers=3), seq_len=48),
    "experts": Case(sparse(1, num_shared=1, capacity_factor=0.7)),
    "moeut": Case(repeated().model_copy(update={"num_layers": 2})),
    "tokenformer": Case(tiny(num_layers=1, linear="tokenformer", tokenformer={"tokens": 16})),
    "bitlinear": Case(tiny(num_layers=1, linear="bitlinear")),
    "fp8": Case(unit(num_layers=1, moe={"num_experts": 4, "top_k": 2, "ffn_size": 32}), optim=Optim(weight_decay=0.0), fp8="static"),
    "recomputed": Case(tiny(num_layers=1), Parallel(recompute="selective")),
}


@pytest.mark.parametrize("name", MODELS)
def test_no_product_is_left_to_torch(name: str, without: None) -> None:
    """Catches a product in bf16, forward or backward, that goes to torch's slow kernels; and another loss than in fp32."""
    case = replace(MODELS[name], precision="bf16", steps=1, batch=1, keep_tensors=False)
    with Bf16Products() as products:
        found = train(case)
    assert not products.met
    expected = train(replace(case, precision="fp32"))
    assert found["loss"] == pytest.approx(expected["loss"], rel=2e-2) and found["norm"] == pytest.approx(expected["norm"], rel=5e-2)


def test_a_run_says_which_way_it_took(without: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a machine that is slower in bf16 than its owner thinks, without a word in the log."""
    make_tokens(tmp_path / "tokens")
    assert run(settings(tmp_path, train__steps=1, precision__compute="bf16")) == (0, "done")
    assert "bf16 (products in fp32: this CPU has no bf16 instructions)" in capsys.readouterr().err
    assert rows(tmp_path, "events")[0]["products"] == "fp32"


def test_generation(without: None) -> None:
    """Catches a cache or a last token whose products stay in bf16."""
    parallel = build(Case(tiny(sliding_window=5), precision="bf16", seq_len=16), 1)
    with Bf16Products() as products:
        generate(parallel, [[1, 2, 3, 4, 5, 6, 7], [3, 4]], Sampling(most=4))
    assert products.met <= {"mm"}  # of few rows
