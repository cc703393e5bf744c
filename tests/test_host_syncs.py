"""The training step makes the host wait nowhere: every family, engine, schedule and recomputation, on a device that computes nothing."""

from __future__ import annotations

import traceback
import types
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megascale.config.schema import Optim, Parallel
from megascale.config.schema.model import Moe
from megascale.config.schema.train import SkipSpikes
from megascale.data.loader import Batch
from megascale.trace.step import trainer_of
from megascale.train.build import build_engine
from megascale.train.log.module_metrics import MetricsOverRanks
from megascale.train.log.reporter import Reporter
from megascale.train.log.step_metrics import step_metrics
from tests.layouts import Case, build, fake_batch, tiny
from tests.ranks import fresh_process
from tests.test_golden import CASES as VARIANTS
from tests.test_golden import SCHEMES

pytestmark = pytest.mark.dist

DENSE = Case(tiny(), precision="bf16", batch=8)
REPEATED: dict[str, Any] = {name: getattr(VARIANTS["moeut"].model, name) for name in ("moe", "moeut")}
MIXTURE = replace(DENSE, model=tiny(moe=Moe(num_experts=4, top_k=2, ffn_size=16)))


# Residual schemes that differ in constants and in where norms are (one has a buffer that follows the step), routers in a formula.
ALIKE = [*(scheme for scheme in SCHEMES if scheme != "branchnorm"), "softmax_topk", "sigmoid", "sigma"]


def on(ranks: int, case: Case = DENSE, rank: int = 0, **parallel: Any) -> tuple[int, int, Case]:
    return ranks, rank, replace(case, parallel=Parallel(**parallel))


# Ranks, the rank that is looked at, and what it trains.
CASES: dict[str, tuple[int, int, Case]] = {
    **{name: (1, 0, replace(case, precision="bf16")) for name, case in VARIANTS.items() if name not in (*ALIKE, "moeut", "schedule_free")},
    # Heads of 8 channels: grouped products take rows of a multiple of 16 bytes only.
    "moeut": on(1, replace(DENSE, model=tiny(hidden_size=32, num_kv_heads=4, **REPEATED))),
    "packed": on(1, replace(DENSE, packed=True)),
    "own frequencies": on(1, replace(DENSE, model=tiny(rope_exponents=(0.0, 0.3, 0.6)))),
    "sinks and caps": on(1, replace(DENSE, model=tiny(attention_sink="learned", attention_gate="head", logit_softcap=9.0))),
    "skip spikes": on(1, replace(DENSE, spikes=SkipSpikes())),
    "selective": on(1, recompute="selective"),
    "full": on(1, recompute="full"),
    "nested": on(1, recompute="nested"),
    "mixture selective": on(1, MIXTURE, recompute="selective"),
    "mixture full": on(1, MIXTURE, recompute="full"),
    "layered": on(1, accumulation="layered"),
    "layered full": on(1, accumulation="layered", recompute="full"),
    "update in backward": on(1, replace(DENSE, clip=0), accumulation="layered", update_in_backward=True),
    "fsdp": on(4, dp_shard=4),
    "zero-2": on(4, dp_shard=4, reshard_after_forward=False),
    "hsdp": on(4, dp_replicate=2, dp_shard=2),
    "ddp": on(2, engine="ddp"),
    "fsdp selective": on(4, dp_shard=4, recompute="selective"),
    "fsdp layered": on(2, dp_shard=2, accumulation="layered"),
    "tp": on(2, tp=2),
    "uneven kv heads": on(4, replace(DENSE, model=tiny(num_heads=12, num_kv_heads=3, hidden_size=48)), rank=1, tp=4),
    "tp sequence": on(2, tp=2, tp_sequence=True),
    "ring": on(2, cp=2),
    "ring packed": on(2, replace(DENSE, packed=True), cp=2),
    "ring window": on(2, replace(DENSE, model=tiny(sliding_window=6, position="alibi")), cp=2),
    "ulysses": on(2, cp=2, cp_method="ulysses"),
    "experts": on(4, MIXTURE, dp_shard=4, ep=2),
    "experts by groups": on(4, replace(MIXTURE, model=VARIANTS["grouped experts"].model), dp_shard=4, ep=2),
    "experts in rounds": on(4, MIXTURE, dp_shard=4, ep=2, ep_rows=1.5),
    "experts full": on(4, MIXTURE, dp_shard=4, ep=2, recompute="full"),
    **{f"{schedule} {rank}": on(2, rank=rank, pp=2, pp_schedule=schedule) for schedule in ("1f1b", "zbv", "dualpipev") for rank in (0, 1)},
    "interleaved": on(2, replace(DENSE, model=tiny(num_layers=4)), pp=2, pp_schedule="interleaved_1f1b", pp_virtual=2),
    "pipeline with fsdp": on(4, pp=2, dp_shard=2),
    "muon with fsdp": on(4, replace(DENSE, optim=VARIANTS["muon"].optim), dp_shard=4),
    "averages": on(4, replace(DENSE, optim=Optim(name="schedule_free", decay="constant", ema=(0.9, 0.99))), dp_shard=4),  # type: ignore[arg-type]
}
GROUP = 18
# What is known to wait, by its place in the code, and why it may.
KNOWN = {
    "megascale/comm/exchange.py": "ranks that exchange rows must know how many will come, to have room for them; not with parallel.ep_rows",
    "megascale/parallel/once.py": "the number of rows that grouped tokens make comes to the host with the sizes of their exchange",
}


