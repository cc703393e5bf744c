"""Folders that are not what they say: one message that names what is wrong, code 2, and nothing written."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megascale.commands.convert import app
from megascale.errors import UsageError
from megascale.formats.convert import ConvertOptions, hf_to_megascale, megascale_to_hf
from megascale.formats.hf.model import read_hf
from tests.formats.models import PLAIN, save

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'megascale[hf]'")


def edit(folder: Path, **changes: Any) -> None:
    """Sets keys of config.json; `...` removes one."""
    config = json.loads((folder / "config.json").read_text())
    config |= changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors")


def point_elsewhere(folder: Path) -> None:
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, "../evil.safetensors")}))


def header_beyond_the_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:])


def overlap(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    first, second = [n for n in header if n != "__metadata__"][:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def lose_a_shard(folder: Path) -> None:
    names = load_file(folder / "model.safetensors")
    index = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index["model.norm.weight"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def foreign_shard(folder: Path) -> None:
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names[1:], "model.safetensors")}))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "unknown architecture": (lambda f: edit(f, model_type="mamba"), "model_type is 'mamba', but only llama, mistral"),
    "roberta": (lambda f: edit(f, model_type="roberta"), "its positions begin behind its padding token"),
    "another attention": (lambda f: edit(f, model_type="llama4"), "its layers alternate between two attentions"),
    "another head": (lambda f: edit(f, architectures=["LlamaForSequenceClassification"]), "LlamaForCausalLM that can be read"),
    "unknown key": (lambda f: edit(f, attention_sinks=4), "attention_sinks is 4, which is not understood"),
    "quantized": (lambda f: edit(f, quantization_config={"bits": 4}), "quantization_config is {'bits': 4}, which is not understood"),
    "remote code": (lambda f: edit(f, auto_map={"AutoModel": "x.py"}), "auto_map is"),
    "bias": (lambda f: edit(f, attention_bias=True), "attention_bias is True, but only False is supported"),
    "activation": (lambda f: edit(f, hidden_act="gelu"), "hidden_act is 'gelu', but only 'silu'"),
    "rope kind": (
        lambda f: edit(f, rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}), "rope_type is 'longrope', but only default, linear"
    ),
    "rope key": (
        lambda f: edit(f, rope_parameters={"rope_type": "linear", "factor": 2.0, "mscale": 1.0}), "rope_scaling.mscale is 1.0"
    ),
    "rope without factor": (lambda f: edit(f, rope_parameters={"rope_type": "linear"}), "rope_scaling.factor is absent"),
    "rope is no mapping": (lambda f: edit(f, rope_parameters=[1]), "which is not a mapping"),
    "window": (lambda f: edit(f, sliding_window=4), "sliding_window is 4, which llama does not have"),
    "no heads": (lambda f: edit(f, num_attention_heads=0), "the number of heads is 0"),
    "text for a size": (lambda f: edit(f, num_hidden_layers="many"), "model.num_layers would be 'many'"),
    "size missing": (lambda f: edit(f, hidden_size=...), "model.hidden_size would be None"),
    "no length": (lambda f: edit(f, max_position_embeddings=...), "has no max_position_embeddings"),
    "more layers": (lambda f: edit(f, num_hidden_layers=3), "model.layers.2."),
    "fewer layers": (lambda f: edit(f, num_hidden_layers=1), "have no place in a model of its config"),
    "another width": (lambda f: edit(f, intermediate_size=40), "has shape [48, 32] but the config makes it [40, 32]"),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "no config": (lambda f: (f / "config.json").unlink(), "there is no"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "holds a list instead of an object"),
    "missing tensor": (lambda f: tensors(f, lambda t: t.pop("model.norm.weight")), "model.norm.weight is missing"),
    "foreign tensor": (
        lambda f: tensors(f, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})),
        "model.layers.0.self_attn.q_proj.bias has no place",
    ),
    "another shape": (
        lambda f: tensors(f, lambda t: t.update({"model.norm.weight": torch.ones(31)})), "has shape [31] but the config makes it [32]"
    ),
    "untied": (lambda f: edit(f, tie_word_embeddings=True), "has a lm_head.weight of its own"),
    "hostile name": (point_elsewhere, "'../evil.safetensors', which is not the name of a safetensors file"),
    "hostile header": (header_beyond_the_file, "is not a whole safetensors file"),
    "overlapping tensors": (overlap, "is not a whole safetensors file"),
    "truncated": (cut_short, "is not a whole safetensors file"),
    "pickle only": (pickled, "pytorch_model.bin is no such file"),
    "missing shard": (lose_a_shard, "there is no such file"),
    "foreign shard": (foreign_shard, "the files do not belong together"),
    "empty index": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    save("llama", PLAIN["llama"], folder / "hf")
    hf_to_megascale(folder / "hf", folder / "ours", ConvertOptions())
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_tampered_folders(damage: str, whole: Path, tmp_path: Path) -> None:
    """Catches whatever is read half, guessed, or believed unseen; nothing is written."""
    import shutil

    shutil.copytree(whole / "hf", tmp_path / "hf")
    change, words = DAMAGE[damage]
    change(tmp_path / "hf")
    with pytest.raises(UsageError) as error:
        hf_to_megascale(tmp_path / "hf", tmp_path / "out", ConvertOptions())
    assert words in str(error.value), str(error.value)
    assert {p.name for p in tmp_path.iterdir()} == {"hf"}


def test_a_disk_without_room_leaves_nothing(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a half-written folder, whether the disk is known to be full before or turns out to be."""
    usage = lambda path: SimpleNamespace(free=10)  # noqa: E731
    for convert, source in ((hf_to_megascale, "hf"), (megascale_to_hf, "ours")):
        with monkeypatch.context() as patch:
            patch.setattr("shutil.disk_usage", usage)
            with pytest.raises(UsageError, match="make room there"):
                convert(whole / source, tmp_path / "out", ConvertOptions())
        with monkeypatch.context() as patch:
            patch.setattr("megascale.checkpoint.streaming.write_shard", full)
            with pytest.raises(UsageError, match=r"out could not be written \(No space left on device: .*nothing is left of it"):
                convert(whole / source, tmp_path / "out", ConvertOptions())
        assert list(tmp_path.iterdir()) == []


