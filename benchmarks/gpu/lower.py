"""What Inductor makes of one block and the loss of each shipped config on an H200, on a machine without one: kernels, bytes, the floor.

    python -m benchmarks.gpu.lower [--label NAME] [--registers] [CONFIG …]

It needs torch's CUDA wheel, which runs without a driver, and no GPU. The graphs are those of a run: the real model on meta tensors through
Dynamo and AOTAutograd, with the config's recomputation. They are lowered as Inductor would on the device, to Triton source that nothing
runs. Blocks are whole ones (no tensor parallelism), in bf16, with weights as FSDP2 gathers them; `@unsharded` after a name keeps fp32
weights, as one GPU without FSDP2 has them. With --registers each kernel is also compiled to machine code for sm_90.

Results are kept by label in results/lower.json, so that a change can be seen beside what was before it.
"""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.gpu.lowering import device
from benchmarks.gpu.lowering.capture import captured
from benchmarks.gpu.lowering.inductor import lower
from benchmarks.gpu.lowering.registers import usage
from megascale.config.load import load_config
from megascale.config.schema import Config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RESULTS = Path(__file__).parent / "results" / "lower.json"
VOCABULARY = 32000  # of configs that take it from their data


def shipped() -> list[str]:
    """All shipped configs, and one whose weights nothing gathers."""
    return [*(path.stem for path in sorted(CONFIGS.glob("*.yaml"))), "llama-1.2b@unsharded"]


def as_on_gpu(name: str) -> Config:
    """The shipped config NAME or NAME@unsharded in bf16."""
    base, _, kind = name.partition("@")
    config = load_config(str(CONFIGS / f"{base}.yaml"))
    precision = config.precision.model_copy(update={"compute": "bf16", "master": "fp32" if kind == "unsharded" else "bf16"})
    update: dict[str, Any] = {"precision": precision}
    if config.model.vocab_size is None:
        sources = VOCABULARY if config.model.encoder_layers else None
        update["model"] = config.model.model_copy(update={"vocab_size": VOCABULARY, "source_vocab_size": sources})
    return config.model_copy(update=update)


def measured(graphs: dict[str, torch.fx.GraphModule], registers: bool) -> dict[str, Any]:
    """Each graph of a config, lowered."""
    found: dict[str, Any] = {}
    for part, graph in graphs.items():
        runs = graph.meta["runs"]
        try:
            low = lower(graph, part.endswith("inference"))
        except Exception as error:  # one operator without a lowering must not hide the rest
            found[part] = {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
            continue
        found[part] = {
            "fused_kernels": low.fused, "calls": low.calls, "fused_bytes": low.fused_bytes, "floor_bytes": low.floor.fused,
            "call_bytes": low.floor.calls, "cast_bytes": low.floor.casts, "runs": runs,
        }  # fmt: skip
        if registers:
            found[part]["resources"] = usage(low.source)
    return found


def table(results: dict[str, Any]) -> str:
    """Markdown: one line per graph."""
    lines = ["| config | graph | kernels | library calls | MB moved | floor | ratio |", "|---|---|---|---|---|---|---|"]
    for name, parts in results.items():
        for part, row in parts.items():
            title = part.split(": ")[-1].replace("inference", "loss")
            if "failed" in row:
                lines.append(f"| {name} | {title} | {row['failed'].replace('|', '/')[:100]} | | | | |")
                continue
            moved, floor = row["fused_bytes"], row["floor_bytes"]
            ratio = f"{moved / floor:.2f}" if floor else "–"
            lines.append(
                f"| {name} | {title} | {row['fused_kernels']} | {row['calls']} | {moved / 1e6:.0f} | {floor / 1e6:.0f} | {ratio} |"
            )
    return "\n".join(lines)


def launches(results: dict[str, Any]) -> str:
    """Markdown: kernels and calls that the graphs of a config launch in a micro-batch, all layers and the loss."""
    lines = ["| config | launches a micro-batch |", "|---|---|"]
    for name, parts in results.items():
        if not any("failed" in row for row in parts.values()):
            lines.append(f"| {name} | {sum(row['runs'] * (row['fused_kernels'] + row['calls']) for row in parts.values())} |")
    return "\n".join(lines)


def main(
    names: Annotated[list[str] | None, typer.Argument(help="configs by name; default: all shipped ones")] = None,
    label: Annotated[str, typer.Option(help="name under which the results are kept")] = "now",
    registers: Annotated[bool, typer.Option("--registers", help="also compile every kernel for sm_90")] = False,
    out: Annotated[Path, typer.Option(help="the JSON file")] = RESULTS,
) -> None:
    why = device.missing()
    if why is not None:
        print(f"skipped: {why}")
        return
    graphs: dict[str, Any] = {}
    results: dict[str, Any] = {}
    for name in names or shipped():
        try:
            graphs[name] = captured(as_on_gpu(name))
        except Exception as error:
            traceback.print_exc()
            results[name] = {"all": {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}}
    device.install()  # from here on torch believes in a GPU
    where = {"torch": torch.__version__, "device": f"{device.PROPERTIES.name}, not there"}
    for name, each in graphs.items():
        results[name] = measured(each, registers)
    known = json.loads(out.read_text()) if out.exists() else {}
    before = known.get(label, {}).get("configs", {})
    known[label] = {"machine": where, "configs": before | results}
    out.write_text(json.dumps(known, indent=1) + "\n")
    print(f"{table(results)}\n\n{launches(results)}")


if __name__ == "__main__":
    typer.run(main)
