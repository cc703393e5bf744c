"""Announces what starts, on the screen and in events.jsonl."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from megascale.config.layout import describe
from megascale.config.schema import Config
from megascale.config.support import padding_note
from megascale.data.vocabulary import first_facts
from megascale.launch.ranks import RankInfo, node_name
from megascale.optim.learning_rate import schedule_note
from megascale.plugins import plugins, versions
from megascale.sizes import model_words
from megascale.train.gpu import slow_notes
from megascale.train.log.console import Console
from megascale.train.log.run_log import RunLog
from megascale.train.start.branch import Note
from megascale.train.start.resume import RunStart
from megascale.train.state import Progress

GPU = "/dev/nvidia0"


def announce(
    config: Config,
    ranks: RankInfo,
    facts: dict[str, Any],
    start: RunStart,
    progress: Progress,
    data_notes: Sequence[str | None],
    notes: Sequence[Note],
    log: RunLog,
    console: Console,
) -> None:
    """Writes the first lines of a run to the screen and its start to events.jsonl."""
    layout = describe(config.parallel)
    entropy = first_facts(config).get("unigram_entropy")
    details: dict[str, Any] = {
        "layout": layout,
        "ranks": ranks.size,
        **facts,
        "torch": torch.__version__,
        "node": node_name(),
        **({"plugins": versions()} if versions() else {}),
        "unigram_entropy": entropy,
        "began": round(psutil.Process().create_time(), 3),
        **log.past,
    }
    if start.folder is not None:
        details["from"] = str(start.folder)
    log.event("resume" if progress.step else "start", progress.step, **details)
    if start.changes:
        lr = {} if start.rates is None else {"lr": [start.rates.before, start.rates.after]}
        log.event("change", progress.step, changes={k: list(v) for k, v in start.changes.items()}, **lr)
    for note in notes:
        if note.event:
            log.event(note.event, progress.step, message=note.sentence, **note.details)
    size, active = facts["parameters"], facts["parameters_active"]
    model = model_words(size, active) + ("," if active < size else "")
    fp8 = "" if config.precision.fp8 == "false" else f" with products in FP8 ({config.precision.fp8} scales)"
    way = " (products in fp32: this CPU has no bf16 instructions)" if facts.get("products") == "fp32" else ""
    threads = f", {facts['threads']} threads per process" if "threads" in facts else ""
    precision = f"{config.precision.compute}{way}{fp8}"
    kernels = f"attention by {facts['attention_kernels']}, " if facts["attention_kernels"] else ""
    kernels += f"norm kernel {facts['norm_kernel']}" + (f", gated delta rule {facts['delta_kernel']}" if "delta_kernel" in facts else "")
    console.say(f"{config.run.name}: {model} on {layout} ({facts['device']}), {precision}{threads}, {kernels}")
    for plugin in plugins():
        console.say(f"plugin {plugin}: {plugin.names}")
    if entropy is not None:
        console.say(f"unigram entropy of the tokens: {entropy:.4f} nats, the loss of a model that only knows token frequencies")
    if start.folder is not None:
        total = config.train.total_steps
        there = f"already at step {progress.step} of {total}: nothing to do unless train.steps or train.tokens is raised"
        following = there if progress.step >= total else f"next is step {progress.step + 1}"
        console.say(f"{'weights' if start.weights_only else 'everything'} from {start.folder}; {following}")
    if log.notes:
        log.event("mended", progress.step, notes=log.notes)
    schedule = schedule_note(config.optim, config.train.total_steps)
    unused = unused_gpu_note(config, facts["device"], os.environ, Path(GPU).exists())
    about = (
        unused,
        padding_note(config),
        schedule,
        *data_notes,
        cast_note(config, facts["device"]),
        fp8_experts_note(config, facts["device"]),
        facts.get("immovable"),
        *slow_notes(config, facts),
    )
    for sentence in (*(note.sentence for note in notes), *log.notes, *about):
        if sentence:
            console.warn(sentence)


def unused_gpu_note(config: Config, device: str, env: Mapping[str, str], present: bool) -> str | None:
    """A warning if training is on CPUs though a GPU seems to exist. An empty list of visible GPUs, or -1, means CPUs on purpose.

    present  whether the driver's device file exists
    """
    visible = env.get("CUDA_VISIBLE_DEVICES")
    hidden = visible is not None and visible.strip() in ("", "-1", "NoDevFiles", "none", "void")
    if device != "cpu" or config.run.device != "auto" or hidden or (visible is None and not present):
        return None
    sign = GPU if visible is None else f"CUDA_VISIBLE_DEVICES={visible}"
    return (
        f"training is on CPUs: there seems to be a GPU ({sign}), but torch {torch.__version__} finds none that it can use; check the "
        "driver (nvidia-smi) and torch's build, or set run.device=cpu"
    )


def cast_note(config: Config, device: str) -> str | None:
    """A warning if FP8 on a GPU is not compiled (docs/gpu.md has the numbers)."""
    if config.precision.fp8 == "false" or config.parallel.compile or device == "cpu":
        return None
    return (
        f"precision.fp8 is {config.precision.fp8} and parallel.compile is false: uncompiled casts cost more than FP8 saves; "
        "set parallel.compile true"
    )


def fp8_experts_note(config: Config, device: str) -> str | None:
    """A warning if experts run in FP8 on a GPU: torch's grouped product has no e5m2, so two of three run in bf16."""
    if config.precision.fp8 == "false" or config.model.moe is None or device == "cpu":
        return None
    return (
        "precision.fp8 is experimental with model.moe: experts multiply in FP8 forward only, and gradients, rounded to FP8, in bf16; "
        "compare the speed with precision.fp8 false"
    )
