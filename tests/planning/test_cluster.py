"""Cluster files: what they say about links, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megascale.errors import UsageError
from megascale.planning.cluster import Link, load_cluster

FILES = sorted(Path("configs/clusters").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_shipped_clusters_load(file: Path) -> None:
    """Catches a file that the schema no longer takes, and a number off by a power of ten: memory, links and peaks in a plausible order."""
    cluster = load_cluster(file)
    assert cluster.name == file.stem and cluster.gpus >= 4
    for pool in cluster.pools:
        device = pool.device
        assert 1e9 < device.room < 300e9
        assert pool.between.bytes_per_second < pool.inside.bytes_per_second < device.memory_bytes_per_second
        assert device.peak("fp64") <= device.peak("fp32") <= device.peak("bf16")


def test_rings_use_the_links_of_their_ranks() -> None:
    """Catches a ring over nodes that is charged with one NIC although eight ranks of a node share its traffic, and a group that is taken
    to lie inside a node because it is small.
    """
    cluster = load_cluster("configs/clusters/two-pools.yaml")
    first = cluster.pools[0]
    assert cluster.joins(range(8)) == (first.inside, 1.0)
    assert cluster.joins(range(0, 512, 8)) == (first.between, 1.0)
    assert cluster.joins(range(16)) == (first.between, 8.0)
    assert cluster.joins([0, 512]) == (cluster.between_pools, 1.0)
    assert cluster.node_of(511) == (0, 63) and cluster.node_of(512) == (1, 0)


def test_a_table_of_measured_rates_is_read_between_its_sizes() -> None:
    """Catches rates interpolated where times should be, and messages below or above the table."""
    link = Link(bytes_per_second=1.0, table=((1e3, 1e6), (1e6, 1e9)))
    assert link.seconds(1e3) == link.seconds(10) == pytest.approx(1e-3)  # no message is faster than the smallest
    assert link.seconds(1e9) == pytest.approx(1.0)
    assert link.seconds(2e6, messages=2) == pytest.approx(2e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pools": []}, "pools"),
        ({"nmae": "x"}, "nmae"),
        ({"pools": [{"nodes": 0}]}, "pools.0.nodes"),
        ({"pools": 2}, "between_pools"),
        ({"product_table": [[1e9, 1e12], [1e6, 1e12]]}, "product_table has the size 1e\\+06 after 1e\\+09"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, change: dict[str, object], words: str) -> None:
    """Catches a traceback, or a message without the file and key, for a missing, unknown or impossible number."""
    values = load_cluster("configs/clusters/laptop.yaml").model_dump(mode="json")
    if "product_table" in change:
        values["pools"][0]["device"] |= change
        change = {}
    values |= {"pools": [*values["pools"], *values["pools"]]} if change == {"pools": 2} else change
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps(values))
    with pytest.raises(UsageError, match=words) as error:
        load_cluster(file)
    assert str(file) in str(error.value)


def test_planning_loads_no_torch() -> None:
    """Catches an import that makes every look at a cluster wait for torch."""
    code = "import sys, megascale.planning.cluster; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
