"""Signal and gradient moments by depth at the first step, compared with theory: one forward and backward of a config on its own tokens."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megascale.analysis.moments import Gradient, Signal
from megascale.analysis.probe import MeasuredMoments, probe, warnings
from megascale.analysis.theory import stack_points
from megascale.comm.agreement import on_all_ranks
from megascale.comm.mesh import build_mesh
from megascale.config.layout import axis_sizes, data_parts, describe
from megascale.config.schema import Config
from megascale.config.support import check
from megascale.data.samples import micro_batches, open_data
from megascale.data.vocabulary import resolve_vocabulary
from megascale.errors import UsageError
from megascale.launch.ranks import RankInfo
from megascale.model.residual import Stack
from megascale.precision.loss_scale import loss_scale
from megascale.train.build import build_model, build_schedule

PANELS = {
    "variance": ("variance of the stream", "log"),
    "correlation": ("mean cosine of two tokens", "linear"),
    "gradient": ("gradient at the stream, RMS", "log"),
    "weight_gradient": ("gradient of a sublayer's weights, norm", "log"),
    "update": ("change of the stream by one SGD step, RMS ÷ lr", "log"),
    "mean": ("mean of the stream", "linear"),
}


def measure(config: Config, ranks: RankInfo, device: torch.device, lr: float) -> dict[str, Any]:
    """The content of OUT.json."""
    config = check(on_all_ranks(lambda: resolve_vocabulary(config)), ranks.size)
    if config.model.moeut is not None or config.model.family == "spacetime" or config.parallel.engine == "deepspeed":
        raise UsageError(
            "the probe looks at stacks of attention and feed-forward blocks that our own engines run: probe a config without "
            "model.moeut, of family decoder, encoder or encoder_decoder, under engine fsdp2 or ddp (here: "
            f"{config.model.family}, {config.parallel.engine})"
        )
    p, t = config.parallel, config.train
    filling = 2 * p.pp * p.stages_per_rank if p.pp > 1 else 1
    batch = t.micro_batch_size * data_parts(dict(p)) * filling
    config = config.model_copy(update={"train": t.model_copy(update={"global_batch_size": batch, "eval_every": 0})})
    mixture, _ = on_all_ranks(lambda: open_data(config))
    mesh = build_mesh(axis_sizes(p, ranks.size), device.type)
    model, facts, _ = on_all_ranks(lambda: build_model(config, mesh, device))
    for _ in model.draw_weights(config.run.seed):
        pass
    batches = micro_batches(config, mixture, 0, mesh, device)
    schedule = build_schedule(model, p, device)
    points = probe(model, schedule, batches, batch * t.seq_len, lr, p.tp_sequence, loss_scale=loss_scale(config))
    theory = expected(config, points)
    return {
        "config": config.plain(),
        "layout": describe(p),
        "parameters": facts["parameters"],
        "tokens": batch * t.seq_len,
        "lr": lr,
        "points": [asdict(point) for point in points],
        "theory": theory,
        "warnings": warnings(points),
    }


def expected(config: Config, points: list[MeasuredMoments]) -> list[dict[str, Any]]:
    """Theory from what the data give: the embedding's moments and the gradient after the last block. It does not cover experts or
    cross-attention, and only attentions, norms and feed-forwards whose rows name a rule.
    """
    model = config.model
    kinds = model.variants.values()
    known = all(m.attention_row.theory and m.norm_row.theory is not None and m.ffn_row.theory is not None for m in kinds)
    if not known or model.has_experts or model.encoder_layers is not None:
        return []
    first, last = points[0], points[-1]
    start = Signal(first.mean, first.variance, first.correlation)
    end = Gradient(last.gradient**2, max(0.0, last.gradient_correlation))
    period = config.model.branchnorm_period
    warm = 1.0 if period is None else min(1.0, 1 / period)
    stack = Stack("decoder" if config.model.causal else "encoder", config.model.num_layers)
    curves = stack_points(config.model, stack, config.train.seq_len, warm, start, end)
    return [c._asdict() for c in curves]


def write(result: dict[str, Any], out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{out}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        draw(result, Path(f"{out}.png"))
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror}") from None


def depths(points: list[dict[str, Any]]) -> list[float]:
    """Blocks before each point, counted through all stacks: a stack's embedding is at the start of its first block."""
    sublayers = Counter(p["layer"] for p in points)
    found: list[float] = []
    for i, p in enumerate(points):
        begins = i == 0 or p["layer"] < 0 or p["layer"] != points[i - 1]["layer"]
        found.append(float(points[i + 1]["layer"]) if p["layer"] < 0 else (p["layer"] if begins else found[-1]) + 1 / sublayers[p["layer"]])
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    """One panel per moment over the depth in blocks: dots are measured, the line is theory."""
    from matplotlib.figure import Figure

    model, points, theory = result["config"]["model"], result["points"], result["theory"]
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    lines = {"variance": "variance", "correlation": "correlation", "gradient": "gradient"}
    depth = depths(points)
    for axes, (key, (label, scale)) in zip(figure.subplots(2, 3).flat, PANELS.items()):
        axes.plot(depth, [p[key] for p in points], ".", color="#1f5fa8", markersize=4, label="measured")
        if key in lines and theory:
            axes.plot(depth[1:], [p[lines[key]] for p in theory], "-", color="#c8551b", linewidth=1.2, label="theory")
            axes.legend(frameon=False, fontsize=8)
        if scale == "log" and any(p[key] > 0 for p in points):
            axes.set_yscale("log")
        if key == "correlation":
            axes.set_ylim(min(-0.05, axes.get_ylim()[0]), 1.05)
        if model["encoder_layers"]:
            axes.axvline(model["encoder_layers"], color="#888", linewidth=0.8, linestyle="--")
        axes.set_title(label, fontsize=9)
        axes.set_xlabel("blocks", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
    sides = [model["encoder_layers"], model["num_layers"]] if model["encoder_layers"] else [model["num_layers"]]
    blocks = " + ".join(map(str, sides))
    figure.suptitle(f"{model['residual']}, {model['norm']}, {blocks} blocks of width {model['hidden_size']}: first step", fontsize=11)
    figure.savefig(path, dpi=110)
