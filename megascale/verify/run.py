"""Verifies a config: its small model on one process and on every layout that applies, in fp64 and in the run's own number format."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

from megascale.config.load import build_config
from megascale.config.phases import spans_of
from megascale.config.schema import Config
from megascale.config.support import check
from megascale.errors import UsageError
from megascale.planning.setting import setting_of
from megascale.planning.traffic import sent_bytes
from megascale.precision.loss_scale import loss_scale
from megascale.train.build import build_engine, draw_model
from megascale.verify.compare import Verdict, judge
from megascale.verify.layouts import Layout, named, placed, products
from megascale.verify.ranks import RankFailed, run_ranks
from megascale.verify.small import small
from megascale.verify.steps import run_steps

CPU = torch.device("cpu")
# What ranks import at their first step: once here instead of a second of each rank.
FORKED = (
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "megascale.parallel.data",
    "megascale.schedule.pipeline",
)


@dataclass(frozen=True)
class Row:
    """A layout with its verdicts; `problem`: why it did not run. Bytes of a step by axis: the most that a rank sent, and the planner's."""

    name: str
    ranks: int
    parallel: dict[str, Any]
    verdicts: tuple[Verdict, ...] = ()
    problem: str = ""
    sent: dict[str, int] = field(default_factory=dict)
    planned: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def as_planned(self) -> bool:
        """Whether ranks sent what formulas say. What goes to experts depends on what tokens choose, and does not count."""
        return all(self.sent.get(axis, 0) == self.planned.get(axis, 0) for axis in {*self.sent, *self.planned} - {"ep"})

    @property
    def equal(self) -> bool:
        return not self.problem and all(v.equal for v in self.verdicts)

    @property
    def wrong(self) -> str:
        return self.problem or next((f"{v.precision}: {v.wrong}" for v in self.verdicts if v.wrong), "")


@dataclass(frozen=True)
class Report:
    rows: list[Row]
    left_out: dict[str, str]
    seconds: float

    @property
    def equal(self) -> bool:
        return bool(self.rows) and all(row.equal for row in self.rows)

    def plain(self) -> dict[str, Any]:
        rows = [{**asdict(row), "equal": row.equal} for row in self.rows]
        return {"equal": self.equal, "seconds": round(self.seconds, 1), "layouts": rows, "left_out": self.left_out}


def verify(
    config: Config,
    ranks: int,
    random: int,
    seed: int,
    only: Mapping[str, dict[str, Any] | None] | None = None,
    tell: Callable[[int, int, Row], None] = lambda *_: None,
) -> Report:
    """Every named layout on at most `ranks` ranks and `random` random products on exactly as many. `tell`(number, of, row) after each.

    only  these layouts instead: named ones, or with keys of `parallel` of their own

    Raises UsageError if the config cannot be made small, or one of `only` does not apply.
    """
    begin = time.monotonic()
    torch.set_num_threads(1)  # ranks are forked, and threads of this process would not be there
    for name in FORKED:
        import_module(name)
    todo: list[tuple[str, Config, Layout]] = []
    left_out: dict[str, str] = {}
    for prefix, made in parts(config):
        found, refused = named(made, ranks)
        found += products(made, ranks, random, seed)
        if only is not None:
            found, refused = _chosen(made, found, refused, only), {}
        todo += [(prefix, made, layout) for layout in found]
        left_out |= {prefix + name: why for name, why in refused.items()}
    rows: list[Row] = []
    references: dict[str, list[dict[str, Any]]] = {}
    for number, (prefix, made, layout) in enumerate(todo, 1):
        key = prefix + str(layout.config.train.micro_batch_size if layout.config.model.has_experts else "")
        if key not in references:
            alone = check(build_config(made.plain() | {"train": layout.config.plain()["train"]}), 1)
            references[key] = run_ranks(1, work, formats(alone, config))[0]
        rows.append(compared(prefix, layout, formats(layout.config, config), references[key]))
        tell(number, len(todo), rows[-1])
    return Report(rows, left_out, time.monotonic() - begin)


def parts(config: Config) -> Iterator[tuple[str, Config]]:
    """The small config of the run's beginning, and of each phase whose small config differs from those before."""
    seen = []
    for number, span in enumerate(spans_of(config)):
        made = small(span.config)
        if made not in seen:
            seen.append(made)
            yield (f"phase {number}: " if number else ""), made


def formats(made: Config, config: Config) -> list[Config]:
    """A small config in fp64, and in the run's own compute format if that is another one."""
    own = config.precision.compute
    return [made.model_copy(update={"precision": made.precision.model_copy(update={"compute": c})}) for c in dict.fromkeys(("fp64", own))]


def work(configs: list[Config]) -> list[dict[str, Any]]:
    """The steps of each config on this rank; tensors from the first rank only."""
    alone = not dist.is_initialized()
    found = []
    for config in configs:
        model = draw_model(config, 1 if alone else dist.get_world_size(), CPU)
        engine = build_engine(model, config, CPU)
        scale = loss_scale(config) / (config.train.global_batch_size * config.train.seq_len)
        result = run_steps(config, model, engine, scale, start=True)
        if not alone and dist.get_rank():
            result = {key: result[key] for key in ("samples", "sent")}
        found.append(result)
    return found


def compared(prefix: str, layout: Layout, configs: list[Config], reference: list[dict[str, Any]]) -> Row:
    begin = time.monotonic()
    parallel = layout.config.parallel.model_dump(mode="json", exclude_defaults=True)
    row = Row(prefix + layout.name, layout.ranks, parallel)
    try:
        everyone = run_ranks(layout.ranks, work, configs)
    except RankFailed as error:
        return replace(row, problem=str(error).strip().splitlines()[-1], seconds=time.monotonic() - begin)
    batch = layout.config.train.global_batch_size
    verdicts = tuple(
        judge(c.precision.compute, [rank[i] for rank in everyone], reference[i], batch, c.model.has_experts) for i, c in enumerate(configs)
    )
    axes = {axis for rank in everyone for axis in rank[0]["sent"]}
    sent = {axis: max(rank[0]["sent"].get(axis, 0) for rank in everyone) for axis in sorted(axes)}
    planned = {axis: round(n) for axis, n in sorted(sent_bytes(setting_of(configs[0], layout.ranks, cpu=True)).items()) if round(n)}
    sent = {axis: n for axis, n in sent.items() if n}
    return replace(row, verdicts=verdicts, sent=sent, planned=planned, seconds=time.monotonic() - begin)


def _chosen(made: Config, found: list[Layout], refused: dict[str, str], only: Mapping[str, dict[str, Any] | None]) -> list[Layout]:
    known = {layout.name: layout for layout in found}
    chosen = []
    for name, parallel in only.items():
        if parallel is not None:
            chosen.append(placed(made, name, parallel))
        elif name in known:
            chosen.append(known[name])
        else:
            why = refused.get(name, f"there is none of that name; there are {', '.join(known)}")
            raise UsageError(f"--layouts names {name!r}, which does not apply to this config: {why}")
    return chosen
