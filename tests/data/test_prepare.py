"""Text in every wrapping becomes the same tokens, whatever the number of workers."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard

from megascale.data.dataset import Mixture, Source, TokenStream, read_sources
from megascale.data.indexed import TokenFile
from megascale.data.loader import Prefetcher, make_batch
from megascale.data.tokenizer import load_tokenizer, train_sentencepiece
from megascale.errors import UsageError

TEXT = [
    "def f(x):\n\treturn  x + 1  # ünïcode ∑ 🙂\n\n\nclass A:\n    pass\n" * 3,
    "The quick brown fox\r\njumps over the lazy dog.\n" * 20,
    " leading and trailing   \n",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train_sentencepiece(TEXT * 5, 305, path)
    return path


def run_tool(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "tools/prepare_data.py", *map(str, args)], capture_output=True, text=True, check=False)


def tokens(prefix: Path) -> list[list[int]]:
    file = TokenFile(prefix)
    return [file.read(i).tolist() for i in range(len(file))]


def test_any_text_comes_back_exactly(model: Path) -> None:
    """Catches a tokenizer that normalizes, strips or drops: code must survive tabs, line ends, blanks and unknown characters."""
    tokenizer = load_tokenizer(model)
    for text in [*TEXT, "\n\n", "漢字\x00\x07", "a  b\t\tc"]:
        assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text


def test_every_wrapping_gives_the_same_tokens(tmp_path: Path, model: Path) -> None:
    """Catches a reader that loses or cuts documents, and an order that depends on the number of workers."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, text in enumerate(TEXT):
        (folder / f"{i}.txt").write_bytes(text.encode())
    lines = "".join(json.dumps({"text": t}) + "\n" for t in TEXT).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXT}), tmp_path / "d.parquet")
    tokenizer = load_tokenizer(model)
    wanted = [[*ids.tolist(), tokenizer.eos_id] for ids in tokenizer.encode_batch(TEXT)]
    for i, source in enumerate([folder, *(tmp_path / n for n in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"))]):
        done = run_tool(source, "--out", tmp_path / f"out{i}", "--tokenizer", model, "--workers", 1 + i % 2)
        assert done.returncode == 0, done.stderr
        assert tokens(tmp_path / f"out{i}") == wanted
    facts = json.loads((tmp_path / "out0.json").read_text())
    counts = np.bincount([t for d in wanted for t in d])
    share = counts[counts > 0] / counts.sum()
    assert facts["unigram_entropy"] == pytest.approx(-(share * np.log(share)).sum())
    assert (facts["documents"], facts["tokens"]) == (3, counts.sum())


def test_long_texts_are_one_document_in_bounded_memory(tmp_path: Path, model: Path) -> None:
    """Catches a reader that holds a whole file: 24 MB pass through less than 250 MB of one process, most of it Python's libraries."""
    path = tmp_path / "long.txt"
    path.write_text("one line of ordinary words, again and again\n" * 560_000)
    script = (
        "import resource, sys; sys.argv = sys.argv[1:]; import runpy\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as e: assert not e.code\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    command = [sys.executable, "-c", script, "tools/prepare_data.py", path, "--out", tmp_path / "o", "--tokenizer", model, "--workers", 1]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(TokenFile(tmp_path / "o")) == 1
    assert int(done.stdout.split()[-1]) < 450_000  # KB; torch is not imported, pyarrow and numpy are


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": 3}\n', "line 2: 'text' is a int"),
        ("x.jsonl", b'{"text": "a"}\nnonsense\n', "line 2: no JSON object"),
        ("x.jsonl", b'{"body": "a"}\n', "--text-key"),
        ("x.txt", b"", "no text"),
        ("x.txt.gz", b"not gzip", "cannot be read"),
        ("x.txt.zst", b"not zstd", "cannot be read"),
        ("x.parquet", b"not parquet", "cannot be read"),
    ],
)
def test_bad_input_is_one_message(tmp_path: Path, model: Path, name: str, content: bytes, words: str) -> None:
    """Catches tracebacks, and output that appears although the input was bad."""
    (tmp_path / name).write_bytes(content)
    done = run_tool(tmp_path / name, "--out", tmp_path / "o", "--tokenizer", model)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "o.bin").exists()


def test_existing_output_and_bad_tokenizers_are_refused(tmp_path: Path, model: Path) -> None:
    """Catches overwritten data and a crash on files that are no tokenizers."""
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "o.bin").write_text("precious")
    done = run_tool(tmp_path / "a.txt", "--out", tmp_path / "o", "--tokenizer", model)
    assert done.returncode == 2 and "--overwrite" in done.stderr
    assert (tmp_path / "o.bin").read_text() == "precious"
    for name in ("bad.model", "bad.json"):
        (tmp_path / name).write_text("{}")
        done = run_tool(tmp_path / "a.txt", "--out", tmp_path / "p", "--tokenizer", tmp_path / name)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr


