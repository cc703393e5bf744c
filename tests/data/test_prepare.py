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
import tokenizers
import torch
import zstandard

from megascale.commands.prepare import warnings
from megascale.data.dataset import Corpus, Mixture, read_sources
from megascale.data.indexed import TokenFile
from megascale.data.loader import Prefetcher, make_batch
from megascale.data.prepare import prepare
from megascale.data.readers import BLOCK_BYTES
from megascale.data.stream import TokenStream
from megascale.data.tokenizer import load_tokenizer, train_sentencepiece
from megascale.errors import UsageError

TEXT = [
    "def f(x):\n\treturn  x + 1  # ünïcode ∑ 🙂\n\n\nclass A:\n    pass\n" * 3,
    "The quick brown fox\r\njumps over the lazy dog.\n" * 20,
    " leading and trailing   \n",
]
TRAINING_WORDS = ["gradient", "window", "token", "shard", "packing", "cluster", "memory"]


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
        assert "3 documents" in done.stdout and "bytes per token" in done.stdout
    assert {p.name for p in tmp_path.glob("out0*")} == {"out0.bin", "out0.idx", "out0.json", "out0.model"}
    facts = json.loads((tmp_path / "out0.json").read_text())
    counts = np.bincount([t for d in wanted for t in d])
    share = counts[counts > 0] / counts.sum()
    assert facts["unigram_entropy"] == pytest.approx(-(share * np.log(share)).sum())
    assert (facts["documents"], facts["tokens"]) == (3, counts.sum())
    assert facts["source_bytes"] == sum(len(t.encode()) for t in TEXT)
    assert facts["largest_token"] == len(counts) - 1


def test_blocks_and_workers_leave_no_trace(tmp_path: Path, model: Path) -> None:
    """Catches tokens that depend on where a long text was cut, or on which worker was first."""
    long = "".join(f"def f{i}(x):\n    return  x + {i}\t# ünïcode\n\n" for i in range(20_000))
    assert len(long) > 3 * BLOCK_BYTES
    (tmp_path / "long.txt").write_bytes(long.encode())
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": "the end"}))
    tokenizer = load_tokenizer(model)
    files = [tmp_path / "long.txt", tmp_path / "short.jsonl"]
    seen: list[int] = []
    facts = [prepare(files, str(tmp_path / f"o{w}"), tokenizer, "text", w, True, seen.append) for w in (1, 3)]
    assert facts[0].documents == 2 and sum(seen) == 2 * sum(f.stat().st_size for f in files)
    for end in ("bin", "idx"):
        assert (tmp_path / f"o1.{end}").read_bytes() == (tmp_path / f"o3.{end}").read_bytes()
    assert tokens(tmp_path / "o1")[0] == [*tokenizer.encode_batch([long])[0].tolist(), tokenizer.eos_id]
    prepare(files, str(tmp_path / "bare"), tokenizer, "text", 1, False, seen.append)
    assert tokens(tmp_path / "bare") == [t[:-1] for t in tokens(tmp_path / "o1")]


