"""Chunks written as a grid: the same chunks, found without looking at all of them, and nothing believed that a file says."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.checkpoint import grid as grid_module
from megascale.checkpoint.grid import Chunk, Grid, grid_of, runs_of
from megascale.checkpoint.index import Damaged, FileEntry, Index, TensorEntry, read_index


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Chunk]]:
    """A tensor's shape and its chunks, cut evenly or not, over files in any order."""
    shape = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    edges = []
    for n in shape:
        if draw(st.booleans()):
            edges.append(list(range(0, n, draw(st.integers(1, n)))))
        else:
            edges.append([0, *sorted(draw(st.sets(st.integers(1, n), max_size=4)) - {n})])
    chunks = []
    stride = draw(st.integers(0, 2))

    def cut(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> None:
        d = len(offsets)
        if d == len(shape):
            file = draw(st.integers(0, 60)) if stride == 2 else len(chunks) * stride
            chunks.append(Chunk(offsets, sizes, f"f{file:03d}.safetensors"))
            return
        for begin, end in zip(edges[d], [*edges[d][1:], shape[d]]):
            cut((*offsets, begin), (*sizes, end - begin))

    if math.prod(map(len, edges)) <= 60:
        cut((), ())
    return shape, draw(st.permutations(chunks)) if len(chunks) < 10 else chunks


@pytest.fixture(scope="module")
def always() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid_module, "FEWEST", 1)
        yield


@given(grids(), st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
@pytest.mark.usefixtures("always")
def test_a_grid_is_its_chunks(tmp_path_factory: pytest.TempPathFactory, drawn: Any, data: st.DataObject) -> None:
    """Catches a chunk with another rectangle or file, one that a rectangle touches and that is not found, and bytes counted for another
    file, through index.json and back.
    """
    shape, chunks = drawn
    names = sorted({c.file for c in chunks})
    sizes = dict.fromkeys(names, 0)
    for c in chunks:
        sizes[c.file] += math.prod(c.sizes)
    entries = {name: FileEntry(size, 1) for name, size in sizes.items()} | {"trainer.json": FileEntry(2, 1)}
    if not chunks:
        return
    folder = tmp_path_factory.mktemp("index")
    written = Index.made(folder, entries, {"w": TensorEntry("I8", shape, tuple(chunks))})
    (folder / "index.json").write_text(written.to_json())
    got = read_index(folder)
    found = got.tensors["w"].chunks
    assert got.version == 2 and isinstance(found, Grid)
    assert list(found) == sorted(chunks, key=lambda c: c.offsets)
    assert [found[i] for i in range(len(found))] == list(found) and found[-1] == list(found)[-1]
    offset = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    size = tuple(data.draw(st.integers(0, n - o)) for o, n in zip(offset, shape))
    assert got.tensors["w"].overlapping(offset, size) == TensorEntry("I8", shape, tuple(found)).overlapping(offset, size)
    assert got.tensors["w"].files() == {c.file for c in found}


def test_one_rank_a_row_takes_a_few_numbers() -> None:
    """Catches an index that grows with the ranks."""
    chunks = [Chunk((4 * i, 0), (4, 7), f"r{i:05d}") for i in range(4096)]
    made = grid_of((4 * 4096, 7), chunks, {c.file: i for i, c in enumerate(chunks)})
    assert made is not None and made.edges == (range(0, 16384, 4), range(0, 7, 7)) and made.runs == ((0, 4096, 1),)


def test_runs() -> None:
    """Catches a run that begins with the wrong step."""
    assert runs_of([5, 5, 5, 7, 9, 11, 2]) == ((5, 3, 0), (7, 3, 2), (2, 1, 0))
    assert runs_of([3, 1]) == ((3, 1, 0), (1, 1, 0)) and runs_of([]) == ()


def test_what_is_no_grid() -> None:
    """Catches a list of chunks that is taken for a grid and read from other places."""
    columns = [Chunk((i, 0), (1, 2), "f") for i in range(20)]
    moved = [*columns[:-1], Chunk((19, 1), (1, 1), "f"), Chunk((19, 0), (1, 1), "f")]
    number = {"f": 0}
    assert grid_of((20, 2), columns, number) is not None
    assert grid_of((20, 2), moved, number) is None and grid_of((20, 2), [*columns[:-1], Chunk((19, 0), (1, 1), "f")], number) is None


BROKEN: dict[str, dict[str, Any]] = {
    "another dimension": {"parts": [1, 1]},
    "no length": {"parts": [0]},
    "half a number": {"parts": [1.5]},
    "true": {"parts": [True]},
    "beginnings that fall": {"parts": [[0, 8, 4]]},
    "a beginning outside": {"parts": [[0, 40]]},
    "no beginning": {"parts": [[]]},
    "too few files": {"files": [[0, 3, 0]]},
    "files that are not listed": {"files": [[0, 4, 1]]},
    "a negative file": {"files": [[3, 4, -1]]},
    "no file": {"files": [[0, 0, 0], [0, 4, 0]]},
    "words": {"files": "many"},
    "more parts than memory": {"shape": [2**40], "parts": [1]},
    "more bytes than the file": {"dtype": "F64"},
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_broken_grids_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """Catches a grid that is believed: a traceback, memory without end, or numbers from the wrong file."""
    entry = {"dtype": "I8", "shape": [40], "parts": [10], "files": [[0, 4, 0]]}
    files = {"a.safetensors": {"bytes": 200, "crc32": 1}, "trainer.json": {"bytes": 2, "crc32": 1}}

    def write(entry: dict[str, Any]) -> None:
        (tmp_path / "index.json").write_text(json.dumps({"version": 2, "files": files, "tensors": {"w": entry}}))

    write(entry)
    assert len(read_index(tmp_path).tensors["w"].chunks) == 4
    write(entry | change)
    with pytest.raises(Damaged, match=r"index\.json is damaged"):
        read_index(tmp_path)
