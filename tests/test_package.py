"""The wheel in a folder of its own, used from another one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from megascale.commands.main import COMMANDS
from megascale.version import __version__

ROOT = Path(__file__).resolve().parents[1]
HELP = """
import contextlib, io, sys
from megascale.commands.main import app
for command in ["", *sys.argv[1:]]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        app([*filter(None, [command]), "--help"])
    assert "Usage: " in said.getvalue(), command
    assert not command or "Examples:\\n    " in said.getvalue(), (command, said.getvalue())
slow = {"torch", "numpy", "pyarrow", "matplotlib", "transformers", "tokenizers"} & set(sys.modules)
assert not slow, slow
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds nothing but the installed wheel, built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "megascale", folder / "megascale", ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    subprocess.run([sys.executable, "-c", build], cwd=folder, check=True, capture_output=True, text=True, timeout=120)
    (wheel,) = (folder / "dist").glob("*.whl")
    assert wheel.name == f"megascale-{__version__}-py3-none-any.whl"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check"]
    subprocess.run([*install, "--target", str(folder / "site"), str(wheel)], check=True, capture_output=True, timeout=120)
    shutil.rmtree(folder / "megascale")
    return folder / "site"


def call(target: Path, folder: Path, *command: object, code: int = 0, **more: str) -> str:
    """A python that finds the wheel and not the checkout. Returns all that it printed."""
    env = {**os.environ, "PYTHONPATH": str(target), "PYTHONDONTWRITEBYTECODE": "1", **more}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=env, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_wheel_answers(target: Path, tmp_path: Path) -> None:
    """Catches a file that the wheel lacks, a command whose help needs torch or has no example, and a version that is written twice."""
    call(target, tmp_path, "-c", HELP, *COMMANDS)
    assert f"megascale {__version__} in {target / 'megascale'}\n" in call(target, tmp_path, "-m", "megascale", "version")
    assert (target / "megascale" / "py.typed").is_file()
    assert (target / "bin" / "megascale").is_file(), "there is no script megascale"
    made = call(target, tmp_path, "-m", "megascale", "schema")
    assert made == (ROOT / "configs" / "schema.json").read_text(encoding="utf-8")
    # A job script of an installed package starts what is installed.
    (tmp_path / "config.yaml").write_text((ROOT / "configs" / "llama-1m.yaml").read_text())
    options = ["config.yaml", "--nodes", 1, "--gpus-per-node", 0, "--preflight"]
    script = call(target, tmp_path, "-m", "megascale", "slurm", *options)
    assert '"$python" -m megascale train "$config"' in script and "-m megascale preflight --out" in script and "$root" not in script


def test_completion(target: Path, tmp_path: Path) -> None:
    """Catches a shell completion that knows no subcommand."""
    asked = {"_MEGASCALE_COMPLETE": "complete_bash", "COMP_WORDS": "megascale in", "COMP_CWORD": "1"}
    assert call(target, tmp_path, target / "bin" / "megascale", **asked).split() == ["inspect"]


@pytest.mark.slow
def test_real_use_from_another_folder(target: Path, tmp_path: Path) -> None:
    """Catches a command that works in a checkout only."""
    text = "".join(
        f"the {a} sees the {b} beside {c} of {a}s .\n" for a in ["cat", "dog", "cow"] for b in ["sun", "moon"] for c in range(60)
    )
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "config.yaml").write_text((ROOT / "configs" / "quickstart.yaml").read_text())
    m = ("-m", "megascale")
    assert "documents" in call(target, tmp_path, *m, "prepare", "text.txt", "--out", "data/t", "--vocab-size", 290, "--workers", 1)
    small = [
        "model.num_layers=1",
        "model.hidden_size=32",
        "model.ffn_size=32",
        "train.seq_len=16",
        "data.train=data/t",
        "data.valid_fraction=0",
    ]
    small += ["train.steps=2", "train.eval_every=0", "train.global_batch_size=2", "train.micro_batch_size=2", "run.device=cpu"]
    assert "parameters" in call(target, tmp_path, *m, "train", "config.yaml", "--dry-run", *small)
    assert not (tmp_path / "runs").exists()
    call(target, tmp_path, *m, "train", "config.yaml", *small)
    run = tmp_path / "runs" / "quickstart"
    assert json.loads((run / "exit.json").read_text())["code"] == 0
    assert "whole: every file" in call(target, tmp_path, *m, "inspect", "runs/quickstart", "--verify")
    call(target, tmp_path, *m, "report", "runs/quickstart")
    assert (tmp_path / "report.html").read_text().lower().startswith("<!doctype html")
    assert call(target, tmp_path, *m, "generate", "runs/quickstart", "--prompt", "the", "--max-new-tokens", 3).strip()
    call(target, tmp_path, *m, "grow", "runs/quickstart", "grown", "--num-layers", 2)
    assert (tmp_path / "grown").is_dir()


def test_one_command_line() -> None:
    """Catches a door that does more than open, and a subcommand without a module or the other way round."""
    modules = {p.stem for p in (ROOT / "megascale" / "commands").glob("*.py")} - {"__init__", "main", "growing"}
    assert modules == set(COMMANDS)
    own = {"quickstart.py", "stop_at.py", "shallow_water.py"}  # demonstrations of the checkout, no doors
    for script in [ROOT / "pretrain.py", *(ROOT / "launchers").glob("*.py"), *(ROOT / "tools").glob("*.py")]:
        assert script.name in own or len(script.read_text().splitlines()) <= 15, script


def test_site_and_image() -> None:
    """Catches a page that the site does not show, and an image whose files are not there."""
    nav = YAML(typ="safe").load((ROOT / "mkdocs.yml").read_text())["nav"]
    pages = [page for entry in nav for value in entry.values() for page in (value if isinstance(value, list) else [value])]
    assert sorted(pages) == sorted(str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md"))
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) == allowed