def test_batches_keep_their_order(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches results taken in another order than they were handed out, once there are more of them than may be under way."""
    monkeypatch.setattr("megascale.data.prepare.BLOCK_BYTES", 100)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"number {i} " * 10}) + "\n" for i in range(60)))
    tokenizer = load_tokenizer(model)
    prepare([tmp_path / "a.jsonl"], str(tmp_path / "o"), tokenizer, "text", 2, False, lambda done: None)
    assert [tokenizer.decode(t) for t in tokens(tmp_path / "o")] == [f"number {i} " * 10 for i in range(60)]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc/self/status to measure memory")
def test_memory_does_not_grow_with_the_input(tmp_path: Path, model: Path) -> None:
    """Catches a reader, a queue or a writer that holds a whole document: 10 MB take no more than 2 MB."""
    line = "one line of ordinary words, again and again\n"
    for name, size in (("small", 2_000_000), ("large", 10_000_000)):
        (tmp_path / name).write_text(line * (size // len(line)))
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from megascale.data.prepare import prepare\nfrom megascale.data.tokenizer import load_tokenizer\n"
        "path, model, workers = sys.argv[1:]\n"
        "facts = prepare([Path(path)], path + '.out', load_tokenizer(model), 'text', int(workers), True, lambda done: None)\n"
        "assert facts.documents == 1\n"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )

    # Not getrusage: its maximum is inherited over fork and exec, and would be that of pytest with torch in it.
    # Two workers, so that the process measured reads, hands out and writes, and the tokenizer's own changing needs lie elsewhere.
    def peak_kb(name: str) -> int:
        command = [sys.executable, "-c", script, str(tmp_path / name), str(model), "2"]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert peak_kb("large") - peak_kb("small") < 6_000  # the text is 8 MB longer, its tokens are more still


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": 3}\n', "line 2: 'text' is a int"),
        ("x.jsonl", b'{"text": "a"}\nnonsense\n', "line 2: no JSON object"),
        ("x.jsonl", b'{"body": "a"}\n', "--text-key"),
        ("x.txt", b"", "no text"),
        ("x.txt.gz", b"not gzip", "is named like a"),
        ("x.txt.zst", b"not zstd", "is named like a"),
        ("x.parquet", b"not parquet", "is named like a"),
    ],
)
def test_bad_input_is_one_message(tmp_path: Path, model: Path, name: str, content: bytes, words: str) -> None:
    """Catches tracebacks, and output that appears although the input was bad."""
    (tmp_path / name).write_bytes(content)
    done = run_tool(tmp_path / name, "--out", tmp_path / "o", "--tokenizer", model)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_inputs_without_a_document_are_counted(tmp_path: Path, model: Path) -> None:
    """Catches a file whose writing failed, or whose documents are all empty, that nobody hears of."""
    for name, content in (("a.txt", ""), ("b.jsonl", '{"text": ""}\n'), ("c.txt", "hello")):
        (tmp_path / name).write_text(content)
    files = sorted(tmp_path.iterdir())
    facts = prepare(files, str(tmp_path / "o"), load_tokenizer(model), "text", 1, True, lambda done: None)
    assert (facts.documents, facts.empty_files) == (1, 2) and json.loads((tmp_path / "o.json").read_text())["empty_files"] == 2
    assert any("2 of the inputs gave no document" in said for said in warnings(facts, load_tokenizer(model)))
    facts = prepare(files[2:], str(tmp_path / "p"), load_tokenizer(model), "text", 1, True, lambda done: None)
    assert "empty_files" not in (tmp_path / "p.json").read_text() and warnings(facts, load_tokenizer(model)) == []


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


def test_wrong_use_is_one_message(tmp_path: Path, model: Path) -> None:
    """Catches options that are ignored, a tokenizer of the user's that is overwritten, and tracebacks for paths that cannot work."""
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "o.model").write_text("precious")
    (tmp_path / "file").write_text("")
    (tmp_path / "z.bin").write_bytes(b"\0")
    for arguments, words in (
        ([tmp_path / "none.txt", "--out", tmp_path / "p"], "there is no input"),
        ([tmp_path / "a.txt", "--out", tmp_path / "p", "--tokenizer", tmp_path / "none.model"], "there is no tokenizer"),
        ([tmp_path / "a.txt", "--out", tmp_path / "p", "--tokenizer", model, "--vocab-size", 300], "exclude each other"),
        ([tmp_path / "a.txt", "--out", tmp_path / "p", "--vocab-size", 8000], "a tokenizer of 8000 pieces cannot be trained"),
        ([tmp_path / "a.txt", "--out", tmp_path / "p", "--vocab-size", 100], "give --vocab-size"),
        ([tmp_path / "z.bin", "--out", tmp_path / "p", "--tokenizer", model], "is not text"),
        ([tmp_path / "a.txt", "--out", tmp_path, "--tokenizer", model], "is a folder"),
        ([tmp_path / "a.txt", "--out", tmp_path / "file" / "p", "--tokenizer", model], "cannot be written"),
        ([tmp_path / "a.txt", "--out", tmp_path / "o", "--tokenizer", model], "o.model exists"),
    ):
        done = run_tool(*arguments)
        assert done.returncode == 2 and words in done.stderr, done.stderr
        assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    assert (tmp_path / "o.model").read_text() == "precious"
    assert {p.name for p in tmp_path.iterdir()} == {"a.txt", "o.model", "file", "z.bin"}


