"""A rank runs on the cores next to its GPU."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from megascale.launch import numa

GPU = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x4F, pci_device_id=0)


def test_cores_near_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a wrong address or list, a launcher's own binding that is widened, and a rank left without cores."""
    folder = tmp_path / "bus/pci/devices/0000:4f:00.0"
    folder.mkdir(parents=True)
    (folder / "local_cpulist").write_text("0-3,8\n")
    assert numa.bus_of(GPU) == folder.name and numa.bus_of(SimpleNamespace()) is None
    assert numa.cores_near(folder.name, frozenset(range(10)), tmp_path) == {0, 1, 2, 3, 8}
    assert numa.cores_near(folder.name, frozenset({2, 9}), tmp_path) == {2}
    assert numa.cores_near(folder.name, frozenset({9}), tmp_path) == {9} == numa.cores_near("0000:00:00.0", frozenset({9}), tmp_path)
    (folder / "local_cpulist").write_text("none\n")
    assert numa.cores_near(folder.name, frozenset({1, 9}), tmp_path) == {1, 9}
    bound: list[frozenset[int]] = []
    monkeypatch.setattr(numa, "own_cores", lambda: frozenset(range(10)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: bound.append(cores), raising=False)
    numa.bind_near(GPU, tmp_path)
    (folder / "local_cpulist").write_text("4-5\n")
    numa.bind_near(GPU, tmp_path)
    assert bound == [{4, 5}]
