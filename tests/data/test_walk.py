"""The files that are read from inputs and folders, and the reports about those left out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from megascale.data.walk import Chosen, choose_files, find_files
from megascale.errors import UsageError


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"text of {name}")


def chosen(root: Path, *inputs: Path, pattern: str = "*") -> tuple[list[str], dict[str, list[str]]]:
    """Files and what was left out, below the root."""
    found = choose_files(inputs or [root], pattern, (), ("text",))
    left = {why: sorted(str(p.relative_to(root)) for p in paths) for why, paths in found.left_out.items()}
    return [str(p.relative_to(root)) for p in found.files], left


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    """Catches files behind a link that are left out without a word, files that are read twice where the folder is below as well, and a loop
    of links that never ends.
    """
    root = tmp_path / "in"
    write(tmp_path, "elsewhere/deep/b.txt", "elsewhere/deep/sub/c.txt")
    write(root, "sub/a.txt", "z/y.txt")
    (root / "sub" / "linkdir").symlink_to(tmp_path / "elsewhere" / "deep")
    (root / "again").symlink_to("z")
    (root / "z" / "loop").symlink_to("..")
    (root / "gone").symlink_to("nowhere")
    files, left = chosen(root)
    assert files == ["sub/a.txt", "sub/linkdir/b.txt", "sub/linkdir/sub/c.txt", "z/y.txt"]
    assert left["leads to a folder that is read already"] == ["again", "z/loop"]
    assert any("No such file" in why and paths == ["gone"] for why, paths in left.items())


def test_hidden_ones_and_earlier_outputs_are_left_out(tmp_path: Path) -> None:
    """Catches the tokenizer of an earlier preparation, a notebook's copies and git's own files as documents; and files asked for by a
    pattern that begins with a dot, or a folder named itself, left out.
    """
    write(tmp_path, "a.txt", ".git/config", ".ipynb_checkpoints/a.txt", "sub/.hidden.txt")
    write(tmp_path, *(f"data{end}" for end in (".bin", ".idx", ".json", ".tokenizer.json")), "data.txt", "other.json")
    (tmp_path / "other.json").write_text('{"text": "x"}')
    files, left = chosen(tmp_path)
    assert files == ["a.txt", "data.txt", "other.json"]
    assert left["is hidden, its name begins with a dot"] == [".git", ".ipynb_checkpoints", "sub/.hidden.txt"]
    assert left["is of an earlier preparation"] == ["data.bin", "data.idx", "data.json", "data.tokenizer.json"]
    assert chosen(tmp_path, tmp_path / ".git")[0] == [".git/config"]
    assert [p.name for p in find_files([tmp_path], ".hid*")] == [".hidden.txt"]


def test_each_file_is_read_once(tmp_path: Path) -> None:
    """Catches a document that counts twice since its file was named twice, lies in a named folder or has a link."""
    write(tmp_path, "a.txt", "b.txt")
    (tmp_path / "0.txt").symlink_to("b.txt")
    files, left = chosen(tmp_path, tmp_path / "b.txt", tmp_path, tmp_path / "b.txt")
    assert sorted(files) == ["a.txt", "b.txt"]
    assert "0.txt" in left["is the same file as another one"]
    twice = choose_files([tmp_path / "a.txt"] * 2, "*", (), ("text",), once=False)
    assert twice.files == [tmp_path / "a.txt"] * 2  # a pair of a text with itself


def test_what_cannot_be_read_is_told_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches files and folders of another user that are left out in silence, or end in a traceback where they were named."""
    write(tmp_path, "a.txt", "locked/b.txt", "secret.txt")
    scan, open_ = os.scandir, Path.open

    def scandir(path: Path) -> Iterator[os.DirEntry[str]]:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    def opened(self: Path, *args: object, **more: object) -> object:
        if self.name == "secret.txt":
            raise PermissionError(13, "Permission denied", str(self))
        return open_(self, *args, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(Path, "open", opened)
    files, left = chosen(tmp_path)
    assert files == ["a.txt"] and sorted(name for names in left.values() for name in names) == ["locked", "secret.txt"]
    assert all("Permission denied" in why for why in left)
    for named in ("locked", "secret.txt"):
        with pytest.raises(UsageError, match=rf"{named} cannot be read \(Permission denied\)"):
            chosen(tmp_path, tmp_path / named)


def test_other_kinds_are_told_or_refused(tmp_path: Path) -> None:
    """Catches a table that becomes text since it lay in a folder, a whole folder that is refused for one, and silence about either."""
    write(tmp_path, "a.txt", "t.csv", "README.md")
    (tmp_path / "c.json").write_text('{\n "a": 1\n}')
    (tmp_path / "d.jsonl").write_text('{"text": "x"}\n')
    found = choose_files([tmp_path], "*", (), ("text",))
    assert [p.name for p in found.files] == ["README.md", "a.txt", "d.jsonl"]
    said = " | ".join(found.sentences())
    assert "t.csv: is CSV" in said and "c.json: is JSON over several lines" in said and "of several kinds" in said
    with pytest.raises(UsageError, match=r"t\.csv is CSV"):
        choose_files([tmp_path / "t.csv"], "*", (), ("text",))
    with pytest.raises(UsageError, match=r"no file is left to read in .*t\.csv: is CSV"):
        choose_files([tmp_path], "*.csv", (), ("text",))
    assert choose_files([tmp_path / "a.txt"], "*", (), ("text",)).sentences() == []


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("*.txt", ["a.txt", "s/b.txt", "s/t/c.txt"]),
        ("s/*.txt", ["s/b.txt"]),
        ("**/*.txt", ["a.txt", "s/b.txt", "s/t/c.txt"]),
        ("s/**/c.*", ["s/t/c.txt"]),
        ("t/*", ["s/t/c.txt"]),
        ("?.md", ["d.md"]),
    ],
)
def test_patterns_match_as_they_always_did(tmp_path: Path, pattern: str, wanted: list[str]) -> None:
    """Catches files that another way to walk finds or misses: those of pathlib's rglob are wanted, in its order."""
    write(tmp_path, "a.txt", "d.md", "s/b.txt", "s/t/c.txt")
    found = find_files([tmp_path], pattern)
    assert [str(p.relative_to(tmp_path)) for p in found] == wanted
    assert found == sorted(p for p in tmp_path.rglob(pattern) if p.is_file())


