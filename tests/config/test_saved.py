"""Configs of other versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from megascale.config.load import build_config, load_config, to_yaml
from megascale.config.saved import STAMP, hint_of_newer, stamped
from megascale.errors import UsageError
from megascale.train.start.opening import check_saved_config
from megascale.version import __version__
from tests.runs import settings

NEWER = f"{STAMP}999.0.1\n"


def test_a_newer_config(tmp_path: Path) -> None:
    """Catches a config of a newer version that is called a spelling mistake, or one of a run that is called damaged and written anew."""
    values = settings(tmp_path)
    text = to_yaml(build_config(values).plain())
    path = tmp_path / "run" / "config.yaml"
    path.parent.mkdir()
    path.write_text(NEWER + text)
    assert load_config(path), "what this version understands it takes"
    path.write_text(NEWER + text.replace("model:\n", "model:\n  hyperconnections: 4\n"))
    for read in (lambda: load_config(path), lambda: check_saved_config(build_config(values), path.parent)):
        with pytest.raises(
            UsageError, match=r"unknown key model\.hyperconnections .*\n.*written by megascale 999\.0\.1, but this is .*install"
        ):
            read()
    path.write_text(stamped(text).replace("model:\n", "model:\n  hyperconnections: 4\n"))
    with pytest.raises(UsageError, match="hyperconnections") as error:
        load_config(path)
    assert "written by" not in str(error.value), "this version's own mistake"
    assert "damaged" in (check_saved_config(build_config(values), path.parent) or "")


@pytest.mark.parametrize("version", [__version__, "0.0.9", "x", "", "1", "v2.0"])
def test_no_hint(tmp_path: Path, version: str) -> None:
    """Catches advice to upgrade where that would not help."""
    (tmp_path / "c.yaml").write_text(f"{STAMP}{version}\n")
    assert hint_of_newer(tmp_path / "c.yaml") is None and hint_of_newer(tmp_path / "absent") is None
