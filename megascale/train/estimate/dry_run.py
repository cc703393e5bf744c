"""Describes a run without allocating anything: whether it fits, exact bytes of the fullest rank, the schedule, the resolved config."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megascale.config.axes import data_parts
from megascale.config.dsp import describe_plan, plan_cuts
from megascale.config.layout import axis_sizes, describe, micro_batches
from megascale.config.load import to_yaml
from megascale.config.schema import Config
from megascale.config.stages import stage_parts
from megascale.config.support import check, padding_note
from megascale.data.vocabulary import resolve_vocabulary
from megascale.errors import UsageError
from megascale.measure.compute import flops_per_token
from megascale.model.families import build_part
from megascale.model.shape import shape_of
from megascale.model.spec import active_parameters, specs_of
from megascale.optim.learning_rate import schedule_note
from megascale.plugins import plugins
from megascale.schedule.orders import compute_order, layered_order, with_weights
from megascale.schedule.timeline import Timeline, draw, simulate, text_lanes
from megascale.sizes import byte_words, count_words, model_words, work_words
from megascale.train.estimate.hsdp import hsdp_note
from megascale.train.estimate.memory import host_bytes, largest_rank
from megascale.train.estimate.verdict import Verdict, room_of, verdict, verdict_lines
from megascale.train.phases import Phase, phases_of
from megascale.train.start.rows import check_rows

if TYPE_CHECKING:
    from megascale.trace.run import Asked


def dry_run(
    config: Config,
    ranks: int,
    json_file: str | None,
    picture: str | None = None,
    show_config: bool = False,
    device_bytes: float | None = None,
    asked: Asked | None = None,
) -> None:
    """Prints whether the run fits and what it does; `json_file` receives the same as JSON, `picture` a drawing of the pipeline, and
    `show_config` ends with every key. `device_bytes`: memory per device, if not that of this machine. Raises UsageError as the run
    would. `asked`: trace the step, too.
    """
    config, report, found = report_of(config, ranks, device_bytes)
    timeline = pipeline_timeline(config, ranks)
    verdict_words = verdict_lines(found)
    if asked is not None:
        traced_words, traced = traced_report(config, report, replace(asked, beside=Path(json_file) if json_file else None))
        report |= traced
        verdict_words = traced_words if traced else [verdict_words[0], *traced_words, *verdict_words[1:]]
    lines = [*verdict_words, *model_lines(config, report), *schedule_lines(config, report["schedule"], timeline)]
    notes = padding_note(config), schedule_note(config.optim, config.train.total_steps), hsdp_note(config, ranks, found.room.limit)
    lines += [f"note: {note}" for note in notes if note]
    print("\n".join(lines))
    if show_config:
        print(f"---\n{to_yaml(config.plain())}", end="")
    if picture:
        draw_pipeline(config, timeline, picture)
    if json_file:
        try:
            Path(json_file).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--json {json_file} cannot be written: {error.strerror}") from None


def report_of(config: Config, ranks: int, device_bytes: float | None = None) -> tuple[Config, dict[str, Any], Verdict]:
    """The resolved config, the report as plain data, and whether it fits. Raises UsageError as the run would."""
    if config.model.vocab_size is None or not (config.model.share_embeddings or config.model.source_vocab_size):
        config = resolve_vocabulary(config)
    config = check(config, ranks)
    check_rows(config)
    phases = phases_of(config, ranks)
    found = verdict(phases, ranks, room_of(config, ranks, device_bytes))
    report = {
        "fits": found.fits,
        "needed_bytes": {"state": found.state, "activations_estimated": round(found.activations)},
        "device_bytes": found.room.limit,
        **describe_run(phases[0].config, ranks),
        "tokens": sum(tokens_of(phase) for phase in phases),
    }
    if config.phases:
        report["phases"] = describe_phases(phases, ranks)
    if config.grow:
        report["growths"] = describe_growths(phases, ranks)
    return config, report, found


def traced_report(config: Config, report: Mapping[str, Any], asked: Asked) -> tuple[list[str], dict[str, Any]]:
    """Lines about the traced step, the verdict first, and its keys; without keys if it could not be traced."""
    from megascale.planning.setting import setting_of
    from megascale.planning.traffic import sent_bytes
    from megascale.trace.report import first_line, lines_of, summary
    from megascale.trace.run import TraceFailedError, trace

    ranks = report["ranks"]
    try:
        traced = trace(config, ranks, asked)
    except TraceFailedError as error:
        return [f"note: not traced: {error}; this is the estimate"], {}
    p = config.parallel
    order = compute_order(p.pp_schedule, p.pp, p.pp_virtual, micro_batches(config, ranks)) if p.pp > 1 else None
    found = summary(traced, report["flops_per_step"], order, ranks, config.precision.compute)
    found["planned_sent_bytes"] = {axis: round(n) for axis, n in sent_bytes(setting_of(config, ranks)).items()}
    files = [f"wrote {name}" for name in traced["files"]]
    return [first_line(found, traced["cluster"].name), *lines_of(found, config.parallel.compile), *files], found


def model_lines(config: Config, report: Mapping[str, Any]) -> list[str]:
    """Lines about the model, what a rank stores, and what a step does."""
    ranks, schedule, p = report["ranks"], report["schedule"], config.parallel
    lines = [
        f"model: {model_words(report['parameters'], report['parameters_active'])}",
        *(f"plugin {plugin}: {plugin.names}" for plugin in plugins()),
        f"layout: {report['layout']} on {ranks} rank{'s' if ranks > 1 else ''}; the fullest rank stores",
    ]
    lines += [f"  {kind:<11}{byte_words(size):>9}  {size:>18,} bytes" for kind, size in report["bytes_per_rank"].items()]
    for kind, size in report.get("host_bytes_per_rank", {}).items():
        where = f"in {p.offload_dir}" if kind == "state" and p.offload_dir else "in host memory"
        lines.append(f"  {kind:<11}{byte_words(size):>9}  {size:>18,} bytes {'of it ' if kind == 'state' else ''}{where}")
    each = f"each of {schedule['data_ranks']} data ranks" if schedule["data_ranks"] > 1 else "one data rank"
    tokens, total = schedule["tokens_per_step"], schedule["steps"]
    lines += [
        f"step: {schedule['micro_batches']} micro-batches of {config.train.micro_batch_size} × {config.train.seq_len:,} tokens on {each}, "
        f"{count_words(tokens)} tokens, {work_words(report['flops_per_step'])}",
        f"run: {total:,} steps, {count_words(report['tokens'])} tokens",
    ]
    for phase in report.get("phases", ()):
        changes = ", ".join(f"{key} {value}" for key, value in phase["changes"].items())
        lines.append(
            f"from step {phase['first']:,} to {phase['last']:,}: {changes}: {phase['micro_batches']} micro-batches, "
            f"{count_words(phase['tokens_per_step'])} tokens and {work_words(phase['flops_per_step'])} a step"
        )
    for growth in report.get("growths", ()):
        size = model_words(growth["parameters"], growth["parameters_active"])
        lines.append(f"after step {growth['after_step']:,}: {growth['layout']}: {size}, {work_words(growth['flops_per_step'])} per step")
        kept = ", ".join(f"{kind} {byte_words(size)}" for kind, size in growth["bytes_per_rank"].items())
        lines.append(f"  {kept} on the fullest rank")
    return lines


def schedule_lines(config: Config, schedule: Mapping[str, Any], timeline: Timeline | None) -> list[str]:
    """Lines about the order of layers and micro-batches if it is not the plain one."""
    lines = []
    if "dsp" in schedule:
        lines.append(f"dsp: layers as attended:cut dimension, a bar for each switch: {schedule['dsp']}")
    if timeline is None:
        return lines
    pipeline = schedule["pipeline"]
    if config.parallel.accumulation == "layered":
        lines.append("layered: embedding, every layer and head take all micro-batches in turn")
    else:
        lines.append(
            f"pipeline: layers by stage {pipeline['layers']}; bubble {100 * pipeline['bubble']:.1f} % if all stages were equally fast"
        )
    if sum(pipeline["gathers"]):
        lines.append(f"  by rank: weights gathered {pipeline['gathers']} times per step, gradients reduced {pipeline['reductions']} times")
    drawn = zip(text_lanes(timeline), timeline.live, timeline.sends)
    return lines + [f"  {line}  live {live}, sends {sends}" for line, live, sends in drawn]


def describe_run(config: Config, ranks: int) -> dict[str, Any]:
    """The facts of a checked config as plain data."""
    sizes = axis_sizes(config.parallel, ranks)
    totals = largest_rank(config, sizes)
    timeline = pipeline_timeline(config, ranks)
    shape = shape_of(config)
    model = build_part(config.model, shape)
    specs = specs_of(model)
    parameters = sum(s.numel for s in specs.values())
    train, parts = config.train, data_parts(sizes)
    tokens = train.global_batch_size * train.seq_len
    return {
        "parameters": parameters,
        "parameters_active": active_parameters(specs),
        "ranks": ranks,
        "layout": describe(config.parallel),
        "bytes_per_rank": totals,
        **({"host_bytes_per_rank": host_bytes(config, ranks)} if config.parallel.offload else {}),
        "flops_per_step": flops_per_token(config.model, specs, train.seq_len, train.source_length) * tokens,
        "schedule": {
            "data_ranks": parts,
            "micro_batches": -(-train.global_batch_size // (train.micro_batch_size * parts)),
            "steps": train.total_steps,
            "tokens_per_step": tokens,
            **({} if timeline is None else {"pipeline": pipeline_facts(config, timeline)}),
            **dsp_facts(config),
        },
        **({"plugins": {str(p): {kind: list(rows) for kind, rows in p.rows.items()} for p in plugins()}} if plugins() else {}),
        "config": config.plain(),
    }


def describe_growths(phases: Sequence[Phase], ranks: int) -> list[dict[str, Any]]:
    """The facts of the run after each growth."""
    keys = ("parameters", "parameters_active", "layout", "bytes_per_rank", "flops_per_step")
    grown = [(before.until, describe_run(p.config, ranks)) for before, p in pairwise(phases) if before.growth is not None]
    return [{"after_step": step, **{k: found[k] for k in keys}} for step, found in grown]


def describe_phases(phases: Sequence[Phase], ranks: int) -> list[dict[str, Any]]:
    """The facts of each phase that an entry of `phases` begins."""
    found = []
    for phase in phases:
        if phase.begun and phase.first == phase.begun[-1][0]:
            facts = describe_run(phase.config, ranks)
            steps = {"first": phase.first, "last": phase.until, "changes": phase.begun[-1][1]}
            step = {key: facts["schedule"][key] for key in ("micro_batches", "tokens_per_step")}
            found.append({**steps, **step, "layout": facts["layout"], "flops_per_step": facts["flops_per_step"]})
    return found


def tokens_of(phase: Phase) -> int:
    return (phase.until - phase.first + 1) * phase.config.train.global_batch_size * phase.config.train.seq_len


def dsp_facts(config: Config) -> dict[str, str]:
    """The dimension along which each layer's stream is split, if that changes from layer to layer."""
    model, p = config.model, config.parallel
    if model.spacetime is None or p.cp == 1 or p.cp_method != "dsp":
        return {}
    attended = [model.attended(i) for i in range(model.num_layers)]
    plan = plan_cuts(attended, model.spacetime.grid, p.cp)
    return {} if plan is None else {"dsp": describe_plan(attended, plan)}


