"""Python's garbage collector during training."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from megascale.train import garbage
from tests.runs import make_tokens, run, settings


def test_collections_are_on_a_beat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a collector that runs when it likes, so that all ranks wait for one now and then, one that never runs, and one that stays
    switched off in the program after the run.
    """
    make_tokens(tmp_path / "tokens")
    held: list[bool] = []
    monkeypatch.setattr(garbage, "_collect", lambda: held.append(gc.isenabled()))
    assert run(settings(tmp_path, run__gc_every=2, train__steps=5, checkpoint__every=0)) == (0, "done")
    assert held == [False, False]  # after steps 2 and 4
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_it_is_left_alone() -> None:
    """Catches a collector that a program had switched off and finds on, and a key that cannot be switched off."""
    with garbage.collected_every(0) as collect:
        collect(0)
        assert gc.isenabled()
    gc.disable()
    try:
        with garbage.collected_every(1):
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    with pytest.raises(ValueError), garbage.collected_every(3):  # noqa: PT012
        assert not gc.isenabled()
        raise ValueError
    assert gc.isenabled()
