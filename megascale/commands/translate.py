"""Targets for sources from an encoder–decoder's checkpoint or a T5 folder, greedily or by a beam; scored against references (sacrebleu)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megascale.cli import examples, new_app

app = new_app(__doc__ or "")


@app.command(
    epilog=examples(
        "megascale translate runs/translate --input test.src",
        "megascale translate runs/translate --input test.src --output out.txt --reference test.tgt --beam 4",
    )
)
def main(
    checkpoint: Annotated[Path, typer.Argument(help="a folder step-…, a run, or a Hugging Face folder with T5")],
    inputs: Annotated[Path, typer.Option("--input", help="text file with a source in each line")],
    output: Annotated[Path | None, typer.Option(help="file for the targets, a line each; printed if absent")] = None,
    reference: Annotated[Path | None, typer.Option(help="text file with the wanted targets: prints BLEU and exact matches")] = None,
    beam: Annotated[int, typer.Option(min=1, help="hypotheses that are followed; 1 is greedy")] = 1,
    length_penalty: Annotated[float, typer.Option(min=0.0, help="power of the length that a score is divided by")] = 1.0,
    longest: Annotated[int | None, typer.Option(min=1, help="tokens of a target; as in training if absent")] = None,
    batch: Annotated[int, typer.Option(min=1, help="sources that are translated together")] = 32,
    tokenizer: Annotated[
        Path | None, typer.Option(help="of the targets; found beside the training data or in the folder if absent")
    ] = None,
    source_tokenizer: Annotated[Path | None, typer.Option(help="of the sources; as --tokenizer if absent")] = None,
) -> None:
    """Translates every line of --input. Runs on one process."""
    from megascale.generation.translate import Search, translate

    translate(checkpoint, inputs, output, reference, Search(beam, length_penalty, longest, batch), tokenizer, source_tokenizer)
