"""bf16 masters: those that an update cannot change, and the run's warning about them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megascale.config.schema import Optim
from megascale.config.schema.train import Multiplier
from megascale.model.spec import ParamSpec
from megascale.optim.masters import immovable, smallest_step
from tests.layouts import tiny
from tests.runs import make_tokens, rows, run, settings

SPECS = {
    "norm": ParamSpec((8,), "norm", "tokens", mean=1.0),
    "bias": ParamSpec((8,), "bias", "tokens"),
    "up": ParamSpec((8, tiny(hidden_size=8)), "up", 0, std=0.02),
}


@pytest.mark.parametrize("size", [1.0, 0.02, 1.5, 3e-5, 448.0])
def test_the_smallest_step_is_that_of_torch(size: float) -> None:
    """Catches a spacing of another number of digits, and a power of two, below which numbers are twice as dense."""
    number = torch.tensor(size).bfloat16()
    step = smallest_step(number.item())
    below, above = ([(number.double() + sign * f * step).bfloat16() == number for sign in (-1, 1)] for f in (0.99, 1.01))
    assert all(below) and not all(above)


def test_gains_stand_still_at_usual_rates() -> None:
    """Catches norm gains of 1 that no step below 1/512 moves, and weights that do move told as if they did not."""
    assert list(immovable(SPECS, Optim(lr=1e-3), tiny(hidden_size=8))) == ["norm"]
    assert immovable(SPECS, Optim(lr=1e-3), tiny(hidden_size=8))["norm"] == 2**-9
    assert not immovable(SPECS, Optim(lr=2e-3), tiny(hidden_size=8))
    assert list(immovable(SPECS, Optim(lr=1e-5), tiny(hidden_size=8))) == ["norm", "up"]
    assert not immovable(SPECS, Optim(lr=1e-3, multipliers={"norm": Multiplier(lr=2.0)}), tiny(hidden_size=8))
    assert list(immovable({**SPECS, "norm": replace(SPECS["norm"], mean=0.25)}, Optim(lr=1e-3), tiny(hidden_size=8))) == []


def test_a_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a run in which norms never learn, without a word; and a warning where masters are fp32."""
    make_tokens(tmp_path / "tokens")
    for master, told in (("bf16", True), ("fp32", False)):
        values = settings(tmp_path, train__steps=1, optim__lr=1e-3, precision__compute="bf16", precision__master=master)
        values["run"]["dir"] = str(tmp_path / master / "run")
        assert run(values) == (0, "done")
        assert ("round away every step up to 0.002" in capsys.readouterr().err) == told
        assert ("immovable" in rows(tmp_path / master, "events")[0]) == told
