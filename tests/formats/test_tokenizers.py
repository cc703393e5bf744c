"""Tokenizers in exported folders: transformers encodes and decodes with them what we do."""

from __future__ import annotations

import inspect
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megascale.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from megascale.errors import UsageError
from megascale.formats.convert import ConvertOptions, hf_to_megascale, megascale_to_hf
from megascale.formats.tokenizer_build import build, open_tokenizer
from megascale.formats.tokenizer_files import PROBES, as_tokenizers, tokenizer_content
from megascale.generation.open import open_any
from tests.formats.models import PLAIN, save

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'megascale[hf]'")
HIDDEN = "<0x123456789ABCDEF> </s> <unk> " * 9  # characters of the names of pieces that text may not match
TEXTS = [inspect.getsource(textwrap), HIDDEN, "Ünïcödé 🙂 and “quotes” " * 30]


def byte_level(path: Path) -> None:
    """A byte-level BPE with a beginning token, as Llama 3's."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(TEXTS, trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing("<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)])
    made.save(str(path))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Any]]:
    """Each kind of tokenizer, ours and transformers' from the files that we export."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizers")
    train_sentencepiece(TEXTS, 500, folder / "sp.model")
    byte_level(folder / "bpe.tokenizer.json")
    found = {}
    for kind, name in (("sentencepiece", "sp.model"), ("bpe", "bpe.tokenizer.json")):
        (folder / kind).mkdir()
        for file, content in tokenizer_content(folder / name).items():
            (folder / kind / file).write_bytes(content)
        found[kind] = (load_tokenizer(folder / name), AutoTokenizer.from_pretrained(folder / kind))
    return found


PIECES = st.one_of(st.text(max_size=8), st.sampled_from([" ", "  ", "\n", "▁", "<s>", "</s>", "<0x41>", "def ", "return", "🙂", "ﬁ"]))


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe"])
@given(parts=st.lists(PIECES, max_size=12))
@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_transformers_encodes_alike(made: dict[str, tuple[Tokenizer, Any]], kind: str, parts: list[str]) -> None:
    """Catches a normalizer or a prefix that one of them has, control pieces that text can match, and bytes that fall out. Where two splits
    are equally likely, as of a run of spaces, rounding decides in both libraries: then their scores are equal and so is their text.
    """
    ours, theirs = made[kind]
    text = "".join(parts)
    if kind == "sentencepiece" and any(mark in text for mark in ("<s>", "</s>")):
        text = text.replace("<s>", "").replace("</s>", "")  # there a tokenizer of transformers means the token, wherever it came from
    ids = ours.encode_batch([text])[0].tolist()
    other = theirs.encode(text, add_special_tokens=False)
    if kind == "bpe":
        assert other == ids
    else:
        piece = sentencepiece.SentencePieceProcessor(model_file=str(ours.path))
        scores = [sum(0.0 if piece.is_byte(i) else piece.get_score(i) for i in row) for row in (ids, other)]
        assert other == ids or (scores[0] == pytest.approx(scores[1], abs=1e-4) and len(other) == len(ids))
    assert theirs.decode(other) == ours.decode(ids)


def test_the_ends_are_known(made: dict[str, tuple[Tokenizer, Any]]) -> None:
    """Catches an export that generates for ever, and a prompt without the token that begins it."""
    for ours, theirs in made.values():
        assert theirs.eos_token_id == ours.eos_id
    ours, theirs = made["bpe"]
    assert ours.encode_prompt("def") == theirs.encode("def") and ours.encode_prompt("def")[0] == 0


def test_models_that_normalize_keep_their_own_file(tmp_path: Path) -> None:
    """Catches a tokenizer.json that encodes other than its SentencePiece model."""
    (tmp_path / "text").write_text("\n".join(TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "usual"), vocab_size=400, model_type="unigram", byte_fallback=True,
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    piece = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "usual.model"))
    assert piece.encode(PROBES[1]) == piece.encode(PROBES[1].strip().replace("  ", " ")), "it removes white space"
    assert as_tokenizers(piece) is None
    assert list(tokenizer_content(tmp_path / "usual.model")) == ["tokenizer.model"]


def test_names_of_bytes_are_text_or_the_file_is_left_out(tmp_path: Path) -> None:
    """Catches "<0x03>" taken for a byte where "3" is unknown."""
    train_sentencepiece(["only letters and spaces " * 20], 273, tmp_path / "t.model")
    assert list(tokenizer_content(tmp_path / "t.model")) == ["tokenizer.model"]


def test_files_travel_with_the_model(tmp_path: Path) -> None:
    """Catches a tokenizer that is lost on the way, a padded vocabulary that is refused, and one that is too small."""
    save("llama", PLAIN["llama"] | {"vocab_size": 410}, tmp_path / "hf")
    byte_level(tmp_path / "hf/tokenizer.json")
    (tmp_path / "hf/tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>"}')
    hf_to_megascale(tmp_path / "hf", tmp_path / "ours", ConvertOptions())
    megascale_to_hf(tmp_path / "ours", tmp_path / "back", ConvertOptions())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "back" / name).read_bytes()
    save("llama", PLAIN["llama"], tmp_path / "small")
    hf_to_megascale(tmp_path / "small", tmp_path / "small-ours", ConvertOptions())
    with pytest.raises(UsageError, match="has 400 pieces but the model 50 rows"):
        megascale_to_hf(tmp_path / "small-ours", tmp_path / "no", ConvertOptions(tokenizer=tmp_path / "hf/tokenizer.json"))
    assert not (tmp_path / "no").exists()


