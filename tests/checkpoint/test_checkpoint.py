"""Checkpoints: any layout to any other bit for bit, damage refused, failures survived."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megascale.checkpoint import index as index_module
from megascale.checkpoint import storage
from megascale.checkpoint.index import read_index
from megascale.checkpoint.loader import find, load, newest, verify
from megascale.checkpoint.saver import Checkpointer, Event
from megascale.checkpoint.shards import read_slice
from megascale.comm.piece import Piece, chunk_bounds
from megascale.errors import UsageError
from tests.ranks import run_ranks

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.float8_e4m3fn, torch.bool]


def whole_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def cut(whole: torch.Tensor, dims: tuple[int | None, int | None], grid: tuple[int, int], rank: int) -> Piece:
    """This rank's rectangle on a two-dimensional grid of ranks; None replicates along that axis of the grid."""
    place = divmod(rank, grid[1])
    offset, local = [0] * whole.ndim, whole
    for dim, ranks, at in zip(dims, grid, place):
        if dim is not None and dim < whole.ndim:
            first, last = chunk_bounds(local.shape[dim], ranks, at)
            offset[dim] += first
            local = local.narrow(dim, first, last - first)
    return Piece(tuple(whole.shape), tuple(offset), local.clone())


Layout = tuple[tuple[int, int], list[tuple[int | None, int | None]]]
SHAPES: dict[str, tuple[int, ...]] = {"model.a": (7, 5), "model.b": (3,), "optim.m": (2, 6, 3), "optim.step": (), "model.e": (1, 4)}


def state(layout: Layout, rank: int, zero: bool = False) -> dict[str, Piece]:
    grid, dims = layout
    result = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        piece = cut(whole_tensor(name, shape, DTYPES[i % len(DTYPES)]), dims[i], grid, rank)
        result[name] = Piece(piece.shape, piece.offset, torch.zeros_like(piece.local)) if zero else piece
    return result


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    grid = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (2, 2), (1, 4)]))
    choice = st.sampled_from([None, 0, 1])
    return grid, [(draw(choice), draw(choice)) for _ in SHAPES]


def save_as(root: str, layout: Layout, step: int = 1) -> list[Event]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    saver = Checkpointer(Path(root), keep_last=3, keep_every=None, asynchronous=True)
    saver.save(step, state(layout, rank), {"step": step})
    return saver.finish()


def load_as(root: str, layout: Layout) -> bool:
    rank = dist.get_rank() if dist.is_initialized() else 0
    target, wanted = state(layout, rank, zero=True), state(layout, rank)
    assert load(find(root), target)["step"] == 1
    return all(torch.equal(target[n].local.view(torch.uint8), wanted[n].local.view(torch.uint8)) for n in target if wanted[n].local.ndim)


@pytest.mark.dist
@given(layouts(), layouts())
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_layout_to_any_other(tmp_path_factory: pytest.TempPathFactory, a: Layout, b: Layout) -> None:
    """Catches rectangles read from the wrong place: uneven, empty, replicated and strided pieces of six dtypes."""
    root = str(tmp_path_factory.mktemp("ck"))
    for events in run_ranks(a[0][0] * a[0][1], save_as, root, a):
        assert [e.kind for e in events] == ["saved"], events
    assert all(run_ranks(b[0][0] * b[0][1], load_as, root, b))
    assert verify(find(root)) == []


ONE: Layout = ((1, 1), [(None, None)] * len(SHAPES))
TWO: Layout = ((2, 1), [(0, None)] * len(SHAPES))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    run_ranks(2, save_as, str(tmp_path), TWO)
    return find(tmp_path)


def edit(folder: Path, change: Any) -> None:
    raw = json.loads((folder / "index.json").read_text())
    change(raw)
    (folder / "index.json").write_text(json.dumps(raw))


def flip(folder: Path) -> None:
    path = folder / "rank-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def shard(raw: Any) -> Any:
    return raw["tensors"]["model.a"]["chunks"]


