"""The parts of a run between growths, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megascale.checkpoint.folders import step_name
from megascale.comm.agreement import on_all_ranks
from megascale.config.schema import Config, GrowAt
from megascale.config.support import check
from megascale.data.memory import TokenLists
from megascale.data.vocabulary import resolve_vocabulary
from megascale.optim.learning_rate import begun_again
from megascale.train.start.alike import check_config

if TYPE_CHECKING:
    from megascale.expand.options import GrowthOptions, Sizes


@dataclass(frozen=True)
class Phase:
    """`config` of the model in this phase, `whole` as the run was started; its last step `until`; the growth after it (None: the run ends);
    and the grown checkpoint `origin` that begins it (None: the run's beginning).
    """

    config: Config
    whole: Config
    until: int
    growth: GrowAt | None = None
    origin: Path | None = None


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
    """All phases of a run, one unless the model grows, with resolved configs. Collective: raises UsageError on all ranks alike."""
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
    """All phases, each with its own model. Raises UsageError for a growth that is refused, before the first step."""
    if not config.grow:
        return [Phase(config, config, config.train.total_steps)]
    from megascale.expand.grow import grown_config, refuse_nothing  # imports all formats of source models
    from megascale.expand.plan import plan_growth
    from megascale.expand.state import check_state_grows

    whole = config
    found, origin = [], None
    for number, entry in enumerate(config.grow):
        found.append(Phase(config, whole, entry.step, entry, origin))
        sizes, options = asked(entry, config.run.seed)
        growth = plan_growth(config.model, config.train.seq_len, sizes, options)
        refuse_nothing(growth, options)
        check_state_grows(config.optim.name, options.optimizer)
        grown = grown_config(config, growth, options)[0]
        config = grown.model_copy(update={"run": config.run, "parallel": entry.parallel or config.parallel})
        config = check(config, ranks)
        origin = Path(config.run_dir) / f"grown-{number + 1}" / step_name(entry.step)
    return [*found, Phase(config, whole, config.train.total_steps, None, origin)]
