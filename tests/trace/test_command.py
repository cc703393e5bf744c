"""`megascale train --dry-run --trace`: the verdict first, the keys that scripts read, and bad input in words."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from megascale.commands.train import app
from megascale.config.load import build_config, to_yaml
from megascale.config.support import check
from megascale.planning.cluster import load_cluster
from megascale.schedule.orders import compute_order
from megascale.schedule.timeline import simulate
from megascale.trace.rates import exchange_seconds, operation_seconds
from megascale.trace.reduced import combined, runs_of
from megascale.trace.report import pipelined
from megascale.trace.run import cluster_of, with_pools

SMALL: dict[str, Any] = {
    "model": {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "ffn_size": 128, "vocab_size": 256},
    "parallel": {"dp_shard": 2, "tp": 2, "tp_sequence": True},
    "train": {"steps": 10, "global_batch_size": 4, "micro_batch_size": 1, "seq_len": 32},
    "precision": {"compute": "bf16"},
    "data": {"train": "nowhere"},
}
TRACED = ["--dry-run", "--ranks", "4", "--trace"]


def invoked(tmp_path: Path, *arguments: str) -> Result:
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(SMALL))
    return CliRunner().invoke(app, [str(file), *arguments])


def test_a_traced_dry_run(tmp_path: Path) -> None:
    """Catches a key of the JSON that is lost, a host wait in the step, and a trace that needs data."""
    result = invoked(tmp_path, *TRACED, "--rank", "first,last", "--json", str(tmp_path / "out.json"))
    assert result.exit_code == 0, result.output
    assert result.output.startswith("fits: yes, ")
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["fits"] is True
    assert report["host_syncs"] == {} == report["wrong_device"]
    assert 0 <= report["peak_bytes"]["weights"] - report["bytes_per_rank"]["parameters"] < 512 * 24  # the allocator rounds each weight
    assert report["peak_bytes"]["total"] == sum(n for kind, n in report["peak_bytes"].items() if kind != "total")
    assert set(report["sent_bytes"]) == {"dp_shard", "tp"}
    assert 0 < report["mfu"] < 1
    assert report["step_seconds"] > 0
    assert list(report["by_rank"]) == ["0", "3"]
    events = json.loads((tmp_path / "out.trace.json").read_text())["traceEvents"]
    assert {e["pid"] for e in events} == {"device", "exchanges", "memory"}
    most = max(sum(e["args"].values()) for e in events if e["ph"] == "C")
    assert most == pytest.approx(sum(report["by_rank"]["0"]["peak_bytes"].values()) / 1e9)
    assert report["planned_sent_bytes"] == report["sent_bytes"]
    assert (tmp_path / "out.memory.png").stat().st_size > 10_000


def test_a_failed_trace_gives_the_report_of_today(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback or a lost verdict where the tracing process dies."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    result = invoked(tmp_path, *TRACED)
    lines = result.output.splitlines()
    assert result.exit_code == 0
    assert lines[0].startswith("fits: ")
    assert lines[1].startswith("note: not traced: the tracing process failed: it ended with code 1")
    assert any(line.startswith("layout: ") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*TRACED, "--rank", "4"), "--rank names rank 4, but the run has 4"),
        ((*TRACED, "--rank", "second"), "--rank is second: name first, middle, last or numbers from 0 to 3"),
        ((*TRACED, "--cluster", "no/such.yaml"), "no/such.yaml"),
        (("--dry-run", "--rank", "0"), "--rank and --cluster say what to trace"),
        (("--trace",), "--trace traces a dry run: add --dry-run"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    """Catches wrong use that is traced all the same, or answered with a traceback."""
    result = invoked(tmp_path, *arguments)
    assert result.exit_code != 0
    assert message in result.output + capsys.readouterr().err + str(result.exception)


def test_a_cluster_smaller_than_the_run(tmp_path: Path) -> None:
    """Catches ranks that are placed on nodes which the cluster does not have."""
    cluster = cluster_of(None, 4)
    small = cluster.model_dump(mode="json")
    file = tmp_path / "small.yaml"
    small["pools"][0]["gpus_per_node"] = 2
    file.write_text(to_yaml(small))
    result = invoked(tmp_path, *TRACED, "--cluster", str(file))
    assert result.exit_code == 2
    assert "4 ranks but the cluster" in result.output + str(result.stderr)


def test_rates() -> None:
    """Catches a roofline that adds what overlaps, and a group across nodes that is as fast as one inside."""
    cluster = cluster_of(None, 64)
    device = cluster.pools[0].device
    computing = operation_seconds(device, 1e15, 1e6, "bf16")
    assert computing == pytest.approx(1e15 / (989e12 * 0.74))
    assert operation_seconds(device, 1e9, 2.9e12, "bf16") == pytest.approx(1.0)
    inside, across = (exchange_seconds(cluster, "all_gather", ranks, 10**9) for ranks in (range(8), range(0, 64, 8)))
    assert across > 7 * inside
    assert exchange_seconds(cluster, "all_reduce", range(8), 10**9) == pytest.approx(2 * inside, rel=0.05)


def test_a_pipeline_is_as_slow_as_its_stages() -> None:
    """Catches a slow stage that delays nobody, and one that is taken for all: two equal stages make the drawn order, a slow second one
    makes the first wait, and what is no action of a stage is added.
    """
    order = compute_order("1f1b", 2, 1, 4)

    def facts(stage: int, factor: float) -> dict[str, Any]:
        actions = {f"{kind} {stage}": {"times": 4, "seconds": 4 * factor * t} for kind, t in (("F", 1.0), ("B", 2.0))}
        return {"rank_seconds": 12 * factor + 0.5, "actions": actions}

    equal = simulate(order)
    assert pipelined(order, {0: facts(0, 1.0), 1: facts(1, 1.0)}, 1) == (15.5, equal.bubble)
    slow, bubble = pipelined(order, {0: facts(0, 1.0), 1: facts(1, 2.0)}, 1)
    assert slow == 27.5 and bubble > equal.bubble
    assert pipelined(order, {0: facts(0, 1.0)}, 0)[0] == 15.5


def test_every_pool_in_use_is_traced() -> None:
    """Catches a run over two kinds of devices that is judged by the first one alone, and measured rates that are not used."""
    cluster = load_cluster("configs/clusters/two-pools.yaml")
    assert with_pools([0], cluster, 600) == [0, 512] and with_pools([0, 599], cluster, 600) == [0, 599]
    assert with_pools([0], cluster, 512) == [0]
    device = cluster_of(None, 4).pools[0].device
    halved = device.model_copy(update={"step_share": 0.5, "product_table": ((1e9, 1e12), (1e12, 1e12))})
    assert operation_seconds(halved, 1e11, 1.0, "bf16") == pytest.approx(0.2)


def test_smaller_runs_add_up() -> None:
    """Catches weights that do not sum to one run, and a layout that a smaller run does not have."""
    values = {**SMALL, "model": {**SMALL["model"], "num_layers": 40}, "train": {**SMALL["train"], "global_batch_size": 64}}
    config = check(build_config(values), 4)
    runs = runs_of(config, 4)
    assert len(runs) == 4
    total = combined((r.weight, {"n": 3 + 5 * r.config.model.num_layers + 7 * r.micro_batches}) for r in runs)
    assert total["n"] == 3 + 5 * 40 + 7 * 32
    both = combined((r.weight, {"n": {"of": r.config.model.num_layers * r.micro_batches}}) for r in runs)
    assert both == {"n": {"of": 40 * 32}}
