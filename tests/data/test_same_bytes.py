"""Token files of ordinary text stay the same byte for byte over versions, so that runs continue with the same data."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megascale.data.prepare import prepare
from megascale.data.tokenizer import load_tokenizer
from megascale.data.walk import choose_files

WORDS = ["gradient", "fenêtre", "token", "破片", "packing", "Größe", "memory", "🙂"]
# Of commit ed196c3, with the tokenizer in inputs/plain.json.
WANTED = {
    "bin": "367567d88b73fe645f4f63e942ad0524726e51ffd8d5b456ed94b16337f1ef47",
    "idx": "a9a54c8936beb4b88ca434f99a21594a33e7f3442b13f7b8e03cdb139e840104",
    "tokenizer.json": "f72736572920a31118db6cb8fbb6805ca89f5b4c3f1ac20f4a16a2413d9e5309",
}
FACTS = {
    "documents": 33,
    "tokens": 3223,
    "source_bytes": 3234,
    "not_utf8_files": 0,
    "vocab_size": 289,
    "eos_id": 0,
    "largest_token": 262,
    "tokenizer": "o.tokenizer.json",
    "tokenizer_fingerprint": "21364d2c5a8108a5",
}


def text(i: int) -> str:
    return "\n".join(" ".join(WORDS[(i * j + k) % 8] for k in range(3 + j % 7)) for j in range(1 + i % 5)) + "\n" * (i % 3)


def write_corpus(folder: Path) -> None:
    """Text files, JSON lines plain and packed, and Parquet."""
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.txt").write_bytes(text(i).encode())
    lines = "".join(json.dumps({"text": text(i)}, ensure_ascii=bool(i % 2)) + "\n" for i in range(6, 20)).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines[: lines.rfind(b"\n", 0, 500) + 1]))
    pyarrow.parquet.write_table(pyarrow.table({"text": [text(i) for i in range(20, 30)]}), folder / "c.parquet")


@pytest.mark.parametrize("workers", [1, 2])
def test_ordinary_text_gives_the_bytes_that_it_always_gave(tmp_path: Path, workers: int) -> None:
    """Catches any change of tokens, order, documents or facts for data that was prepared well before."""
    write_corpus(tmp_path / "in")
    files = choose_files([tmp_path / "in"], "*", (), ("text",)).files
    tokenizer = load_tokenizer(Path(__file__).parent / "inputs" / "plain.json")
    prepare(files, str(tmp_path / "o"), tokenizer, "text", workers, True, lambda done: None)
    found = {p.name.removeprefix("o."): hashlib.sha256(p.read_bytes()).hexdigest() for p in tmp_path.glob("o.*")}
    assert {k: v for k, v in found.items() if k != "json"} == WANTED
    facts = json.loads((tmp_path / "o.json").read_text())  # not by its bytes: the entropy is a sum, whose last digit is the library's
    assert facts.pop("unigram_entropy") == pytest.approx(3.12073476733349, rel=1e-12)
    assert facts == FACTS
