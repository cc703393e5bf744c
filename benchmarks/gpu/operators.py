"""Every operator once on this device, compared with the same on a CPU: whole small models eager and compiled, and what needs several ranks
by itself.

    python -m benchmarks.gpu.operators [--apart 8] [NAME …]

With --apart each check runs in a process of its own, so many at a time: an illegal access ends one check and not the rest. Prints what
passed so far after each, so a run that is cut off has said something.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from megascale.comm import exchange
from megascale.comm.mesh import build_mesh
from megascale.config.layout import axis_sizes
from megascale.config.schema import Model, Optim, Parallel
from megascale.config.schema.model import Moe
from megascale.data.loader import Batch
from megascale.handles import handle_of
from megascale.model.deferred import defer
from megascale.model.layers import Linear
from megascale.model.ops.attention_flex import block_attention, block_gradients, taken_apart, takes_merged, with_parts
from megascale.model.ops.attention_fused import merge
from megascale.model.ops.attention_tiles import AttentionMask, Ranges
from megascale.model.ops.compiled import compile_static
from megascale.model.ops.grouped_matmul import grouped_product
from megascale.parallel.context import Spread
from megascale.parallel.ring import add_fused, add_fused_gradients, rectangles
from megascale.precision.fp8 import fp8_grouped
from megascale.train.build import build_engine
from megascale.train.engines.engine import backward, update
from tests.layouts import CPU, Case, build, fake_batch, tiny

LIMIT = 120  # seconds of a check in a process of its own
FP32, BF16 = 1e-4, 3e-2  # rounding over five steps, relative
# Kernels of attention want heads of 16 channels, products rows of 16 bytes.
WIDE: dict[str, Any] = {"hidden_size": 64, "ffn_size": 128, "vocab_size": 96}
MOE = Moe(num_experts=4, top_k=2, ffn_size=64)
LATENT: dict[str, Any] = {
    "attention": "latent", "num_kv_heads": 4, "head_dim": 16, "latent": {"kv_rank": 32, "query_rank": 32, "rope_dim": 16, "value_dim": 16},
}  # fmt: skip
KINDS: dict[str, Any] = {"kinds": {"near": {"sliding_window": 40}, "far": {}}, "pattern": ["near", "far"]}
UNIT: dict[str, Any] = {"residual": "mus", "ffn": "gelu", "init_std": 1.0}


def model(**changes: Any) -> Model:
    return tiny(**{**WIDE, **changes})


CASES = {
    "plain": Case(tiny(dropout=0.1)),
    "wide": Case(model(dropout=0.1)),
    "tied, layernorm": Case(model(tie_embeddings=True, norm="layernorm", bias=True, ffn="gelu", position="learned", residual="post")),
    "deepnorm": Case(model(residual="deepnorm")),
    "branchnorm, dyt": Case(model(residual="branchnorm", branchnorm_period=3, norm="dyt")),
    "documents": Case(model(), packed=True, seq_len=160),
    "alibi, window": Case(model(position="alibi", sliding_window=40), seq_len=160),
    "kinds": Case(model(**KINDS), packed=True, seq_len=160),
    "latent": Case(model(**LATENT)),
    "several tokens ahead": Case(model(mtp_depth=2)),
    "experts": Case(model(moe=MOE)),
    "experts, biases, capacity": Case(model(moe=MOE.model_copy(update={"balance": "bias", "capacity_factor": 1.0, "num_shared": 1}))),
    "encoder": Case(model(family="encoder")),
    "layered": Case(model(), Parallel(accumulation="layered")),
    "recomputed": Case(model(), Parallel(recompute="selective")),
    "recomputed in full": Case(model(), Parallel(recompute="full")),
    "offloaded": Case(model(), Parallel(offload=("optimizer", "activations"))),
    "moments in bf16": Case(model(), optim=Optim(lr=1e-3, moments="bf16", betas=(0.9, 0.95))),
    "moments in 8 bits": Case(model(), optim=Optim(lr=1e-3, moments="int8")),
    "muon": Case(model(), optim=Optim(name="muon", lr=1e-3)),
    "muon in bf16": Case(model(), optim=Optim(name="muon", lr=1e-3, muon_dtype="bf16")),
    "lion": Case(model(), optim=Optim(name="lion", lr=1e-4)),
    "unit-scaled": Case(model(**UNIT)),
    "unit-scaled experts": Case(model(**UNIT, moe=MOE)),
}
COMPILED = ("plain", "wide", "documents", "kinds", "latent", "several tokens ahead", "experts", "recomputed", "unit-scaled", "deepnorm")
BUDGET = Case(model(), Parallel(recompute="budget", activation_budget=0.5))


def moved(batch: Batch, device: torch.device) -> Iterator[Any]:
    for value in batch:
        yield value.to(device) if isinstance(value, Tensor) else value


def losses_on(device: torch.device, case: Case) -> list[float]:
    on = build(case, 1, device)
    engine = build_engine(on, case.config, device)
    losses = []
    for step in range(case.steps):
        numbers = list(range(step * case.batch, (step + 1) * case.batch))
        batches = [fake_batch(case, numbers[i : i + case.micro_batch]) for i in range(0, case.batch, case.micro_batch)]
        batches = [Batch(*moved(b, device)) for b in batches]
        sums = backward(engine, batches, 1 / (case.batch * case.seq_len), case.optim.lr)
        losses.append(update(engine, sums).loss.item())
    return losses


def whole(case: Case, precision: str, compiled: bool, device: torch.device, fp8: str = "false") -> None:
    """Five steps of a small model, the CPU's eager."""
    case = replace(case, precision=precision, fp8=fp8, steps=5, micro_batch=2, seq_len=max(16, case.seq_len))  # type: ignore[arg-type]
    parallel = case.parallel.model_copy(update={"compile": compiled})
    plain = case.parallel if case.parallel.recompute != "budget" else Parallel()
    reference, got = losses_on(CPU, replace(case, parallel=plain)), losses_on(device, replace(case, parallel=parallel))
    bound = FP32 if precision == "fp32" else BF16
    assert max(abs(a - b) / b for a, b in zip(got, reference)) <= bound, (got, reference)


