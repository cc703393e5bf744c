"""Text ↔ token numbers: SentencePiece models and Hugging Face tokenizer.json files behind one small interface."""

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

ENDINGS = (".model", ".tokenizer.json")  # of the tokenizer that prepare_data.py leaves beside a prefix
IN_FOLDERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")  # names in Hugging Face folders
LONGEST_LINE = 4192  # bytes of a line that SentencePiece trains on
RESERVED = "\u2585"  # a character that no line may have that it trains on


class Tokenizer:
    """`encode_batch`, `encode_prompt`, `decode`, `vocab_size`, and a `fingerprint` that two equal tokenizers share.

    `eos_id` ends a document and `bos_id` begins one; asking for one that no file names raises UsageError. `specials` are numbers of tokens
    that no text should become. `begin`: what a document began with in the data beside; None where no data says so.
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
            # The largest number and not the count of names: numbers may have gaps.
            self.vocab_size = 1 + max(numbers.values(), default=-1)
            names = special_names(spec)
            self.specials = sorted(numbers[n] for n in names if n in numbers)
            self._ends = tuple(n for n in END_NAMES if n in names) or tuple(n for n in END_NAMES if n in numbers)
        else:
            wrong = f"{path} is not a tokenizer, a SentencePiece .model or a Hugging Face tokenizer.json"
            self._piece = guarded(lambda: sentencepiece.SentencePieceProcessor(model_proto=data), wrong)
            self.vocab_size = int(self._piece.vocab_size())
        if not 0 < self.vocab_size <= MOST_TOKENS:
            raise UsageError(f"{path} numbers its tokens up to {self.vocab_size - 1}, and 0 to {MOST_TOKENS - 1} can be: correct it")
        facts = _facts_of(path, prefix, self.fingerprint)
        self.begin: tuple[int, ...] | None = None
        if facts:
            self.begin = (int(facts["bos_id"]),) if "bos_id" in facts else ()
        self._known = {key: int(facts[key]) for key in ("eos_id", "bos_id") if key in facts}
        for key, token in self._known.items():
            if token >= self.vocab_size:
                raise UsageError(f"{key} of the data beside {path} is {token}, and it has {self.vocab_size} pieces: prepare the data again")
        if eos is not None:
            self._known["eos_id"] = self._number(eos, "--eos")

    @property
    def eos_id(self) -> int:
        """The token that ends a document: as prepared or asked for, else as the model or the files beside it say, else by its name."""
        if "eos_id" not in self._known:
            self._known["eos_id"] = self._find("eos", self._ends)
        return self._known["eos_id"]

    @property
    def bos_id(self) -> int:
        """The token that begins a document where that is asked for: as the model, the files beside it or its post-processor say."""
        if "bos_id" not in self._known:
            self._known["bos_id"] = self._find("bos", ())
        return self._known["bos_id"]

    def encode_batch(self, texts: list[str]) -> list[NDArray[np.int32]]:
        """Token numbers of each text, without any that begin or end it. Names of special tokens in a text are text, as far as the
        tokenizer can tell: those it reads otherwise are among `specials`.
        """
        if self._piece is not None:
            piece = self._piece
            return [np.array(ids, np.int32) for ids in guarded(lambda: piece.encode(texts, out_type=int), f"{self.path} cannot encode")]
        made = self._native(as_text=True)
        found = guarded(lambda: made.encode_batch(texts, add_special_tokens=False), f"{self.path} cannot encode a text")
        return [np.array(e.ids, np.int32) for e in found]

    def encode_prompt(self, text: str) -> list[int]:
        """A text that a model goes on from. It begins as the documents of the data beside did; without data, with the tokens that
        tokenizer.json wants at a beginning, and names of special tokens are these. Nothing is put behind it.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise UsageError(f"the prompt {text[:60]!r} has halves of characters, which are no text: correct it") from None
        if self._json is None or self.begin is not None:
            return [*(self.begin or ()), *(int(i) for i in self.encode_batch([text])[0])]
        made = self._native(as_text=False)
        ids = guarded(lambda: made.encode(text, add_special_tokens=True).ids, f"{self.path} cannot encode the prompt")
        return [int(i) for i in ids[: len(ids) - self._put_around()[1]]]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token numbers; for models of `train_sentencepiece` exactly what was encoded, but that "▁" comes back as a space.
        Numbers without a piece, with which vocabularies are filled up, say nothing.
        """
        numbers = [int(i) for i in ids]
        if self._piece is not None:
            return str(self._piece.decode([i for i in numbers if i < self.vocab_size]))
        made = self._native(as_text=True)
        return str(guarded(lambda: made.decode(numbers, skip_special_tokens=False), f"{self.path} cannot decode"))

    def _native(self, as_text: bool) -> tokenizers.Tokenizer:
        """The tokenizer, which reads names of special tokens `as_text` or as the tokens."""
        assert self._json is not None
        self._json.encode_special_tokens = as_text
        return self._json

    def _put_around(self) -> tuple[list[int], int]:
        """What tokenizer.json puts before a text, and how many tokens it puts behind one."""
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
                f"no file beside {self.path} says which token begins a document: write bos_token into tokenizer_config.json beside it, or "
                "leave out --bos"
            )
        raise UsageError(
            f"no file beside {self.path} says which token ends a document, and it has none called {', '.join(END_NAMES)}: prepare the data "
            "with --eos TOKEN, or write eos_token into tokenizer_config.json beside it"
        )

    def _number(self, token: str | int, where: str | Path) -> int:
        """The number of a token that is named in `where`."""
        number: int | None = token if isinstance(token, int) else None
        if isinstance(token, str) and self._json is not None:
            number = self._json.token_to_id(token)
        elif isinstance(token, str) and self._piece is not None:
            number = int(self._piece.piece_to_id(token))
            number = number if self._piece.id_to_piece(number) == token else None
        if number is None or not 0 <= number < self.vocab_size:
            raise UsageError(f"{where} names the token {token!r}, and {self.path} has none such: correct one of them, or give --eos TOKEN")
        return number


def load_tokenizer(path: str | Path, prefix: str | None = None, eos: str | None = None) -> Tokenizer:
    """A .model file, a tokenizer.json, or a folder that holds one of them (tokenizer.json first). Raises UsageError.

    `prefix`: of the data that a model was trained on, where the tokenizer does not lie beside it: PREFIX.json says how its documents began
    and ended. `eos`: the name of the token that ends a document, whatever else is said.
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
    """What PREFIX.json says where this tokenizer, or one equal to it, made the tokens; empty for tokenizers from elsewhere."""
    prefixes = [] if prefix is None else [prefix]
    prefixes += [str(path)[: -len(end)] for end in reversed(ENDINGS) if path.name.endswith(end)][:1]
    for candidate in prefixes:
        try:
            facts = source_facts(candidate)
        except UsageError:  # whoever uses the data says so; beside a tokenizer from elsewhere lies a .json of another kind
            continue
        if facts.get("tokenizer_fingerprint") == fingerprint:
            return facts
    return {}


