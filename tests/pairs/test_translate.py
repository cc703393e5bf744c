"""tools/translate.py on a model that has learned its pairs, and what it says to wrong use."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import typer

from megascale.commands import translate
from megascale.config.load import build_config
from megascale.data.tokenizer import load_tokenizer
from megascale.errors import UsageError
from megascale.launch.ranks import RankInfo
from megascale.train.setup import build_trainer
from tests.formats.models import PLAIN, save
from tests.pairs.files import pair_settings
from tests.pairs.test_data import SOURCES, TARGETS, prepared, write_lines


def run_tool(*args: str) -> None:
    """tools/translate.py in this process."""
    typer.main.get_command(translate.app).main(list(args), standalone_mode=False)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on twelve pairs, long enough to know them by heart."""
    folder = tmp_path_factory.mktemp("translate")
    files = write_lines(folder / "a.txt", SOURCES), write_lines(folder / "b.txt", TARGETS)
    prepared(*files, "--pairs", "--out", str(folder / "all"))
    few = write_lines(folder / "few.src", SOURCES[:12]), write_lines(folder / "few.tgt", TARGETS[:12])
    prepared(*few, "--pairs", "--out", str(folder / "few"), "--tokenizer", str(folder / "all.target.model"))
    values = pair_settings(
        folder,
        data__train=str(folder / "few"),
        model__vocab_size=None,
        model__hidden_size=32,
        model__residual="deepnorm",
        train__source_len=44,
        train__seq_len=44,
        train__steps=120,
        train__global_batch_size=12,
        train__micro_batch_size=12,
        checkpoint__every=0,
        optim__lr=1e-2,
        precision__compute="fp32",
    )
    with build_trainer(build_config(values), RankInfo()) as trainer:
        trainer.train()
    return folder


def test_what_was_learned_is_told(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a decoder that begins otherwise than in training, a batch whose rows mix, and lines in another order."""
    out = run_dir / "out.txt"
    run_tool(str(run_dir / "run"), "--input", str(run_dir / "few.src"), "--output", str(out), "--beam", "2", "--batch", "5")
    assert out.read_text().splitlines() == TARGETS[:12]
    run_tool(str(run_dir / "run"), "--input", str(run_dir / "few.src"))
    assert capsys.readouterr().out.splitlines() == TARGETS[:12]


def test_from_a_t5_folder(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches another first token, sources that see padding, and an end that is not theirs: greedy as transformers does it."""
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'megascale[hf]'")
    tokenizer = load_tokenizer(run_dir / "all.target.model")
    sizes = {"vocab_size": tokenizer.vocab_size, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "n_positions": 20}
    theirs = save(
        "t5", {**sizes, "eos_token_id": tokenizer.eos_id, "decoder_start_token_id": 7, "initializer_factor": 3.0}, tmp_path / "t5"
    )
    shutil.copy(tokenizer.path, tmp_path / "t5/spiece.model")
    sources = SOURCES[:3]
    run_tool(str(tmp_path / "t5"), "--input", write_lines(tmp_path / "in.txt", sources), "--batch", "2")
    want = []
    for ids in tokenizer.encode_batch(sources):
        with torch.no_grad():
            row = theirs.generate(torch.tensor([[*ids, tokenizer.eos_id]]), max_new_tokens=20, num_beams=1, do_sample=False)[0, 1:].tolist()
        row = row[: row.index(tokenizer.eos_id)] if tokenizer.eos_id in row else row
        want.append(tokenizer.decode(row).replace("\n", " "))
    assert capsys.readouterr().out.splitlines() == want and len(set(want)) == 3
    narrow = {**sizes, "vocab_size": 12, "eos_token_id": 1, "decoder_start_token_id": 0}
    save("t5", narrow, tmp_path / "narrow")
    with pytest.raises(UsageError, match=r"line 1 has token \d+, and the model knows 12"):
        run_tool(str(tmp_path / "narrow"), "--input", str(tmp_path / "in.txt"), "--tokenizer", str(tokenizer.path))
    assert tokenizer.decode([*tokenizer.encode_batch(["word"])[0], tokenizer.vocab_size + 5]) == "word"
    save("llama", PLAIN["llama"], tmp_path / "llama")
    with pytest.raises(UsageError, match=r"only an encoder_decoder has sources: use megascale generate"):
        run_tool(str(tmp_path / "llama"), "--input", str(tmp_path / "in.txt"))


def test_wrong_use_is_one_message(run_dir: Path, tmp_path: Path) -> None:
    """Catches tracebacks for what the user can mend."""
    run, sources = str(run_dir / "run"), str(run_dir / "few.src")
    long = write_lines(tmp_path / "long", ["word " * 60])
    for args, words in (
        ((run, "--input", str(tmp_path / "none")), "cannot be read"),
        ((run, "--input", long), "line 1 has"),
        ((run, "--input", sources, "--reference", long), "few.src has 12"),
        ((str(tmp_path), "--input", sources), "is not a checkpoint"),
        ((run, "--input", sources, "--tokenizer", "nowhere"), "there is no tokenizer nowhere"),
    ):
        with pytest.raises(UsageError, match=words):
            run_tool(*args)


def test_scores(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches references and translations swapped or out of step."""
    pytest.importorskip("sacrebleu", reason="sacrebleu is an extra: pip install 'megascale[translate]'")
    run_tool(str(run_dir / "run"), "--input", str(run_dir / "few.src"), "--reference", str(run_dir / "few.tgt"))
    said = capsys.readouterr().err
    assert "BLEU = 100.00" in said and "12 of 12 lines exact" in said
