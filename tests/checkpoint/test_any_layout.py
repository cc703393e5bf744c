"""Any layout to any other, bit for bit; slices; weights alone."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings

from megascale.checkpoint import grid, planning
from megascale.checkpoint.index import read_index
from megascale.checkpoint.joining import Held
from megascale.checkpoint.loader import find, load, verify
from megascale.checkpoint.saver import write_checkpoint
from megascale.checkpoint.shards import read_slice
from megascale.comm.piece import Piece
from megascale.errors import UsageError
from tests.checkpoint.states import (
    TENSORS,
    Layout,
    checkpointer,
    cut_rows,
    cut_whole,
    kinds,
    layouts,
    load_layout,
    make,
    on_ranks,
    same,
    save_layout,
    state,
    this_rank,
    vector,
    whole,
)


@pytest.mark.dist
@given(layouts(), layouts())
@settings(  # no shrinking: it starts ranks hundreds of times for an example that is small already
    max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
def test_any_layout_to_any_other(tmp_path_factory: pytest.TempPathFactory, a: Layout, b: Layout) -> None:
    """Catches rectangles read from the wrong place: uneven, empty, replicated and strided pieces of eight dtypes, chunks as grids."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "FEWEST", 1 + len(b["model.a"]) % 3)  # in most cases; one chunk is no list
        there_and_back(tmp_path_factory, a, b)


def there_and_back(tmp_path_factory: pytest.TempPathFactory, a: Layout, b: Layout) -> None:
    root = tmp_path_factory.mktemp("checkpoint")
    for events in on_ranks(len(a["model.a"]), save_layout, str(root), a):
        assert kinds(events) == ["saved"], events
    assert all(on_ranks(len(b["model.a"]), load_layout, str(root), b))
    assert verify(find(root)) == []


@pytest.mark.dist
def test_every_element_is_stored_once(tmp_path: Path) -> None:
    """Catches replicas that are written by every rank that holds them."""
    for events in on_ranks(3, save_layout, str(tmp_path), cut_whole(3)):
        assert kinds(events) == ["saved"]
    index = read_index(find(tmp_path))
    assert all(len(t.chunks) == (1 if t.numel else 0) for t in index.tensors.values())
    assert len({c.file for t in index.tensors.values() for c in t.chunks}) == 3  # shared out among the ranks


def test_any_safetensors_reader_finds_a_whole_tensor(tmp_path: Path) -> None:
    """Catches names that only this program understands."""
    from safetensors.torch import load_file

    found = load_file(make(tmp_path, 1) / "rank-00000.safetensors")
    assert torch.equal(found["model.a"], whole("model.a"))


def half_group(root: str) -> list[str]:
    """Ranks 0 and 2 of three save together; rank 1 takes no part."""
    group = dist.new_group([0, 2])
    if this_rank() == 1:
        return []
    rank = dist.get_rank(group)
    saver = checkpointer(root, group=group, asynchronous=True)
    saver.save(1, state(cut_rows(2), rank), {"step": 1})
    events = saver.finish()
    target = state(cut_rows(2), rank, fill=0)
    load(find(root), target, group)
    assert same(target, state(cut_rows(2), rank))
    return kinds(events)


@pytest.mark.dist
def test_part_of_the_ranks(tmp_path: Path) -> None:
    """Catches a mix-up of a rank's number in the group with its number in the world."""
    assert on_ranks(3, half_group, str(tmp_path)) == [["saved"], [], ["saved"]]


def plans_made(root: str) -> list[int]:
    """How often this rank has said what it holds, for each of four saves; the third has a tensor more on rank 1, the fourth is like it."""
    made = 0
    real = planning.packed

    def counted(held: Sequence[Held]) -> bytes:
        nonlocal made
        made += 1
        return real(held)

    planning.packed = counted
    saver, counts = checkpointer(root), []
    for step in (1, 2, 3, 4):
        pieces = {n: Piece(p.shape, p.offset, p.local + step) for n, p in vector(0.0).items()}
        if step > 2 and this_rank() == 1:
            pieces["model.late"] = Piece((2,), (0,), torch.full((2,), float(step)))
        saver.save(step, pieces, {"step": step})
        counts.append(made)
        assert kinds(saver.finish()) == ["saved"]
    return counts


@pytest.mark.dist
def test_plans_are_made_again_only_where_something_changed(tmp_path: Path) -> None:
    """Catches planning at every save, which takes seconds at thousands of tensors, and a stale plan after a change on one rank."""
    assert on_ranks(2, plans_made, str(tmp_path)) == [[1, 1, 1, 1], [1, 1, 2, 2]]
    for name, size in (("model.norm", 4), ("model.late", 2)):
        assert torch.equal(read_slice(find(tmp_path), name, (0,), (size,)), torch.full((size,), 4.0))


def test_weights_alone(tmp_path: Path) -> None:
    """Catches init_from that insists on an optimizer, touches it, or forgets a weight."""
    folder = make(tmp_path)
    target = {**state(cut_whole(), fill=0), "optim.new": Piece((1,), (0,), torch.ones(1))}
    load(folder, target, prefix="model.")
    assert torch.equal(target["model.a"].local, whole("model.a"))
    assert target["optim.step"].local == 0 and target["optim.new"].local == 1
    del target["model.a"]
    with pytest.raises(UsageError, match=r"also holds model\.a, which nobody"):
        load(folder, target, prefix="model.")


def test_loading_into_parameters(tmp_path: Path) -> None:
    """Catches a load that autograd refuses, or that replaces a parameter instead of filling it."""
    write_checkpoint(tmp_path, 1, vector(3.0), {})
    weight = torch.nn.Parameter(torch.zeros(4))
    load(find(tmp_path), {"model.norm": Piece((4,), (0,), weight)})
    assert weight.requires_grad and weight.sum() == 12


def test_slices_come_from_the_chunks_they_touch(tmp_path: Path) -> None:
    """Catches streaming tools that read shifted rows, and a rectangle beyond the tensor."""
    folder = make(tmp_path)
    index = read_index(folder)
    assert torch.equal(read_slice(index, "model.a", (2, 1), (4, 3)), whole("model.a")[2:6, 1:4])
    assert torch.equal(read_slice(folder, "optim.step", (), ()), whole("optim.step"))
    assert read_slice(folder, "model.none", (0, 0), (0, 3)).shape == (0, 3)
    for name, (shape, _) in TENSORS.items():
        assert read_slice(index, name, (0,) * len(shape), shape).dtype == whole(name).dtype
    for offset, shape in (((5, 0), (3, 5)), ((-1, 0), (2, 5)), ((0,), (7,))):
        with pytest.raises(UsageError, match="there is no"):
            read_slice(index, "model.a", offset, shape)
    with pytest.raises(UsageError, match="holds no tensor"):
        read_slice(index, "model.z", (0,), (1,))


def test_nothing_on_disk_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a reader that would run code from a checkpoint: one process needs no pickle at all, to save or to load."""
    folder = make(tmp_path / "two")
    for name in ("load", "loads", "Unpickler", "dump", "dumps", "Pickler"):
        monkeypatch.setattr(pickle, name, None)
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr(torch, "save", None)
    target = state(cut_whole(), fill=0)
    load(folder, target)
    assert same(target, state(cut_whole()))
    alone = write_checkpoint(tmp_path / "one", 1, target, {})
    for path in (folder, alone):
        assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}
