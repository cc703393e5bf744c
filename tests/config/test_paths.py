"""Paths with `~` and `$NAME`, which only a shell expands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from megascale.cli import check_path, new_app, run_tool
from megascale.config.load import load_config, to_yaml
from megascale.config.paths import unexpanded
from megascale.errors import UsageError
from tests.runs import settings

KEYS = ["run.dir", "data.train", "data.valid", "data.tokenizer", "data.source_tokenizer", "checkpoint.resume", "checkpoint.init_from",
        "parallel.offload_dir"]  # fmt: skip


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("NOWHERE", raising=False)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("~/data/t", "write /home/me/data/t"),
        ("$SCRATCH/t", "write /scratch/me/t"),
        ("data/${SCRATCH}/t", "write data//scratch/me/t"),
        ("$NOWHERE/t", "write the path in full"),
        ("~nobody-of-this-name/t", "write the path in full"),
        ("data/~t", None),
        ("./~/t", None),
        ("price-$5/t", None),
    ],
)
def test_what_a_shell_would_expand(path: str, words: str | None) -> None:
    """Catches a folder `~` or `$SCRATCH` that is made in silence, and a name refused that no shell would touch."""
    found = unexpanded(path)
    assert found is None if words is None else found is not None and words in found


@pytest.mark.parametrize("key", KEYS)
def test_every_path_of_a_config(tmp_path: Path, key: str) -> None:
    """Catches a key of a path that is not looked at, as a single path and in a list of sources."""
    (tmp_path / "c.yaml").write_text(to_yaml(settings(tmp_path)))
    values = ["~/t", *(["[a, $SCRATCH/t]", "[{path: ~/t, weight: 2}]"] if key in ("data.train", "data.valid") else [])]
    for value in values:
        with pytest.raises(UsageError, match=rf"{key} is '(~|\$SCRATCH)/t': .* write /(home|scratch)/me/t"):
            load_config(tmp_path / "c.yaml", [f"{key}={value}"])


def test_paths_of_tools(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches `--out=~/x`, which bash does not expand, as a folder of that name."""
    app, seen = new_app("a tool"), []

    @app.command()
    def main(inputs: Annotated[list[Path], typer.Argument()], out: Annotated[Path, typer.Option()] = Path("o")) -> None:
        seen.append((inputs, out))

    def ended(*words: str) -> Any:
        monkeypatch.setattr("sys.argv", ["tool", *words])
        with pytest.raises(SystemExit) as ending:
            run_tool(app)
        return ending.value.code

    for words in (["a", "--out=~/x"], ["a", "$SCRATCH/b"]):
        assert ended(*words) == 2 and "cannot be used" in capsys.readouterr().err
    assert seen == [] and ended("a", "--out=x") in (0, None) and seen == [([Path("a")], Path("x"))]
    with pytest.raises(UsageError, match="write /home/me/x"):
        check_path("~/x")
