"""`megascale verify`: every shipped config becomes small, layouts equal one process, and planted faults are found and named."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megascale.comm.piece import Piece
from megascale.commands.verify import read_layouts
from megascale.config.load import load_config
from megascale.config.schema import Config
from megascale.config.support import check
from megascale.data.loader import sample_numbers
from megascale.errors import UsageError
from megascale.model.init import initialize
from megascale.optim.clip import global_norm
from megascale.optim.optimizers import AdamW
from megascale.parallel import model as parallel_model
from megascale.parallel.model import ParallelModel
from megascale.train.engines import engine
from megascale.verify import run, steps
from megascale.verify.layouts import ROWS, named, products
from megascale.verify.ranks import RankFailed, run_ranks
from megascale.verify.run import Report, parts, verify
from megascale.verify.small import small

KEPT = ("family", "attention", "residual", "norm", "position", "ffn", "linear", "tie_embeddings", "attention_sink", "mtp_depth")
SHIPPED = sorted(Path("configs").glob("*.yaml"))


def config(**changes: Any) -> Config:
    return load_config(
        "configs/quickstart.yaml", ["precision.compute=fp64", *(f"{key.replace('__', '.')}={v}" for key, v in changes.items())]
    )


def checked(only: list[str], asked: Config | None = None) -> Report:
    return verify(asked or config(), 2, 0, 1, dict.fromkeys(only))


def test_every_shipped_config_becomes_small() -> None:
    """Catches a part that is lost on the way to a small model, one that does not fit the others any more, and a row that no config uses."""
    used: set[str] = set()
    for path in SHIPPED:
        whole = load_config(path)
        made = check(small(whole), 1)
        for key in (
            "family",
            "attention",
            "residual",
            "norm",
            "position",
            "ffn",
            "linear",
            "tie_embeddings",
            "attention_sink",
            "mtp_depth",
        ):
            assert getattr(made.model, key) == getattr(whole.model, key), (path, key)
        assert set(made.model.kinds) == set(whole.model.kinds) and made.model.has_experts == whole.model.has_experts
        assert made.model.hidden_size == 32 and made.model.num_layers <= 8 and made.optim.name == whole.optim.name
        assert (made.model.num_kv_heads < made.model.num_heads) == (whole.model.num_kv_heads < whole.model.num_heads)
        used |= {layout.name for layout in named(made, 4)[0]}
    assert used == set(ROWS)


def test_random_products_are_valid_and_the_same_again() -> None:
    """Catches a product that a rule refuses, one that is drawn twice, and a seed that means nothing."""
    made = small(load_config("configs/mixtral-8x7b.yaml"))
    first, again, other = (list(products(made, 4, 12, seed)) for seed in (1, 1, 2))
    assert first == again != other and len({str(x.config.parallel) + str(x.config.train) for x in first}) == 12
    assert all(x.ranks == 4 for x in first)


def test_each_phase_is_verified() -> None:
    """Catches a phase with another model or packing that nobody looks at, and one that is looked at twice."""
    phases = "[{from: 5 steps, set: {optim.lr: 1e-5}}, {from: 9 steps, set: {train.packing: documents}}]"
    made = list(parts(config(train__steps=20, phases=phases)))
    assert [prefix for prefix, _ in made] == ["", "phase 2: "] and made[1][1].train.packing == "documents"


@pytest.mark.dist
def test_layouts_are_equal() -> None:
    """Catches a difference that verify makes itself, and bytes that the planner's formulas do not know."""
    found = checked(["fsdp", "tp sequence", "1f1b"])
    assert found.equal and all(row.sent == row.planned and row.sent for row in found.rows), found


def no_sum(self: ParallelModel, weights: Any = None) -> None:
    """In place of the sum of partial gradients over tensor ranks."""


