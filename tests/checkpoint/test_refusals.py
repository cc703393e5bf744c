"""Damaged, tampered or mismatching checkpoints are refused with a message; what must not be saved is not."""

from __future__ import annotations

import json
import os
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megascale.checkpoint import index as index_module
from megascale.checkpoint.loader import find, load, newest, verify
from megascale.checkpoint.planning import checksum
from megascale.comm.piece import Piece
from megascale.errors import UsageError
from tests.checkpoint.states import checkpointer, cut_rows, cut_whole, make, on_ranks, same, state, this_rank, vector, whole

ONE = cut_whole()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return make(tmp_path)


def edit(folder: Path, change: Callable[[Any], object]) -> None:
    raw = json.loads((folder / "index.json").read_text())
    change(raw)
    (folder / "index.json").write_text(json.dumps(raw))


def flip(path: Path, position: int = -3) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


def name_file(raw: Any, name: str) -> None:
    """Lets the index speak of another file instead of the first shard."""
    raw["files"][name] = raw["files"].pop("rank-00000.safetensors")
    for tensor in raw["tensors"].values():
        for chunk in tensor["chunks"]:
            chunk["file"] = chunk["file"].replace("rank-00000.safetensors", name)


def forge(folder: Path) -> None:
    """A shard with a tensor turned on its side, and an index with its new size and checksum."""
    path = folder / SECOND
    tensors = load_file(path)
    tensors["model.a@4,0"] = tensors["model.a@4,0"].T.contiguous()
    save_file(tensors, path)
    data = path.read_bytes()
    edit(folder, lambda r: r["files"].update({SECOND: {"bytes": len(data), "crc32": zlib.crc32(data)}}))


def a(raw: Any) -> Any:
    return raw["tensors"]["model.a"]


