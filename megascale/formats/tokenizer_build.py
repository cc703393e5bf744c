"""Builds tokenizers from vocab.json and merges.txt, or from vocab.txt, without transformers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from megascale.data.tokenizer import Tokenizer, load_tokenizer
from megascale.errors import UsageError
from megascale.formats.hf.folder import BESIDE, CONFIG, encoders
from megascale.formats.json_file import read_object

# Classes of transformers whose vocab.json and merges.txt are byte-pair encodings, and their pre-tokenization: None: GPT-2's.
BYTE_PAIRS: Mapping[str, str | None] = {
    "GPT2Tokenizer": None,
    "Qwen2Tokenizer": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
# A family's tokenizer class if no tokenizer_config.json names one.
OF_MODEL = {"gpt2": "GPT2Tokenizer", "qwen3": "Qwen2Tokenizer", "qwen3_moe": "Qwen2Tokenizer", "bert": "BertTokenizer"}
FIX = (
    "make a tokenizer.json with transformers (AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)), or give one with --tokenizer"
)


def open_tokenizer(path: Path, prefix: str | None = None) -> Tokenizer:
    """Like `load_tokenizer`, but folders may also have vocab.json with merges.txt, or vocab.txt. Raises UsageError with what is missing."""
    names = {p.name for p in encoders(path)} if path.is_dir() else set()
    if not names or "tokenizer.json" in names or any(n.endswith(".model") for n in names):
        return load_tokenizer(path, prefix)
    text = build(path)
    with tempfile.TemporaryDirectory() as folder:  # a Tokenizer belongs to a file and reads those next to it
        for name in BESIDE:
            if (path / name).is_file():
                (Path(folder) / name).write_bytes((path / name).read_bytes())
        (Path(folder) / "tokenizer.json").write_text(text, encoding="utf-8")
        made = load_tokenizer(Path(folder), prefix)
        end_of(made)  # read now from the files next to it, which are deleted afterwards
        return made


def end_of(tokenizer: Tokenizer) -> int | None:
    """The token that ends a text; None if unknown."""
    try:
        return tokenizer.eos_id
    except UsageError:
        return None


def build(folder: Path) -> str:
    """Builds the text of a tokenizer.json. Raises UsageError if the files are insufficient."""
    said = _object(folder / "tokenizer_config.json")
    kind = said.get("tokenizer_class") or OF_MODEL.get(str(_object(folder / CONFIG).get("model_type")))
    kind = kind.removesuffix("Fast") if isinstance(kind, str) else kind
    try:
        if isinstance(kind, str) and kind in BYTE_PAIRS and (folder / "vocab.json").is_file():
            made = _byte_pairs(folder, said, BYTE_PAIRS[kind])
        elif kind == "BertTokenizer" and (folder / "vocab.txt").is_file():
            made = _word_pieces(folder, said)
        else:
            held = ", ".join(p.name for p in encoders(folder))
            raise UsageError(f"the tokenizer in {folder} ({held}) is a {kind or 'tokenizer of no known class'}, which is not read: {FIX}")
        _add(made, folder, said)
        return made.to_str()
    except UsageError:
        raise
    except Exception as error:  # the library raises bare types from native code
        raise UsageError(f"the tokenizer in {folder} cannot be read ({error}): {FIX}") from None


def _object(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _byte_pairs(folder: Path, said: Mapping[str, Any], cut: str | None) -> tokenizers.Tokenizer:
    if not (folder / "merges.txt").is_file():
        raise UsageError(f"{folder} holds vocab.json without merges.txt: get the missing file")
    read_object(folder / "vocab.json")
    made = tokenizers.Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    made.decoder = decoders.ByteLevel()
    if cut is None:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(said.get("add_prefix_space", False)))
    else:
        made.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(tokenizers.Regex(cut), behavior="isolated", invert=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return made


def _word_pieces(folder: Path, said: Mapping[str, Any]) -> tokenizers.Tokenizer:
    names = {n: str(said.get(f"{n}_token") or f"[{n.upper()}]") for n in ("unk", "cls", "sep")}
    made = tokenizers.Tokenizer(models.WordPiece.from_file(str(folder / "vocab.txt"), unk_token=names["unk"]))
    made.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(said.get("tokenize_chinese_chars", True)),
        strip_accents=said.get("strip_accents"),
        lowercase=bool(said.get("do_lower_case", True)),
    )
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    ends = [(name, made.token_to_id(name)) for name in (names["cls"], names["sep"])]
    if all(i is not None for _, i in ends):
        made.post_processor = processors.TemplateProcessing(f"{names['cls']} $A {names['sep']}", special_tokens=ends)
    return made


def _add(made: tokenizers.Tokenizer, folder: Path, said: Mapping[str, Any]) -> None:
    """Adds tokens outside the vocabulary, with the ids in the files."""
    stored = said.get("added_tokens_decoder") or {}
    added = {str(t["content"]): (int(i), bool(t.get("special", True))) for i, t in stored.items()}
    added |= {name: (int(i), True) for name, i in _object(folder / "added_tokens.json").items() if name not in added}
    for name, (number, special) in sorted(added.items(), key=lambda entry: entry[1][0]):
        made.add_tokens([tokenizers.AddedToken(name, special=special, normalized=False)])
        if made.token_to_id(name) != number:
            raise UsageError(f"the tokenizer in {folder} gives {name!r} the number {number}, which does not follow its vocabulary: {FIX}")
    marks = json.loads(made.to_str())["added_tokens"]
    known = {t["content"] for t in marks}
    ends = [said.get(f"{n}_token") for n in ("bos", "eos", "unk", "pad", "cls", "sep", "mask")]
    names = [str(e["content"]) if isinstance(e, Mapping) else str(e) for e in ends if e]
    names += ["<|endoftext|>"]  # GPT-2's end token, which its files may omit
    made.add_special_tokens([n for n in names if n not in known and made.token_to_id(n) is not None])
