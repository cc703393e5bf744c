"""Targets for sources from an encoder–decoder's checkpoint or a T5 folder, with greedy or beam search, scored against references
(sacrebleu).
"""

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
    output: Annotated[Path | None, typer.Option(help="file for the targets, one per line; printed if absent")] = None,
    reference: Annotated[Path | None, typer.Option(help="text file with reference targets: prints BLEU and exact matches")] = None,
    beam: Annotated[int, typer.Option(min=1, help="hypotheses to keep; 1 is greedy")] = 1,
    length_penalty: Annotated[float, typer.Option(min=0.0, help="power of the length that divides a score")] = 1.0,
    longest: Annotated[int | None, typer.Option(min=1, help="most tokens of a target; default: as in training")] = None,
    batch: Annotated[int, typer.Option(min=1, help="sources per batch")] = 32,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer of the targets; default: the one of the training data or the folder")
    ] = None,
    source_tokenizer: Annotated[Path | None, typer.Option(help="tokenizer of the sources; default: --tokenizer")] = None,
) -> None:
    """Translates every line of --input. Runs in one process."""
    from megascale.generation.translate import Search, translate

    translate(checkpoint, inputs, output, reference, Search(beam, length_penalty, longest, batch), tokenizer, source_tokenizer)
