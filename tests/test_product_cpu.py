"""fp32 products on CPUs by oneDNN: the same numbers as torch's, and the same places in recomputation, compilation and pipelines."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from megascale.config.schema import Parallel
from megascale.model.layers import linear
from megascale.model.ops import matmul_cpu
from megascale.model.ops.compiled import compile_static
from megascale.model.ops.grouped_matmul import product_by_expert
from megascale.parallel.recompute import KEPT, PLAIN, _policy
from tests.layouts import Case, tiny, train, worst
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(not matmul_cpu.ONEDNN, reason="this build of torch has no oneDNN")

ROWS, IN, OUT = 2 * 128, 512, 512


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


class Products(TorchDispatchMode):
    """Counts calls of the operator."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.megascale.product.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_value_and_gradients(biased: bool, transposed: bool) -> None:
    """Catches a transpose or a stride that oneDNN reads otherwise, and a bias or a gradient that is lost."""
    x = random(2, ROWS // 2, IN).requires_grad_()
    weight = (random(IN, OUT).t() if transposed else random(OUT, IN)).requires_grad_()
    inputs = [x, weight, *([random(OUT).requires_grad_()] if biased else [])]
    g = random(2, ROWS // 2, OUT)
    with Products() as products:
        y = linear(*inputs)
        grads = torch.autograd.grad(y, inputs, g)
    assert products.count == 2  # forward and the input's gradient
    wide = [t.detach().double().requires_grad_() for t in inputs]
    expected = torch.nn.functional.linear(*wide)
    for ours, theirs in zip((y, *grads), (expected, *torch.autograd.grad(expected, wide, g.double()))):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_small_and_wide_products_stay_with_torch() -> None:
    """Catches products of fp64, of bf16, or too small to gain, that go to oneDNN."""
    x, weight = random(ROWS, IN), random(OUT, IN)
    assert matmul_cpu.takes(x, weight)
    assert not matmul_cpu.takes(x[:-1], weight)
    for dtype in (torch.float64, torch.bfloat16):
        assert not matmul_cpu.takes(x.to(dtype), weight.to(dtype))
    assert not matmul_cpu.takes(x.to("meta"), weight.to("meta"))


def test_products_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an expert's rows that go to another's place or through its matrix the wrong way; the second has too few for oneDNN."""
    sizes, bank, rows_taken = [ROWS, 3, 0, ROWS], random(4, OUT, IN), []
    inner = matmul_cpu.product

    def product(rows: Tensor, weight: Tensor) -> Tensor:
        rows_taken.append(len(rows))
        return inner(rows, weight)  # type: ignore[no-any-return]

    monkeypatch.setattr(matmul_cpu, "product", product)  # a mode that counts does not see inside an operator
    for transposed in (False, True):
        x = random(sum(sizes), OUT if transposed else IN)
        y = product_by_expert(x, bank, torch.tensor(sizes), transposed)
        matrices = [w if transposed else w.t() for w in bank.double()]
        expected = torch.cat([rows @ w for rows, w in zip(x.double().split(sizes), matrices)])
        assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert rows_taken == [ROWS, ROWS] * 2


def test_selective_recomputation_keeps_it() -> None:
    """Catches an operator that recomputation does not know, which is then run twice forward."""
    x, weight = random(ROWS, IN).requires_grad_(), random(OUT, IN).requires_grad_()
    with Products() as products:
        contexts = partial(create_selective_checkpoint_contexts, partial(_policy, KEPT))
        checkpoint(lambda x: linear(x, weight).sin(), x, **PLAIN, context_fn=contexts).sum().backward()
    assert products.count == 2


def test_it_is_one_graph_with_its_neighbours() -> None:
    """Catches a question that a compiler cannot ask, which would cut every block in pieces."""
    x, weight = random(ROWS, IN).requires_grad_(), random(OUT, IN).requires_grad_()

    def f(x: Tensor) -> Tensor:
        return linear(x.sin(), weight).cos().sum()

    found, expected = (torch.autograd.grad(g(x), (x, weight)) for g in (compile_static(f, fullgraph=True), f))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (4, Parallel(tp=2, dp_shard=2, tp_sequence=True, recompute="selective")),
        (2, Parallel(pp=2, pp_schedule="zbv", pp_virtual=2)),
    ],
    ids=["tp x zero3 x selective", "zbv"],
)
def test_layouts_equal_one_process(ranks: int, parallel: Parallel) -> None:
    """Catches weight gradients that a split backward loses, or that are computed for a detached weight."""
    sizes = {"hidden_size": 256, "ffn_size": 1024, "num_layers": 4, "vocab_size": 512, "init_std": 0.05}
    case = Case(tiny(**sizes), parallel, precision="fp32", seq_len=256, batch=8, micro_batch=2, steps=2)
    with Products() as products:
        reference = train(replace(case, parallel=Parallel()))
    assert products.count > 0
    got = run_ranks(ranks, train, case)[0]
    assert max(abs(a - b) / abs(b) for a, b in zip(got["loss"], reference["loss"])) <= 1e-6
    assert worst(got["grad"], reference["grad"])[0] <= 1e-5


ONE_STEP = """
import torch
from megascale.model.ops.compiled import compile_static
x = torch.linspace(0, 1, 4099).requires_grad_()
compile_static(lambda x: (x.sin() * x).sum())(x).backward()
assert torch.allclose(x.grad, x.cos() * x + x.sin(), atol=1e-5), (x.grad - x.cos() * x - x.sin()).abs().max()
"""


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs two widths of vectors, and so a CPU with AVX-512")
@pytest.mark.slow
def test_what_was_compiled_for_wider_vectors_is_not_read_back(tmp_path: Path) -> None:
    """Catches loops of sixteen numbers that run on a processor of eight: torch's cache finds them by the graph alone."""
    for width in ("avx512", "avx2"):
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "ATEN_CPU_CAPABILITY": width}
        done = subprocess.run([sys.executable, "-c", ONE_STEP], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-500:]


def test_the_cache_keeps_the_users_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a processor that a cache does not tell from another, and a user's own tag that is lost."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "FIRST")
    with torch.compiler.config.patch(cache_key_tag="mine"):  # monkeypatch would leave the setting deleted: it is no plain attribute
        compile_static(random)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "OTHER")
        compile_static(random)
        threads = torch.get_num_threads()
        assert torch.compiler.config.cache_key_tag == f"mine|OTHER, threads={threads}"
