"""The layouts that a config is verified on: one for each axis, engine, schedule and way to recompute, their products, and random ones."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megascale.config.load import build_config
from megascale.config.schema import Config
from megascale.config.support import check
from megascale.errors import UsageError

# Name → keys of `parallel`; the ranks are the product of its axes. Those that need more ranks than there are, or that a rule refuses for
# the config, are left out.
ROWS: dict[str, dict[str, Any]] = {
    "fsdp": {"dp_shard": 2},
    "zero-2": {"dp_shard": 2, "reshard_after_forward": False},
    "ddp": {"dp_replicate": 2, "dp_shard": 1, "engine": "ddp"},
    "selective": {"dp_shard": 2, "recompute": "selective"},
    "full": {"dp_shard": 2, "recompute": "full"},
    "nested": {"dp_shard": 2, "recompute": "nested"},
    "layered": {"dp_shard": 2, "accumulation": "layered"},
    "offload": {"dp_shard": 2, "offload": ["optimizer"]},
    "tp": {"tp": 2},
    "tp sequence": {"tp": 2, "tp_sequence": True},
    "ring": {"cp": 2},
    "ulysses": {"cp": 2, "cp_method": "ulysses"},
    "dsp": {"cp": 2, "cp_method": "dsp"},
    "gpipe": {"pp": 2, "pp_schedule": "gpipe"},
    "1f1b": {"pp": 2},
    "interleaved": {"pp": 2, "pp_schedule": "interleaved_1f1b", "pp_virtual": 2},
    "looped": {"pp": 2, "pp_schedule": "looped_bfs", "pp_virtual": 2},
    "zero bubble": {"pp": 2, "pp_schedule": "interleaved_zero_bubble", "pp_virtual": 2},
    "zbv": {"pp": 2, "pp_schedule": "zbv"},
    "dualpipev": {"pp": 2, "pp_schedule": "dualpipev"},
    "ep": {"dp_shard": 2, "ep": 2},
    "ep in rounds": {"dp_shard": 2, "ep": 2, "ep_rows": 1.5},
    "fsdp on 3": {"dp_shard": 3},
    "hsdp": {"dp_replicate": 2, "dp_shard": 2},
    "tp on 4": {"tp": 4},
    "tp sequence x fsdp": {"tp": 2, "tp_sequence": True, "dp_shard": 2},
    "tp x ddp": {"tp": 2, "dp_replicate": 2, "dp_shard": 1, "engine": "ddp"},
    "ring x fsdp": {"cp": 2, "dp_shard": 2, "recompute": "full"},
    "ring of ulysses": {"cp": 4, "cp_ulysses": 2},
    "tp x ring": {"tp": 2, "tp_sequence": True, "cp": 2},
    "tp x ulysses": {"tp": 2, "cp": 2, "cp_method": "ulysses"},
    "pp x fsdp": {"pp": 2, "dp_shard": 2},
    "pp x tp": {"pp": 2, "tp": 2, "tp_sequence": True, "pp_schedule": "zbv"},
    "pp x ring": {"pp": 2, "cp": 2},
    "ep x edp": {"dp_shard": 4, "ep": 2},
    "ep x tp": {"dp_shard": 2, "tp": 2, "ep": 2},
    "ep x etp 1": {"tp": 2, "tp_sequence": True, "dp_shard": 2, "ep": 4, "etp": 1},
    "ep x pp": {"pp": 2, "dp_shard": 2, "ep": 2, "pp_schedule": "dualpipev"},
    "ep x ring": {"cp": 2, "dp_shard": 2, "ep": 2},
}
CHOICES: dict[str, tuple[Any, ...]] = {
    "recompute": ("none", "none", "selective", "full", "nested"),
    "reshard_after_forward": (True, False),
    "tp_sequence": (True, False),
    "cp_method": ("ring", "ulysses", "dsp"),
    "pp_schedule": ("gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev"),
    "accumulation": ("depth_first", "depth_first", "layered"),
    "engine": ("fsdp2", "fsdp2", "fsdp2", "ddp"),
}
TRIES = 400  # random products that are drawn for those asked for, since rules refuse many


@dataclass(frozen=True)
class Layout:
    """A valid layout: its checked config and number of ranks."""

    name: str
    config: Config
    ranks: int


def placed(config: Config, name: str, parallel: dict[str, Any], train: dict[str, Any] | None = None) -> Layout:
    """The config with these keys of `parallel`. Raises UsageError if a rule refuses it."""
    sizes = {"dp_shard": 1, **parallel}
    ranks = 1
    for axis in ("dp_replicate", "dp_shard", "cp", "tp", "pp"):
        ranks *= sizes.get(axis, 1)
    plain = config.plain()
    plain["parallel"] = sizes
    plain["train"] |= train or {}
    return Layout(name, check(build_config(plain), ranks), ranks)


def named(config: Config, ranks: int) -> tuple[list[Layout], dict[str, str]]:
    """The rows that apply on at most so many ranks, and for each other one why it does not."""
    found, left_out = [], {}
    for name, parallel in ROWS.items():
        try:
            layout = placed(config, name, parallel)
        except UsageError as error:
            left_out[name] = " ".join(str(error).split())
            continue
        if layout.ranks > ranks:
            left_out[name] = f"it takes {layout.ranks} ranks"
        else:
            found.append(layout)
    return found, left_out


def products(config: Config, ranks: int, count: int, seed: int) -> Iterator[Layout]:
    """`count` random layouts on exactly `ranks` ranks that no rule refuses, each once; fewer if there are fewer."""
    generator = random.Random(seed)
    seen: set[str] = set()
    for _ in range(TRIES * count):
        if len(seen) == count:
            return
        parallel = _drawn(generator, ranks, config.model.moe is not None or config.model.has_experts)
        plain = (1, True, False, "none", "depth_first", "fsdp2")
        name = ", ".join(f"{key} {value}" for key, value in parallel.items() if value not in plain)
        key = str(sorted(parallel.items()))
        if key in seen:
            continue
        try:
            layout = placed(config, name, parallel, {"micro_batch_size": generator.choice((1, 1, 2))})
        except UsageError:
            continue
        seen.add(key)
        yield layout


def _drawn(generator: random.Random, ranks: int, experts: bool) -> dict[str, Any]:
    sizes = dict.fromkeys(("tp", "pp", "cp", "dp_shard", "dp_replicate"), 1)
    left, factor = ranks, 2
    while left > 1:
        while left % factor:
            factor += 1
        sizes[generator.choice(list(sizes))] *= factor
        left //= factor
    found: dict[str, Any] = {**sizes, **{key: generator.choice(values) for key, values in CHOICES.items()}}
    found["tp_sequence"] = found["tp_sequence"] and sizes["tp"] > 1
    if sizes["pp"] > 1 and found["pp_schedule"] in ("interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble"):
        found["pp_virtual"] = 2
    unused = {"pp": ["pp_schedule"], "cp": ["cp_method"]}
    for axis, keys in unused.items():
        if sizes[axis] == 1:
            for key in keys:
                del found[key]
    if experts:
        found["ep"] = generator.choice([n for n in (1, 2, 4) if ranks % n == 0])
    return found
