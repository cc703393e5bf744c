"""Saving beside training: stalls, events, failures, kills, retention."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megascale.checkpoint import folders, storage
from megascale.checkpoint.index import read_index
from megascale.checkpoint.loader import find, load, newest, verify
from megascale.checkpoint.saver import write_checkpoint
from megascale.checkpoint.shards import read_slice
from megascale.comm.piece import Piece
from tests.checkpoint.states import checkpointer, cut_rows, kinds, on_ranks, same, state, this_rank, vector


def steps(root: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in root.glob("step-*"))


def test_training_goes_on_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a save that holds training up, one that writes what training has changed since, and events that are lost or repeated."""
    go_on = threading.Event()

    def slow(*args: Any, **options: Any) -> Path:
        assert go_on.wait(20)
        return write_checkpoint(*args, **options)

    monkeypatch.setattr("megascale.checkpoint.saver.write_checkpoint", slow)
    saver = checkpointer(tmp_path, asynchronous=True)
    pieces, trainer = state(cut_rows(1)), {"step": 1, "ids": {"a": 1}}
    saver.save(1, pieces, trainer)
    for piece in pieces.values():
        piece.local.zero_()
    trainer["ids"]["a"] = 2  # type: ignore[index]
    assert saver.poll() == [] and steps(tmp_path) == []
    go_on.set()
    (event,) = saver.finish()
    assert (event.kind, event.step, event.message) == ("saved", 1, "") and 0 < event.seconds < 20
    assert saver.poll() == [] and saver.finish() == []
    target = state(cut_rows(1), fill=0)
    assert load(find(tmp_path), target) == {"step": 1, "ids": {"a": 1}}
    assert same(target, state(cut_rows(1)))


def test_saves_follow_each_other_and_reuse_their_memory(tmp_path: Path) -> None:
    """Catches two saves at once, events of the first lost in the second, and fresh buffers, which cost ten times a copy."""
    saver = checkpointer(tmp_path, asynchronous=True)
    places = set()
    for step in (1, 2, 3):
        saver.save(step, vector(step), {"step": step})
        places.add(tuple(b.data_ptr() for b in saver._buffers.values()))
    assert [(e.kind, e.step) for e in saver.finish()] == [("saved", 1), ("saved", 2), ("saved", 3)]
    assert len(places) == 1
    for step in (1, 2, 3):
        assert read_slice(tmp_path / f"step-0000000{step}", "model.norm", (1,), (1,)) == step
    saver.save(4, vector(4.0, size=9), {})  # another shape needs another buffer
    assert kinds(saver.finish()) == ["saved"] and read_slice(find(tmp_path), "model.norm", (8,), (1,)) == 4


def refuse_and_mend(root: str) -> list[str]:
    """The first save is refused on rank 1 alone, after rank 0 has made its plan."""
    saver, events = checkpointer(root), []
    for value in (0.0, 1.0, 2.0):
        saver.save(1, vector(value) if value or this_rank() == 0 else {"model.norm": value}, {})  # type: ignore[dict-item]
        events += saver.finish()
    return kinds(events)


@pytest.mark.dist
def test_a_plan_that_failed_is_forgotten(tmp_path: Path) -> None:
    """Catches a cache that believes the plan of a save that was refused."""
    assert on_ranks(2, refuse_and_mend, str(tmp_path)) == [["failed", "saved", "saved"]] * 2
    assert read_slice(find(tmp_path), "model.norm", (3,), (1,)) == 2


def events_of(root: str, fail: Callable[[int, int], bool], asynchronous: bool) -> list[list[tuple[str, str]]]:
    """Saves steps 1, 2 and 3; the disk is full where `fail(step, rank)` says so."""
    real = storage.write_shard
    saver, result = checkpointer(root, asynchronous=asynchronous), []
    for step in (1, 2, 3):

        def write(path: Path, tensors: Any, step: int = step) -> Any:
            if fail(step, this_rank()):
                path.write_bytes(b"half")
                raise OSError(28, "No space left on device", str(path))
            return real(path, tensors)

        storage.write_shard = write  # type: ignore[assignment]
        saver.save(step, state(cut_rows(2), this_rank()), {"step": step})
        result.append([(e.kind, e.message) for e in saver.finish()])
    return result


