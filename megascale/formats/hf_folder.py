"""A Hugging Face folder: config.json, safetensors files with or without an index, and the files of its tokenizer.

Nothing of it is unpickled or executed. Its index and headers are checked before they are believed, as those of a checkpoint are.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megascale.checkpoint.index import DTYPES, SHARD_NAME, Chunk, Index, TensorEntry
from megascale.errors import UsageError
from megascale.formats.sources import Stored

CONFIG, GENERATION = "config.json", "generation_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What encodes text, as transformers, tokenizers and SentencePiece name it.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)


def is_hf_folder(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of a Hugging Face folder, or UsageError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"there is no {path}: name a folder that transformers saved") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read ({error}): get the file again") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds a {type(value).__name__} instead of an object: get the file again")
    return value


def open_hf(folder: Path) -> Stored:
    """Reads the headers of all weight files. Raises UsageError for files that are missing, foreign, damaged or named outside the folder."""
    config = folder / CONFIG
    read_object(config)
    if (folder / INDEX).is_file():
        files = _files_of_index(folder)
    elif (folder / SINGLE).is_file():
        files = {SINGLE: None}
    else:
        other = next(
            (p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.h5", "*.safetensors") for p in sorted(folder.glob(pattern))), None
        )
        hint = f" ({other} is no such file: save the model again with transformers)" if other else ""
        raise UsageError(f"{folder} holds neither {INDEX} nor {SINGLE}{hint}: get its weights as safetensors")
    tensors: dict[str, TensorEntry] = {}
    digest = hashlib.blake2b(config.read_bytes(), digest_size=16)
    for name, expected in files.items():
        found = _header(folder / name)
        if expected is not None and expected != found.keys():
            odd = sorted(expected ^ found.keys())
            raise UsageError(
                f"{folder / INDEX} says that {name} holds {len(expected)} tensors, and it has {len(found)}; {odd[0]} is in one alone: "
                "the files do not belong together, get them again"
            )
        twice = sorted(tensors.keys() & found.keys())
        if twice:
            raise UsageError(f"{folder / name} holds {twice[0]}, which another file of the folder holds too: get the files again")
        tensors |= found
        stat = (folder / name).stat()
        digest.update(json.dumps([name, stat.st_size, stat.st_mtime_ns, sorted((k, t.shape) for k, t in found.items())]).encode())
    return Stored(Index(folder, 0, {}, tensors), digest.hexdigest())


def _files_of_index(folder: Path) -> dict[str, set[str] | None]:
    path = folder / INDEX
    weights = read_object(path).get("weight_map")
    if not isinstance(weights, Mapping) or not weights:
        raise UsageError(f"{path} has no weight_map: get the file again")
    files: dict[str, set[str] | None] = {}
    for tensor, name in weights.items():
        if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
            raise UsageError(f"{path} puts {tensor} into {name!r}, which is no name of a safetensors file in this folder: do not trust it")
        expected = files.setdefault(name, set())
        assert expected is not None
        expected.add(tensor)
    for name in files:
        if not (folder / name).is_file():
            raise UsageError(f"{path} names {name}, and there is no such file in {folder}: get the missing file")
    return files


def _header(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of a file, as one chunk each."""
    found = {}
    try:
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                part = file.get_slice(name)
                dtype, shape = part.get_dtype(), tuple(part.get_shape())
                if dtype not in DTYPES:
                    raise UsageError(f"{path} stores {name} as {dtype}, which cannot be read here: save it in another dtype")
                chunks = (Chunk((0,) * len(shape), shape, path.name),) if math.prod(shape) else ()
                found[name] = TensorEntry(dtype, shape, chunks)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} is no whole safetensors file ({error}): get it again") from None
    return found


def tokenizer_files(folder: Path) -> list[Path]:
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def as_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
