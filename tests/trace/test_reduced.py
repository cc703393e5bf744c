"""Facts of small runs, extended linearly, are those of the whole run."""

from __future__ import annotations

from typing import Any

import pytest

from megascale.config.load import build_config
from megascale.config.schema import Config
from megascale.config.support import check
from tests.ranks import fresh_process

pytestmark = [pytest.mark.dist, pytest.mark.slow]

BASE: dict[str, Any] = {
    "model": {"num_layers": 16, "hidden_size": 512, "num_heads": 8, "num_kv_heads": 4, "ffn_size": 1024, "vocab_size": 4096},
    "train": {"steps": 10, "global_batch_size": 64, "micro_batch_size": 1, "seq_len": 512},
    "precision": {"compute": "bf16"},
    "data": {"train": "nowhere"},
}
CASES: dict[str, dict[str, Any]] = {
    "fsdp": {"dp_shard": 8, "recompute": "none"},
    "fsdp full": {"dp_shard": 8, "recompute": "full"},
    "tp": {"dp_shard": 4, "tp": 2, "tp_sequence": True, "recompute": "selective"},
    "layered": {"dp_shard": 8, "accumulation": "layered"},
    "1f1b": {"pp": 2, "dp_shard": 4},
}


def config_of(name: str) -> Config:
    return check(build_config({**BASE, "parallel": CASES[name]}), 8)


def both(name: str) -> list[dict[str, Any]]:
    """Facts of rank 0 by small runs, and by the whole run."""
    from megascale.trace.child import traced_rank
    from megascale.trace.rank import Machine
    from megascale.trace.reduced import Run, runs_of
    from megascale.trace.run import cluster_of

    config, machine = config_of(name), Machine(cluster_of(None, 8))
    runs = runs_of(config, 8)
    assert len(runs) > 1
    whole = Run(config, config.train.global_batch_size // machine_parts(config))
    return [traced_rank(machine, some, 8, 0)[0] for some in (runs, [whole])]


def machine_parts(config: Config) -> int:
    from megascale.config.axes import data_parts
    from megascale.config.layout import axis_sizes

    return data_parts(axis_sizes(config.parallel, 8))


@pytest.mark.parametrize("name", CASES)
def test_small_runs_say_what_the_whole_says(name: str) -> None:
    """Catches a fact that is not linear, and a peak that is elsewhere in a deeper model."""
    reduced, whole = fresh_process(both, name, timeout=500)
    assert sum(reduced["peak_bytes"].values()) == pytest.approx(sum(whole["peak_bytes"].values()), rel=0.002)
    assert reduced["sent_bytes"] == pytest.approx(whole["sent_bytes"])
    assert reduced["kernels"] == pytest.approx(whole["kernels"], rel=0.002)  # a kernel over a list takes some tensors at a time
    assert reduced["flops"] == pytest.approx(whole["flops"])
    assert reduced["rank_seconds"] == pytest.approx(whole["rank_seconds"], rel=0.02)
