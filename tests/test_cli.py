"""The endings of commands for all kinds of errors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from megascale.cli import new_app, run_tool
from megascale.commands.main import main
from megascale.config.load import to_yaml
from megascale.errors import TrainingError
from megascale.train.faults.stop import StopFlag
from tests.runs import make_tokens, settings

PLAIN = Path(__file__).parent / "data" / "inputs" / "plain.json"


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (TrainingError("lost"), 3, "error: lost"),
        (FileNotFoundError(2, "No such file or directory", "/a/b"), 2, "/a/b"),
        (OSError(36, "File name too long", "x" * 300), 2, "File name too long"),
        (PermissionError(13, "Permission denied", "c.json"), 2, "c.json: Permission denied"),
        (RecursionError("maximum recursion depth exceeded"), 2, "nested too deeply"),
        (MemoryError(), 4, "out of memory"),
        (UnicodeEncodeError("utf-8", "\udc80", 0, 1, "surrogates not allowed"), 2, "not UTF-8"),
        (BrokenProcessPool("a child process terminated abruptly"), 4, "worker process was killed"),
    ],
)
def test_what_the_machine_does_is_a_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, words: str
) -> None:
    """Catches a traceback, and code 1, for a file, a name or a machine that the user can see to."""
    app = new_app("")
    app.command()(raising(error))
    monkeypatch.setattr(sys, "argv", ["tool"])
    with pytest.raises(SystemExit) as ending:
        run_tool(app)
    said = capsys.readouterr().err
    assert ending.value.code == code and words in said and said.startswith("error: ") and said.count("\n") == 1


@pytest.mark.parametrize("error", [AttributeError("x"), KeyError("x"), AssertionError()])
def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Catches a bug that is told as the user's mistake."""
    app = new_app("")
    app.command()(raising(error))
    monkeypatch.setattr(sys, "argv", ["tool"])
    with pytest.raises(type(error)):
        run_tool(app)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, a folder in which nobody can make a file")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("train {config}", "the run directory runs/run cannot be written"),
        ("schema --out schema.json", "name a file in a folder that you may write to"),
        ("prepare {config} --out text --tokenizer {tokenizer}", "choose another --out"),
        ("chaos {config}", "name a folder that you may write to"),
        ("report {config}", "run"),
        ("nonsense", "there is no command 'nonsense'"),
        ("shema", "did you mean schema?"),
    ],
)
def test_a_folder_without_write_access(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str, words: str
) -> None:
    """Catches a traceback where a command is used in a folder that it cannot write to."""
    make_tokens(tmp_path / "tokens")
    values = settings(tmp_path)
    values["run"].pop("dir")
    (tmp_path / "config.yaml").write_text(to_yaml(values))
    given = arguments.format(config=tmp_path / "config.yaml", tokenizer=PLAIN)
    monkeypatch.chdir("/proc")
    monkeypatch.setattr(sys, "argv", ["megascale", *given.split()])
    monkeypatch.setattr(StopFlag, "listen", lambda self: None)
    with pytest.raises(SystemExit) as ending:
        main()
    said = capsys.readouterr().err
    assert ending.value.code == 2 and words in said and "error: " in said and "Traceback" not in said


PRINTS = """
import sys
from megascale.cli import new_app, run_tool
app = new_app("")
@app.command()
def main() -> None:
    for i in range({lines}):
        print(i)
    {last}
run_tool(app)
"""


@pytest.mark.parametrize("lines", [3, 200_000])
def test_a_reader_that_goes_away(lines: int) -> None:
    """Catches `tool | head` with a traceback, while it writes and when the rest is flushed at the end."""
    code = PRINTS.format(lines=lines, last="pass")
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        f"{{ sleep 0.2; {sys.executable} -c '{code}'; }} | true",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=buffered,
    )
    assert done.stderr == ""


def test_an_interrupt() -> None:
    """Catches a traceback, or a good end, where the user pressed Ctrl-C."""
    code = PRINTS.format(lines=1, last="import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 130 and "Traceback" not in done.stderr