ZERO, SECOND = "rank-00000.safetensors", "rank-00001.safetensors"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard is gone": (lambda f: (f / SECOND).unlink(), f"{SECOND} cannot be read: No such file"),
    "a bit flipped": (lambda f: flip(f / SECOND), f"{SECOND} has checksum"),
    "a shard is short": (lambda f: os.truncate(f / ZERO, 100), f"{ZERO} has 100 bytes but index.json says"),
    "shards exchanged": (lambda f: (f / ZERO).write_bytes((f / SECOND).read_bytes()), f"{ZERO} has .* but index.json says"),
    "a forged shard": (forge, r"stores model\.a@4,0 as F32 \[5, 3\] but the index says F32 \[3, 5\]"),
    "no index": (lambda f: (f / "index.json").unlink(), r"there is no .*index\.json"),
    "no trainer.json": (lambda f: (f / "trainer.json").unlink(), r"there is no .*trainer\.json"),
    "index is no JSON": (lambda f: (f / "index.json").write_text("{"), "cannot be read"),
    "index is no text": (lambda f: (f / "index.json").write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "index is a list": (lambda f: (f / "index.json").write_text("[]"), "a list instead of an object"),
    "index is very deep": (lambda f: (f / "index.json").write_text("[" * 200_000), "cannot be read"),
    "another format's index": (lambda f: (f / "index.json").write_text('{"weight_map": {}}'), "format version None"),
    "index of the future": (lambda f: edit(f, lambda r: r.update(version=99)), "format version 99"),
    "version is true": (lambda f: edit(f, lambda r: r.update(version=True)), "format version True"),
    "path up": (lambda f: edit(f, lambda r: name_file(r, "../x.safetensors")), "is not the name of a shard file"),
    "absolute path": (lambda f: edit(f, lambda r: name_file(r, "/etc/x.safetensors")), "is not the name of a shard file"),
    "zero byte": (lambda f: edit(f, lambda r: name_file(r, "x\0.safetensors")), "is not the name of a shard file"),
    "the folder itself": (lambda f: edit(f, lambda r: name_file(r, "..")), "is not the name of a shard file"),
    "file not listed": (lambda f: edit(f, lambda r: r["files"].pop(SECOND)), "which the index does not list"),
    "trainer.json not listed": (lambda f: edit(f, lambda r: r["files"].pop("trainer.json")), r"trainer\.json is not listed"),
    "a chunk is missing": (lambda f: edit(f, lambda r: a(r)["chunks"].pop()), "model.a hold 20 of its 35 elements"),
    "chunks overlap": (lambda f: edit(f, lambda r: a(r)["chunks"][1].update(offsets=[3, 0])), "model.a overlap"),
    "chunk outside": (lambda f: edit(f, lambda r: a(r)["chunks"][1].update(offsets=[6, 0])), "reach beyond its shape"),
    "chunks moved": (
        lambda f: edit(f, lambda r: [c.update(offsets=[3 * (1 - i), 0]) for i, c in enumerate(a(r)["chunks"])]),
        "does not contain",
    ),
    "negative size": (lambda f: edit(f, lambda r: a(r)["chunks"][0].update(sizes=[-4, 5])), "is not a size"),
    "size beyond all": (lambda f: edit(f, lambda r: a(r).update(shape=[10**30, 0])), "is not a size"),
    "shape beyond memory": (lambda f: edit(f, lambda r: a(r).update(shape=[10**10, 10**10])), "beyond any memory"),
    "more than the file": (
        lambda f: edit(f, lambda r: a(r).update(shape=[7000], chunks=[{"offsets": [0], "sizes": [7000], "file": ZERO}])),
        "bytes and its chunks",
    ),
    "sizes are text": (lambda f: edit(f, lambda r: a(r).update(shape="75")), "is not a list"),
    "unknown dtype": (lambda f: edit(f, lambda r: a(r).update(dtype="PICKLE")), "unknown dtype"),
    "files are a list": (lambda f: edit(f, lambda r: r.update(files=[])), "is damaged"),
    "trainer.json changed": (lambda f: (f / "trainer.json").write_text('{"step": 2}'), r"trainer\.json has"),
    "trainer.json is no JSON": (lambda f: (f / "trainer.json").write_text("nan nan"), "trainer.json cannot be read"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_refused(saved: Path, what: str) -> None:
    """Catches silent loading of wrong numbers, tracebacks on files that somebody touched, and a state that is half overwritten."""
    damage, words = DAMAGE[what]
    damage(saved)
    target = state(ONE, fill=0)
    with pytest.raises(UsageError, match=words):
        load(saved, target)
    assert same(target, state(ONE, fill=0))
    assert verify(saved)


def leaves(node: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a JSON value."""
    items = list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []
    return [(node, key) for key, _ in items] + [leaf for _, value in items for leaf in leaves(value)]


def test_no_edit_loads_wrong_numbers(saved: Path) -> None:
    """Catches tampering that no list of cases thought of: 300 random edits of the JSON and 200 flipped bytes load right or are refused."""
    generator = random.Random(5)
    originals = {p: p.read_bytes() for p in saved.iterdir()}
    values = [
        None,
        True,
        -1,
        0,
        1,
        2,
        3,
        5,
        7,
        10**40,
        1.5,
        "",
        "F32",
        "F64",
        "I32",
        "BF16",
        ZERO,
        SECOND,
        "../x",
        [],
        [0],
        [7, 5],
        {},
        "model.b",
    ]
    refused = 0
    for trial in range(500):
        path = saved / "index.json" if trial < 300 else generator.choice(sorted(originals))
        if trial < 300:
            raw = json.loads(originals[path])
            container, key = generator.choice(leaves(raw))
            if generator.random() < 0.2:
                del container[key]
            else:
                container[key] = generator.choice(values)
            path.write_text(json.dumps(raw))
        else:
            flip(path, generator.randrange(len(originals[path])))
        target = state(ONE, fill=0)
        try:
            load(saved, target)
            assert same(target, state(ONE)), path.read_text()
        except UsageError:
            refused += 1
        path.write_bytes(originals[path])
    assert refused > 450
    load(saved, state(ONE, fill=0))


def load_refused(folder: str, ranks: int, change: Callable[[dict[str, Piece], int], object]) -> str:
    target = state(cut_rows(ranks), this_rank(), fill=0)
    change(target, this_rank())
    try:
        load(folder, target)
    except UsageError as error:
        return str(error)
    return "loaded"


def other(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Callable[[dict[str, Piece], int], object]:
    return lambda s, rank: s.update({name: Piece(shape, (0,) * len(shape), torch.zeros(shape, dtype=dtype))})


MISFITS: dict[str, tuple[Callable[[dict[str, Piece], int], object], str]] = {
    "shape": (other("model.a", (7, 4)), "model.a has shape [7, 5] in "),
    "dtype": (other("model.a", (7, 5), torch.bfloat16), "model.a is torch.float32 in "),
    "missing": (other("model.new", (1,)), "lacks model.new"),
    "extra": (
        lambda s, rank: [s.pop(n) for n in list(s) if n.startswith("optim")],
        "also holds optim.flags, optim.m, optim.seen and 1 more",
    ),
    "on one rank alone": (lambda s, rank: rank == 1 and other("model.a", (7, 4))(s, rank), "model.a has shape [7, 5] in "),
    "no tensor": (lambda s, rank: rank == 1 and s.update({"model.a": 3.0}), "which is not a tensor"),  # type: ignore[dict-item]
}


@pytest.mark.dist
@pytest.mark.parametrize("what", MISFITS)
def test_what_does_not_fit_is_refused(saved: Path, what: str) -> None:
    """Catches silent casts, state left at its start because its name changed, and ranks that wait for the one that refused."""
    change, words = MISFITS[what]
    first, second = on_ranks(2, load_refused, str(saved), 2, change)
    assert words in first and first == second


@pytest.mark.dist
def test_names_are_asked_for_by_all_ranks_together(saved: Path) -> None:
    """Catches a pipeline's rank that calls another stage's weights extra."""

    def stage(s: dict[str, Piece], rank: int) -> None:
        for name in list(s)[rank::2]:
            s[name] = Piece(s[name].shape, (0,) * len(s[name].shape), torch.zeros_like(whole(name)))
        for name in list(s)[1 - rank :: 2]:
            del s[name]

    assert on_ranks(2, load_refused, str(saved), 2, stage) == ["loaded", "loaded"]


def damaged_together(folder: str) -> str:
    if this_rank() == 1:
        (Path(folder) / "index.json").write_text("{")
    return load_refused(folder, 2, lambda s, rank: None)


@pytest.mark.dist
def test_all_ranks_refuse_what_one_cannot_read(saved: Path) -> None:
    """Catches ranks that wait for ever for one whose node cannot read the folder; which of them fails does not matter here."""
    flip(saved / SECOND)
    first, second = on_ranks(2, load_refused, str(saved), 2, lambda s, rank: None)
    assert "checksum" in first and first == second
    for message in on_ranks(2, damaged_together, str(saved)):
        assert message != "loaded"


def test_old_formats_are_migrated(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a version number without a way to read what it stands for."""
    edit(saved, lambda r: r.update(version=-1, parameters=r.pop("tensors")))
    with pytest.raises(UsageError, match="format version -1"):
        load(saved, state(ONE, fill=0))
    monkeypatch.setitem(index_module.MIGRATIONS, -1, lambda raw: {**raw, "version": 0})
    monkeypatch.setitem(index_module.MIGRATIONS, 0, lambda raw: {**raw, "version": 1, "tensors": raw["parameters"]})
    target = state(ONE, fill=0)
    load(saved, target)
    assert same(target, state(ONE))


def test_finding(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Catches a run that resumes from a foreign folder, or is not found by one of its three names."""
    root = saved.parent
    run = tmp_path_factory.mktemp("run")
    (run / "checkpoints").symlink_to(root)
    assert find(saved) == find(root) == saved
    assert find(run) == run / "checkpoints" / saved.name
    foreign = tmp_path_factory.mktemp("foreign")
    for words in ("is not a checkpoint and holds none", "has shards but no index.json"):
        with pytest.raises(UsageError, match=words):
            find(foreign)
        (foreign / "model.safetensors").touch()
    with pytest.raises(UsageError, match="is not a checkpoint"):
        find(foreign / "nowhere")


def test_newest(tmp_path: Path) -> None:
    """Catches a resume from what was not finished, from outside, or none at all although an older checkpoint is whole."""
    assert newest(tmp_path) is None and newest(tmp_path / "nowhere") is None
    saver = checkpointer(tmp_path, keep_last=9)
    for step in (1, 2, 3):
        saver.save(step, vector(step), {"step": step})
    three, two = tmp_path / "step-00000003", tmp_path / "step-00000002"
    (tmp_path / ".tmp-step-00000004").mkdir()
    (tmp_path / "step-notes").mkdir()
    assert newest(tmp_path) == three
    (tmp_path / "latest").write_text("step-00000002\n")
    assert newest(tmp_path) == two  # a run killed before it could name step 3 goes on from the one it named
    for dangling in ("step-00000009\n", "../../etc\n", "", "\0"):
        (tmp_path / "latest").write_text(dangling)
        assert newest(tmp_path) == three
    (three / "index.json").write_text("{")
    assert newest(tmp_path) == two
    (tmp_path / "latest").unlink()
    assert newest(tmp_path) == two


def save_refused(root: str, change: Callable[[dict[str, Piece], int], object]) -> str:
    pieces: dict[str, Piece] = state(cut_rows(2), this_rank())
    change(pieces, this_rank())
    saver = checkpointer(root, asynchronous=True)
    saver.save(1, pieces, {})
    (event,) = saver.finish()
    return event.message


def rows(first: int, last: int, dtype: torch.dtype = torch.float32) -> Piece:
    return Piece((4, 3), (first, 0), torch.zeros(last - first, 3, dtype=dtype))


BAD_STATES: dict[str, tuple[Callable[[dict[str, Piece], int], object], str]] = {
    "a number": (lambda s, r: s.update({"optim.lr": 3.0}), "optim.lr = 3.0, which is not a tensor"),  # type: ignore[dict-item]
    "a number on one rank": (lambda s, r: r == 1 and s.update({"optim.lr": 3.0}), "optim.lr = 3.0, which is not a tensor"),  # type: ignore[dict-item]
    "a dtype": (lambda s, r: s.update({"model.c": Piece((1,), (0,), torch.zeros(1, dtype=torch.complex64))}), "cannot be stored"),
    "outside": (lambda s, r: s.update({"model.c": Piece((3,), (1,), torch.zeros(3))}), "does not lie inside its shape [3]"),
    "replicas": (lambda s, r: s.update(vector(float(r))), "model.norm should be the same on ranks 0 and 1, but it differs"),
    "one bit of a scalar": (lambda s, r: s["optim.step"].local.add_(r), "optim.step should be the same on ranks 0 and 1"),
    "a gap": (lambda s, r: s.update({"model.c": rows(2 * r, 2 * r + 1)}), "the ranks' pieces do not make whole tensors"),
    "an overlap": (lambda s, r: s.update({"model.c": rows(r, 3 + r)}), "the ranks' pieces do not make whole tensors"),
    "an overlap from the start": (lambda s, r: s.update({"model.c": rows(0, 4 - r)}), "of model.c overlap at [0, 0]"),
    "two dtypes": (
        lambda s, r: s.update({"model.c": rows(2 * r, 2 * r + 2, (torch.float32, torch.float64)[r])}),
        "torch.float64 [4, 3] on rank 1",
    ),
}


@pytest.mark.dist
@pytest.mark.parametrize("what", BAD_STATES)
def test_states_that_cannot_be_kept_are_not_saved(tmp_path: Path, what: str) -> None:
    """Catches unreadable shards, and runs that came apart: one of two different "equal" tensors would be kept and the other lost."""
    change, words = BAD_STATES[what]
    first, second = on_ranks(2, save_refused, str(tmp_path), change)
    assert words in first and first == second
    assert list(tmp_path.glob("*step*")) == []


def test_the_checksum_sees_every_element() -> None:
    """Catches a sample of elements that misses the one that differs, and a sum that depends on where the memory begins."""
    for size, dtype in ((0, torch.float32), (1, torch.bool), (9, torch.uint8), (5000, torch.float32), (70001, torch.bfloat16)):
        memory = torch.zeros(size + 1, dtype=dtype)
        tensor = memory[1:]
        before = checksum(tensor)
        assert before == checksum(tensor.clone())
        for position in range(0, size, max(1, size // 7)):
            tensor[position] = 1
            assert checksum(tensor) != before
            tensor[position] = 0
    assert checksum(torch.arange(9000)) != checksum(torch.arange(9000).flip(0))


def test_a_trainer_that_is_no_json(tmp_path: Path) -> None:
    """Catches a save that ends half-way because of a number of the wrong kind."""
    saver = checkpointer(tmp_path)
    saver.save(1, vector(1.0), {"loss": torch.ones(1)})
    assert "cannot be written as JSON" in saver.finish()[0].message
    assert list(tmp_path.glob("*step*")) == []