def beside(prefix: str) -> Path | None:
    """The tokenizer that prepare_data.py left beside a prefix."""
    for end in ENDINGS:
        if is_file(Path(prefix + end)):
            return Path(prefix + end)
    return None


def keep_beside(tokenizer: Tokenizer, prefix: str, files: Publication) -> Path:
    """The tokenizer as PREFIX.model or PREFIX.tokenizer.json of `files`, in place of any other that lies there."""
    target, other = (Path(prefix + end) for end in (ENDINGS if tokenizer.path.suffix != ".json" else reversed(ENDINGS)))
    files.remove(other)
    if not (target.exists() and target.samefile(tokenizer.path)):
        write_durably(files.stage(target), tokenizer.path.read_bytes())
    return target


def training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines as SentencePiece trains on. It leaves out, without a word, lines of more than LONGEST_LINE bytes, which are cut here in front
    of a space, and lines with the character that it keeps for itself, at which they are cut.
    """
    for text in texts:
        for line in text.split("\n"):
            for part in line.split(RESERVED):
                yield from cut_line(part)


def cut_line(line: str) -> Iterator[str]:
    """Pieces of at most LONGEST_LINE bytes that together are the line."""
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
    """A unigram model that reproduces any text exactly: nothing is normalized, white space is kept, unknown characters become bytes.

    The texts are held in memory; about five seconds for 8192 pieces from 4 MB on two cores. Line ends are pieces of their own, so that a
    text cut after a line end is encoded as the whole is, but for ties between equally likely pieces, which rounding over the length of a
    text decides. The number of pieces: `vocab_size`, or without `exact` as many as there are where the texts have too few different words.
    Raises UsageError where it cannot be.
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
        if needed:  # SentencePiece's own advice is an option that this tool does not have
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