def pipeline_timeline(config: Config, ranks: int) -> Timeline | None:
    """The schedule of a checked config in model time, with gathers and reductions of sharded weights; None if micro-batches simply run one
    after another.
    """
    p, m = config.parallel, micro_batches(config, ranks)
    if p.accumulation == "layered":
        return simulate({0: layered_order(config.model.total_layers + 2, m, p.breadth_first or m)})
    if p.pp == 1:
        return None
    order = compute_order(p.pp_schedule, p.pp, p.pp_virtual, m)
    return simulate(with_weights(order, m, p.pp_reduce_every) if p.engine == "fsdp2" and p.dp_shard > 1 else order)


def pipeline_facts(config: Config, timeline: Timeline) -> dict[str, Any]:
    p = config.parallel
    return {
        "schedule": "layered" if p.accumulation == "layered" else p.pp_schedule,
        "stages": len({s.step.stage for lane in timeline.lanes for s in lane}),
        "gathers": [sum(mark.kind == "G" for mark in marks) for marks in timeline.marks],
        "reductions": [sum(mark.kind == "R" for mark in marks) for marks in timeline.marks],
        "layers": [len(part.layers) for part in stage_parts(config.model, p, config.train.seq_len, config.train.source_length)],
        "bubble": timeline.bubble,
        "live_activations": timeline.live,
        "sends": timeline.sends,
        "order": [[f"{s.step.kind}{s.step.stage}.{s.step.micro_batch}" for s in lane] for lane in timeline.lanes],
    }


def draw_pipeline(config: Config, timeline: Timeline | None, picture: str) -> None:
    if timeline is None:
        raise UsageError(f"--draw {picture} draws the order of a pipeline or of layered accumulation: set parallel.pp or accumulation")
    if Path(picture).suffix not in (".png", ".svg"):
        raise UsageError(f"--draw {picture} has no known ending: name it .png or .svg")
    try:
        draw(timeline, f"{describe(config.parallel)}, {config.train.global_batch_size} sequences per step", Path(picture))
    except OSError as error:
        raise UsageError(f"--draw {picture} cannot be written: {error.strerror}") from None
