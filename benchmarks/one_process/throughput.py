"""Share of the machine's own product rate that a training step reaches, and tokens/s compared with Hugging Face's Llama of the same shape.

`python -m benchmarks.one_process.throughput --dtype fp32` (or bf16); needs `pip install -e '.[hf]'` for the comparison. `--plain` also runs
the loop that a tutorial would write, a control for the machine. On a GPU add `--config gpu`: a 1.2B decoder in bf16.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.common import in_turn, machine, next_token_batch, one_step, toy, trained, write
from benchmarks.two_processes.plain import Plain
from megascale.config.load import load_config
from megascale.config.schema import Model, Parallel, Precision
from megascale.measure.compute import flops_per_token, peak_flops
from megascale.model.decoder import Decoder
from megascale.model.layers import Fp8
from megascale.model.ops.compiled import compile_static
from megascale.model.ops.matmul import way_of
from megascale.model.shape import Shape
from megascale.model.spec import specs_of
from megascale.parallel.model import ParallelModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def our_step(
    cfg: Model, seq_len: int, tokens: torch.Tensor, dtype: torch.dtype, recompute: str, fp8: Fp8 = "false", compiled: bool = True
) -> tuple[Callable[[], object], float, ParallelModel]:
    """One training step of ours, its FLOPs, and the model."""
    compute = next(name for name, its in DTYPES.items() if its == dtype)
    layout = Parallel(compile=compiled, recompute=recompute)  # type: ignore[arg-type]
    config = toy(cfg, seq_len, layout, precision=Precision(compute=compute, fp8=fp8))  # type: ignore[arg-type]
    model, engine = trained(config, 1, tokens.device)
    flops = flops_per_token(cfg, {w.name: w.placement.spec for w in model.weights}, seq_len) * tokens.shape[0] * seq_len
    batch = next_token_batch(tokens)
    return partial(one_step, engine, [batch], 1 / batch.valid), flops, model


def their_step(cfg: Model, tokens: torch.Tensor, dtype: torch.dtype) -> Callable[[], object]:
    """The same shape as Hugging Face's Llama, compiled, with torch's fused AdamW and clipping, fp32 masters under autocast."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.ffn_size,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        num_key_value_heads=cfg.num_kv_heads,
        tie_word_embeddings=cfg.tie_embeddings,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(tokens.device)
    compiled = compile_static(model)
    return tutorial_step(model, lambda: compiled(input_ids=tokens[:, :-1], labels=tokens[:, :-1]).loss, dtype)


def plain_step(cfg: Model, tokens: torch.Tensor, dtype: torch.dtype) -> Callable[[], object]:
    """The same shape in torch's own modules, with GELU and a tied head."""
    model = Plain(cfg)
    model.head.weight = model.embedding.weight
    compiled = compile_static(model)
    return tutorial_step(model, lambda: compiled(tokens[:, :-1], tokens[:, 1:]), dtype)


