"""Tokenizers of other projects: a document becomes its text's tokens and the end that their files name, whatever else they are set to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import typer
from tokenizers.processors import TemplateProcessing

from megascale.commands import prepare as prepare_data
from megascale.data.prepare import Facts, prepare
from megascale.data.tokenizer import LONGEST_LINE, Tokenizer, cut_line, load_tokenizer, train_sentencepiece, training_lines
from megascale.data.tokenizer_json import lengthening
from megascale.errors import UsageError

INPUTS = Path(__file__).parent / "inputs"
TEXTS = [json.loads(line)["text"] for line in (INPUTS / "docs.jsonl").read_text().splitlines()]
END = "<|endoftext|>"


def prepared(out: Path, tokenizer: Tokenizer, source: Path = INPUTS / "docs.jsonl", bos: bool = False) -> Facts:
    return prepare([source], str(out), tokenizer, "text", 1, True, lambda done: None, bos=bos)


def changed(path: Path, **values: Any) -> Path:
    """plain.json with other values, at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**json.loads((INPUTS / "plain.json").read_text()), **values}))
    return path


@pytest.mark.parametrize("name", ["trunc.json", "padfixed.json"])
def test_truncation_and_padding_do_not_reach_documents(tmp_path: Path, name: str) -> None:
    """Catches documents cut at 8 tokens, or filled up with the end, since somebody saved a tokenizer so."""
    facts = [prepared(tmp_path / n, load_tokenizer(INPUTS / n)) for n in (name, "plain.json")]
    assert (facts[0].documents, facts[0].tokens) == (facts[1].documents, facts[1].tokens)
    assert (tmp_path / f"{name}.bin").read_bytes() == (tmp_path / "plain.json.bin").read_bytes()
    prompts = [load_tokenizer(INPUTS / n).encode_prompt("a long prompt of many, many words") for n in (name, "plain.json")]
    assert prompts[0] == prompts[1]


def test_dropout_is_for_other_uses() -> None:
    """Catches another tokenization at every run."""
    tokenizer = load_tokenizer(INPUTS / "dropout.json")
    found = {tuple(tokenizer.encode_batch(["hello world, the dog"])[0].tolist()) for _ in range(20)}
    assert len(found) == 1


def test_names_of_special_tokens_in_text_are_text(tmp_path: Path) -> None:
    """Catches documents that end in the middle where a text speaks of <|endoftext|>."""
    tokenizer = load_tokenizer(INPUTS / "plain.json")
    ids = tokenizer.encode_batch([f"a {END} b"])[0].tolist()
    assert 0 not in ids and tokenizer.decode(ids) == f"a {END} b"
    facts = prepared(tmp_path / "o", tokenizer, INPUTS / "inj.jsonl")
    assert (facts.tokens, facts.special_tokens) == (17, 0)
    assert load_tokenizer(INPUTS / "plain.json").encode_prompt(f"a{END}")[-1] == 0  # a prompt of another project's model may hold them


def test_special_tokens_that_cannot_be_text_are_counted(tmp_path: Path) -> None:
    """Catches an end inside of documents that nobody hears of, where the tokenizer has it as an ordinary word; and words of no vocabulary,
    which are a special token too, counted with them.
    """
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "a": 1, "</s>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["<unk>"])
    words.save(str(tmp_path / "t.json"))
    (tmp_path / "a.txt").write_text("a </s> a unknown </s>")
    facts = prepared(tmp_path / "o", load_tokenizer(tmp_path / "t.json"), tmp_path / "a.txt")
    assert facts.special_tokens == 2 and json.loads((tmp_path / "o.json").read_text())["special_tokens"] == 2


@pytest.mark.parametrize(("folder", "end"), [("gemtok", 291), ("dstok", 0)])
def test_the_end_is_what_the_files_say(tmp_path: Path, folder: str, end: int) -> None:
    """Catches an ordinary </s> taken for the end, and an end of another name that is not found though tokenizer_config.json says it; and
    that the tokenizer kept beside the data, alone, forgets it.
    """
    tokenizer = load_tokenizer(INPUTS / folder)
    assert tokenizer.eos_id == end
    assert prepared(tmp_path / "o", tokenizer).eos_id == end
    assert load_tokenizer(tmp_path / "o.tokenizer.json").eos_id == end
    shutil.copy(tmp_path / "o.tokenizer.json", tmp_path / "elsewhere.json")
    assert load_tokenizer(tmp_path / "elsewhere.json", prefix=str(tmp_path / "o")).eos_id == end


