"""Targets for sources from an encoder–decoder's checkpoint or a T5 folder, with greedy or beam search, scored against references
(sacrebleu).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megascale.checkpoint.loader import find, load
from megascale.checkpoint.trainer import read_trainer
from megascale.comm.mesh import build_mesh
from megascale.config.layout import axis_sizes
from megascale.config.load import build_config
from megascale.config.schema import Config, Parallel
from megascale.data.tokenizer import Tokenizer, beside, load_tokenizer
from megascale.data.vocabulary import end_token, first_prefix
from megascale.errors import UsageError
from megascale.formats.hf.folder import CONFIG, is_hf_folder
from megascale.formats.json_file import read_object
from megascale.formats.load import load_model
from megascale.formats.tokenizer_build import open_tokenizer
from megascale.generation.beam import beam_search
from megascale.generation.open import layout, open_any
from megascale.launch.ranks import RankInfo
from megascale.model.encoder_decoder import EncoderDecoder
from megascale.train.build import build_model
from megascale.train.device import choose_device
from megascale.train.state import model_pieces


@dataclass(frozen=True)
class Search:
    """Settings of the search: hypotheses of a beam, the power of the length that divides a score, most tokens of a target (None: as in
    training), and sources per batch.
    """

    beam: int
    length_penalty: float
    longest: int | None
    batch: int


def translate(
    checkpoint: Path,
    inputs: Path,
    output: Path | None,
    reference: Path | None,
    search: Search,
    tokenizer: Path | None,
    source_tokenizer: Path | None,
) -> None:
    """Writes or prints the target of every line of `inputs`, and the score if there is a reference. Runs in one process."""
    sources, wanted = read_lines(inputs), None if reference is None else read_lines(reference)
    if wanted is not None and len(wanted) != len(sources):
        raise UsageError(f"{reference} has {len(wanted)} lines and {inputs} has {len(sources)}: give a reference for each source")
    bleu = None if wanted is None else import_sacrebleu()
    opened = (open_hf if is_hf_folder(checkpoint) else open_run)(checkpoint, tokenizer, source_tokenizer)
    model = opened.model
    if search.longest is not None and model.cfg.position_row.table and search.longest > opened.longest:
        raise UsageError(
            f"--longest is {search.longest} but the model has learned {opened.longest} positions (train.seq_len): choose a smaller one"
        )
    found: list[str] = []
    longest = search.longest or opened.longest
    for first in range(0, len(sources), search.batch):
        rows = padded(opened, sources[first : first + search.batch], first, inputs)
        for hypothesis in beam_search(model, rows, opened.end, longest, search.beam, search.length_penalty, opened.start):
            found.append(opened.out.decode(hypothesis.tokens).replace("\n", " "))
    text = "".join(line + "\n" for line in found)
    if output is None:
        print(text, end="")
    else:
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--output {output} cannot be written: {error.strerror}") from None
    if wanted is not None and bleu is not None:
        exact = sum(a == b for a, b in zip(found, wanted))
        print(f"{bleu.corpus_bleu(found, [wanted])}; {exact} of {len(wanted)} lines exact", file=sys.stdout if output else sys.stderr)


def read_lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error}): give a text file in UTF-8") from None
    if not lines:
        raise UsageError(f"{path} has no line: give a text file with a sentence in each")
    return lines


def import_sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError:
        raise UsageError(
            "--reference needs sacrebleu, which is not installed: pip install 'megascale[translate]', or leave it out"
        ) from None
    return sacrebleu


@dataclass(frozen=True)
class Opened:
    """A model with tokenizers of its input (`into`) and output (`out`). The decoder's input starts with `start`, targets end with `end`."""

    model: EncoderDecoder
    device: torch.device
    into: Tokenizer
    out: Tokenizer
    start: int
    end: int
    longest_source: int | None  # None: any length
    longest: int