@pytest.mark.dist
@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_on_one_rank(tmp_path: Path, rank: int, asynchronous: bool) -> None:
    """Catches ranks that wait for the one whose disk is full, half a checkpoint left, old ones lost, and training that ends."""
    first, second = on_ranks(2, events_of, str(tmp_path), lambda step, r: step == 2 and r == rank, asynchronous)
    assert first == second and [[kind for kind, _ in events] for events in first] == [["saved"], ["failed"], ["saved"]]
    message = first[1][0][1]
    assert "No space left on device" in message and f"rank-0000{rank}.safetensors" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001", "step-00000003"]
    assert verify(find(tmp_path)) == []


PUBLISHING = [
    ("write_durably", "trainer.json"),
    ("write_durably", "index.json"),
    ("write_durably", ".tmp-latest"),
    ("sync_folder", ""),
    ("publish", ""),
]


def publication_fails(root: str, what: str, file: str) -> list[list[str]]:
    real, result = getattr(folders, what), []
    saver = checkpointer(root, asynchronous=True)
    for step in (1, 2, 3):

        def broken(path: Path, *args: Any, step: int = step) -> Any:
            if step == 2 and (not file or path.name == file):
                raise OSError(28, "No space left on device")
            return real(path, *args)

        for module in (storage, folders):  # what is in the folder, and its name
            if hasattr(module, what):
                setattr(module, what, broken)
        saver.save(step, state(cut_rows(2), this_rank()), {"step": step})
        result.append(kinds(saver.finish()))
    return result


@pytest.mark.dist
@pytest.mark.parametrize(("what", "file"), PUBLISHING)
def test_a_disk_that_is_full_at_the_end(tmp_path: Path, what: str, file: str) -> None:
    """Catches a rank that reports success because only the coordinator, who publishes, has failed."""
    assert on_ranks(2, publication_fails, str(tmp_path), what, file) == [[["saved"], ["failed"], ["saved"]]] * 2
    assert steps(tmp_path) == [1, 3] and list(tmp_path.glob(".tmp*")) == []


def limited(root: str, rank_with_limit: int) -> list[tuple[str, str]]:
    """The kernel refuses the second save's writes on one rank, beyond a file size."""
    pieces = {"model.a": Piece((400_000,), (200_000 * this_rank(),), torch.ones(200_000))}
    saver, events = checkpointer(root, asynchronous=True), []
    for step in (1, 2):
        if step == 2 and this_rank() == rank_with_limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
        saver.save(step, pieces, {"step": step})
        events += saver.finish()
    return [(e.kind, e.message) for e in events]


@pytest.mark.dist
def test_a_limit_of_the_kernel(tmp_path: Path) -> None:
    """Catches an error path that works only where it is faked: here the kernel ends a write in its middle."""
    first, second = on_ranks(2, limited, str(tmp_path), 1)
    assert first == second and [kind for kind, _ in first] == ["saved", "failed"]
    assert "File too large" in first[1][1] and "rank-00001.safetensors" in first[1][1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"] and verify(find(tmp_path)) == []


def start(ranks: int, folder: Path, work: Callable[..., None], *args: Any) -> list[Any]:
    """Ranks that may be killed: forked, with one thread each."""

    def rank_main(rank: int) -> None:
        torch.set_num_threads(1)
        if ranks > 1:
            dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), ranks), rank=rank, world_size=ranks)
        work(*args)

    processes = [multiprocessing.get_context("fork").Process(target=rank_main, args=(r,), daemon=True) for r in range(ranks)]
    for process in processes:
        process.start()
    return processes


