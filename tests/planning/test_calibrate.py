"""`megascale plan --calibrate`: what is measured becomes a cluster file that loads and plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megascale.commands.plan import app
from megascale.errors import UsageError
from megascale.planning import measured
from megascale.planning.calibrate import calibrate, from_measured
from megascale.planning.cluster import load_cluster

POD = Path("configs/clusters/h100-pod.yaml")
CEILINGS = Path("benchmarks/gpu/results/ceilings.json")
FOUND: dict[str, Any] = {
    "name": "1/4 of a CPU",
    "memory": 4e9,
    "products": {"fp32": [(1e6, 2e9), (1e9, 8e9)], "bf16": [(1e6, 1e9), (1e9, 4e9)]},
    "attention": 2e9,
    "copied": 3e9,
    "kernel": 5e-6,
    "links": [(1e3, 1e6), (1e6, 5e8)],
}


@pytest.mark.dist
def test_two_ranks_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ranks that wait for each other forever, a table out of order, and a file that the planner does not take."""
    monkeypatch.setitem(measured.SIZES, "cpu", measured.Sizes((16, 32), (1, 1, 32, 8), 1 << 12, (1e3, 1e4)))
    monkeypatch.setattr("megascale.planning.calibrate.BUDGET", 0.001)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    lines = calibrate(tmp_path / "here.yaml", 2, None, None)
    assert lines[0].startswith(f"wrote {tmp_path}/here.yaml: 2 × 1/2 of a CPU")
    cluster = load_cluster(tmp_path / "here.yaml")
    assert cluster.gpus == 2 and len(cluster.pools[0].inside.table) == 2
    assert cluster.pools[0].device.product_rate("fp32", 2 * 16.0**3) > 0


def test_rates_become_a_cluster() -> None:
    """Catches shares of another format's peak, and a table of one format for another."""
    cluster = from_measured(FOUND, 4, "cpu", None)
    device = cluster.pools[0].device
    assert device.product_rate("fp32") == pytest.approx(8e9) and device.product_rate("bf16") == pytest.approx(4e9)
    assert device.product_rate("fp32", 1e6) == pytest.approx(2e9)
    assert device.attention_share * device.peak("fp32") == pytest.approx(2e9)
    link, _ = cluster.joins(range(4))
    assert link.seconds(1e6) == pytest.approx(1e6 / 5e8)
    base = load_cluster(POD)
    over = from_measured(FOUND, 4, "cpu", base)
    assert over.gpus == base.gpus and over.pools[0].between == base.pools[0].between and over.pools[0].inside.table


def test_results_of_a_gpu_are_laid_over(tmp_path: Path) -> None:
    """Catches rates in other units, and prices or links of the base that are lost."""
    out = tmp_path / "h100.yaml"
    shown = CliRunner().invoke(app, ["--calibrate", str(out), "--cluster", str(POD), "--measured", str(CEILINGS)])
    assert shown.exit_code == 0, shown.output
    new, base = load_cluster(out), load_cluster(POD)
    assert new.gpus == base.gpus and new.pools[0].between == base.pools[0].between
    assert 600e12 < new.pools[0].device.product_rate("bf16") < 800e12 and 1000e12 < new.pools[0].device.product_rate("fp8") < 1400e12
    assert new.pools[0].device.memory_bytes_per_second == pytest.approx(3.006e12)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "a plan needs a config and --cluster FILE"),
        (["--measured", "x.json"], "add --calibrate FILE"),
        (["--calibrate", "OUT", "--measured", str(CEILINGS)], "add --cluster FILE to lay them over"),
        (["--calibrate", "OUT", "--cluster", str(POD), "--measured", "none.json"], "cannot be read"),
        (["--calibrate", "OUT", "--cluster", str(POD), "--measured", "bad.json"], "has no products_teraflops"),
        (["--calibrate", "OUT", "--gpus", "0"], "--gpus is 0"),
    ],
)
def test_wrong_use_is_a_sentence(arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback, and a file written in spite of it."""
    (tmp_path / "bad.json").write_text(json.dumps({"machine": [], "result": []}))
    out = tmp_path / "out.yaml"
    given = [str(out) if a == "OUT" else str(tmp_path / a) if a == "bad.json" else a for a in arguments]
    result = CliRunner().invoke(app, given)
    assert isinstance(result.exception, UsageError) and words in str(result.exception) and not out.exists()