def tutorial_step(model: torch.nn.Module, forward: Callable[[], torch.Tensor], dtype: torch.dtype) -> Callable[[], object]:
    """fp32 masters under autocast, clipping and torch's fused AdamW."""
    device = next(model.parameters()).device.type
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = forward()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def both(cfg: Model, seq_len: int, batch: int, rounds: int) -> None:
    """A step in bf16 compared with one in fp32, not compiled, in turn on one thread: medians of processor time."""
    torch.set_num_threads(1)
    assert cfg.vocab_size is not None
    tokens = torch.randint(0, cfg.vocab_size, (batch, seq_len + 1))
    steps = {name: our_step(cfg, seq_len, tokens, dtype, "none", compiled=False)[0] for name, dtype in DTYPES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            if i > 0:
                seconds[name].append(time.process_time() - begin)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    way, ratio = way_of(torch.bfloat16), medians["bf16"] / medians["fp32"]
    sizes = {"num_layers": cfg.num_layers, "hidden_size": cfg.hidden_size, "seq_len": seq_len, "batch": batch}
    found = {"machine": machine(), **sizes, "bf16_products": way, "processor_seconds": medians, "bf16_over_fp32": ratio}
    write(__file__, f"cpu_bf16_over_fp32_{way}", found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ffn", choices=["swiglu", "gelu"], default="gelu", help="Hugging Face's Llama has swiglu only")
    parser.add_argument("--config", choices=["cpu", "gpu", "tiny"], default="cpu", help="tiny: whether it runs at all")
    parser.add_argument("--batch", type=int, default=4, help="sequences in a step")
    parser.add_argument("--compare", action="store_true", help="also run Hugging Face's Llama (uses swiglu)")
    parser.add_argument("--plain", action="store_true", help="also run a plain loop in torch's own modules (on CPUs, with GELU)")
    parser.add_argument("--both", action="store_true", help="only a step in bf16 compared with one in fp32, on one thread of a CPU")
    args = parser.parse_args()
    if args.plain and (args.compare or args.config == "gpu" or args.ffn != "gelu"):
        parser.error("--plain is a loop with GELU on CPUs: leave out --compare, --config gpu and --ffn")
    dtype = DTYPES[args.dtype]
    if args.config == "gpu":
        cfg, seq_len, device = load_config("configs/llama-1.2b.yaml").model, 4096, torch.device("cuda")
    else:
        ffn = "swiglu" if args.compare else args.ffn
        sizes = {"num_layers": 8, "hidden_size": 512, "num_heads": 8, "vocab_size": 8192, "tie_embeddings": True, "ffn": ffn}
        if args.config == "tiny":
            sizes |= {"num_layers": 1, "hidden_size": 64, "num_heads": 1, "vocab_size": 256}
        cfg, seq_len, device = Model.model_validate(sizes), 512, torch.device("cpu")
    if args.both:
        both(cfg.model_copy(update={"num_layers": 4}), seq_len, 1, args.rounds)
        return
    assert cfg.vocab_size is not None
    tokens = torch.randint(0, cfg.vocab_size, (args.batch, seq_len + 1), device=device)
    step, flops, _ = our_step(cfg, seq_len, tokens, dtype, "none")
    steps = {"megascale": step}
    if args.compare:
        steps["huggingface"] = their_step(cfg, tokens, dtype)
    if args.plain:
        steps["plain"] = plain_step(cfg, tokens, dtype)
    for warm_up in steps.values():
        for _ in range(3):
            warm_up()
    measured = in_turn(steps, args.rounds, device, dtype)
    parameters = sum(s.numel for s in specs_of(Decoder(cfg, Shape(seq_len, dtype, dtype))).values())
    result = {
        "machine": machine(),
        "parameters": parameters,
        "dtype": args.dtype,
        "ffn": cfg.ffn,
        "tokens_per_step": args.batch * seq_len,
        "flops_per_step": flops,
        "flops_formula": "6·parameters·tokens + 12·L·h·s·tokens (attention in full)",
        "share_of_gemm": flops / measured["megascale"]["seconds"] / measured["megascale"]["gemm_flops"],
        "measured": measured,
    }
    if args.compare:
        result["speed_over_huggingface"] = measured["huggingface"]["seconds"] / measured["megascale"]["seconds"]
    if args.plain:
        result["share_of_gemm_plain"] = flops / measured["plain"]["seconds"] / measured["plain"]["gemm_flops"]
        result["speed_over_plain"] = measured["plain"]["seconds"] / measured["megascale"]["seconds"]
    if device.type == "cuda":
        seconds = measured["megascale"]["seconds"]
        result["tokens_per_second"] = args.batch * seq_len / seconds
        result["mfu"] = flops / seconds / peak_flops(device, dtype)
        result["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    write(__file__, f"{device.type}_{args.dtype}{'_vs_hf' if args.compare else '_vs_plain' if args.plain else ''}", result)


if __name__ == "__main__":
    main()