def save_for_ever(root: str, first: int) -> None:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    saver = checkpointer(root, keep_last=2, asynchronous=True)
    for step in range(first, first + 100_000):
        local = torch.full((300_000 // ranks,), float(step))
        # Every other save replaces the one before, which is the moment without a folder of that name.
        saver.save(step // 2, {"model.a": Piece((300_000,), (this_rank() * (300_000 // ranks),), local)}, {"step": step})


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 2])
def test_kills_at_any_time_leave_a_whole_checkpoint(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, ranks: int) -> None:
    """Catches any moment at which `latest` names something that is not whole, and left-overs that are in the next run's way."""
    generator, first, reached, found = random.Random(ranks), 2, set(), None
    for _ in range(12):
        processes = start(ranks, tmp_path_factory.mktemp("store"), save_for_ever, str(tmp_path), first)
        deadline = time.monotonic() + 20
        while newest(tmp_path) == found and time.monotonic() < deadline:  # its first save is there
            time.sleep(0.01)
        time.sleep(generator.uniform(0.1, 0.35))
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
        for process in processes:
            process.join()
        found = newest(tmp_path)
        assert found is not None and verify(found) == []
        target = {"model.a": Piece((300_000,), (0,), torch.zeros(300_000))}
        step = load(found, target)["step"]
        assert bool((target["model.a"].local == step).all()) and step >= first - 2
        reached.add(step)
        first = step + 2
    assert len(reached) > 6  # the kills came while it was saving


def lose_a_peer(root: str) -> None:
    real = storage.write_shard

    def die(*args: Any) -> Any:
        if this_rank() == 1:
            os._exit(1)
        return real(*args)

    saver = checkpointer(root, asynchronous=True)
    saver.save(1, state(cut_rows(2), this_rank()), {"step": 1})
    saver.finish()
    storage.write_shard = die  # type: ignore[assignment]
    saver.save(2, state(cut_rows(2), this_rank()), {"step": 2})
    (Path(root) / "events").write_text(" ".join(kinds(saver.finish())))
    os._exit(0)


@pytest.mark.dist
def test_a_rank_that_dies_while_writing(tmp_path: Path) -> None:
    """Catches a rank that waits for hours for one that is gone, and a checkpoint without its shard."""
    processes = start(2, tmp_path, lose_a_peer, str(tmp_path))
    processes[0].join(20)
    assert processes[0].exitcode == 0
    assert (tmp_path / "events").read_text() == "failed"
    assert steps(tmp_path) == [1] and list(tmp_path.glob(".tmp*")) == []


def test_retention(tmp_path: Path) -> None:
    """Catches checkpoints that pile up, milestones that are deleted, and other people's folders that are."""
    (tmp_path / "step-by-step").mkdir()
    saver = checkpointer(tmp_path, keep_last=2, keep_every=4)
    for step in range(1, 10):
        saver.save(step, vector(step), {"step": step})
    assert set(kinds(saver.finish())) == {"saved"}
    (tmp_path / "step-by-step").rmdir()
    assert steps(tmp_path) == [4, 8, 9]
    assert (tmp_path / "latest").read_text() == "step-00000009\n"
    saver = checkpointer(tmp_path, keep_last=1)
    saver.save(2, vector(2.0), {"step": 2})  # after going back: the newest by time is not the highest number
    assert steps(tmp_path) == [2, 9] and find(tmp_path).name == "step-00000002"
    assert not list(tmp_path.glob(".tmp*"))


def test_steps_sort_as_numbers(tmp_path: Path) -> None:
    """Catches step 100000000 counted as older than step 99999999, because its name is longer."""
    saver = checkpointer(tmp_path, keep_last=1)
    for step in (99_999_999, 100_000_000):
        saver.save(step, vector(1.0), {})
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-100000000"]


def test_a_folder_that_cannot_be_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a save that is called failed on one rank alone because an old checkpoint stays."""
    saver = checkpointer(tmp_path, keep_last=1)
    saver.save(1, vector(1.0), {})

    def busy(folder: Path) -> None:
        raise OSError(16, "Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr("megascale.checkpoint.saver.remove", busy)
        saver.save(2, vector(2.0), {})
    assert kinds(saver.finish()) == ["saved", "saved"] and steps(tmp_path) == [1, 2]
    saver.save(3, vector(3.0), {})
    assert steps(tmp_path) == [3]


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    """Catches shards of two saves mixed in one folder, and the old one lost when the new one fails."""
    first = {"model.old": Piece((2,), (0,), torch.ones(2))}
    write_checkpoint(tmp_path, 1, first, {})
    folder = write_checkpoint(tmp_path, 1, vector(2.0), {})
    assert list(read_index(folder).tensors) == ["model.norm"] and verify(folder) == []
    with pytest.MonkeyPatch.context() as patch:
        real = os.rename

        def refuse(source: Path, target: Path) -> None:
            if Path(source).name.startswith(".tmp-step"):
                raise OSError(5, "Input/output error")
            real(source, target)

        patch.setattr(os, "rename", refuse)
        with pytest.raises(OSError, match="Input/output"):
            write_checkpoint(tmp_path, 1, first, {})
    assert list(read_index(find(tmp_path)).tensors) == ["model.norm"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]


def test_left_overs_of_killed_saves_are_cleaned(tmp_path: Path) -> None:
    """Catches a disk that fills with half checkpoints, and a save that mixes with one of them."""
    half = tmp_path / ".tmp-step-00000001"
    half.mkdir()
    (half / "rank-00000.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-del-step-00000000").mkdir()
    (tmp_path / ".tmp-latest").write_text("step-0")
    folder = write_checkpoint(tmp_path, 1, vector(1.0), {})
    assert verify(folder) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]
