"""The parts of a run between growths, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megascale.checkpoint.storage import step_name
from megascale.config.schema import Config, GrowAt
from megascale.config.support import check
from megascale.expand.grow import grown_config, refuse_nothing
from megascale.expand.options import GrowthOptions, Sizes
from megascale.expand.plan import plan_growth


@dataclass(frozen=True)
class Phase:
    """`config` of the model as it is then, `whole` as the run was begun; its last step `until`, the growth after it (None: the run ends),
    and the grown checkpoint `origin` that begins it (None: the run's beginning).
    """

    config: Config
    whole: Config
    until: int
    growth: GrowAt | None = None
    origin: Path | None = None


def asked(entry: GrowAt, seed: int) -> tuple[Sizes, GrowthOptions]:
    """An entry of the config as the tool's sizes and options."""
    sizes = Sizes(
        entry.hidden_size, entry.num_heads, entry.num_kv_heads, entry.head_dim, entry.ffn_size, entry.expert_ffn_size, entry.num_layers,
        entry.num_experts, entry.top_k, entry.granularity, tokenformer_size=entry.tokenformer_size,
    )  # fmt: skip
    options = GrowthOptions(
        entry.width_method, entry.ffn_method, entry.heads_method, entry.depth_method, entry.placement, entry.symmetry, entry.split,
        entry.optimizer, entry.router, lossless=entry.lossless, seed=seed,
    )  # fmt: skip
    return sizes, options


def phases_of(config: Config, ranks: int) -> list[Phase]:
    """All phases, each with its own model. Raises UsageError for a growth that is refused, before the first step."""
    whole = config
    found, origin = [], None
    for number, entry in enumerate(config.grow):
        found.append(Phase(config, whole, entry.step, entry, origin))
        sizes, options = asked(entry, config.run.seed)
        growth = plan_growth(config.model, config.train.seq_len, sizes, options)
        refuse_nothing(growth, options)
        grown = grown_config(config, growth, options)[0]
        config = grown.model_copy(update={"run": config.run, "parallel": entry.parallel or config.parallel})
        check(config, ranks)
        origin = Path(config.run_dir) / f"grown-{number + 1}" / step_name(entry.step)
    return [*found, Phase(config, whole, config.train.total_steps, None, origin)]
