"""Opens Hugging Face's tokenizer.json so that a document becomes the tokens of its text and nothing else, and finds the tokens that begin
and end a document.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from megascale.errors import UsageError

LARGEST = 512 << 20  # largest tokenizer.json in bytes; one with 250,000 tokens has 35 MB
MOST_TOKENS = 1 << 24  # a larger vocabulary is a mistake: its token counts alone would take gigabytes
MOST_GROWTH = 1024  # factor by which a normalizer may lengthen a text
# Names of the end token if no file next to the tokenizer names one, in order of preference.
END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
NAMED_IN = ("tokenizer_config.json", "special_tokens_map.json")
NUMBERED_IN = ("generation_config.json", "config.json")

T = TypeVar("T")


def guarded(call: Callable[[], T], what: str) -> T:
    """Calls native code of tokenizer libraries, which raises bare types and panics that are not `Exception`s."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, GeneratorExit, UsageError):
        raise
    except BaseException as error:
        raise UsageError(f"{what}: {' '.join(str(error).split())[:300] or type(error).__name__}") from None


def open_json(path: Path, data: bytes) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The tokenizer and its specification. Truncation, padding and dropout from the file are switched off.

    Raises UsageError for a file that is not a tokenizer, or would take all memory.
    """
    wrong = f"{path} is not a tokenizer"
    fix = "give a SentencePiece .model or a Hugging Face tokenizer.json"
    if len(data) > LARGEST:
        raise UsageError(f"{wrong}: it has {len(data)} bytes, more than {LARGEST}; {fix}")
    try:
        spec = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{wrong}: {error}; {fix}") from None
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        raise UsageError(f"{wrong}: it has no 'model'; {fix}")
    growth = lengthening(spec.get("normalizer"))
    if growth > MOST_GROWTH:
        raise UsageError(f"{path}: its normalizer makes a text up to {growth:.0f} times as long; correct it, or take another tokenizer")
    made = guarded(lambda: tokenizers.Tokenizer.from_str(data.decode("utf-8")), wrong)
    made.no_truncation()
    made.no_padding()
    if getattr(made.model, "dropout", None) is not None:
        made.model.dropout = None
    return made, spec


def lengthening(normalizer: Any) -> float:
    """The factor by which the normalizer may lengthen a text."""
    if not isinstance(normalizer, Mapping):
        return 1.0
    kind, content = normalizer.get("type"), normalizer.get("content")
    if kind == "Sequence" and isinstance(normalizer.get("normalizers"), list):
        growth = 1.0
        for part in normalizer["normalizers"]:
            growth = min(growth * lengthening(part), 1e300)
        return growth
    if kind == "Replace" and isinstance(content, str):
        pattern = normalizer.get("pattern")
        text = pattern.get("String") if isinstance(pattern, Mapping) else None
        if isinstance(text, str) and text:
            return max(1.0, len(content) / len(text))
        nothing = pattern.get("Regex") if isinstance(pattern, Mapping) else ""
        return 1.0 + len(content) if _matches_nothing(nothing) else max(1.0, len(content))
    if kind == "Prepend" and isinstance(normalizer.get("prepend"), str):
        return 1.0 + len(normalizer["prepend"])
    return 1.0


def _matches_nothing(pattern: Any) -> bool:
    """Whether a regular expression matches the empty text, and so between any two characters; True if unknown."""
    try:
        return not isinstance(pattern, str) or re.search(pattern, "") is not None
    except (re.error, RecursionError, OverflowError):
        return True


def special_names(spec: Mapping[str, Any]) -> set[str]:
    """Tokens that no text should become: the special ones except the unknown token."""
    added = spec.get("added_tokens")
    names = {t["content"] for t in added if t.get("special")} if isinstance(added, list) else set()
    model = spec["model"]
    unknown, number, vocab = model.get("unk_token"), model.get("unk_id"), model.get("vocab")
    if isinstance(number, int) and isinstance(vocab, list) and 0 <= number < len(vocab):
        unknown = vocab[number][0]
    return names - {unknown}


def said_beside(path: Path, what: str, files: tuple[str, ...]) -> tuple[str | int, Path] | None:
    """`what` ("eos" or "bos") according to `files` next to a tokenizer: a token's name or id, and the file that says so."""
    for name in files:
        file = path.with_name(name)
        value = _read(file).get(f"{what}_token_id" if name in NUMBERED_IN else f"{what}_token")
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, list):
            value = value[0] if value else None
        if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
            return value, file
    return None


def _read(path: Path) -> dict[str, Any]:
    """Reads a JSON object; empty if there is no file. Raises UsageError for an unreadable file, since its content affects tokens."""
    try:
        if not path.is_file():
            return {}
        if path.stat().st_size > LARGEST:
            raise UsageError(f"{path} has {path.stat().st_size} bytes, more than {LARGEST}: correct it, or remove it")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} next to the tokenizer cannot be read ({error}): correct it, or remove it") from None
    return value if isinstance(value, dict) else {}