def alike(ours: Any, theirs: Any, bound: float) -> None:
    for a, b in zip(ours, theirs):
        gap = ((a.double().cpu() - b.double().cpu()).norm() / b.double().norm().clamp(min=1e-30)).item()
        assert gap <= bound, f"{gap} and not at most {bound}"


def drawn(device: torch.device, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The same numbers on every device."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def deferred(device: torch.device, compiled: bool) -> None:
    """A weight's gradient that is computed after the backward pass."""
    x, w, g = drawn(device, (32, 64), (48, 64), (32, 48))
    layer, queue = Linear(48, 64, "up", 0, 1.0, torch.float32), []  # type: ignore[var-annotated]
    layer.weight = torch.nn.Parameter(w.clone())
    defer(layer, queue)
    d_x = torch.autograd.grad((compile_static(layer) if compiled else layer)(x.requires_grad_()), x, g)[0]
    for add_gradient in queue:
        add_gradient()
    assert layer.weight.grad is not None
    alike((d_x, layer.weight.grad), (g @ w, g.t() @ x.detach()), 1e-2)


def exchanged(device: torch.device) -> None:
    """Rows to experts and back, in a group of one: the host learns their number from pinned memory, and rounds have more room than rows."""
    axis = build_mesh(axis_sizes(Parallel(), 1), device.type)["ep"]
    handle = handle_of(axis)
    (x,) = drawn(device, (24, 16))
    counts = torch.tensor([[10, 8]], device=device)
    received = exchange.exchange_counts(counts, handle)
    assert torch.equal(received, counts)
    for rows in (None, 32):
        splits = exchange.on_host(torch.stack((counts.sum(1), received.sum(1))))
        sent = exchange.send_rows(x, splits, handle) if rows is None else exchange.move_rows(x, splits, handle, False, rows)
        assert torch.equal(exchange.wait(sent)[:18], x[:18]) and not exchange.wait(sent)[18:].any()


def ring_flex(device: torch.device, mask: AttentionMask) -> None:
    """A ring's queries over three blocks of keys by FlexAttention, merged, forward and backward, against plain attention."""
    if device.type == "cuda" and not takes_merged():
        return
    length, here = 600, [range(130, 290), range(460, 600)]
    blocks: list[Ranges] = [here, [range(130), range(290, 360)], [range(360, 460)]]
    q, k, v, d_out = drawn(device, (2, 4, length, 16), (2, 2, length, 16), (2, 2, length, 16), (2, 4, length, 16))

    def pick(x: Tensor, ranges: Ranges) -> Tensor:
        return torch.cat([x[:, :, r.start : r.stop] for r in ranges], 2)

    given = [x.double().cpu().requires_grad_() for x in (q, k, v)]
    place, documents = torch.arange(length), mask.documents
    seen = place[:, None] >= place
    seen = seen if mask.window is None else seen & (place[:, None] - place < mask.window)
    seen = seen if documents is None else seen & (documents[:, None, :, None] == documents[:, None, None, :])
    plain = F.scaled_dot_product_attention(given[0], given[1], given[2], attn_mask=seen, enable_gqa=True)
    wanted = torch.autograd.grad(pick(plain, here), given, pick(d_out.double().cpu(), here))
    mask = mask._replace(documents=None if documents is None else documents.to(device))
    found = with_parts(mask, device, here, blocks).blocks
    assert found is not None
    sight, parts = taken_apart(found)
    mine, kv = pick(q, here), [(pick(k, b), pick(v, b)) for b in blocks]
    out, lse = torch.zeros_like(mine), torch.full((*mine.shape[:3], 1), float("-inf"), device=device)
    for block, part in zip(kv, parts):
        merge(out, lse, *block_attention(mine, *block, mask, sight, part))
    grads = [block_gradients(pick(d_out, here), mine, *block, out, lse, mask, sight, part) for block, part in zip(kv, parts)]
    d_q, d_k, d_v = zip(*grads)
    alike((out, sum(d_q)), (pick(plain, here), pick(wanted[0], here)), 1e-2)
    for mine_of, theirs in ((d_k, wanted[1]), (d_v, wanted[2])):
        alike(mine_of, [pick(theirs, b) for b in blocks], 1e-2)


def ring_fused(device: torch.device) -> None:
    """A ring's blocks by the fused kernel and its log-sum-exp, against one call."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    held = Spread.of(512, 2, 1, 1).met
    q, k, v, d_out = drawn(device, *[(1, 4, 512, 64)] * 4, dtype=dtype)
    given = [x.double().cpu().requires_grad_() for x in (q, k, v)]
    plain = F.scaled_dot_product_attention(given[0], given[1], given[2], is_causal=True)
    wanted = torch.autograd.grad(plain, given, d_out.double().cpu())
    order = [i for part in held for r in part for i in r]
    half = len(order) // 2
    for place in range(2):
        mine = order[:half] if place == 0 else order[half:]
        kv = torch.stack((k, v))[:, :, :, order]
        out, lse = torch.zeros_like(q[:, :, mine], dtype=torch.float32), torch.full((1, 4, half, 1), float("-inf"), device=device)
        d_q, d_kv = torch.zeros_like(out), torch.zeros(2, 1, 4, 512, 64, device=device)
        pairs = [(rectangles(held[place], held[owner], True), slice(owner * half, (owner + 1) * half)) for owner in range(2)]
        for parts, rows in pairs:
            add_fused(out, lse, q[:, :, mine], kv[:, :, :, rows], parts)
        for parts, rows in pairs:
            d_k, d_v = d_kv[0][:, :, rows], d_kv[1][:, :, rows]
            add_fused_gradients((d_q, d_k, d_v), d_out[:, :, mine], q[:, :, mine], kv[:, :, :, rows], out.to(dtype), lse, parts)
        alike((out, d_q), (plain[:, :, mine], wanted[0][:, :, mine]), 2e-2)


def grouped(device: torch.device, fp8: bool) -> None:
    """Products of rows sorted by expert, one expert without rows; and their gradients."""
    counts = torch.tensor([5, 0, 27, 16])
    found = []
    for on in (CPU, device):
        x, w, g = drawn(on, (48, 64), (4, 32, 64), (48, 32), dtype=torch.bfloat16)
        given = [x.requires_grad_(), w.requires_grad_()]  # in place
        y = fp8_grouped(x, w, counts.to(on), 0.25) if fp8 else grouped_product(x, w, counts.to(on))
        found.append([y, *torch.autograd.grad(y, given, g)])
    alike(found[1], found[0], 2**-7)


def checks() -> dict[str, Callable[[torch.device], None]]:
    """All of them by name."""
    documents = (torch.rand(2, 600, generator=torch.Generator().manual_seed(0)) < 0.01).cumsum(1)
    found: dict[str, Callable[[torch.device], None]] = {
        "deferred": partial(deferred, compiled=False),
        "deferred, compiled": partial(deferred, compiled=True),
        "exchange of rows": exchanged,
        "ring, fused": ring_fused,
        "ring, documents": partial(ring_flex, mask=AttentionMask(documents=documents)),
        "ring, window": partial(ring_flex, mask=AttentionMask(window=150)),
        "grouped products": partial(grouped, fp8=False),
        "grouped products, fp8": partial(grouped, fp8=True),
    }
    for name, case in CASES.items():
        for precision in ("fp32", "bf16"):
            found[f"{name}, {precision}"] = partial(whole, case, precision, False)
            if name in COMPILED:
                found[f"{name}, {precision}, compiled"] = partial(whole, case, precision, True)
    found["budget, bf16, compiled"] = partial(whole, BUDGET, "bf16", True)
    for name in ("unit-scaled", "unit-scaled experts"):
        for compiled in (False, True):
            found[f"{name}, fp8{', compiled' * compiled}"] = partial(whole, CASES[name], "bf16", compiled, fp8="static")
    return found


def chosen(device: torch.device, names: list[str]) -> list[str]:
    """The names that are asked for; without any, all that say something here: on a CPU one whole model, uncompiled."""
    whole_models = {name for name, check in checks().items() if isinstance(check, partial) and check.func is whole}
    return names or [n for n in checks() if device.type == "cuda" or n == "wide, fp32" or not (n in whole_models or "compiled" in n)]


def here(names: list[str], device: torch.device) -> Iterator[tuple[str, str]]:
    """Name and error, empty if it passed, in this process."""
    every = checks()
    for name in names:
        try:
            torch.manual_seed(0)
            every[name](device)
        except Exception:
            yield name, traceback.format_exc()[-1500:]
        else:
            yield name, ""


def in_processes(names: list[str], at_once: int) -> Iterator[tuple[str, str]]:
    few = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "2"}

    def one(name: str) -> tuple[str, str]:
        words = [sys.executable, "-m", "benchmarks.gpu.operators", name]
        try:
            done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT, env=few)
        except subprocess.TimeoutExpired:
            return name, f"no answer within {LIMIT} s"
        return name, "" if done.returncode == 0 else done.stdout[-1500:] or f"exit code {done.returncode}"

    with ThreadPoolExecutor(at_once) as pool:
        for done in as_completed([pool.submit(one, name) for name in names]):
            yield done.result()


def main(
    names: Annotated[list[str] | None, typer.Argument(help="which checks; default: all that this device can do")] = None,
    apart: Annotated[int, typer.Option(help="so many at a time, each in a process of its own; 0: all in this one")] = 0,
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    every, passed, failed = chosen(device, names or []), 0, dict[str, str]()
    for name, error in in_processes(every, apart) if apart else here(every, device):
        passed += not error
        failed |= {name: error} if error else {}
        print(json.dumps({"passed": passed, "failed": failed, "left": len(every) - passed - len(failed)}), flush=True)
    raise typer.Exit(bool(failed))


if __name__ == "__main__":
    typer.run(main)