@pytest.fixture
def prepared(tmp_path: Path, model: Path) -> str:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": t * (i % 3 + 1)}) + "\n" for i, t in enumerate(TEXT * 6)))
    assert run_tool(tmp_path / "in.jsonl", "--out", tmp_path / "p", "--tokenizer", model).returncode == 0
    return str(tmp_path / "p")


def test_stream_reads_across_documents(prepared: str) -> None:
    """Catches windows that begin or end at the wrong document."""
    file = TokenFile(prepared)
    chosen = np.array([2, 0, 5])
    stream = TokenStream(file, chosen)
    flat = [t for d in chosen for t in file.read(d).tolist()]
    numbers = [i for i, d in enumerate(chosen) for _ in file.read(d)]
    for start in range(0, len(flat) - 7, 5):
        got, documents = stream.read(start, 7)
        assert got.tolist() == flat[start : start + 7] and documents.tolist() == numbers[start : start + 7]


def test_samples_cover_an_epoch_and_depend_on_the_seed_only(prepared: str) -> None:
    """Catches windows that are lost or doubled in an epoch, and an order that has a memory."""
    mixtures = [Mixture([Source(prepared, 1.0, "p")], 16, seed, 305, "train", 0.2, shuffled=True) for seed in (1, 1, 2)]
    windows = (len(mixtures[0].streams[0]) - 1) // 16
    first = [tuple(mixtures[0].sample(n)[0]) for n in range(windows)]
    assert [tuple(mixtures[1].sample(n)[0]) for n in reversed(range(windows))] == first[::-1]
    in_order = Mixture([Source(prepared, 1.0, "p")], 16, 1, 305, "train", 0.2, shuffled=False)
    assert sorted(first) == sorted(tuple(in_order.sample(n)[0]) for n in range(windows))
    assert [tuple(mixtures[2].sample(n)[0]) for n in range(windows)] != first
    assert [tuple(mixtures[0].sample(windows + n)[0]) for n in range(windows)] != first


def test_packing_keeps_documents_apart(prepared: str) -> None:
    """Catches positions that do not restart and targets in another document."""
    mixture = Mixture([Source(prepared, 1.0, "p")], 64, 1, 305, "all", 0.0, shuffled=True)
    batch = make_batch(mixture, [0, 3, -1], "documents", torch.device("cpu"))
    assert batch.documents is not None and batch.positions is not None
    for row in range(2):
        tokens_, documents = mixture.sample([0, 3][row])
        for i in range(64):
            same = documents[i] == documents[i + 1]
            assert batch.targets[row, i] == (tokens_[i + 1] if same else -1)
            assert batch.positions[row, i] == i - np.argmax(documents[:64] == documents[i])
    assert (batch.targets[2] == -1).all()
    assert batch.valid == int((batch.targets >= 0).sum())


def test_tokens_beyond_the_vocabulary_and_short_data(prepared: str) -> None:
    """Catches an index error deep in the embedding instead of a word about the tokenizer."""
    with pytest.raises(UsageError, match=r"made with a vocabulary of 305, and model\.vocab_size is 290"):
        Mixture([Source(prepared, 1.0, "p")], 16, 1, 290, "all", 0.0, shuffled=True)
    with pytest.raises(UsageError, match=r"needs 1000001"):
        Mixture([Source(prepared, 1.0, "p")], 1_000_000, 1, 305, "all", 0.0, shuffled=True)
    Path(prepared + ".json").unlink()
    mixture = Mixture([Source(prepared, 1.0, "p")], 16, 1, 5, "all", 0.0, shuffled=True)
    with pytest.raises(UsageError, match=r"holds token \d+, and model.vocab_size is 5"):
        mixture.sample(0)


def test_source_lists(tmp_path: Path) -> None:
    """Catches paths taken relative to the wrong folder, and names that would share one curve."""
    (tmp_path / "mix.yaml").write_text("sources:\n  - {path: a, weight: 2}\n  - sub/b\n")
    assert read_sources(str(tmp_path / "mix.yaml"), "data.train") == [
        Source(str(tmp_path / "a"), 2.0, "a"),
        Source(str(tmp_path / "sub/b"), 1.0, "b"),
    ]
    with pytest.raises(UsageError, match="stands twice"):
        read_sources(["x/a", "y/a"], "data.valid")
    (tmp_path / "bad.yaml").write_text("sources: [{pth: a}]\n")
    with pytest.raises(UsageError, match="pth"):
        read_sources(str(tmp_path / "bad.yaml"), "data.train")


def test_prefetcher_hands_errors_over_and_closes() -> None:
    """Catches a training loop that waits for ever on a dead thread."""

    def make(step: int) -> list[object]:
        if step == 3:
            raise UsageError("no more")
        return [step]

    batches = Prefetcher(make, 1, 9)  # type: ignore[arg-type]
    assert [next(batches), next(batches)] == [[1], [2]]
    with pytest.raises(UsageError, match="no more"):
        next(batches)
    Prefetcher(lambda step: [], 1, 1000).close()
