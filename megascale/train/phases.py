"""The phases of a run, between changes of its config and growths, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megascale.checkpoint.folders import step_name
from megascale.comm.agreement import on_all_ranks
from megascale.config.phases import Clock, changes_of, plain_clock, spans_of, with_changes
from megascale.config.schema import Config, GrowAt
from megascale.config.support import check
from megascale.data.memory import TokenLists
from megascale.data.vocabulary import resolve_vocabulary
from megascale.errors import UsageError
from megascale.model.families import build_part
from megascale.model.shape import shape_of
from megascale.model.spec import specs_of
from megascale.optim.learning_rate import begun_again
from megascale.optim.rates import check_names
from megascale.train.start.alike import check_config

if TYPE_CHECKING:
    from megascale.expand.options import GrowthOptions, Sizes


@dataclass(frozen=True)
class Phase:
    """A part of a run with one config.

    config  of this phase; `whole`: as the run was started
    until   its last step; `first`: its first one
    clock   where its steps are in the schedule of the learning rate
    before  the config that a checkpoint from before `first` was written with; None for the first phase
    begun   the entries of `phases` that have begun, each with its first step
    growth  the growth after it; None: there is none
    origin  the grown checkpoint that begins it; None: the checkpoint of the phase before, or the run's beginning
    flows   whether the next phase goes on with the same model and optimizer in memory; otherwise a checkpoint lies between them
    """

    config: Config
    whole: Config
    until: int
    first: int = 1
    clock: Clock | None = None
    before: Config | None = None
    begun: tuple[tuple[int, dict[str, Any]], ...] = ()
    growth: GrowAt | None = None
    origin: Path | None = None
    flows: bool = False

    @property
    def rates(self) -> Clock:
        return self.clock or plain_clock(self.config)


@dataclass(frozen=True)
class Given:
    """What a Python program passes in addition to the config: `samples` instead of the files of data.train; `writes` False for a run
    without a directory; `quiet` to print warnings only.
    """

    samples: TokenLists | None = None
    writes: bool = True
    quiet: bool = False


FROM_FILES = Given()


def run_phases(config: Config, ranks: int) -> list[Phase]:
    """All phases of a run, one unless its config changes or its model grows, with resolved configs. Collective: raises UsageError on all
    ranks alike.
    """
    check_config(config)
    resolved = on_all_ranks(lambda: check(resolve_vocabulary(config), ranks))
    if resolved.checkpoint.init_schedule == "lemon":
        resolved = resolved.model_copy(update={"optim": begun_again(resolved.optim, resolved.train.total_steps)})
    return on_all_ranks(lambda: phases_of(resolved, ranks))


def asked(entry: GrowAt, seed: int) -> tuple[Sizes, GrowthOptions]:
    """An entry of `grow` as sizes and options of the growth command."""
    from megascale.expand.options import GrowthOptions, Sizes, sizes_of

    sizes = Sizes(
        entry.hidden_size, entry.num_heads, entry.num_kv_heads, entry.head_dim, entry.ffn_size, entry.expert_ffn_size, entry.num_layers,
        entry.num_experts, entry.top_k, entry.granularity, tokenformer_size=entry.tokenformer_size, kv_rank=entry.kv_rank,
        query_rank=entry.query_rank, rope_dim=entry.rope_dim, value_dim=entry.value_dim, key_heads=entry.key_heads,
        value_heads=entry.value_heads, key_dim=entry.key_dim, conv_size=entry.conv_size, mtp_depth=entry.mtp_depth,
        kinds={name: sizes_of(name, given) for name, given in entry.kinds.items()},
    )  # fmt: skip
    options = GrowthOptions(
        entry.width_method, entry.ffn_method, entry.heads_method, entry.depth_method, entry.placement, entry.symmetry, entry.split,
        entry.optimizer, entry.router, lossless=entry.lossless, seed=seed,
    )  # fmt: skip
    return sizes, options


def phases_of(config: Config, ranks: int) -> list[Phase]:
    """All phases, each with its own model and layout. Raises UsageError for a phase or a growth that is refused, before the first step."""
    spans, growths = spans_of(config), {entry.step: entry for entry in config.grow}
    whole, found = config, list[Phase]()
    now, before, origin = spans[0].config, None, None
    begun: tuple[tuple[int, dict[str, Any]], ...] = ()
    for span in spans:
        if span.entry is not None:
            before = before or now
            now = check_change(before, check(with_changes(now.model_copy(update={"phases": whole.phases}), span.entry), ranks), span.entry)
            now = now.model_copy(update={"phases": ()})
            begun = (*begun, (span.first, changes_of(whole.phases[span.entry], "phases")))
        first = span.first
        for step in sorted(step for step in growths if span.first <= step <= span.last):
            found.append(Phase(now, whole, step, first, span.clock, before, begun, growths[step], origin))
            number = 1 + list(growths).index(step)
            now = grown(now, growths[step], ranks)
            origin, first, before = Path(now.run_dir) / f"grown-{number}" / step_name(step), step + 1, now
        if first <= span.last:
            found.append(Phase(now, whole, span.last, first, span.clock, before, begun, None, origin))
            origin, before = None, now
    for phase in found:
        if phase.config.optim.groups or phase.config.optim.multipliers:
            check_names(phase.config.optim, specs_of(build_part(phase.config.model, shape_of(phase.config))))
    ends = pairwise(found)
    return [*(replace(a, flows=a.growth is None and goes_on(a.config, b.config)) for a, b in ends), found[-1]]


# What a phase can change while the model and the optimizer stay in memory.
LIGHT = {
    "train": ("global_batch_size", "clip", "log_every", "eval_every", "eval_steps", "max_skipped_steps"),
    "optim": ("lr", "decay", "decay_steps", "warmup_steps", "min_lr_ratio"),
    "data": ("train", "valid"),
}


def goes_on(before: Config, now: Config) -> bool:
    """Whether everything that `now` changes can change in memory."""
    if before.parallel.engine == "deepspeed" or (before.parallel.update_in_backward and before.train.clip != now.train.clip):
        return False
    if any(average.in_tokens for average in now.optim.ema) and _batch(before) != _batch(now):
        return False  # the share that a step keeps follows its tokens
    own_rate = before.optim.muon is not None and before.optim.muon.lr is not None
    if (before.optim.independent_decay or own_rate) and before.optim.lr != now.optim.lr:
        return False  # the decay of each group, or Muon's rate, is relative to the peak rate

    def rest(config: Config) -> dict[str, Any]:
        sections = {name: getattr(config, name) for name in Config.model_fields if name != "phases"}
        for name, light in LIGHT.items():
            sections[name] = {k: v for k, v in dict(sections[name]).items() if k not in light}
        return sections

    return rest(before) == rest(now)


def grown(config: Config, entry: GrowAt, ranks: int) -> Config:
    """The config after a growth. Raises UsageError for a growth that is refused."""
    from megascale.expand.grow import grown_config, refuse_nothing  # imports all formats of source models
    from megascale.expand.plan import plan_growth
    from megascale.expand.state import check_state_grows

    sizes, options = asked(entry, config.run.seed)
    growth = plan_growth(config.model, config.train.seq_len, sizes, options)
    refuse_nothing(growth, options)
    check_state_grows(config.optim.name, options.optimizer)
    larger = grown_config(config, growth, options)[0]
    return check(larger.model_copy(update={"run": config.run, "parallel": entry.parallel or config.parallel}), ranks)


def check_change(before: Config, now: Config, entry: int) -> Config:
    """Raises UsageError if a phase changes the form of a weight, or an order of samples that is drawn as a whole; else returns `now`."""
    where = f"phases[{entry}].set"
    if now.data.order == "megatron" and (now.data != before.data or _batch(now) != _batch(before)):
        raise UsageError(
            f"{where} changes the data, the batch or train.seq_len, but under data.order megatron the order of all samples depends on "
            "their number: use data.order megascale, or leave them out of the phase"
        )
    if (now.model, shape_of(now)) == (before.model, shape_of(before)):
        return now
    then, there = ({n: s.shape for n, s in specs_of(build_part(c.model, shape_of(c))).items()} for c in (before, now))
    for name in dict.fromkeys((*then, *there)):
        if then.get(name) != there.get(name):
            raise UsageError(
                f"{where} changes the weights: {name} is {_form(then.get(name))} before and {_form(there.get(name))} after; a phase keeps "
                "every weight's form: use grow for a larger model, or leave the key out"
            )
    return now


def _batch(config: Config) -> tuple[int, int]:
    return config.train.global_batch_size, config.train.seq_len


def _form(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