def full(path: Path, *_: Any) -> None:
    raise OSError(28, "No space left on device", str(path))


def test_nothing_is_written_over(whole: Path, tmp_path: Path) -> None:
    """Catches a folder of somebody's that is gone."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter").write_text("dear")
    for convert, source in ((hf_to_megascale, "hf"), (megascale_to_hf, "ours")):
        with pytest.raises(UsageError, match="is not empty, and nothing is overwritten"):
            convert(whole / source, tmp_path / "mine", ConvertOptions())
    assert (tmp_path / "mine/letter").read_text() == "dear" and [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_killed_conversion_is_finished(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches files of a killed run that are trusted although the source has changed, or made again although it has not."""
    from megascale.checkpoint import streaming

    written: list[str] = []
    real = streaming.write_shard

    def write(path: Path, *rest: Any) -> Any:
        written.append(path.name)
        if len(written) == 3:
            raise KeyboardInterrupt
        return real(path, *rest)

    monkeypatch.setattr("megascale.formats.hf.model.FILE_BYTES", 20000)
    monkeypatch.setattr("megascale.checkpoint.streaming.write_shard", write)
    with pytest.raises(KeyboardInterrupt):
        megascale_to_hf(whole / "ours", tmp_path / "out", ConvertOptions())
    assert not (tmp_path / "out").exists()
    megascale_to_hf(whole / "ours", tmp_path / "out", ConvertOptions())
    assert len(written) == len(set(written)) + 1, "two whole files are kept"
    assert read_hf(tmp_path / "out").model == read_hf(whole / "hf").model


def tool(*args: object) -> None:
    assert app([*map(str, args)], standalone_mode=False) in (None, 0)


def test_the_tool_says_what_it_did(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a report without the difference of logits, and wrong use that is no sentence."""
    tool(whole / "ours", tmp_path / "hf", "--from", "megascale", "--to", "hf", "--tokens", "1,5,9", "--report", tmp_path / "r.json")
    assert "is the largest difference from transformers in fp32" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["logits"] < 1e-4
    for args, words in (
        (("--from", "hf", "--to", "hf"), "--from is hf and --to is hf: give one of"),
        (("--from", "hf", "--to", "megascale", "--dtype", "int8"), "--dtype is int8: give one of fp32"),
        (("--from", "hf", "--to", "megascale", "--tokens", "1,x"), "--tokens is '1,x'"),
        (("--from", "hf", "--to", "megascale", "--tokens", "50"), "--tokens holds 50, and the model reads 1 to 64 numbers below 50"),
        (("--from", "hf", "--to", "megascale", "--tp", "2"), "--tp is 2, and nothing from hf to megascale depends on it"),
        (("--from", "hf", "--to", "megascale", "--report", tmp_path / "no/r.json"), "no file can be written there"),
    ):
        with pytest.raises(UsageError) as error:
            tool(whole / "hf", tmp_path / "other", *args)
        assert words in str(error.value)
    wrong = subprocess.run([sys.executable, "tools/convert.py", "a", "b", "--from", "x", "--to", "hf"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: --from is x") and "Traceback" not in wrong.stderr
    assert not (tmp_path / "other").exists()
