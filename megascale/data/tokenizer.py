"""Text ↔ token numbers: SentencePiece models and Hugging Face tokenizer.json files behind one small interface."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers
from numpy.typing import NDArray

from megascale.errors import UsageError

# Names that end a document, in the order of preference, for tokenizer.json files, which do not say which one does.
END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


class Tokenizer:
    """`encode_batch`, `decode`, `vocab_size`, `eos_id`, and a `fingerprint` that two equal tokenizers share."""

    def __init__(self, path: Path) -> None:
        self.path = path
        data = path.read_bytes()
        self.fingerprint = hashlib.blake2b(data, digest_size=8).hexdigest()
        self._piece: sentencepiece.SentencePieceProcessor | None = None
        self._json: tokenizers.Tokenizer | None = None
        try:
            if path.suffix == ".json":
                self._json = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
                # The largest number and not the count of names: numbers may have gaps.
                self.vocab_size = 1 + max(self._json.get_vocab().values(), default=-1)
                ends = [self._json.token_to_id(name) for name in END_NAMES]
                self.eos_id = next((int(e) for e in ends if e is not None), -1)
            else:
                self._piece = sentencepiece.SentencePieceProcessor(model_proto=data)
                self.vocab_size, self.eos_id = int(self._piece.vocab_size()), int(self._piece.eos_id())
        except Exception as error:  # both libraries raise bare types from native code
            raise UsageError(f"{path} is not a tokenizer: {error}; give a SentencePiece .model or a Hugging Face tokenizer.json") from None
        if self.eos_id < 0:
            raise UsageError(f"{path} has no token that ends a document (looked for {', '.join(END_NAMES)}): add one to the tokenizer")

    def encode_batch(self, texts: list[str]) -> list[NDArray[np.int32]]:
        """Token numbers of each text, without any that begin or end it."""
        if self._piece is not None:
            return [np.array(ids, np.int32) for ids in self._piece.encode(texts, out_type=int)]
        assert self._json is not None
        return [np.array(e.ids, np.int32) for e in self._json.encode_batch(texts, add_special_tokens=False)]

    def encode_prompt(self, text: str) -> list[int]:
        """A text that a model goes on from: with the tokens that its tokenizer.json wants at its beginning."""
        if self._json is not None:
            return [int(i) for i in self._json.encode(text, add_special_tokens=True).ids]
        return [int(i) for i in self.encode_batch([text])[0]]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token numbers; for models of `train_sentencepiece` exactly what was encoded, but that "▁" comes back as a space.
        Numbers without a piece, with which vocabularies are filled up, say nothing.
        """
        numbers = [int(i) for i in ids]
        if self._piece is not None:
            return str(self._piece.decode([i for i in numbers if i < self.vocab_size]))
        assert self._json is not None
        return str(self._json.decode(numbers, skip_special_tokens=False))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A .model file, a tokenizer.json, or a folder that holds one of them (tokenizer.json first). Raises UsageError."""
    where = Path(path)
    if where.is_dir():
        models = sorted(where.glob("*.model"))
        found = [p for p in (where / "tokenizer.json", where / "tokenizer.model") if p.is_file()] or models
        if not found:
            raise UsageError(f"the folder {where} holds neither tokenizer.json nor a SentencePiece .model: name the tokenizer's file")
        if len(models) > 1 and found is models:
            raise UsageError(f"the folder {where} holds {models[0].name} and {models[1].name}: name the one to use")
        where = found[0]
    if not where.is_file():
        raise UsageError(f"there is no tokenizer {where}: give a SentencePiece .model or a Hugging Face tokenizer.json")
    return Tokenizer(where)


def beside(prefix: str) -> Path | None:
    """The tokenizer that prepare_data.py left beside a prefix."""
    for end in (".model", ".tokenizer.json"):
        if Path(prefix + end).is_file():
            return Path(prefix + end)
    return None


def keep_beside(tokenizer: Tokenizer, prefix: str) -> Path:
    """Copies the tokenizer to PREFIX.model or PREFIX.tokenizer.json, in place of any other that lies there."""
    target, other = Path(prefix + ".model"), Path(prefix + ".tokenizer.json")
    if tokenizer.path.suffix == ".json":
        target, other = other, target
    partial = target.with_name(f".{target.name}.partial")
    partial.write_bytes(tokenizer.path.read_bytes())
    os.replace(partial, target)
    other.unlink(missing_ok=True)
    return target


def train_sentencepiece(texts: Iterable[str], vocab_size: int, out: Path) -> None:
    """A unigram model that reproduces any text exactly: nothing is normalized, white space is kept, unknown characters become bytes.

    The texts are held in memory; about five seconds for 8192 pieces from 4 MB on two cores. Line ends are pieces of their own, so that a
    text cut after a line end is encoded as the whole is, but for ties between equally likely pieces, which rounding over the length of a
    text decides. Raises UsageError where the texts have too few different words for `vocab_size`.
    """
    model = io.BytesIO()
    lines = (line for text in texts for line in text.split("\n") if line and len(line) < 4000)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            vocab_size=vocab_size,
            model_type="unigram",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n"],
            character_coverage=0.9995,
            num_threads=2,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).split("] ")[-1]
        needed = re.search(r"smaller than required_chars\. \d+ vs (\d+)", reason)
        if needed:  # SentencePiece's own advice is an option that this tool does not have
            reason = f"its characters alone need {needed[1]}: give --vocab-size {needed[1]} or more"
        raise UsageError(f"a tokenizer of {vocab_size} pieces cannot be trained on this text: {reason}") from None
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(model.getvalue())
