"""A step with experts ÷ a dense step of equal active parameters, and tokens/s compared with Hugging Face's Mixtral of the same shape.

    python -m benchmarks.experts.step_time --dtype bf16

One process, all in one run and taking turns; seconds by the clock and of the processor, of which the second mean something on a machine
that others use as well (with one thread). Needs `pip install -e '.[hf]'` for the comparison. A step has several micro-batches, as steps
have: the optimizer's pass over all experts, of which a token meets few, is paid once for all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import machine, next_token_batch, one_step, toy, trained, write
from megascale.config.schema import Model, Parallel
from megascale.model.ops.compiled import compile_static
from megascale.model.spec import active_parameters

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SEQ_LEN, MICRO_BATCHES = 512, 2


def shape(layers: int, experts: int, width: int) -> Model:
    """A decoder whose tokens meet three times its width in every feed-forward sublayer, dense or as two experts of half that."""
    moe = {"num_experts": experts, "top_k": 2, "ffn_size": 3 * width // 2} if experts else None
    sizes: dict[str, Any] = {"num_layers": layers, "hidden_size": width, "num_heads": width // 64, "ffn_size": 3 * width, "moe": moe}
    return Model(**sizes, vocab_size=4096)


def our_step(cfg: Model, batches: list[torch.Tensor], dtype: torch.dtype, compiled: bool) -> tuple[Callable[[], object], dict[str, int]]:
    """One training step of ours, and how many parameters it has and a token meets."""
    compute = next(name for name, its in DTYPES.items() if its == dtype)
    model, engine = trained(toy(cfg, SEQ_LEN, Parallel(compile=compiled), compute), 1, batches[0].device)
    specs = {w.name: w.placement.spec for w in model.weights}
    micro_batches = [next_token_batch(t) for t in batches]
    step = partial(one_step, engine, micro_batches, 1 / sum(b.valid for b in micro_batches))
    return step, {"parameters": sum(s.numel for s in specs.values()), "active": active_parameters(specs)}


def their_step(cfg: Model, batches: list[torch.Tensor], dtype: torch.dtype, compiled: bool, experts: str) -> Callable[[], object]:
    """The same shape as Hugging Face's Mixtral, with torch's fused AdamW and clipping, fp32 masters under autocast."""
    from transformers import MixtralConfig, MixtralForCausalLM

    assert cfg.moe is not None
    config = MixtralConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.moe.ffn_size,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        num_key_value_heads=cfg.num_kv_heads,
        num_local_experts=cfg.moe.num_experts,
        num_experts_per_tok=cfg.moe.top_k,
        output_router_logits=True,
        use_cache=False,
    )
    config._experts_implementation = experts
    model = MixtralForCausalLM(config).to(batches[0].device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    run = compile_static(model) if compiled else model

    def step() -> None:
        for t in batches:
            with torch.autocast(t.device.type, dtype, enabled=dtype != torch.float32):
                loss = run(input_ids=t[:, :-1], labels=t[:, :-1]).loss / len(batches)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def in_turn(steps: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of each step by the clock and of the processor, medians of rounds in which the candidates take turns."""
    clock: dict[str, list[float]] = {what: [] for what in steps}
    processor: dict[str, list[float]] = {what: [] for what in steps}
    for _ in range(rounds):
        for what, step in steps.items():
            begin, busy = time.perf_counter(), time.process_time()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            clock[what].append(time.perf_counter() - begin)
            processor[what].append(time.process_time() - busy)
    medians = [{what: statistics.median(found) for what, found in times.items()} for times in (clock, processor)]
    return medians[0], medians[1]


def main(
    dtype: str = "bf16",
    layers: int = 1,
    width: int = 512,
    sequences: Annotated[int, typer.Option(help="of 512 tokens in a micro-batch")] = 16,
    rounds: int = 3,
    threads: int = 2,
    experts: Annotated[list[int], typer.Option(help="how many, each in turn")] = [8, 64],  # noqa: B006
    compiled: bool = False,
    theirs: Annotated[str, typer.Option(help="Mixtral's implementations of experts, by comma; empty: none")] = "eager,grouped_mm",
    device: str = "cpu",
    name: Annotated[str, typer.Option(help="of the file with the results")] = "step_time",
) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    place, kind = torch.device(device), DTYPES[dtype]
    batches = [torch.randint(0, 4096, (sequences, SEQ_LEN + 1), device=place) for _ in range(MICRO_BATCHES)]
    steps: dict[str, Callable[[], object]] = {}
    sizes: dict[str, Any] = {}
    for number in (0, *experts):
        what = f"{number} experts" if number else "dense"
        steps[what], sizes[what] = our_step(shape(layers, number, width), batches, kind, compiled)
    for implementation in filter(None, theirs.split(",")):
        steps[f"Mixtral, {implementation}"] = their_step(shape(layers, experts[0], width), batches, kind, compiled, implementation)
    for step in steps.values():
        step()  # what is made once
    clock, processor = in_turn(steps, rounds, place)
    seconds = processor if threads == 1 and device == "cpu" else clock
    tokens = MICRO_BATCHES * sequences * SEQ_LEN
    write(
        __file__,
        f"{name}_{dtype}" + ("_compiled" if compiled else "") + ("" if device == "cpu" else f"_{device}"),
        {
            "machine": machine(),
            "tokens": tokens,
            "layers": layers,
            "width": width,
            "seconds": clock,
            "processor_seconds": processor,
            "ratios_of": "processor_seconds" if seconds is processor else "seconds",
            "sizes": sizes,
            "over_dense": {what: t / seconds["dense"] for what, t in seconds.items() if what in sizes},
            "over_mixtral": {what: t / seconds[f"{experts[0]} experts"] for what, t in seconds.items() if what.startswith("Mixtral")},
        },
    )


if __name__ == "__main__":
    typer.run(main)
