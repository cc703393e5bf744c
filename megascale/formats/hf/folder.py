"""A Hugging Face folder: config.json, safetensors files with or without an index, and the files of its tokenizer.

Nothing of it is unpickled or executed. Its index and headers are checked before use, like those of a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megascale.checkpoint.grid import Chunk
from megascale.checkpoint.index import DTYPES, SHARD_NAME, Index, TensorEntry
from megascale.errors import UsageError
from megascale.formats.json_file import read_object
from megascale.formats.sources import StoredTensors

CONFIG, GENERATION = "config.json", "generation_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LONGEST_NAME = 255  # of a file
# Files that encode text, each alone or with its companions, and files that say how they are used, as named by transformers, tokenizers,
# SentencePiece, tiktoken and Mistral.
ENCODERS = ("tokenizer.json", "*.model", "tokenizer.model.v*", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken")
BESIDE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def is_hf_folder(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def open_hf(folder: Path) -> StoredTensors:
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
                f"{folder / INDEX} says that {name} holds {len(expected)} tensors, but it has {len(found)}; {odd[0]} is in one alone: "
                "the files do not belong together, get them again"
            )
        twice = sorted(tensors.keys() & found.keys())
        if twice:
            raise UsageError(f"{folder / name} holds {twice[0]}, which another file of the folder holds too: get the files again")
        tensors |= found
        stat = (folder / name).stat()
        digest.update(json.dumps([name, stat.st_size, stat.st_mtime_ns, sorted((k, t.shape) for k, t in found.items())]).encode())
    return StoredTensors(Index(folder, 0, {}, tensors), digest.hexdigest())


def _files_of_index(folder: Path) -> dict[str, set[str] | None]:
    path = folder / INDEX
    weights = read_object(path).get("weight_map")
    if not isinstance(weights, Mapping) or not weights:
        raise UsageError(f"{path} has no weight_map: get the file again")
    files: dict[str, set[str] | None] = {}
    for tensor, name in weights.items():
        if not isinstance(name, str) or len(name) > LONGEST_NAME or not SHARD_NAME.fullmatch(name):
            raise UsageError(
                f"{path} puts {tensor[:100]} into {str(name)[:100]!r}, which is not the name of a safetensors file in this folder: do not "
                "trust it"
            )
        expected = files.setdefault(name, set())
        assert expected is not None
        expected.add(tensor)
    for name in files:
        if not (folder / name).is_file():
            raise UsageError(f"{path} names {name}, but there is no such file in {folder}: get the missing file")
    return files


def _header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a file, each as one chunk."""
    found = {}
    try:
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                part = file.get_slice(name)
                dtype, shape = part.get_dtype(), tuple(part.get_shape())
                if dtype not in DTYPES:
                    raise UsageError(f"{path} stores {name} as {dtype}, which cannot be read here: save it in another dtype")
                chunks = (Chunk((0,) * len(shape), shape, path.name),) if math.prod(shape) else ()
                found[name] = TensorEntry(dtype, shape, chunks)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} is not a whole safetensors file ({error}): get it again") from None
    return found


def encoders(folder: Path) -> list[Path]:
    """The files of a folder that encode text."""
    return _matching(folder, ENCODERS)


def tokenizer_files(folder: Path) -> list[Path]:
    """All files of a tokenizer in a folder."""
    return _matching(folder, (*ENCODERS, *BESIDE))


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]


def as_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
