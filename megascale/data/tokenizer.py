"""Text ↔ token ids: SentencePiece models and Hugging Face tokenizer.json files behind one small interface."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from numpy.typing import NDArray

from megascale.data.facts import is_file, source_facts
from megascale.data.publish import Publication
from megascale.data.tokenizer_json import END_NAMES, MOST_TOKENS, NAMED_IN, NUMBERED_IN, guarded, open_json, said_beside, special_names
from megascale.errors import UsageError
from megascale.files import write_durably

ENDINGS = (".model", ".tokenizer.json")  # of the tokenizer that `megascale prepare` stores next to a prefix
IN_FOLDERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")  # names in Hugging Face folders
LONGEST_LINE = 4192  # longest line in bytes that SentencePiece trains on
RESERVED = "\u2585"  # a character that SentencePiece reserves: training lines must not have it


class Tokenizer:
    """`encode_batch`, `encode_prompt`, `decode`, `vocab_size`, and a `fingerprint` that two equal tokenizers share.

    `eos_id` ends a document and `bos_id` begins one; reading one that no file defines raises UsageError. `specials` are ids of tokens that
    no text should become. `begin`: tokens that began each document of the data next to it; None if no data say so.
    """

    def __init__(self, path: Path, prefix: str | None = None, eos: str | None = None) -> None:
        self.path = path
        data = path.read_bytes()
        self.fingerprint = hashlib.blake2b(data, digest_size=8).hexdigest()
        self._piece: sentencepiece.SentencePieceProcessor | None = None
        self._json: tokenizers.Tokenizer | None = None
        self.specials: list[int] = []
        self._ends: tuple[str, ...] = ()
        if path.suffix == ".json":
            self._json, spec = open_json(path, data)
            numbers = self._json.get_vocab()
            # The largest id, not the number of names: ids may have gaps.
            self.vocab_size = 1 + max(numbers.values(), default=-1)
            names = special_names(spec)
            self.specials = sorted(numbers[n] for n in names if n in numbers)
            self._ends = tuple(n for n in END_NAMES if n in names) or tuple(n for n in END_NAMES if n in numbers)
        else:
            wrong = f"{path} is not a tokenizer, a SentencePiece .model or a Hugging Face tokenizer.json"
            self._piece = guarded(lambda: sentencepiece.SentencePieceProcessor(model_proto=data), wrong)
            self.vocab_size = int(self._piece.vocab_size())
        if not 0 < self.vocab_size <= MOST_TOKENS:
            raise UsageError(f"{path} has token ids up to {self.vocab_size - 1}, but at most {MOST_TOKENS - 1} is supported: correct it")
        facts = _facts_of(path, prefix, self.fingerprint)
        self.begin: tuple[int, ...] | None = None
        if facts:
            self.begin = (int(facts["bos_id"]),) if "bos_id" in facts else ()
        self._known = {key: int(facts[key]) for key in ("eos_id", "bos_id") if key in facts}
        for key, token in self._known.items():
            if token >= self.vocab_size:
                raise UsageError(f"{key} of the data next to {path} is {token}, not below {self.vocab_size}: prepare the data again")
        if eos is not None:
            self._known["eos_id"] = self._number(eos, "--eos")

    @property
    def eos_id(self) -> int:
        """The token that ends a document: from preparation or the caller, else from the model or the files next to it, else by its name."""
        if "eos_id" not in self._known:
            self._known["eos_id"] = self._find("eos", self._ends)
        return self._known["eos_id"]

    @property
    def bos_id(self) -> int:
        """The token that begins a document on request: from the model, the files next to it or its post-processor."""
        if "bos_id" not in self._known:
            self._known["bos_id"] = self._find("bos", ())
        return self._known["bos_id"]

    def encode_batch(self, texts: list[str]) -> list[NDArray[np.int32]]:
        """Token ids of each text, without any that begin or end it. Names of special tokens in a text are text if the tokenizer allows
        that; those that it always recognizes are in `specials`.
        """
        if self._piece is not None:
            piece = self._piece
            return [np.array(ids, np.int32) for ids in guarded(lambda: piece.encode(texts, out_type=int), f"{self.path} cannot encode")]
        made = self._native(as_text=True)
        found = guarded(lambda: made.encode_batch(texts, add_special_tokens=False), f"{self.path} cannot encode a text")
        return [np.array(e.ids, np.int32) for e in found]

    def encode_prompt(self, text: str) -> list[int]:
        """Tokens of a text to continue. It begins like the documents of the data next to the tokenizer; without data, like tokenizer.json
        prescribes, and names of special tokens become those tokens. Nothing is appended.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise UsageError(f"the prompt {text[:60]!r} has half a surrogate pair, which is not text: correct it") from None
        if self._json is None or self.begin is not None:
            return [*(self.begin or ()), *(int(i) for i in self.encode_batch([text])[0])]
        made = self._native(as_text=False)
        ids = guarded(lambda: made.encode(text, add_special_tokens=True).ids, f"{self.path} cannot encode the prompt")
        return [int(i) for i in ids[: len(ids) - self._put_around()[1]]]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; for models of `train_sentencepiece` exactly what was encoded, except that "▁" becomes a space. Ids without
        a piece, which pad vocabularies, give no text.
        """
        numbers = [int(i) for i in ids]
        if self._piece is not None:
            return str(self._piece.decode([i for i in numbers if i < self.vocab_size]))
        made = self._native(as_text=True)
        return str(guarded(lambda: made.decode(numbers, skip_special_tokens=False), f"{self.path} cannot decode"))

    def _native(self, as_text: bool) -> tokenizers.Tokenizer:
        """The native tokenizer, which treats names of special tokens `as_text` or as tokens."""
        assert self._json is not None
        self._json.encode_special_tokens = as_text
        return self._json

    def _put_around(self) -> tuple[list[int], int]:
        """The tokens that tokenizer.json puts before a text, and the number that it puts after one."""
        made = self._native(as_text=False)
        found = guarded(lambda: made.encode("a", add_special_tokens=True), f"{self.path} cannot encode a text")
        put = list(found.special_tokens_mask)
        if 0 not in put:
            return [], 0
        return [int(i) for i in found.ids[: put.index(0)]], put[::-1].index(0)

    def _find(self, what: str, names: tuple[str, ...]) -> int:
        """The number of the token that begins ("bos") or ends ("eos") a document."""
        if self._piece is not None:
            own = int(self._piece.bos_id() if what == "bos" else self._piece.eos_id())
            if own >= 0:
                return own
        in_folder = self.path.name in IN_FOLDERS
        if in_folder and (said := said_beside(self.path, what, NAMED_IN)):
            return self._number(*said)
        if what == "bos" and self._json is not None and (before := self._put_around()[0]):
            return before[0]
        if in_folder and (said := said_beside(self.path, what, NUMBERED_IN)):
            return self._number(*said)
        if names:
            return self._number(names[0], str(self.path))
        if what == "bos":
            raise UsageError(
                f"no file next to {self.path} names the token that begins a document: write bos_token into tokenizer_config.json there, or "
                "leave out --bos"
            )
        raise UsageError(
            f"no file next to {self.path} names its end token, and it has none called {', '.join(END_NAMES)}: prepare the data "
            "with --eos TOKEN, or write eos_token into tokenizer_config.json there"
        )

    def _number(self, token: str | int, where: str | Path) -> int:
        """The id of a token that `where` names."""
        number: int | None = token if isinstance(token, int) else None
        if isinstance(token, str) and self._json is not None:
            number = self._json.token_to_id(token)
        elif isinstance(token, str) and self._piece is not None:
            number = int(self._piece.piece_to_id(token))
            number = number if self._piece.id_to_piece(number) == token else None
        if number is None or not 0 <= number < self.vocab_size:
            raise UsageError(f"{where} names the token {token!r}, but {self.path} has no such token: correct one, or give --eos TOKEN")
        return number


def load_tokenizer(path: str | Path, prefix: str | None = None, eos: str | None = None) -> Tokenizer:
    """Opens a .model file, a tokenizer.json, or a folder with one of them (tokenizer.json first). Raises UsageError.

    `prefix`: of the data that a model was trained on, if the tokenizer is not stored with them: PREFIX.json says how its documents began
    and ended. `eos`: the name of the token that ends a document; it overrides the files.
    """
    where = Path(path)
    if not is_file(where) and os.path.isdir(where):
        models = sorted(where.glob("*.model"))
        found = [p for p in (where / "tokenizer.json", where / "tokenizer.model") if p.is_file()] or models
        if not found:
            raise UsageError(f"the folder {where} holds neither tokenizer.json nor a SentencePiece .model: name the tokenizer's file")
        if len(models) > 1 and found is models:
            raise UsageError(f"the folder {where} holds {models[0].name} and {models[1].name}: name the one to use")
        where = found[0]
    if not is_file(where):
        raise UsageError(f"there is no tokenizer {str(where)[:300]}: give a SentencePiece .model or a Hugging Face tokenizer.json")
    try:
        return Tokenizer(where, prefix, eos)
    except OSError as error:
        raise UsageError(f"the tokenizer {where} cannot be read: {error.strerror or error}") from None


def _facts_of(path: Path, prefix: str | None, fingerprint: str) -> dict[str, Any]:
    """The facts in PREFIX.json if this tokenizer, or an equal one, made the tokens; empty for other tokenizers."""
    prefixes = [] if prefix is None else [prefix]
    prefixes += [str(path)[: -len(end)] for end in reversed(ENDINGS) if path.name.endswith(end)][:1]
    for candidate in prefixes:
        try:
            facts = source_facts(candidate)
        except UsageError:  # opening the data will report it; a foreign tokenizer may have an unrelated .json next to it
            continue
        if facts.get("tokenizer_fingerprint") == fingerprint:
            return facts
    return {}


def beside(prefix: str) -> Path | None:
    """The tokenizer that `megascale prepare` stored next to a prefix."""
    for end in ENDINGS:
        if is_file(Path(prefix + end)):
            return Path(prefix + end)
    return None


def keep_beside(tokenizer: Tokenizer, prefix: str, files: Publication) -> Path:
    """Stores the tokenizer as PREFIX.model or PREFIX.tokenizer.json in `files`, replacing any other one there."""
    target, other = (Path(prefix + end) for end in (ENDINGS if tokenizer.path.suffix != ".json" else reversed(ENDINGS)))
    files.remove(other)
    if not (target.exists() and target.samefile(tokenizer.path)):
        write_durably(files.stage(target), tokenizer.path.read_bytes())
    return target


def training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines for training SentencePiece. It silently drops lines of more than LONGEST_LINE bytes, which are split here before a space, and
    lines with its reserved character, at which they are split.
    """
    for text in texts:
        for line in text.split("\n"):
            for part in line.split(RESERVED):
                yield from cut_line(part)