DAMAGE: dict[str, tuple[Any, str]] = {
    "a shard is gone": (lambda f: (f / "rank-00001.safetensors").unlink(), "rank-00001.safetensors cannot be read"),
    "a bit flipped": (flip, "rank-00001.safetensors has checksum"),
    "a shard is short": (lambda f: os.truncate(f / "rank-00000.safetensors", 100), "has 100 bytes and index.json says"),
    "no index": (lambda f: (f / "index.json").unlink(), "index.json"),
    "index is no JSON": (lambda f: (f / "index.json").write_text("{"), "cannot be read"),
    "index is a list": (lambda f: (f / "index.json").write_text("[]"), "instead of an object"),
    "index of the future": (lambda f: edit(f, lambda r: r.update(version=99)), "format version 99"),
    "path out of the folder": (lambda f: edit(f, lambda r: r["files"].update({"../x": {"bytes": 1, "crc32": 1}})), "is no name of a shard file"),
    "a chunk is missing": (lambda f: edit(f, lambda r: shard(r).pop()), "hold 20 of its 35 elements"),
    "chunks overlap": (lambda f: edit(f, lambda r: shard(r)[1].update(offsets=[3, 0], sizes=[3, 5])), "overlap"),
    "negative size": (lambda f: edit(f, lambda r: shard(r)[0].update(sizes=[-4, 5])), "is no size"),
    "unknown dtype": (lambda f: edit(f, lambda r: r["tensors"]["model.a"].update(dtype="PICKLE")), "unknown dtype"),
    "trainer.json is no JSON": (lambda f: (f / "trainer.json").write_text("nan nan"), "trainer.json cannot be read"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_refused(saved: Path, what: str) -> None:
    """Catches silent loading of wrong numbers, and tracebacks on files that somebody touched."""
    damage, words = DAMAGE[what]
    damage(saved)
    with pytest.raises(UsageError, match=words):
        load(saved, state(ONE, 0, zero=True))


def replace_piece(name: str, piece: Piece) -> dict[str, Piece]:
    return {**state(ONE, 0), name: piece}


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (lambda: replace_piece("model.a", Piece((7, 4), (0, 0), torch.zeros(7, 4))), r"\[7, 5\] in .* and \[7, 4\] here"),
        (lambda: replace_piece("model.a", Piece((7, 5), (0, 0), torch.zeros(7, 5).bfloat16())), "float32 in .* and torch.bfloat16 here"),
        (lambda: replace_piece("model.new", Piece((1,), (0,), torch.zeros(1))), "lacks model.new"),
        (lambda: {k: v for k, v in state(ONE, 0).items() if k != "optim.m"}, "also holds optim.m"),
    ],
)
def test_what_does_not_fit_is_refused(saved: Path, wanted: Any, words: str) -> None:
    """Catches silent casts and state that is left at its start because its name changed."""
    with pytest.raises(UsageError, match=words):
        load(saved, wanted())


def test_weights_alone(saved: Path) -> None:
    """Catches init_from that insists on an optimizer, or that forgets a weight."""
    target = {k: v for k, v in state(ONE, 0, zero=True).items() if k.startswith("model.")}
    load(saved, target, prefix="model.")
    assert torch.equal(target["model.a"].local, state(ONE, 0)["model.a"].local)
    del target["model.a"]
    with pytest.raises(UsageError, match="also holds model.a"):
        load(saved, target, prefix="model.")


