"""How much of a step torch.compile covers, by layout: graphs, breaks, and hidden products that run eager.

    python -m benchmarks.gpu.graphs [LAYOUT …] [--mode none …]

Two or four gloo ranks on CPUs. Graphs are traced but not compiled, so that a cell takes seconds. Each row is written into
results/graphs.json as soon as it is there, beside what was counted before; prints the table of docs/gpu.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import machine
from megascale.analysis.compiled_graphs import Coverage, counted_graphs
from megascale.config.schema import Model, Parallel
from megascale.parallel import apply
from megascale.train.build import build_schedule
from tests.layouts import Case, build, fake_batch, tiny
from tests.ranks import run_ranks

MODES = ("none", "selective", "full", "nested")
COUNTS = ("graphs", "breaks", "eager_products")
RESULTS = Path(__file__).parent / "results" / "graphs.json"
MIXTURE: dict[str, Any] = {
    "num_experts": 4,
    "top_k": 2,
    "ffn_size": 32,
    "num_shared": 1,
    "aux_loss": 0.01,
    "z_loss": 0.001,
    "balance": "loss",
}
EXPERTS = {"moe": MIXTURE}
UNIT = {"residual": "mus", "ffn": "gelu", "init_std": 1.0, "hidden_size": 64, "ffn_size": 64}  # rows of 16 for FP8, under tp as well
LATENT = {
    "attention": "latent",
    "num_kv_heads": 4,
    "head_dim": 8,
    "latent": {"kv_rank": 16, "query_rank": 16, "rope_dim": 4, "value_dim": 8},
}
# More kinds than torch compiles of one function by itself.
NINE = {f"window{n}": {"sliding_window": n} for n in range(4, 13)}
KINDS = {"num_layers": 9, "kinds": NINE, "pattern": list(NINE)}
# Layouts, on two ranks if not on `ranks`, with a `model` that differs from the dense one and `fp8`.
LAYOUTS: dict[str, dict[str, Any]] = {
    "dense, fsdp": {"dp_shard": 2},
    "hsdp": {"dp_replicate": 2, "dp_shard": 2, "ranks": 4},
    "ddp": {"engine": "ddp", "dp_replicate": 2},
    "tp": {"tp": 2},
    "tp, tp_sequence": {"tp": 2, "tp_sequence": True},
    "cp ulysses": {"cp": 2, "cp_method": "ulysses"},
    "cp ring": {"cp": 2},
    "pp 1f1b": {"pp": 2},
    "pp zbv": {"pp": 2, "pp_schedule": "zbv"},
    "experts, fsdp": {"dp_shard": 2, "model": EXPERTS},
    "experts, ep": {"dp_shard": 2, "ep": 2, "model": EXPERTS},
    "experts, ep in rounds": {"dp_shard": 2, "ep": 2, "ep_rows": 1.5, "model": EXPERTS},
    "experts, ep and edp": {"dp_shard": 4, "ep": 2, "model": EXPERTS, "ranks": 4},
    "experts, tp and ep": {"tp": 2, "tp_sequence": True, "dp_shard": 2, "ep": 2, "model": EXPERTS, "ranks": 4},
    "experts, tp and etp 1": {"tp": 2, "tp_sequence": True, "etp": 1, "ep": 2, "model": EXPERTS},
    "experts, zbv and ep": {"pp": 2, "pp_schedule": "zbv", "dp_shard": 2, "ep": 2, "model": EXPERTS, "ranks": 4},
    "fp8, fsdp": {"dp_shard": 2, "model": UNIT, "fp8": "static"},
    "fp8, tp": {"tp": 2, "tp_sequence": True, "model": UNIT, "fp8": "static"},
    "nine kinds of layers, fsdp": {"dp_shard": 2, "model": KINDS},
    "latent attention, fsdp": {"dp_shard": 2, "model": LATENT},
    "latent attention, tp": {"tp": 2, "model": LATENT},
    "two tokens ahead, fsdp": {"dp_shard": 2, "model": {"mtp_depth": 2}},
}


def case(row: dict[str, Any], mode: str) -> Case:
    """A small model in a layout, with compiled blocks."""
    model: Model = tiny(**{"num_layers": 4, "num_heads": 4, "num_kv_heads": 2, **row.get("model", {})})
    parallel = Parallel(compile=True, recompute=mode, **{k: v for k, v in row.items() if k not in ("model", "fp8", "ranks")})  # type: ignore[arg-type]
    precision = "bf16" if "fp8" in row else "fp32"
    return Case(model, parallel, precision=precision, fp8=row.get("fp8", "false"), seq_len=32, batch=4, micro_batch=1)


def _graphs_only(axes: Any, settings: Any) -> Any:
    return "aot_eager"


def coverage(cases: dict[str, Case], ranks: int) -> dict[str, Coverage]:
    """The coverage of each case, one after the other on these ranks; eager products are those of the second step."""
    apply.counting_backend = _graphs_only
    found: dict[str, Coverage] = {}
    for name, each in cases.items():
        with counted_graphs() as counted:
            model = build(each, ranks)
            schedule = build_schedule(model, each.parallel, torch.device("cpu"))
            for _ in range(2):
                counted.eager_products = 0
                schedule.run([fake_batch(each, [i]) for i in range(4)], 1.0)
        found[name] = counted
    return found


def table(found: dict[str, Any]) -> str:
    """The table of docs/gpu.md; – where nothing has been counted."""
    lines = ["| layout | " + " | ".join(f"recompute {mode}" for mode in MODES) + " |", "|" + "---|" * (len(MODES) + 1)]
    for name in (name for name in LAYOUTS if name in found):
        cells = [", ".join(str(found[name][m][key]) for key in COUNTS) if m in found[name] else "–" for m in MODES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(
    names: Annotated[list[str] | None, typer.Argument(help="layouts; default: all")] = None,
    modes: Annotated[list[str], typer.Option("--mode", help="of recomputation")] = list(MODES),  # noqa: B006
) -> None:
    found: dict[str, Any] = json.loads(RESULTS.read_text())["coverage"] if RESULTS.exists() else {}
    for name in names or LAYOUTS:
        ranks = LAYOUTS[name].get("ranks", 2)
        counted = run_ranks(ranks, coverage, {mode: case(LAYOUTS[name], mode) for mode in modes}, ranks, timeout=1200)[0]
        found[name] = found.get(name, {}) | {mode: vars(each) for mode, each in counted.items()}
        RESULTS.write_text(json.dumps({"machine": machine(), "coverage": found}, indent=1) + "\n")
        print(name, found[name], flush=True)
    print(f"\n{table(found)}")


if __name__ == "__main__":
    typer.run(main)