def cut_line(line: str) -> Iterator[str]:
    """Splits a line into pieces of at most LONGEST_LINE bytes."""
    if 4 * len(line) > LONGEST_LINE and len(data := line.encode()) > LONGEST_LINE:
        start = 0
        while len(data) - start > LONGEST_LINE:
            end = start + LONGEST_LINE
            space = data.rfind(b" ", start + 1, end)
            if space < 0:
                while data[end] & 0xC0 == 0x80:  # inside a character
                    end -= 1
            else:
                end = space
            yield data[start:end].decode()
            start = end
        line = data[start:].decode()
    if line:
        yield line


def train_sentencepiece(texts: Iterable[str], vocab_size: int, out: Path, exact: bool = True) -> int:
    """A unigram model that reproduces any text exactly: no normalization, white space is kept, unknown characters become bytes.

    The texts are held in memory; about five seconds for 8192 pieces from 4 MB on two cores. Line ends are separate pieces, so that a text
    cut after a line end is encoded like the whole, except for ties between equally likely pieces, which rounding decides. The number of
    pieces is `vocab_size`, or without `exact` as many as possible if the texts have too few different words.
    Raises UsageError if that is impossible.
    """
    lines = list(training_lines(texts))
    failed = f"a tokenizer of {vocab_size} pieces cannot be trained on this text"
    if not lines:
        raise UsageError(f"{failed}: there is none; name files that have some")
    try:
        content = _train(lines, vocab_size)
    except (RuntimeError, OSError, ValueError, TypeError, OverflowError) as error:
        reason = str(error).split("] ")[-1].strip() or str(error).strip()
        needed = re.search(r"smaller than required_chars\. \d+ vs (\d+)", reason)
        if needed:  # SentencePiece's own advice names an option that this tool does not have
            raise UsageError(f"{failed}: its characters alone need {needed[1]}: give --vocab-size {needed[1]} or more") from None
        most = re.search(r"Vocabulary size too high .*<= (\d+)", reason)
        if most is None:
            raise UsageError(f"{failed}: {reason or type(error).__name__}") from None
        if exact:
            raise UsageError(
                f"{failed}: it has too few different words for more than {most[1]}: give --vocab-size {most[1]} or less"
            ) from None
        vocab_size = int(most[1])
        content = _train(lines, vocab_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(content)
    return vocab_size


def _train(lines: list[str], vocab_size: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
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
    return model.getvalue()
