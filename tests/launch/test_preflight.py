"""Preflight: every pair meets, and what is slow, missing or different is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megascale.launch.rendezvous import free_port
from megascale.measure.diagnosis import Finding, diagnose, exclude_line
from megascale.measure.health import Health, tournament

ROOT = Path(__file__).resolve().parents[2]
WELL = [Health(r, f"n{r // 2}", 100 + r, 50, 60, 900.0 if r % 2 == 0 else None, 500, {"torch": "2.13.0"}) for r in range(8)]
QUICK = ["--gemm-size", "128", "--disk-mb", "1", "--link-mb", "1"]


@given(st.integers(1, 40))
def test_every_pair_meets_once(players: int) -> None:
    """Catches a pair that is left out or meets twice, and a player in two pairs of a round."""
    rounds = list(tournament(players))
    met = Counter(pair for pairs in rounds for pair in pairs)
    assert set(met) == {(a, b) for a in range(players) for b in range(a + 1, players)} and set(met.values()) <= {1}
    assert all(len({p for pair in pairs for p in pair}) == 2 * len(pairs) for pairs in rounds)
    assert len(rounds) <= players


def test_a_healthy_cluster() -> None:
    """Catches false alarms on the spread that every machine shows."""
    links = {(f"n{a}", f"n{b}"): 10.0 + a + b for a in range(4) for b in range(a + 1, 4)}
    assert diagnose(WELL, [], {"n0": 0.0, "n1": 0.01}, links, 0.7) == [] and exclude_line([]) is None


def test_the_unfit_are_named() -> None:
    """Catches a slow, silent or different node that passes, and the wrong end of a slow link that is blamed."""
    sick = [replace(WELL[0], gemm_tflops=30.0), *WELL[1:7], replace(WELL[7], versions={"torch": "2.12.0"})]
    links = {(f"n{a}", f"n{b}"): 1.0 if 2 in (a, b) else 10.0 for a in range(4) for b in range(a + 1, 4)}
    found = diagnose(sick, [(8, "n4")], {"n1": 7.0}, links, 0.7)
    assert Finding("n4", "rank 8 did not report") in found
    assert Finding("n0", "GEMM 30 TFLOP/s, and the median is 104") in found
    assert Finding("n3", "torch 2.12.0, and most ranks have 2.13.0") in found
    assert any(f.node == "n2" and "links" in f.what for f in found)
    assert Finding("n1", "its clock is +7.0 s from rank 0's", grave=False) in found
    assert exclude_line(found) == "--exclude=n0,n2,n3,n4"


def test_a_single_slow_link() -> None:
    """Catches two good nodes that are thrown out for the cable between them."""
    links = {(f"n{a}", f"n{b}"): 10.0 for a in range(4) for b in range(a + 1, 4)} | {("n1", "n3"): 1.0}
    found = diagnose(WELL, [], {}, links, 0.7)
    assert [(f.node, f.grave) for f in found] == [("n1", False)] and "link to n3" in found[0].what and exclude_line(found) is None


def start(folder: Path, rank: int, size: int, port: str, *words: str) -> subprocess.Popen[str]:
    env = {n: v for n, v in os.environ.items() if not n.startswith(("SLURM_", "OMPI_", "PMI"))}
    env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "launchers/preflight.py", "--out", str(folder), *QUICK, *words]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.dist
def test_three_ranks(tmp_path: Path) -> None:
    """Catches phases that do not end together and a report without its numbers. Rates of a busy test machine prove nothing: any share."""
    port = free_port(str(tmp_path))
    ranks = [start(tmp_path, r, 3, str(port), "--share", "0.01") for r in range(3)]
    out = [p.communicate(timeout=100) for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0, 0], out
    assert "all is well" in out[0][0] and out[1][0] == ""
    facts = json.loads((tmp_path / "preflight.json").read_text())
    assert facts["code"] == 0 and facts["exclude"] is None and len(facts["health"]) == 3 and len(facts["links_gb_per_second"]) == 3
    assert (
        facts["collectives_gb_per_second"].keys() == {"all_reduce", "all_gather"} and (tmp_path / "preflight.txt").read_text() == out[0][0]
    )


@pytest.mark.dist
def test_a_rank_that_never_comes(tmp_path: Path) -> None:
    """Catches a preflight that hangs with the nodes it was to find out about."""
    ranks = [start(tmp_path, r, 2, str(free_port(str(tmp_path))), "--timeout", "4") for r in range(1)]
    out, _ = ranks[0].communicate(timeout=60)
    assert ranks[0].returncode == 5 and "rank 1 did not report" in out


@pytest.mark.dist
def test_wrong_use(tmp_path: Path) -> None:
    """Catches a traceback for a folder that cannot be."""
    (tmp_path / "file").touch()
    command = [sys.executable, "launchers/preflight.py", "--out", str(tmp_path / "file" / "x")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "--out" in done.stderr
