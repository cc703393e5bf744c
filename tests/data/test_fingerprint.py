"""Fingerprints of token files: other data are told from the same, at the cost of a few blocks."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from megascale.data.fingerprint import BLOCK, PLACES, file_print, places, print_of
from megascale.data.samples import overlap_note
from megascale.errors import UsageError


def test_other_content_of_the_same_size(tmp_path: Path) -> None:
    """Catches a fingerprint of names, sizes or times alone, and one that a copy changes."""
    for name, content in (("a", b"one two"), ("b", b"one twO"), ("c", b"one two")):
        for end in ("bin", "idx"):
            (tmp_path / f"{name}.{end}").write_bytes(content)
    a, b, c = (print_of(str(tmp_path / name), ("bin", "idx")) for name in "abc")
    assert a == c and a["bin"] != b["bin"] and a["bin"].startswith("7 bytes, ")
    (tmp_path / "a.json").write_text('{"mean": [1.0], "documents": 3}')
    assert print_of(str(tmp_path / "a"), ["bin"], fields=True) != print_of(str(tmp_path / "b"), ["bin"], fields=True)
    with pytest.raises(UsageError, match=r"none.bin cannot be read \(No such file"):
        print_of(str(tmp_path / "none"), ["bin"])


@pytest.mark.parametrize("size", [0, 1, BLOCK, (PLACES + 2) * BLOCK, (PLACES + 2) * BLOCK + 1, 10**9 + 1, 10**13])
def test_places_that_are_read(size: int, tmp_path: Path) -> None:
    """Catches an end that is never read, a place behind the end, and a cost that grows with the file."""
    found = places(size)
    assert len(found) <= PLACES + 2 and found == sorted(set(found))
    assert all(0 <= start < size for start in found) and (not size or (found[0] == 0 and found[-1] + BLOCK >= size))
    if size > BLOCK:
        assert max(b - a for a, b in pairwise(found)) <= max(BLOCK, size // (PLACES - 1))
    if size == 10**9 + 1:  # a file of holes, which takes no room
        with (tmp_path / "large.bin").open("wb") as file:
            file.truncate(size)
        assert file_print(tmp_path / "large.bin").startswith("1000000001 bytes, ")


def test_validation_on_what_is_trained_on_is_told() -> None:
    """Catches a valid_loss of the training data that looks like generalization."""
    t, other = {"bin": "1 bytes, a"}, {"bin": "1 bytes, b"}
    assert overlap_note({"train": {"t": t}, "valid": {"v": other}}) is None
    assert overlap_note({"train": {"t": t}, "valid": {}}) is None
    note = overlap_note({"train": {"t": t}, "valid": {"v": other, "w": t, "t": t}})
    assert note is not None and "(w is t, t)" in note and "data.valid_fraction" in note
