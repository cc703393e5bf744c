"""Scores a checkpoint or a Hugging Face folder on JSONL files; under torchrun the weights are sharded over its ranks (tp)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from megascale.cli import examples, new_app
from megascale.errors import UsageError

app = new_app(__doc__ or "")


@app.command(
    epilog=examples(
        "megascale evaluate runs/llama-125m --choice eval/trivia.jsonl --bits eval/news.jsonl",
        "megascale evaluate HF_FOLDER --tasks tasks.yaml --json results.json",
    )
)
def main(
    checkpoint: Annotated[Path, typer.Argument(help="a folder step-…, a run, or a Hugging Face folder")],
    tasks: Annotated[Path | None, typer.Option(help="YAML list of {name, path, kind}, as in a config's section evaluate")] = None,
    choice: Annotated[list[Path] | None, typer.Option(help="JSONL file of multiple choice; may be repeated, like the next two")] = None,
    bits: Annotated[list[Path] | None, typer.Option(help="JSONL file of texts, for bits per byte")] = None,
    exact: Annotated[list[Path] | None, typer.Option(help="JSONL file of prompts with the exact answer")] = None,
    batch: Annotated[int, typer.Option(min=1, max=1 << 20, help="texts per forward pass")] = 8,
    as_json: Annotated[Path | None, typer.Option("--json", help="write the results to this file, too")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="a tokenizer's file or folder; default: as for megascale generate")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16, fp16 or fp64; default: as in training")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Prints the results of each file."""
    from megascale.evaluation.opened import opened
    from megascale.evaluation.tasks import open_task, run_task

    named = listed(tasks) if tasks is not None else []
    by_kind = {"choice": choice, "bits": bits, "exact": exact}
    named += [(path.stem, path, kind) for kind, paths in by_kind.items() for path in paths or []]
    if not named:
        raise UsageError("there is nothing to evaluate: give --choice, --bits, --exact or --tasks")
    names = [name for name, *_ in named]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"two evaluations are called {twice}: name them apart in --tasks")
    if as_json is not None and not as_json.parent.is_dir():
        raise UsageError(f"--json {as_json} cannot be written: there is no folder {as_json.parent}")
    with opened(checkpoint, tokenizer, batch, dtype, device) as model:
        ready = [open_task(name, kind, path, model.tokenizer, model.scorer.length, model.vocab_size) for name, path, kind in named]
        results: dict[str, Any] = {}
        for task in ready:
            results[task.name] = run_task(task, model.scorer)
            if model.first:
                print(f"{task.name}: {', '.join(f'{key} {value:.4f}' for key, value in results[task.name].items())}", flush=True)
        if as_json is not None and model.first:
            try:
                as_json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            except OSError as error:
                raise UsageError(f"--json {as_json} cannot be written: {error.strerror}") from None


def listed(path: Path) -> list[tuple[str, Path, str]]:
    """The evaluations of a YAML file, whose paths are as in a config. Raises UsageError."""
    from pydantic import ValidationError

    from megascale.config.bounds import read_small_file
    from megascale.config.load import parse_yaml
    from megascale.config.schema import EvaluateAt

    try:
        value = parse_yaml(read_small_file(path))
    except (OSError, ValueError) as error:
        raise UsageError(f"--tasks {path} cannot be read: {error}") from None
    entries = value.get("evaluate") if isinstance(value, dict) else value
    if not isinstance(entries, list):
        raise UsageError(f"--tasks {path} is no list: give a list of {{name, path, kind}}")
    found: list[tuple[str, Path, str]] = []
    for number, entry in enumerate(entries, 1):
        try:
            task = EvaluateAt.model_validate(entry)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise UsageError(f"--tasks {path}, entry {number}: {key}: {first['msg']}") from None
        found.append((task.name, Path(task.path), task.kind))
    return found