def test_where_the_end_is_looked_for(tmp_path: Path) -> None:
    """Catches another order of the files, numbers taken for names, and a message that does not say what to do."""
    folder = tmp_path / "t"
    shutil.copytree(INPUTS / "gemtok", folder)
    for name, content, end in (
        ("tokenizer_config.json", {"eos_token": {"content": "</s>"}}, 290),
        ("tokenizer_config.json", {"eos_token": None}, 291),  # nothing says it: the special one of the usual names
        ("config.json", {"eos_token_id": [289, 290]}, 289),
        ("generation_config.json", {"eos_token_id": 290}, 290),
        ("special_tokens_map.json", {"eos_token": "<s>"}, 289),
    ):
        (folder / name).write_text(json.dumps(content))
        assert load_tokenizer(folder).eos_id == end, name
    assert load_tokenizer(folder, eos="<pad>").eos_id == 0
    with pytest.raises(UsageError, match=r"--eos names the token '<none>', but .* has no such token"):
        load_tokenizer(folder, eos="<none>")
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<gone>"}))
    with pytest.raises(UsageError, match=r"special_tokens_map.json names the token '<gone>', but .*tokenizer.json has no such token"):
        _ = load_tokenizer(folder).eos_id
    (folder / "special_tokens_map.json").write_text("{")
    with pytest.raises(UsageError, match=r"special_tokens_map.json next to the tokenizer cannot be read"):
        _ = load_tokenizer(folder).eos_id
    shutil.copy(INPUTS / "dstok" / "tokenizer.json", tmp_path / "alone.json")
    with pytest.raises(UsageError, match=r"names its end token.*--eos TOKEN"):
        prepared(tmp_path / "o", load_tokenizer(tmp_path / "alone.json"))
    assert list(tmp_path.glob("o*")) == [] and list(tmp_path.glob(".o*")) == []
    assert load_tokenizer(tmp_path / "alone.json", eos="<|end_of_sentence|>").eos_id == 0


def around(path: Path, template: str) -> Path:
    """plain.json with a post-processor that puts the special token of number 0 around a text."""
    made = tokenizers.Tokenizer.from_file(str(INPUTS / "plain.json"))
    made.post_processor = TemplateProcessing(template, special_tokens=[(END, 0)])
    path.parent.mkdir(exist_ok=True)
    made.save(str(path))
    return path


def test_prompts_begin_as_documents_did(tmp_path: Path) -> None:
    """Catches a prompt with a beginning that no document had, one without it where all had, and documents that begin so unasked."""
    path = around(tmp_path / "t" / "tokenizer.json", f"{END} $A")
    text = load_tokenizer(INPUTS / "plain.json").encode_batch(["the dog"])[0].tolist()
    assert load_tokenizer(path).encode_prompt("the dog") == [0, *text]  # of a model from elsewhere
    for bos in (False, True):
        facts = prepared(tmp_path / "o", load_tokenizer(path), bos=bos)
        assert (facts.bos_id, facts.tokens) == ((0, 67) if bos else (None, 64))
        assert ("bos_id" in json.loads((tmp_path / "o.json").read_text())) == bos
        for kept in (load_tokenizer(tmp_path / "o.tokenizer.json"), load_tokenizer(path, prefix=str(tmp_path / "o"))):
            assert kept.encode_prompt("the dog") == [*([0] if bos else []), *text]
    with pytest.raises(UsageError, match=r"names the token that begins a document: write bos_token into tokenizer_config.json"):
        prepared(tmp_path / "p", load_tokenizer(INPUTS / "plain.json"), bos=True)
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps({"bos_token": "h"}))
    assert load_tokenizer(path).bos_id == tokenizers.Tokenizer.from_file(str(path)).token_to_id("h")


@pytest.mark.parametrize("train", ["data/p", [{"path": "data/p"}, "q"], ["data/p"]])
def test_generation_finds_the_data(train: Any) -> None:
    """Catches prompts that begin as the tokenizer's file says where the run's data says otherwise, for one way to write a config."""
    from megascale.formats.tokenizer_files import find_prefix

    assert find_prefix({"data": {"train": train}}) == "data/p"
    assert find_prefix({"data": {"train": []}}) is None and find_prefix({}) is None


