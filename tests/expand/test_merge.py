"""Merged checkpoints: the exact mean, whatever layouts wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from megascale.checkpoint.index import read_index
from megascale.checkpoint.shards import read_slice
from megascale.commands.merge import app
from megascale.errors import UsageError
from megascale.expand.merge import last_of, merge
from megascale.expand.write import Effort
from tests.ranks import run_ranks
from tests.runs import make_tokens, run, settings, weights_at

pytestmark = pytest.mark.dist
STEPS = {2: (1, {}), 4: (2, {"parallel__tp": 2}), 6: (2, {"parallel__dp_shard": 2})}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps whose three checkpoints were written by one process, by tensor ranks and by data ranks; and another model's."""
    folder = tmp_path_factory.mktemp("merge")
    make_tokens(folder / "tokens", 100)
    same = {"model__vocab_size": 41, "checkpoint__every": 2, "checkpoint__keep_last": 9}
    for last, (ranks, changes) in STEPS.items():
        assert (
            run_ranks(ranks, run, settings(folder, train__steps=last, optim__decay="constant", **same, **changes)) == [(0, "done")] * ranks
        )
    other = settings(folder, train__steps=1, model__ffn_size=40)
    other["run"]["dir"] = str(folder / "other")
    assert run(other) == (0, "done")
    return folder


def merged(folder: Path) -> dict[str, torch.Tensor]:
    index = read_index(next(folder.glob("step-*")))
    return {n: read_slice(index, n, (0,) * len(t.shape), t.shape) for n, t in index.tensors.items()}


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0]])
def test_the_mean_of_any_layouts(folder: Path, tmp_path: Path, weights: list[float] | None) -> None:
    """Catches a checkpoint that counts twice or not at all, pieces of another rank, and slabs that are put together wrongly."""
    sources = [folder / "run" / "checkpoints" / f"step-{n:08d}" for n in STEPS]
    facts = merge(sources, tmp_path / "m", weights, Effort(slab_bytes=256))
    given = weights or [1.0] * 3
    states = [weights_at(folder, n) for n in STEPS]
    found = merged(tmp_path / "m")
    assert set(found) == {n for n in states[0] if n.startswith("model.")} and facts["steps"] == list(STEPS)
    for name, tensor in found.items():
        want = sum(w * s[name] for w, s in zip(given, states)) / sum(given)
        assert (tensor - want).abs().max() < 1e-15


def test_a_run_begins_from_it(folder: Path, tmp_path: Path) -> None:
    """Catches a merged folder that no command understands, and a choice of the wrong checkpoints."""
    out = tmp_path / "m"
    told = CliRunner().invoke(app, [str(folder / "run"), "--last", "2", "--every", "4", "--out", str(out)])
    assert told.exit_code == 0 and "0.5000" in told.stdout and f"checkpoint.init_from={out}" in told.stdout
    states = [weights_at(folder, n) for n in (2, 6)]
    name = "model.head.weight"
    assert (merged(out)[name] - (states[0][name] + states[1][name]) / 2).abs().max() < 1e-15
    start = settings(tmp_path, train__steps=1, model__vocab_size=41)
    start["data"], start["checkpoint"]["init_from"] = {"train": str(folder / "tokens")}, str(out)
    assert run(start) == (0, "done")


def test_of_itself(folder: Path, tmp_path: Path) -> None:
    """Catches rounding that a mean of equal weights does not have: with all the weight on one checkpoint it is that one, bit for bit."""
    sources = [folder / "run" / "checkpoints" / f"step-{n:08d}" for n in (2, 4)]
    merge(sources, tmp_path / "m", [0.0, 1.0], Effort())
    state = weights_at(folder, 4)
    assert all(torch.equal(tensor, state[name]) for name, tensor in merged(tmp_path / "m").items())


CASES: list[tuple[list[str], list[float] | None, str]] = [
    (["run", "other"], None, r"model.ffn_size is 32 in .* and 40 in .*only checkpoints of one model"),
    (["run", "run"], None, "is given twice"),
    (["run"], None, "needs two checkpoints or more"),
    (["run/checkpoints/step-00000002", "run"], [1.0], "--weights has 1 numbers, but there are 2"),
    (["run/checkpoints/step-00000002", "run"], [1.0, -1.0], "add up to more than 0"),
    (["nothing", "run"], None, "is not a checkpoint and holds none"),
]


@pytest.mark.parametrize(("sources", "weights", "words"), CASES)
def test_what_is_refused(folder: Path, tmp_path: Path, sources: list[str], weights: Any, words: str) -> None:
    """Catches a mean of things that have none, and a target that is left half-written."""
    with pytest.raises(UsageError, match=words):
        merge([folder / s for s in sources], tmp_path / "m", weights, Effort())
    assert not (tmp_path / "m").exists()


def test_too_few_checkpoints(folder: Path) -> None:
    """Catches a mean over fewer checkpoints than were asked for."""
    with pytest.raises(UsageError, match=r"--last is 4, but .* has 3 checkpoints \(of steps 2, 4, 6\)"):
        last_of(folder / "run", 4, None)
    with pytest.raises(UsageError, match="has 2 checkpoints that are multiples of 4 steps before step 6"):
        last_of(folder / "run", 3, 4)
