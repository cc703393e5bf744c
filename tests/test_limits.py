"""Limits of control groups, from files as kernels and containers show them."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from megascale.limits import core_quota, memory_free, memory_limit, raise_open_files

MB = 1 << 20


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        section, _, rest = name.partition("_")
        (folder / f"{section}.{rest}").write_text(text)


def member(folder: Path, text: str) -> Path:
    (folder / "own").write_text(text)
    return folder / "own"


def test_version_2(tmp_path: Path) -> None:
    """Catches a job's limit that is not at the root, one above the own group, and files that the kernel keeps taken for memory in use."""
    job = tmp_path / "system.slice" / "job_7"
    write(job, memory_max=f"{400 * MB}\n", memory_current=f"{300 * MB}\n", cpu_max="250000 100000\n")
    write(job, memory_stat=f"anon 5\ninactive_file {100 * MB}\nactive_file {50 * MB}\n")
    write(job / "step_0", memory_max="max\n", memory_current="5\n", cpu_max="max 100000\n")
    own = member(tmp_path, "0::/system.slice/job_7/step_0\n")
    assert memory_limit(1e12, tmp_path, own) == 400 * MB and memory_limit(5.0, tmp_path, own) == 5
    assert memory_free(1e12, tmp_path, own) == 250 * MB and core_quota(tmp_path, own) == 3
    write(tmp_path / "system.slice", memory_max=f"{90 * MB}", memory_current=f"{100 * MB}")
    assert memory_limit(1e12, tmp_path, own) == 90 * MB and memory_free(1e12, tmp_path, own) == 0


def test_version_1(tmp_path: Path) -> None:
    """Catches the limits of older clusters unseen, and their number for no limit taken for one."""
    job = tmp_path / "memory" / "slurm" / "job_7"
    write(job, memory_limit_in_bytes=f"{64 * MB}", memory_usage_in_bytes=f"{24 * MB}", memory_stat=f"total_inactive_file {4 * MB}\n")
    write(tmp_path / "memory", memory_limit_in_bytes="9223372036854771712", memory_usage_in_bytes="9")
    write(tmp_path / "cpu,cpuacct" / "slurm", cpu_cfs_quota_us="400000", cpu_cfs_period_us="100000")
    write(tmp_path / "cpu,cpuacct", cpu_cfs_quota_us="-1", cpu_cfs_period_us="100000")
    own = member(tmp_path, "1:name=systemd:/x\n4:memory:/slurm/job_7\n3:cpu,cpuacct:/slurm/job_7\n0::/\n")
    assert memory_limit(1e12, tmp_path, own) == 64 * MB and memory_free(1e12, tmp_path, own) == 44 * MB
    assert core_quota(tmp_path, own) == 4


@pytest.mark.parametrize("text", ["", "0::/docker/abc\n", "0::/../..\n", "no such line\n", None])
def test_containers_and_nothing(text: str | None, tmp_path: Path) -> None:
    """Catches a container's limit unseen since its path is one of the machine's, and files in whose form nothing is."""
    own = tmp_path / "none" if text is None else member(tmp_path, text)
    assert memory_limit(7.0, tmp_path, own) == memory_free(7.0, tmp_path, own) == 7 and core_quota(tmp_path, own) is None
    write(tmp_path, memory_max="5", memory_current="3", memory_stat="what", cpu_max="100000 0")
    assert (memory_limit(7.0, tmp_path, own), memory_free(7.0, tmp_path, own), core_quota(tmp_path, own)) == (5, 2, None)


def test_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches 1,024 files for a mixture of many sources, and a limit that is lowered."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda what, limits: asked.append(limits))
    for soft, hard in ((64, 4096), (1024, 1 << 30), (1024, resource.RLIM_INFINITY), (1 << 20, 1 << 20), (4096, 4096)):
        monkeypatch.setattr(resource, "getrlimit", lambda what, now=(soft, hard): now)
        raise_open_files()
    assert asked == [(4096, 4096), (65536, 1 << 30), (65536, resource.RLIM_INFINITY)]
