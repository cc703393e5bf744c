"""The files of a tokenizer in a Hugging Face folder, made from the tokenizer that a model was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers

from megascale.data.tokenizer import Tokenizer, beside, load_tokenizer
from megascale.errors import UsageError
from megascale.formats.hf.folder import GENERATION, as_json, encoders, tokenizer_files
from megascale.formats.tokenizer_build import end_of, open_tokenizer

POSITION = "megascale.json"  # the exporting run's position in its data
# Keys for generation in a config.json, used without a generation_config.json.
SAID_BY_CONFIG = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
SPACE = "▁"
NEVER = -1e6  # the score of pieces that no text may match: bytes, control symbols
# A SentencePiece model is also exported as tokenizer.json if both encode these alike: white space, accents, full width, digits, bytes.
PROBES = (
    "The quick brown fox.",
    " leading,  double  and trailing ",
    "\n\ttabs\r\nand\n\nlines\n",
    "Ünïcödé ﬁ Ａ① é é — “quotes”",
    "def f(x):\n    return x ** 2  # 12345\n",
    "日本語 العربية 🙂\u200d🙃 \x00",
    "<s>[INST]</s> <unk> <0x0A>",
    "",
)


@dataclass(frozen=True)
class Found:
    """A tokenizer's files for a folder, name → content; its number of pieces and its end token, if it can be read; and notes for the
    user.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    vocab_size: int | None = None
    end: int | None = None
    notes: tuple[str, ...] = ()


def gather(path: Path | None, asked: bool) -> Found:
    """The tokenizer at `path`, a file or a folder; None: there is none.

    asked  the user named it, so it must be readable. One that was found is copied as it is, with a note.

    Raises UsageError.
    """
    if path is None:
        return Found()
    try:
        tokenizer = open_tokenizer(path)
        return Found(tokenizer_content(path, tokenizer), tokenizer.vocab_size, end_of(tokenizer))
    except UsageError as error:
        if asked:
            raise
        files = {p.name: p.read_bytes() for p in tokenizer_files(path)} if path.is_dir() else {}
        what = "its files are copied without comparing them with the model" if files else "the folder has none"
        return Found(files, notes=(f"{error}; {what}",))


def tokenizer_content(path: Path, tokenizer: Tokenizer | None = None) -> dict[str, bytes]:
    """A tokenizer's file or folder → its files in a Hugging Face folder. Raises UsageError if it is not a tokenizer."""
    if path.is_dir() and tokenizer_files(path):
        return {p.name: p.read_bytes() for p in tokenizer_files(path)}
    tokenizer = tokenizer or load_tokenizer(path)
    if tokenizer.path.suffix == ".json":
        end = str(tokenizers.Tokenizer.from_file(str(tokenizer.path)).id_to_token(tokenizer.eos_id))
        return {"tokenizer.json": tokenizer.path.read_bytes(), "tokenizer_config.json": as_json(_facts(end))}
    return _of_sentencepiece(tokenizer)


def _facts(end: str) -> dict[str, Any]:
    return {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": end, "clean_up_tokenization_spaces": False}


def _of_sentencepiece(tokenizer: Tokenizer) -> dict[str, bytes]:
    data = tokenizer.path.read_bytes()
    piece = sentencepiece.SentencePieceProcessor(model_proto=data)
    content = {"tokenizer.model": data}
    text = as_tokenizers(piece)
    if text is not None:
        content |= {"tokenizer.json": text.encode(), "tokenizer_config.json": as_json(_facts(piece.id_to_piece(piece.eos_id())))}
    return content


def as_tokenizers(piece: Any) -> str | None:
    """A SentencePiece unigram model as the text of a tokenizer.json; None if it would not encode alike: BPE, a model that normalizes its
    text, or one that lacks a character of a hidden piece's name, where an unknown character costs more than the name.
    """
    numbers = range(piece.vocab_size())
    hidden = [piece.is_control(i) or piece.is_byte(i) or piece.is_unknown(i) or piece.is_unused(i) for i in numbers]
    known = {piece.id_to_piece(i) for i in numbers if not hidden[i]}
    if any(set(piece.id_to_piece(i)) - known for i in numbers if hidden[i]):
        return None
    vocabulary = [(piece.id_to_piece(i), NEVER if hidden[i] else piece.get_score(i)) for i in numbers]
    made = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=piece.unk_id(), byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", SPACE)
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    plain = [i for i in numbers if not hidden[i]]
    # User-defined symbols are matched before anything else. The library does not list them; only they have score 0.
    marks = [piece.id_to_piece(i) for i in plain if piece.get_score(i) == 0.0]
    made.add_tokens([tokenizers.AddedToken(m, normalized=False, special=False) for m in marks])
    if made.get_vocab_size() != piece.vocab_size():
        return None
    alike = all(made.encode(t, add_special_tokens=False).ids == piece.encode(t) for t in PROBES)
    return made.to_str() if alike else None


def find_tokenizer(config: Mapping[str, Any], folder: Path) -> Path | None:
    """Finds a checkpoint's tokenizer: next to the converted model, else the one in the run's config, else next to its data."""
    if encoders(folder.parent):
        return folder.parent
    data = config.get("data")
    data = data if isinstance(data, Mapping) else {}
    if isinstance(data.get("tokenizer"), str) and data["tokenizer"]:
        return Path(data["tokenizer"])
    prefix = find_prefix(config)
    return None if prefix is None else beside(prefix)


def find_prefix(config: Mapping[str, Any]) -> str | None:
    """The prefix of the first training data in a run's config."""
    sources = (config.get("data") or {}).get("train")
    first = sources[0] if isinstance(sources, list) and sources else sources
    prefix = first.get("path") if isinstance(first, Mapping) else first
    return prefix if isinstance(prefix, str) else None


def export_files(tokenizer: Found, trainer: Mapping[str, Any]) -> dict[str, bytes]:
    """Files of an exported folder besides the model: the tokenizer; the generation config it came with, else one that names the end token;
    and the run's position in its data.
    """
    content = dict(tokenizer.files)
    if "samples" in trainer:
        content[POSITION] = as_json({k: trainer[k] for k in ("step", "samples", "tokens", "identity", "drawn", "mixture") if k in trainer})
    generation, config = (trainer.get(k) for k in ("hf_generation_config", "hf_config"))
    if isinstance(generation, Mapping) and generation:
        content[GENERATION] = as_json(generation)
    elif isinstance(config, Mapping) and config.get("eos_token_id") is not None:
        content[GENERATION] = as_json({k: config[k] for k in SAID_BY_CONFIG if config.get(k) is not None})
    elif tokenizer.end is not None:
        content[GENERATION] = as_json({"eos_token_id": tokenizer.end, "pad_token_id": tokenizer.end})
    return content


def check_fits(tokenizer: Found, path: Path | None, vocab_size: int) -> None:
    """Raises UsageError for a tokenizer with more pieces than the model has rows; the rest is padding."""
    if tokenizer.vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise UsageError(
            f"the tokenizer {path} has {tokenizer.vocab_size} pieces but the model {vocab_size} rows: give the tokenizer that it was "
            "trained with, or --no-tokenizer"
        )
