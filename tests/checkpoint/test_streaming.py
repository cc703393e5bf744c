"""Checkpoints made slab by slab: the same bytes however they are made, whole or not there."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megascale.checkpoint.index import read_index
from megascale.checkpoint.loader import verify
from megascale.checkpoint.shards import read_slice
from megascale.checkpoint.streaming import Target, pack, slabs, write_streamed
from megascale.errors import UsageError
from tests.checkpoint.states import TENSORS, whole

TARGETS = [Target(name, dtype, shape) for name, (shape, dtype) in TENSORS.items()]


@dataclass(frozen=True)
class Cut:
    """Rectangles of the test's tensors; `slow` seconds each, and the one at `broken` is refused."""

    slow: float = 0.0
    broken: str = ""

    def __call__(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        time.sleep(self.slow)
        if name == self.broken:
            raise UsageError("the source is damaged")
        return whole(name)[tuple(slice(o, o + n) for o, n in zip(offset, shape))]


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@settings(max_examples=25, deadline=None)
@given(slab=st.integers(1, 200), file=st.integers(8, 400))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, slab: int, file: int) -> None:
    """Slabs that leave out or repeat elements, and chunks whose offsets are not theirs."""
    root = tmp_path_factory.mktemp("root")
    folder = write_streamed(root, 3, TARGETS, Cut(), {"a": 1}, stamp="s", slab_bytes=slab, file_bytes=file)
    assert verify(folder) == []
    for name, (shape, dtype) in TENSORS.items():
        read = read_slice(folder, name, (0,) * len(shape), shape)
        assert read.dtype == dtype
        assert torch.equal(read.view(torch.uint8) if shape else read, whole(name).view(torch.uint8) if shape else whole(name))
    shutil.rmtree(root)


@given(sizes=st.lists(st.integers(1, 5), max_size=4).map(tuple), most=st.integers(1, 30))
def test_slabs_follow_one_another(sizes: tuple[int, ...], most: int) -> None:
    """A cut in another order than memory's, which would write a file whose tensors are permuted."""
    numbers = torch.arange(max(1, torch.tensor(sizes).prod().item() if sizes else 1)).view(sizes)
    cut = [numbers[tuple(slice(o, o + n) for o, n in zip(*slab))].reshape(-1) for slab in slabs((0,) * len(sizes), sizes, most)]
    assert torch.equal(torch.cat(cut), numbers.reshape(-1))
    assert max(c.numel() for c in cut) <= most


def test_workers_do_not_change_a_bit(tmp_path: Path) -> None:
    """Files assigned to workers instead of to tensors; slabs that show in the bytes."""
    one = write_streamed(tmp_path / "one", 0, TARGETS, Cut(), {}, stamp="s", slab_bytes=7, file_bytes=60)
    two = write_streamed(tmp_path / "two", 0, TARGETS, Cut(), {}, stamp="s", workers=2, file_bytes=60)
    assert len(pack(TARGETS, 60)) > 3
    assert content(one) == content(two)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_leaves_nothing(tmp_path: Path, workers: int) -> None:
    """A half-written folder, or an empty one, after an error in the middle."""
    with pytest.raises(UsageError, match="the source is damaged"):
        write_streamed(tmp_path / "new", 0, TARGETS, Cut(broken="optim.m"), {}, stamp="s", workers=workers, file_bytes=60)
    assert not (tmp_path / "new").exists()


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing that begins although the disk is known to be too small."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="make room"):
        write_streamed(tmp_path / "new", 0, TARGETS, Cut(), {}, stamp="s")
    assert not (tmp_path / "new").exists()


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """Work that starts from nothing again, or that takes a half-written file, or files made from another source, for finished."""
    program = (
        "from tests.checkpoint.test_streaming import *\n"
        "write_streamed(sys.argv[1], 0, TARGETS, Cut(slow=0.1), {}, stamp='s', slab_bytes=16, file_bytes=60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "killed")], cwd=Path(__file__).parents[2])
    temporary = tmp_path / "killed" / ".tmp-step-00000000"
    deadline = time.monotonic() + 60
    while len(list(temporary.glob("*.done"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = {p.name.removesuffix(".done") for p in temporary.glob("*.done")}
    assert len(finished) >= 2
    assert not (tmp_path / "killed" / "step-00000000").exists()
    times = {name: (temporary / name).stat().st_mtime_ns for name in finished}
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "killed", other)  # keeps the times
    done = write_streamed(tmp_path / "killed", 0, TARGETS, Cut(), {}, stamp="s", slab_bytes=16, file_bytes=60)
    assert {name: (done / name).stat().st_mtime_ns for name in finished} == times
    anew = write_streamed(other, 0, TARGETS, Cut(), {}, stamp="another", slab_bytes=16, file_bytes=60)
    assert all((anew / name).stat().st_mtime_ns != times[name] for name in finished)
    assert content(done) == content(anew)
    assert {p.name for p in done.iterdir()} == set(read_index(done).files) | {"index.json"}