@pytest.mark.parametrize("pattern", ["", "/abs/*", "a\0b"])
def test_patterns_that_cannot_match(tmp_path: Path, pattern: str) -> None:
    """Catches a traceback for a pattern that is no pattern below a folder."""
    with pytest.raises(UsageError, match="make it relative"):
        find_files([tmp_path], pattern, (), Chosen())


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.zst", "a.txt.xz", "a.bz2", "a.parquet"])
def test_a_packed_file_without_a_byte(tmp_path: Path, name: str) -> None:
    """Catches a shard whose download failed and that is missing in the tokens without a word, named or found in a folder."""
    write(tmp_path, "in/b.txt")
    (tmp_path / "in" / name).touch()
    for given in (tmp_path / "in", tmp_path / "in" / name):
        with pytest.raises(UsageError, match=rf"{name} has no bytes, as after a download that failed"):
            chosen(tmp_path, given)
    (tmp_path / "in" / name).rename(tmp_path / "in" / "a.txt")
    assert chosen(tmp_path, tmp_path / "in")[0] == ["in/a.txt", "in/b.txt"]


@pytest.mark.parametrize("name", ["fake.gz", "fake.txt.zst", "fake.jsonl.xz", "fake.bz2", "fake.PARQUET"])
def test_a_name_that_promises_what_a_file_is_not(tmp_path: Path, name: str) -> None:
    """Catches a preparation that ends, after a tokenizer was trained, for one text below its folder that is named like a packed file."""
    write(tmp_path, "in/a.txt", f"in/{name}")
    files, left = chosen(tmp_path, tmp_path / "in")
    assert files == ["in/a.txt"] and list(left.values()) == [[f"in/{name}"]]
    assert all("is named like" in why and "rename it, or leave it out" in why for why in left)
    with pytest.raises(UsageError, match=rf"{name} is named like"):
        chosen(tmp_path, tmp_path / "in" / name)


@pytest.mark.parametrize("name", ["-", "/dev/fd/987", "/proc/self/fd/987"])
def test_what_flows_between_programs(tmp_path: Path, name: str) -> None:
    """Catches "correct the path" for a path that is right and no file."""
    with pytest.raises(UsageError, match="is not an ordinary file, but inputs are read more than once"):
        find_files([Path(name)], "*")