def test_the_facts_of_another_tokenizer_say_nothing(tmp_path: Path) -> None:
    """Catches the end of another preparation taken for a tokenizer that was put beside its facts."""
    prepared(tmp_path / "o", load_tokenizer(INPUTS / "gemtok"))
    shutil.copy(INPUTS / "plain.json", tmp_path / "o.tokenizer.json")
    assert load_tokenizer(tmp_path / "o.tokenizer.json").eos_id == 0
    prepared(tmp_path / "o", load_tokenizer(INPUTS / "plain.json"))
    facts = json.loads((tmp_path / "o.json").read_text())
    (tmp_path / "o.json").write_text(json.dumps({**facts, "eos_id": 500}))
    with pytest.raises(UsageError, match=r"eos_id of the data next to .* is 500, not below 289"):
        load_tokenizer(tmp_path / "o.tokenizer.json")


@pytest.mark.parametrize("template", [f"$A {END}", f"{END} $A {END} {END}"])
def test_nothing_is_put_behind_a_prompt(tmp_path: Path, template: str) -> None:
    """Catches generation that goes on behind the end of a document, since a post-processor appended it."""
    tokenizer = load_tokenizer(around(tmp_path / "tokenizer.json", template))
    text = load_tokenizer(INPUTS / "plain.json").encode_batch(["the dog"])[0].tolist()
    begin = [0] if template.startswith(END) else []
    assert tokenizer.encode_prompt("the dog") == [*begin, *text]
    assert tokenizer.encode_prompt("") == begin
    assert tokenizer.encode_batch(["the dog"])[0].tolist() == text
    with pytest.raises(UsageError, match="half a surrogate pair"):
        tokenizer.encode_prompt("\ud800")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 99}] * 5}},
            "as long",
        ),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": ""}, "content": "a" * 2000}}, "2001 times as long"),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 2000}}, "2001 times as long"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 2**32 - 2}, "unk_token": "a"}}, "has token ids up to"),
        ({"model": {"type": "WordLevel", "vocab": {}, "unk_token": "a"}, "added_tokens": []}, "has token ids up to"),
        ({"model": 3}, "it has no 'model'"),
        ({"model": {"type": "Nothing"}}, "is not a tokenizer"),
    ],
)
def test_tokenizers_that_would_end_the_process_are_refused(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    """Catches gigabytes of normalized text, counts for four thousand million pieces, and native errors as tracebacks."""
    with pytest.raises(UsageError, match=words):
        load_tokenizer(changed(tmp_path / "t.json", **values))


def test_absurd_values_that_do_no_harm_are_read(tmp_path: Path) -> None:
    """Catches padding to 2^60 tokens as an abort in native code, and ordinary normalizers refused."""
    padding = {**json.loads((INPUTS / "padfixed.json").read_text())["padding"], "strategy": {"Fixed": 2**60}, "pad_to_multiple_of": 0}
    tokenizer = load_tokenizer(changed(tmp_path / "t.json", padding=padding))
    assert len(tokenizer.encode_batch(["the dog"])[0]) == 2
    legacy = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    assert lengthening({"type": "Sequence", "normalizers": legacy}) <= 4
    clean = [{"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}] * 40
    assert lengthening({"type": "Sequence", "normalizers": clean}) == 1


def test_panics_of_native_code_are_sentences(tmp_path: Path) -> None:
    """Catches PanicException, which is no Exception, as a traceback; and an interrupt taken for one."""
    from megascale.data.tokenizer_json import guarded

    class PanicException(BaseException):
        pass

    def fails(error: BaseException) -> None:
        raise error

    with pytest.raises(UsageError, match="the tokenizer: attempt to divide by zero"):
        guarded(lambda: fails(PanicException("attempt to\ndivide by zero")), "the tokenizer")
    with pytest.raises(KeyboardInterrupt):
        guarded(lambda: fails(KeyboardInterrupt()), "the tokenizer")
    for content in (b"[" * 100_000, b"\xff\xfe", b"[]", b"{}"):
        (tmp_path / "t.json").write_bytes(content)
        with pytest.raises(UsageError, match="is not a tokenizer"):
            load_tokenizer(tmp_path / "t.json")


def test_training_sees_every_line() -> None:
    """Catches lines that SentencePiece leaves out in silence: longer than 4,192 bytes, counted in bytes and not in characters, or with the
    character that it keeps for itself; and characters cut in two.
    """
    for line in ("x" * 10_000, "字" * 3000, "a" + "é" * 2500, "word " * 2000, "🙂 " * 3000):
        pieces = list(cut_line(line))
        assert "".join(pieces) == line and max(len(p.encode()) for p in pieces) <= LONGEST_LINE
    assert {len(p.encode()) % 5 for p in list(cut_line("word " * 2000))[1:-1]} == {0}  # in front of a space where there is one
    assert list(training_lines(["a\n\n" + "b" * 4192 + "\nc▅d▅"])) == ["a", "b" * 4192, "c", "d"]


def test_the_trained_tokenizer_knows_long_lines(tmp_path: Path) -> None:
    """Catches a tokenizer made of the short lines alone, and a failure without a reason."""
    long = ["the quick brown fox jumps over the lazy dog " * 125] * 4 + ["row ▅▅ of blocks " * 3] * 4
    train_sentencepiece([*long, *(f"id {i} ok" for i in range(50))], 300, tmp_path / "t.model")
    tokenizer = load_tokenizer(tmp_path / "t.model")
    assert len(tokenizer.encode_batch([long[0]])[0]) < 0.85 * len(long[0])  # not byte by byte
    chinese = ["".join(chr(0x4E00 + (i * 7 + j) % 30) for j in range(2000)) for i in range(4)]
    assert train_sentencepiece(chinese, 8192, tmp_path / "c.model", exact=False) < 8192
    assert len(load_tokenizer(tmp_path / "c.model").encode_batch(chinese)[0]) <= 2000
    for texts, size, words in (
        (["\n"], 300, "there is none"),
        (chinese, 8192, "give --vocab-size"),
        (chinese, 270, "its characters alone need"),
    ):
        with pytest.raises(UsageError, match=f"a tokenizer of {size} pieces cannot be trained on this text: .*{words}"):
            train_sentencepiece(texts, size, tmp_path / "n.model")


def test_short_lines_train_the_tokenizer_that_they_always_did(tmp_path: Path) -> None:
    """Catches options or lines that differ from those of SentencePiece itself, where no line is too long for it."""
    import io

    texts = ["the gradient of a window\n\tof tokens, cut into shards\n" * 5, "def f(x):\n    return x ** 2\n" * 5] * 3
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line),
        model_writer=model,
        vocab_size=290,
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
    train_sentencepiece(texts, 290, tmp_path / "t.model")
    assert (tmp_path / "t.model").read_bytes() == model.getvalue()


def test_the_tool_takes_and_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches options that are not passed on, and what was left out or replaced that nobody hears of."""
    command = typer.main.get_command(prepare_data.app)

    def run(*args: object) -> str:
        command.main([*map(str, args), "--workers", "1", "--overwrite", "--out", str(tmp_path / "o")], standalone_mode=False)
        return " ".join(capsys.readouterr().err.split())

    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "part-0").write_bytes(b'\xef\xbb\xbf{"text": "caf\xe9"}\n{"text": null}\n')
    (folder / "t.csv").write_text("a,b")
    shutil.copy(INPUTS / "dstok" / "tokenizer.json", tmp_path / "alone.json")
    said = run(folder, "--tokenizer", tmp_path / "alone.json", "--eos", "<|end_of_sentence|>")
    for words in (
        "1 files are not valid UTF-8",
        "1 documents are null and were left out",
        "1 byte-order marks",
        "1 files are read as JSON lines by what is in them",
        "t.csv: is CSV",
    ):
        assert words in said, said
    facts = json.loads((tmp_path / "o.json").read_text())
    assert (facts["documents"], facts["null_documents"], facts["byte_order_marks"], facts["eos_id"]) == (1, 1, 1, 0)
    run(INPUTS / "docs.jsonl", "--tokenizer", around(tmp_path / "t" / "tokenizer.json", f"{END} $A"), "--bos")
    assert json.loads((tmp_path / "o.json").read_text())["bos_id"] == 0
    for args, words in (
        (("--eos", "<none>"), "--eos names the token '<none>'"),
        (("--bos", "--pairs"), "--bos is for documents"),
        (("--longest-line", "20"), "line 1 has more than 20 bytes"),
    ):
        with pytest.raises(UsageError, match=words):
            run(INPUTS / "docs.jsonl", "--tokenizer", INPUTS / "plain.json", *args)
    for out in ("a\nb", "x" * 300, "a\0b", "\ud800"):
        with pytest.raises(UsageError, match="is not a prefix of files"):
            command.main([str(INPUTS / "docs.jsonl"), "--out", out], standalone_mode=False)