def test_nothing_on_disk_is_unpickled(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a reader that would run code from a checkpoint: one process needs no pickle at all."""
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, None)
    monkeypatch.setattr(torch, "load", None)
    load(saved, state(ONE, 0, zero=True))
    assert {p.suffix for p in saved.iterdir()} == {".safetensors", ".json"}


def test_old_formats_are_migrated(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a version number without a way to read what it stands for."""

    def rename(raw: dict[str, Any]) -> dict[str, Any]:
        return {**raw, "version": 1, "tensors": raw["parameters"]}

    edit(saved, lambda r: r.update(version=0, parameters=r.pop("tensors")))
    monkeypatch.setitem(index_module.MIGRATIONS, 0, rename)
    load(saved, state(ONE, 0, zero=True))


def test_slices_come_from_the_chunks_they_touch(saved: Path) -> None:
    """Catches streaming tools that read shifted rows, and a rectangle beyond the tensor."""
    whole = state(ONE, 0)["model.a"].local
    index = read_index(saved)
    assert torch.equal(read_slice(index, "model.a", (2, 1), (4, 3)), whole[2:6, 1:4])
    with pytest.raises(UsageError, match="there is no"):
        read_slice(index, "model.a", (5, 0), (3, 5))


def diverged(root: str) -> list[Event]:
    piece = Piece((4,), (0,), torch.full((4,), float(dist.get_rank())))
    saver = Checkpointer(Path(root), keep_last=3, keep_every=None, asynchronous=False)
    saver.save(1, {"model.norm": piece}, {})
    return saver.finish()


@pytest.mark.dist
def test_replicas_that_differ_are_not_saved(tmp_path: Path) -> None:
    """Catches a run that has come apart: one of two different "equal" tensors would be kept and the other lost."""
    for events in run_ranks(2, diverged, str(tmp_path)):
        assert [e.kind for e in events] == ["failed"] and "model.norm should be the same on ranks 0 and 1" in events[0].message


def test_numbers_in_the_state_are_refused(tmp_path: Path) -> None:
    """Catches a plain number that would end up as an unreadable shard."""
    saver = Checkpointer(tmp_path, keep_last=1, keep_every=None, asynchronous=False)
    saver.save(1, {"optim.lr": 3.0}, {})  # type: ignore[dict-item]
    assert "optim.lr = 3.0, which is no tensor" in saver.finish()[0].message


def fails_once(root: str, rank_that_fails: int) -> list[list[str]]:
    """Step 1 is saved, step 2 fails on one rank, step 3 is saved."""
    real = storage.write_shard
    kinds = []
    saver = Checkpointer(Path(root), keep_last=3, keep_every=None, asynchronous=True)
    for step in (1, 2, 3):

        def full(*args: Any, step: int = step) -> Any:
            if step == 2 and dist.get_rank() == rank_that_fails:
                raise OSError(28, "No space left on device")
            return real(*args)

        storage.write_shard = full  # type: ignore[assignment]
        saver.save(step, state(TWO, dist.get_rank()), {"step": step})
        kinds.append([e.kind for e in saver.finish()])
    return kinds


@pytest.mark.dist
@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_keeps_the_old_checkpoints(tmp_path: Path, rank: int) -> None:
    """Catches ranks that wait for the one whose disk is full, half a checkpoint that is left, and training that ends for it."""
    assert run_ranks(2, fails_once, str(tmp_path), rank) == [[["saved"], ["failed"], ["saved"]]] * 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001", "step-00000003"]


def test_a_file_size_limit_is_survived_for_real(tmp_path: Path) -> None:
    """Catches an error path that works only when it is faked: the kernel refuses the write here."""
    script = f"""
import resource, signal, torch, pathlib
from megascale.checkpoint.saver import Checkpointer
from megascale.comm.piece import Piece
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
s = Checkpointer(pathlib.Path({str(tmp_path)!r}), keep_last=2, keep_every=None, asynchronous=True)
state = {{"model.a": Piece((100000,), (0,), torch.ones(100000))}}
s.save(1, state, {{}}); print(s.finish()[0].kind)
resource.setrlimit(resource.RLIMIT_FSIZE, (200000, 200000))
s.save(2, state, {{}}); e = s.finish()[0]; print(e.kind, e.message)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.startswith("saved\nfailed OSError"), out
    assert newest(tmp_path) == tmp_path / "step-00000001"


def test_retention(tmp_path: Path) -> None:
    """Catches checkpoints that pile up, and milestones that are deleted."""
    saver = Checkpointer(tmp_path, keep_last=2, keep_every=4, asynchronous=False)
    for step in range(1, 10):
        saver.save(step, {"model.a": Piece((2,), (0,), torch.ones(2))}, {"step": step})
    assert {e.kind for e in saver.finish()} == {"saved"}
    assert sorted(p.name for p in tmp_path.glob("step-*")) == [f"step-0000000{n}" for n in (4, 8, 9)]
    assert (tmp_path / "latest").read_text() == "step-00000009\n"


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    """Catches shards of two saves mixed in one folder."""
    saver = Checkpointer(tmp_path, keep_last=2, keep_every=None, asynchronous=False)
    for value in (1.0, 2.0):
        saver.save(1, {f"model.{value}": Piece((2,), (0,), torch.full((2,), value))}, {})
    assert list(read_index(newest(tmp_path) or tmp_path).tensors) == ["model.2.0"]


def test_newest_passes_over_what_is_damaged(tmp_path: Path) -> None:
    """Catches a resume from a folder that was not finished, and one that gives up although an older checkpoint is whole."""
    saver = Checkpointer(tmp_path, keep_last=5, keep_every=None, asynchronous=False)
    for step in (1, 2, 3):
        saver.save(step, {"model.a": Piece((2,), (0,), torch.ones(2))}, {"step": step})
    (tmp_path / "step-00000003" / "index.json").write_text("{")
    (tmp_path / ".tmp-step-00000004").mkdir()
    assert newest(tmp_path) == tmp_path / "step-00000002"
    (tmp_path / "latest").write_text("../../etc\n")
    assert newest(tmp_path) == tmp_path / "step-00000002"


def test_kills_at_any_time_leave_a_whole_checkpoint(tmp_path: Path) -> None:
    """Catches any moment at which `latest` names something that is not whole."""
    script = f"""
import torch, pathlib
from megascale.checkpoint.saver import Checkpointer
from megascale.comm.piece import Piece
s = Checkpointer(pathlib.Path({str(tmp_path)!r}), keep_last=2, keep_every=None, asynchronous=True)
state = {{"model.a": Piece((400000,), (0,), torch.ones(400000))}}
print("ready", flush=True)
for step in range(1, 100000): s.save(step, state, {{"step": step}})
"""
    for delay in (0.03, 0.1, 0.17, 0.3):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.2 + delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        named = tmp_path / (tmp_path / "latest").read_text().strip()
        assert verify(named) == []
        found = newest(tmp_path)
        assert found is not None and verify(found) == []


def test_inspect_tool(saved: Path) -> None:
    """Catches a tool that calls a damaged checkpoint whole, or shows a traceback."""

    def tool(*args: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "tools/inspect_checkpoint.py", *map(str, args)], capture_output=True, text=True, check=False)

    done = tool(saved, "--verify")
    assert done.returncode == 0 and "whole" in done.stdout and "model" in done.stdout, done.stderr
    flip(saved)
    done = tool(saved, "--verify")
    assert done.returncode == 2 and "checksum" in done.stderr and "Traceback" not in done.stderr
    done = tool(saved.parent.parent / "nowhere")
    assert done.returncode == 2 and "no checkpoint" in done.stderr