def test_hugging_face_tokenizers(tmp_path: Path, model: Path) -> None:
    """Catches counts that are too small where token numbers have gaps, and a tokenizer of an earlier run left beside new tokens."""
    vocabulary = {"<unk>": 0, "hello": 1, "world": 7, "</s>": 9}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (tmp_path / "hf").mkdir()
    tokenizer.save(str(tmp_path / "hf" / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("hello world")
    assert run_tool(tmp_path / "a.txt", "--out", tmp_path / "o", "--tokenizer", model).returncode == 0
    done = run_tool(tmp_path / "a.txt", "--out", tmp_path / "o", "--tokenizer", tmp_path / "hf", "--overwrite", "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert tokens(tmp_path / "o") == [[1, 7, 9]]
    assert json.loads((tmp_path / "o.json").read_text())["vocab_size"] == 10
    assert {p.name for p in tmp_path.glob("o.*")} == {"o.bin", "o.idx", "o.json", "o.tokenizer.json"}


def test_trains_a_tokenizer_and_counts_damaged_files(tmp_path: Path) -> None:
    """Catches training that differs from run to run, and damage that nobody hears of."""
    (tmp_path / "in").mkdir()
    for i in range(30):
        (tmp_path / "in" / f"{i}.txt").write_text(" ".join(TRAINING_WORDS[i * j % 7] + TRAINING_WORDS[j % 7] for j in range(40)))
    (tmp_path / "in" / "latin.txt").write_bytes(b"caf\xe9")
    for name in ("a", "b"):
        done = run_tool(tmp_path / "in", "--out", tmp_path / name, "--vocab-size", 290)
        assert done.returncode == 0 and "1 files are not valid UTF-8" in done.stderr, done.stderr
    for end in ("model", "bin", "idx"):
        assert (tmp_path / f"a.{end}").read_bytes() == (tmp_path / f"b.{end}").read_bytes()
    facts = json.loads((tmp_path / "a.json").read_text())
    assert (facts["vocab_size"], facts["not_utf8_files"], facts["documents"]) == (290, 1, 31)


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
        assert got.tolist() == flat[start : start + 7]
        assert documents.tolist() == numbers[start : start + 7]


def test_samples_cover_an_epoch_and_depend_on_the_seed_only(prepared: str) -> None:
    """Catches windows that are lost or doubled in an epoch, and an order that has a memory."""
    mixtures = [Mixture([Corpus(prepared, 1.0, "p")], 16, seed, 305, "train", 0.2, shuffled=True) for seed in (1, 1, 2)]
    windows = (len(mixtures[0].streams[0]) - 1) // 16
    first = [tuple(mixtures[0].sample(n)[0]) for n in range(windows)]
    assert [tuple(mixtures[1].sample(n)[0]) for n in reversed(range(windows))] == first[::-1]
    in_order = Mixture([Corpus(prepared, 1.0, "p")], 16, 1, 305, "train", 0.2, shuffled=False)
    flat = in_order.streams[0].read(0, len(in_order.streams[0]))[0]
    for n in range(windows):
        assert in_order.sample(n)[0].tolist() == flat[n * 16 : n * 16 + 17].tolist()
    assert sorted(first) == sorted(tuple(in_order.sample(n)[0]) for n in range(windows))
    assert [tuple(mixtures[2].sample(n)[0]) for n in range(windows)] != first
    assert [tuple(mixtures[0].sample(windows + n)[0]) for n in range(windows)] != first


def test_packing_keeps_documents_apart(prepared: str) -> None:
    """Catches positions that do not restart and targets in another document."""
    mixture = Mixture([Corpus(prepared, 1.0, "p")], 64, 1, 305, "all", 0.0, shuffled=True)
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
        Mixture([Corpus(prepared, 1.0, "p")], 16, 1, 290, "all", 0.0, shuffled=True)
    with pytest.raises(UsageError, match=r"needs 1000001"):
        Mixture([Corpus(prepared, 1.0, "p")], 1_000_000, 1, 305, "all", 0.0, shuffled=True)
    Path(prepared + ".json").unlink()
    mixture = Mixture([Corpus(prepared, 1.0, "p")], 16, 1, 5, "all", 0.0, shuffled=True)
    with pytest.raises(UsageError, match=r"holds token \d+ but model.vocab_size is 5"):
        mixture.sample(0)


def test_sources_of_different_tokenizers_are_not_mixed(prepared: str) -> None:
    """Catches two vocabularies in one run: the loss would look fine and the model speak nonsense."""
    other = prepared + "2"
    for end in (".bin", ".idx"):
        Path(other + end).write_bytes(Path(prepared + end).read_bytes())
    sources = [Corpus(prepared, 1.0, "p"), Corpus(other, 1.0, "q")]
    Mixture(sources, 16, 1, 305, "all", 0.0, shuffled=True)
    facts = json.loads(Path(prepared + ".json").read_text())
    Path(other + ".json").write_text(json.dumps({**facts, "tokenizer_fingerprint": "0123"}))
    with pytest.raises(UsageError, match=f"{facts['tokenizer_fingerprint']} and .*p2 with 0123"):
        Mixture(sources, 16, 1, 305, "all", 0.0, shuffled=True)


def test_source_lists(tmp_path: Path) -> None:
    """Catches paths taken relative to the wrong folder, and names that would share one curve."""
    (tmp_path / "mix.yaml").write_text("sources:\n  - {path: a, weight: 2}\n  - sub/b\n")
    assert read_sources(str(tmp_path / "mix.yaml"), "data.train") == [
        Corpus(str(tmp_path / "a"), 2.0, "a"),
        Corpus(str(tmp_path / "sub/b"), 1.0, "b"),
    ]
    with pytest.raises(UsageError, match="is used twice"):
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
    with pytest.raises(StopIteration):
        next(batches)
    Prefetcher(lambda step: [], 1, 1000).close()
    short = Prefetcher(lambda step: [], 1, 1)
    assert list(short) == [[]] and list(short) == []