def another_start(piece: Piece, name: str, spec: Any, seed: int) -> None:
    initialize(piece, name, spec, seed)
    if dist.is_initialized() and name == "blocks.1.ffn.up.weight":
        piece.local.add_(1e-15 * dist.get_rank())


def later_samples(first: int, count: int, size: int, part: int, parts: int) -> list[list[int]]:
    late = parts > 1 and first > 0
    return [[n + late for n in row] for row in sample_numbers(first, count, size, part, parts)]


def own_norm(weights: Any, size: int, factors: Any = None) -> torch.Tensor:
    return global_norm(weights, 1, factors)


def slower(self: AdamW, lr: float, factor: torch.Tensor, finite: torch.Tensor) -> None:
    step(self, lr * (1 - 1e-6 * dist.is_initialized()), factor, finite)


step = AdamW.step
# The layout, what is put in whose place, and the words of the verdict.
FAULTS: dict[str, tuple[str, Any, str, Any, str]] = {
    "a sum left out": ("tp sequence", ParallelModel, "finish_gradients", no_sum, "the gradient of blocks."),
    "another start": ("fsdp", parallel_model, "initialize", another_start, "blocks.1.ffn.up.weight starts from other values"),
    "samples of another step": ("fsdp", steps, "sample_numbers", later_samples, "step 2 trains on samples"),
    "a norm of one rank": ("zero-2", engine, "global_norm", own_norm, "the norm of step 1 differs"),
    "another rate": ("1f1b", AdamW, "step", slower, "differs by"),
}


@pytest.mark.dist
@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_is_found_and_named(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Catches a verdict that is always "equal", and one that names a consequence instead of the first thing that differs."""
    layout, owner, name, fault, words = FAULTS[what]
    monkeypatch.setattr(owner, name, fault)
    (row,) = checked([layout]).rows
    assert not row.equal and words in row.wrong, row


def test_the_command(tmp_path: Path) -> None:
    """Catches a table without a verdict, JSON without the rows, and an exit code that a script cannot use."""
    layouts, report = tmp_path / "layouts.yaml", tmp_path / "verify.json"
    layouts.write_text("{mine: {tp: 2, recompute: full}}")
    words = ["configs/llama-1m.yaml", "precision.compute=fp64", "--layouts", str(layouts), "--json", str(report)]
    done = subprocess.run([sys.executable, "-m", "megascale", "verify", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "1 of 1 layouts equal one process" in done.stdout, done.stderr
    found = json.loads(report.read_text())
    assert found["equal"] and [row["name"] for row in found["layouts"]] == ["mine"]
    assert found["layouts"][0]["parallel"] == {"dp_shard": 1, "tp": 2, "recompute": "full"}


WRONG = {
    "[fsdp, wide]": "names 'wide', which does not apply to this config: there is none of that name",
    "[ep]": "ep and etp distribute experts, but the model has none",
    "{mine: {tp: 3}}": "parallel.tp is 3",
    "{mine: {tq: 2}}": "tq",
    "3": "holds a int",
    "[]": "holds a list",
    "{": "is no YAML",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_layouts(tmp_path: Path, text: str) -> None:
    """Catches a traceback, or a layout that is left out in silence."""
    (tmp_path / "layouts.yaml").write_text(text)
    with pytest.raises(UsageError, match=re.escape(WRONG[text])):
        verify(config(), 2, 0, 1, read_layouts(tmp_path / "layouts.yaml"))
    with pytest.raises(UsageError, match="cannot be read"):
        read_layouts(tmp_path / "nowhere.yaml")


def test_a_rank_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a verification that ends at its first layout that does not run."""
    monkeypatch.setattr(run, "run_ranks", lambda size, work, configs: raise_failed() if size > 1 else run_ranks(size, work, configs))
    found = checked(["fsdp", "tp"])
    assert [row.problem for row in found.rows] == ["it broke"] * 2 and not found.equal


def raise_failed() -> Any:
    raise RankFailed("rank 1 failed:\nTraceback …\nit broke")