def waits_of(names: list[str]) -> dict[str, Any]:
    """For each case what makes the host wait in the second step and in reading the first, or why it could not be run. A process of its own:
    it changes torch.
    """
    from megascale.analysis.fake_device import BACKEND, FakeDevice

    device = FakeDevice().device
    prepare_torch(device)
    found: dict[str, Any] = {}
    for name in names:
        ranks, rank, case = CASES[name]
        if ranks > 1:
            from torch.testing._internal.distributed.fake_pg import FakeStore

            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
        try:
            found[name] = second_step(case, ranks, device, BACKEND)
        except Exception:
            found[name] = "".join(line for line in traceback.format_exc().splitlines(True) if "registered at" not in line)
        if ranks > 1:
            dist.destroy_process_group()
    return found


def prepare_torch(device: torch.device) -> None:
    """Groups that move nothing over the device, and no weights drawn on it."""
    import torch.distributed._tools.fake_collectives  # registers collectives of fakes
    from torch.nn.functional import scaled_dot_product_attention
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  # registers the backend

    from megascale.model.ops import attention_flex
    from megascale.parallel.model import ParallelModel

    dist.Backend.backend_capability["fake"].append(device.type)
    ParallelModel.draw_weights = lambda *_: iter(())  # type: ignore[assignment, method-assign]

    def flex(q: Any, k: Any, v: Any, enable_gqa: bool, return_aux: Any = None, **_: Any) -> Any:
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=enable_gqa)
        return out if return_aux is None else (out, types.SimpleNamespace(lse=torch.zeros_like(q[..., 0], dtype=torch.float32)))

    def flex_backward(d_out: Any, q: Any, k: Any, v: Any, *_: Any) -> Any:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    def all_reduce(*args: Any, **kwargs: Any) -> Any:
        work = reduced(*args, **kwargs)
        return types.SimpleNamespace(get_future=lambda: done(args[:1])) if kwargs.get("async_op") else work

    def done(value: Any) -> Any:
        future: Any = torch.futures.Future()
        future.set_result(value)
        return future

    reduced, dist.all_reduce = dist.all_reduce, all_reduce  # DDP's hook wants a future, and fake work has none
    attention_flex._kernel = lambda _: flex  # type: ignore[assignment]  # modes refuse the real ones
    attention_flex._backward_kernel = lambda _: flex_backward  # type: ignore[assignment]


def micro_batches(case: Case) -> int:
    if case.parallel.pp_schedule == "dualpipev":
        return 4
    return 2 if case.parallel.pp > 1 or case.parallel.accumulation == "layered" else 1