def test_generation_of_an_export_needs_nothing_else(tmp_path: Path) -> None:
    """Catches a folder that transformers' own pipeline cannot use."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train_sentencepiece(TEXTS, 400, tmp_path / "t.model")
    save("qwen3", PLAIN["qwen3"] | {"vocab_size": 400}, tmp_path / "hf")
    hf_to_megascale(tmp_path / "hf", tmp_path / "ours", ConvertOptions())
    megascale_to_hf(tmp_path / "ours", tmp_path / "out", ConvertOptions(tokenizer=tmp_path / "t.model"))
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    out = model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert isinstance(out, torch.Tensor) and tokenizer.decode(out[0]).startswith("def ")


def byte_pairs(folder: Path) -> None:
    """vocab.json and merges.txt, as GPT-2's folder has them, without a tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    made.train_from_iterator(TEXTS, trainer)
    made.model.save(str(folder))


def word_pieces(folder: Path) -> None:
    """vocab.txt alone, as BERT's oldest folders."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
        "the",
        ".",
    ]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("GPT2Tokenizer", {}),
        ("Qwen2Tokenizer", {"eos_token": "<|im_end|>", "added_tokens_decoder": {"400": {"content": "<|im_end|>", "special": True}}}),
        ("BertTokenizer", {}),
    ],
)
def test_older_files_are_put_together(kind: str, said: dict[str, Any], tmp_path: Path) -> None:
    """Catches text that is cut, lowered or numbered other than transformers does it with the same files."""
    import transformers

    (word_pieces if kind == "BertTokenizer" else byte_pairs)(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, **said}))
    ours, theirs = open_tokenizer(tmp_path), getattr(transformers, kind).from_pretrained(str(tmp_path))
    for text in (*PROBES, *TEXTS, "The don't 123456 naïve é", "A<|im_end|>B"):
        if "<" not in text or kind == "BertTokenizer":
            assert ours.encode_batch([text])[0].tolist() == theirs.encode(text, add_special_tokens=False), text
    assert ours.vocab_size == len(theirs)
    if "eos_token" in said:
        assert json.loads(build(tmp_path))["added_tokens"][-1]["id"] == 400


def test_tokenizers_of_every_kind_travel(tmp_path: Path) -> None:
    """Catches files that are lost on the way, or a model that cannot be converted for the sake of a tokenizer that we cannot read."""
    save("gpt2", PLAIN["gpt2"] | {"vocab_size": 400}, tmp_path / "hf")
    byte_pairs(tmp_path / "hf")
    train_sentencepiece(TEXTS, 400, tmp_path / "hf/spiece.model")
    (tmp_path / "hf/tekken.json").write_text("{}")
    (tmp_path / "hf/qwen.tiktoken").write_text("IQ== 0\n")
    names = {"vocab.json", "merges.txt", "spiece.model", "tekken.json", "qwen.tiktoken"}
    assert (
        hf_to_megascale(tmp_path / "hf", tmp_path / "ours", ConvertOptions()).tokenizer
        == "spiece.model, vocab.json, tekken.json, qwen.tiktoken"
    )
    megascale_to_hf(tmp_path / "ours", tmp_path / "back", ConvertOptions())
    for name in names:
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "back" / name).read_bytes()
    for name in ("spiece.model", "vocab.json", "merges.txt", "qwen.tiktoken"):
        (tmp_path / "ours" / name).unlink()
    report = megascale_to_hf(tmp_path / "ours", tmp_path / "again", ConvertOptions())
    assert (tmp_path / "again/tekken.json").exists() and "which is not read" in report.notes[0] and "copied" in report.notes[0]
    bare = megascale_to_hf(tmp_path / "ours", tmp_path / "bare", ConvertOptions(with_tokenizer=False))
    assert bare.tokenizer is None and not (tmp_path / "bare/tekken.json").exists() and bare.notes == []
    with pytest.raises(UsageError, match=r"make a tokenizer\.json with transformers"):
        megascale_to_hf(tmp_path / "ours", tmp_path / "no", ConvertOptions(tokenizer=tmp_path / "ours"))


def test_the_end_of_a_config_goes_back(tmp_path: Path) -> None:
    """Catches an export that ends at another token than the folder it came from, which has no generation_config.json."""
    save("llama", PLAIN["llama"] | {"vocab_size": 410, "eos_token_id": [3, 5]}, tmp_path / "hf")
    (tmp_path / "hf/generation_config.json").unlink()
    byte_level(tmp_path / "hf/tokenizer.json")
    hf_to_megascale(tmp_path / "hf", tmp_path / "ours", ConvertOptions())
    assert open_any(tmp_path / "hf").ends == open_any(tmp_path / "ours").ends == {3, 5}
    megascale_to_hf(tmp_path / "ours", tmp_path / "back", ConvertOptions())
    assert json.loads((tmp_path / "back/generation_config.json").read_text())["eos_token_id"] == [3, 5]
