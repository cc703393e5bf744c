#!/usr/bin/env python3
"""From nothing to a report: real text, two processes, a stop, a resume on another layout, a growth, and the undisturbed run beside it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from megascale.cli import new_app, run_tool
from megascale.config.load import load_config
from megascale.config.schema import Config
from megascale.errors import MegascaleError, TrainingError
from megascale.report.read import read_run
from megascale.sizes import count_words

CONFIG = "configs/quickstart.yaml"
FIRST, SECOND = ["parallel.dp_shard=2"], ["parallel.tp=2", "parallel.dp_shard=1"]
app = new_app(__doc__ or "")


@app.command()
def main(
    folder: Annotated[Path, typer.Option(help="where runs and the report go")] = Path("runs"),
    data: Annotated[Path, typer.Option(help="prefix of the token files")] = Path("data/stdlib"),
    override: Annotated[list[str] | None, typer.Option(help="section.key=value for all runs")] = None,
) -> None:
    """Runs the quickstart; earlier quickstart runs in FOLDER are replaced."""
    console, begun = Console(stderr=True, highlight=False), time.monotonic()
    if not data.with_name(data.name + ".idx").exists():
        console.rule("the machine's own Python library, as text")
        source = sysconfig.get_paths()["stdlib"]
        call([sys.executable, "tools/prepare_data.py", source, "--out", str(data), "--pattern", "*.py"])
    names = ("quickstart", "quickstart-undisturbed")
    for name in names:
        shutil.rmtree(folder / name, ignore_errors=True)
    common = [f"data.train={data}", *(override or [])]
    common.append(growth(load_config(CONFIG, common)))

    console.rule("two processes, weights sharded (dp_shard 2)")
    run = folder / names[0]
    half = load_config(CONFIG, common).train.total_steps // 2
    pretrain(run, names[0], FIRST + common, expected=75, stop_at=half)
    console.rule("stopped; on it goes with every matrix cut in two (tp 2), and grows")
    pretrain(run, names[0], SECOND + common, expected=0)
    console.rule("the same run, undisturbed, to compare with")
    pretrain(folder / names[1], names[1], FIRST + common, expected=0)

    report = folder / "report.html"
    runs = [str(folder / n) for n in names]
    call(
        [
            sys.executable,
            "tools/report.py",
            *runs,
            "--out",
            str(report),
            "--png",
            str(folder / "quickstart.png"),
            "--title",
            "quickstart",
        ]
    )
    summary = read_run(run)
    best = min(v for r in summary.metrics for v in (r.get("valid_loss") or {}).values())
    entropy = summary.entropy or float("nan")
    grown = next(e for e in summary.events if e["event"] == "grow")
    sizes = grown["parameters"]
    console.print(
        f"after step {grown['step']} the model grew from {count_words(sizes['source'])} to {count_words(sizes['target'])} parameters, "
        f"{grown['verdict']}: in fp64 no logit moved by more than {grown['logits_moved']:.0e}\n"
        f"validation loss {best:.3f} nats, unigram entropy {entropy:.3f}: the model has learned {entropy - best:.2f} nats per token beyond "
        f"counting; {time.monotonic() - begun:.0f} s\nopen {report}"
    )
    if not best < entropy - 0.5:
        raise TrainingError(f"the validation loss {best:.3f} is not clearly below the unigram entropy {entropy:.3f}")


def growth(config: Config) -> str:
    """After three quarters of the steps a quarter more width and a third more layers, as an override."""
    model, step = config.model, config.train.total_steps * 3 // 4
    return f"grow=[{{step: {step}, hidden_size: {model.hidden_size * 5 // 4}, num_layers: {-(-model.num_layers * 4 // 3)}}}]"


def pretrain(run: Path, name: str, overrides: list[str], expected: int, stop_at: int | None = None) -> None:
    """Two processes under torchrun's agent; the run's exit.json says how they ended. At step `stop_at` a file STOP asks it to stop, as
    a person would with `touch`, but at the same step on every machine.
    """
    program = ["pretrain.py"] if stop_at is None else ["tools/stop_at.py", str(stop_at)]
    command = [sys.executable, "launchers/agent.py", "2", *program]
    (run / "exit.json").unlink(missing_ok=True)
    subprocess.run(
        [*command, CONFIG, f"run.name={name}", f"run.dir={run}", *overrides],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    try:
        ending = json.loads((run / "exit.json").read_text())
    except (OSError, ValueError):
        raise MegascaleError("pretraining left no exit.json: its message is above") from None
    if ending["code"] != expected:
        raise TrainingError(f"pretraining ended with code {ending['code']} instead of {expected}: {ending['reason']}")


def call(command: list[str]) -> None:
    ended = subprocess.run(command, check=False)
    if ended.returncode:
        raise SystemExit(ended.returncode)


if __name__ == "__main__":
    run_tool(app)