class Log:
    """Takes rows and events."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: False


def second_step(case: Case, ranks: int, device: torch.device, backend: Any) -> list[str]:
    from megascale.analysis.fake_device import FakeEvent
    from megascale.analysis.host_syncs import host_syncs

    config = case.config
    model = build(case, ranks, device)
    batch = fake_batch(case, [0] * case.micro_batch)
    there = Batch(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in batch))
    reporter = Reporter(
        mesh=model.mesh,
        device=device,
        cfg=config.train,
        last_step=9,
        flops_per_token=1.0,
        peak=None,
        observed=MetricsOverRanks(model),
        log=Log(),  # type: ignore[arg-type]
        console=Log(),  # type: ignore[arg-type]
        provenance={},
        metrics=step_metrics(),
    )
    reporter.stop_agreed = lambda: False  # type: ignore[method-assign]  # ones are read
    batches = iter([[there] * micro_batches(case)] * 2)
    trainer = trainer_of(config, model, build_engine(model, config, device), device, batches, reporter, until=9)
    steps = iter(trainer)
    with host_syncs(device.type) as found:
        for _ in range(1 if case.parallel.engine == "ddp" else 2):  # DDP's second step looks at memory, and there is none
            begun = FakeEvent.recorded
            found.clear()
            backend.waits.clear()
            next(steps)
    late = [f"an event of the step itself ({n} of {begun})" for n in backend.waits if n is None or n > begun]
    return [*(f"{s.kind}: {s.where}" for s in found), *late]


@cache
def waits_of_group(number: int) -> dict[str, Any]:
    """A process starts for some cases at a time: it imports for seconds, and each case takes one."""
    return fresh_process(waits_of, list(CASES)[number * GROUP : (number + 1) * GROUP], timeout=400)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CASES)
def test_the_step_waits_for_nothing(name: str) -> None:
    """Catches an `item`, a tensor made of a list on the device, a blocking copy or a mask as an index, in the step or in what reads it."""
    waits = waits_of_group(list(CASES).index(name) // GROUP)[name]
    assert not isinstance(waits, str), waits
    known = {place for place in KNOWN if CASES[name][2].parallel.ep_rows is None}
    assert [w for w in waits if not any(place in w for place in known)] == []


def planted() -> dict[str, list[str]]:
    """By expression, the kinds of wait that are found in it."""
    from torch._subclasses.fake_tensor import DynamicOutputShapeException

    from megascale.analysis.fake_device import FakeDevice
    from megascale.analysis.host_syncs import host_syncs

    device = FakeDevice().device
    x, host = torch.zeros(4, device=device), torch.zeros(4)
    kinds = {}
    for text in (*WAITING, *FREE):
        # Fakes have no values that a shape could depend on.
        with host_syncs(device.type) as found, suppress(DynamicOutputShapeException):
            eval(text, {"torch": torch, "x": x, "host": host, "device": device})
        kinds[text] = sorted(s.kind for s in found)
    return kinds


WAITING = {
    "x.sum().item()": "a value is told",
    "bool(x[0])": "a value is told",
    "float(x[0])": "a value is told",
    "x.cpu()": "a tensor is told",
    "host.copy_(x)": "a tensor is told",
    "torch.tensor([1.0, 2.0], device=device)": "a tensor is given",
    "host.to(device)": "a tensor is given",
    "x.copy_(host)": "a tensor is given",
    "x[[0, 2]]": "a tensor is given",
    "x[torch.tensor([0, 2])]": "a tensor is given",
    "x.nonzero()": "a shape is told",
    "x[x > 0]": "a shape is told",
}
FREE = ("x + 1", "x[0]", "x[1:3]", "torch.full((), 2.0, device=device)", "host.to(device, non_blocking=True)", "x.where(x > 0, 0)")


def test_each_kind_of_wait_is_seen() -> None:
    """Catches a kind that the list above would be empty of because nobody looks for it, and one that is seen where nobody waits."""
    assert fresh_process(planted) == {**{text: [kind] for text, kind in WAITING.items()}, **{text: [] for text in FREE}}