def open_run(checkpoint: Path, tokenizer: Path | None, source_tokenizer: Path | None) -> Opened:
    folder = find(checkpoint)
    config, step = saved_config(folder)
    out = chosen(config, tokenizer, config.data.tokenizer, "target")
    shared = config.model.share_embeddings
    into = out if shared and source_tokenizer is None else chosen(config, source_tokenizer, config.data.source_tokenizer, "source")
    model, device = open_model(config, folder, step)
    end = end_token(config) if tokenizer is None else out.eos_id
    start = end if config.data.start_token is None else config.data.start_token
    return Opened(model, device, into, out, start, end, config.train.source_length, config.train.seq_len)


def open_hf(folder: Path, tokenizer: Path | None, source_tokenizer: Path | None) -> Opened:
    """Opens a T5 folder: its position biases are relative, so it takes sources of any length."""
    found = open_any(folder)
    if found.model.family != "encoder_decoder":
        raise UsageError(f"{folder} is of family {found.model.family}, but only an encoder_decoder has sources: use megascale generate")
    out = open_tokenizer(tokenizer or folder)
    into = out if source_tokenizer is None else open_tokenizer(source_tokenizer)
    said = read_object(folder / CONFIG)
    start, end = (said.get(key) for key in ("decoder_start_token_id", "eos_token_id"))
    if not isinstance(start, int) or not isinstance(end, int):
        raise UsageError(f"{folder / CONFIG} has decoder_start_token_id {start} and eos_token_id {end}: targets need a number for both")
    config = layout(found, 1, "auto")
    device = choose_device(config, RankInfo())
    mesh = build_mesh(axis_sizes(config.parallel, 1), device.type)
    model = load_model(config.model, found.seq_len, found.produce, mesh, config.parallel, device, found.dtype).model
    assert isinstance(model, EncoderDecoder)
    return Opened(model, device, into, out, start, end, None, found.seq_len)


def saved_config(folder: Path) -> tuple[Config, int]:
    """The config of a checkpoint's run, for one process, and its step."""
    trainer = read_trainer(folder)
    if not isinstance(trainer.get("config"), dict):
        raise UsageError(f"{folder / 'trainer.json'} has no config of a run: give a checkpoint that pretraining wrote")
    config = build_config({**trainer["config"], "parallel": {}}, trainer.get("plugins", {}))
    if config.model.family != "encoder_decoder":
        raise UsageError(f"model.family of {folder} is {config.model.family}, but only an encoder_decoder has sources")
    return config.model_copy(update={"parallel": Parallel(dp_shard=1)}), int(trainer.get("step", 1))


def chosen(config: Config, given: Path | None, configured: str | None, side: str) -> Tokenizer:
    path = given or configured or beside(first_prefix(config, side))
    if path is None:
        option = "--source-tokenizer" if side == "source" else "--tokenizer"
        raise UsageError(f"there is no tokenizer next to {first_prefix(config, side)}: name it with {option}")
    return load_tokenizer(path, first_prefix(config, side))


def open_model(config: Config, folder: Path, step: int) -> tuple[EncoderDecoder, torch.device]:
    device = choose_device(config, RankInfo())
    parallel, _, _ = build_model(config, build_mesh(axis_sizes(config.parallel, 1), device.type), device)
    load(folder, model_pieces(parallel), prefix="model.")
    parallel.at_step(max(1, step))
    parallel.train(False)
    model = parallel.model
    assert isinstance(model, EncoderDecoder)
    return model, device


def padded(opened: Opened, texts: list[str], first: int, path: Path) -> torch.Tensor:
    """Texts with their end tokens as rows [b, t], −1 beyond."""
    rows, longest = [[*ids, opened.into.eos_id] for ids in opened.into.encode_batch(texts)], opened.longest_source
    vocabulary = opened.model.cfg.source_vocab_size or opened.model.cfg.vocab_size or 0
    for number, row in enumerate(rows, first + 1):
        if max(row) >= vocabulary:
            raise UsageError(
                f"{path}, line {number} has token {max(row)}, and the model knows {vocabulary}: use the tokenizer it was trained with"
            )
        if longest is not None and len(row) > longest:
            raise UsageError(
                f"{path}, line {number} has {len(row)} tokens, and the model was trained on sources of at most {longest}: cut it"
            )
    width = max(map(len, rows))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], device=opened.device)
