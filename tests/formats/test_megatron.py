"""Megatron's weights in and out: against megatron-core itself where it is installed, and against themselves on every layout."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megascale.checkpoint.streaming import Target, write_streamed
from megascale.commands.convert import app
from megascale.config.schema import Model
from megascale.errors import UsageError
from megascale.formats.hf.compare_logits import our_logits
from megascale.formats.megatron.checkpoint import read_megatron, write_megatron, write_torch_dist
from megascale.formats.megatron.pickles import read_pickle, read_torch, read_torch_bytes
from megascale.formats.shapes import MODEL, our_shapes
from megascale.formats.sources import OpenCheckpoint, open_checkpoint
from tests.layouts import tiny

SEQ = 16
needs_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None,
    reason="megatron-core is not installed: pip install 'megascale[megatron]'",
)
MODELS: dict[str, Model] = {
    "llama": tiny(num_kv_heads=2, vocab_size=37),
    "qk norm, own head size": tiny(num_kv_heads=4, qk_norm=True, head_dim=10),
    "gpt": tiny(norm="layernorm", bias=True, ffn="gelu", position="learned", num_kv_heads=4, tie_embeddings=True),
    "experts": tiny(num_kv_heads=2, vocab_size=37, moe={"num_experts": 3, "top_k": 2, "ffn_size": 20, "num_shared": 1}),
}


class Random:
    """Weights drawn from (name, place)."""

    def __call__(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hash((name, offset)) % 2**31)
        return 0.3 * torch.randn(shape, generator=generator)


def checkpoint(model: Model, folder: Path) -> OpenCheckpoint:
    targets = [Target(MODEL + n, torch.float32, s) for n, s in our_shapes(model, SEQ).items()]
    config = {"model": model.model_dump(mode="json"), "train": {"seq_len": SEQ}}
    write_streamed(folder, 7, targets, Random(), {"step": 7, "config": config}, stamp="x")
    return open_checkpoint(folder)


def assert_same(a: Any, b: OpenCheckpoint) -> None:
    for name, target in b.source.tensors.items():
        zero = (0,) * len(target.shape)
        assert torch.equal(a.produce(name, zero, target.shape), b.source.read(name, zero, target.shape)), name


@given(data=st.data())
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_every_layout_comes_back(data: st.DataObject) -> None:
    """Catches a KV head's group, a gate, a padding row or a layer that lands on another rank, and either place of norms."""
    tp, pp, kv = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.sampled_from([1, 2, 3])), data.draw(st.sampled_from([4, 8]))
    norm = data.draw(st.sampled_from(["rmsnorm", "layernorm"]))
    model = tiny(
        num_layers=6,
        hidden_size=32,
        num_heads=kv * data.draw(st.sampled_from([1, 2])),
        num_kv_heads=kv,
        head_dim=data.draw(st.sampled_from([2, 6])),
        ffn_size=4 * data.draw(st.integers(1, 9)),
        ffn=data.draw(st.sampled_from(["swiglu", "gelu"])),
        norm=norm,
        bias=norm == "layernorm",
        qk_norm=data.draw(st.booleans()),
        position=data.draw(st.sampled_from(["rope", "learned"])),
        tie_embeddings=data.draw(st.booleans()),
        vocab_size=data.draw(st.integers(9, 40)),
        moe=data.draw(mixtures()) if norm == "rmsnorm" else None,
    )
    with tempfile.TemporaryDirectory() as name:
        ours = checkpoint(model, Path(name) / "ours")
        spec, divisible = data.draw(st.sampled_from(["te", "local"])), data.draw(st.sampled_from([1, 16]))
        experts = data.draw(st.sampled_from(["sequential", "grouped"]))
        write_megatron(ours, Path(name) / "out", tp, pp, spec, divisible, None, experts)
        assert_same(read_megatron(Path(name) / "out", model, SEQ), ours)


@st.composite
def mixtures(draw: st.DrawFn) -> dict[str, Any] | None:
    if draw(st.booleans()):
        return None
    return {
        "num_experts": draw(st.integers(1, 4)),
        "top_k": 1,
        "ffn_size": 4 * draw(st.integers(1, 5)),
        "num_shared": draw(st.integers(0, 2)),
        "every": draw(st.integers(1, 2)),
        "balance": draw(st.sampled_from(["loss", "bias"])),
    }


MIXED = tiny(num_layers=3, vocab_size=37, moe={"num_experts": 2, "every": 2, "ffn_size": 12, "balance": "bias"})


@pytest.mark.parametrize(("name", "spec"), [*((n, "te") for n in MODELS), ("mixed", "te"), ("mixed", "local")])
def test_a_distributed_checkpoint_comes_back(name: str, spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rectangle that lies elsewhere than .metadata says, layers of one kind that change places, a file that is not begun when the
    last is full, and a rectangle that brings along what it was cut from.
    """
    monkeypatch.setattr("megascale.formats.megatron.distributed.CHUNK", 200)
    monkeypatch.setattr("megascale.formats.megatron.distributed.FILE_BYTES", 40000)
    model, folder = MODELS.get(name, MIXED), tmp_path / "out/iter_0000007"
    ours = checkpoint(model, tmp_path / "ours")
    write_torch_dist(ours, tmp_path / "out", spec, 16, None)
    assert_same(read_megatron(tmp_path / "out", model, SEQ), ours)
    files = sorted(folder.glob("*.distcp"))
    weights = sum(t.nbytes for t in ours.source.tensors.values())
    chunks = len(re.findall(rb"archive/data/0", b"".join(p.read_bytes() for p in files))) // 2
    assert len(files) > 2 and sum(p.stat().st_size for p in files) < weights + 16 * 24 * 8 + 2000 * (chunks + 8)
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(folder, tmp_path / "whole.pt")  # torch's own reader
    held = torch.load(tmp_path / "whole.pt")["embedding.word_embeddings.weight"]
    assert torch.equal(held[:37], ours.source.read("model.embedding.weight", (0, 0), (37, 24))) and held.shape == (48, 24)


def oracle(folder: Path, model: Model, ranks: tuple[int, int], tokens: torch.Tensor, rows: int, **told: Any) -> torch.Tensor | None:
    """Runs megatron-core on tp·pp processes; its logits, where it is no pipeline."""
    values = {
        "layers": model.num_layers, "hidden": model.hidden_size, "heads": model.num_heads, "kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim, "ffn": model.ffn_size, "gated": model.ffn == "swiglu", "qk_norm": bool(model.qk_norm),
        "norm": "RMSNorm" if model.norm == "rmsnorm" else "LayerNorm", "rope": model.position == "rope", "tied": model.tie_embeddings,
        "rows": rows, "length": SEQ, "moe": None if model.moe is None else model.moe.model_dump(),
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    content = {"values": values, "tp": ranks[0], "pp": ranks[1], "tokens": tokens.tolist(), "save": [], **told}
    (folder / "told.json").write_text(json.dumps(content))
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks[0] * ranks[1]}", "tests/formats/megatron_oracle.py"]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "logits.pt") if ranks[1] == 1 else None


@needs_megatron
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.dist
@pytest.mark.parametrize("name", MODELS)
def test_against_megatron_core(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches names, orders of rows and paddings that only we believe in: what megatron-core saves, in both formats, has its logits here,
    and it loads what we write in both, on two tensor ranks and on two stages.
    """
    model, tokens, rows = MODELS[name], torch.arange(24).view(2, 12) % 37, 48
    want = oracle(tmp_path / "one", model, (1, 1), tokens, rows, save=["ranks", "dist"])
    two = oracle(tmp_path / "two", model, (2, 1), tokens, rows, save=["ranks", "dist"])
    for logits, source in ((want, "one"), (two, "two")):
        for folder in (tmp_path / source, tmp_path / source / "dist"):
            foreign = read_megatron(folder, model, SEQ)
            got = our_logits(foreign.model, SEQ, foreign.produce, tokens)
            assert (got - logits[..., : model.vocab_size]).abs().max() < 1e-4, folder  # type: ignore[index]
    ours = checkpoint(model, tmp_path / "ours")
    exact = our_logits(model, SEQ, ours.source.read, tokens)
    monkeypatch.setattr("megascale.formats.megatron.distributed.CHUNK", 500)
    write_torch_dist(ours, tmp_path / "dist", "local", 12, None)
    for tp, pp in ((1, 1), (2, 1), (1, 2)):
        logits = oracle(
            tmp_path / f"dist{tp}{pp}", model, (tp, pp), tokens, 48, load_dist=str(tmp_path / "dist/iter_0000007"), save=["dist"]
        )
        if logits is not None:
            assert (logits[..., : model.vocab_size] - exact).abs().max() < 1e-4
        assert_same(read_megatron(tmp_path / f"dist{tp}{pp}/dist", model, SEQ), ours)
    for tp, pp in ((2, 1), (1, 2)):
        out = tmp_path / f"out{tp}{pp}"
        write_megatron(ours, out, tp, pp, "local", 12, None)
        load = str(out / "iter_0000007")
        logits = oracle(tmp_path / f"told{tp}{pp}", model, (tp, pp), tokens, 48, load=load, save=["dist"])
        if logits is not None:
            assert (logits[..., : model.vocab_size] - exact).abs().max() < 1e-4
        assert_same(read_megatron(tmp_path / f"told{tp}{pp}/dist", model, SEQ), ours)


class Evil:
    """A pickle that would run a program."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_nothing_in_a_pickle_runs(tmp_path: Path) -> None:
    """Catches a reader that calls what a file names, bare or inside torch.save's zip; the tensors beside it are read all the same."""
    (tmp_path / "bare").write_bytes(pickle.dumps({"a": Evil(tmp_path / "ran"), "b": 1}))
    assert read_pickle(tmp_path / "bare")["b"] == 1
    torch.save({"model": {"w": torch.arange(3.0)}, "args": Evil(tmp_path / "ran")}, tmp_path / "zip")
    assert read_torch(tmp_path / "zip")["model"]["w"].tolist() == [0, 1, 2]
    assert not (tmp_path / "ran").exists()
    with zipfile.ZipFile(tmp_path / "torn", "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02garbage")
    for name, words in (("torn", "cannot be read"), ("bare", "not a zip file"), ("absent", "there is no")):
        with pytest.raises(UsageError, match=words):
            read_torch(tmp_path / name)


def lose(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder / "iter_0000007/mp_rank_01_000")


def change(folder: Path, rank: str, name: str, value: Any) -> None:
    path = folder / "iter_0000007" / rank / "model_optim_rng.pt"
    held = torch.load(path)
    held["model"][name] = value
    path.unlink()  # or the file that somebody has mapped would change
    torch.save(held, path)


DAMAGE: dict[str, tuple[Any, str]] = {
    "a rank is missing": (lose, r"mp_rank_01_000 is missing: 3 of 4 ranks are here"),
    "a rank of experts": (lambda f: (f / "iter_0000007/mp_rank_00_000_001").mkdir(), "only tensor and pipeline ranks can be read"),
    "no such iteration": (lambda f: (f / "latest_checkpointed_iteration.txt").write_text("../../x"), "there is no such iteration"),
    "copies differ": (
        lambda f: change(f, "mp_rank_01_001", "decoder.final_layernorm.weight", torch.ones(24)), "of which it is a copy: the ranks do"
    ),
    "a foreign tensor": (lambda f: change(f, "mp_rank_00_000", "decoder.layers.0.mlp.linear_fc3.weight", torch.ones(2)), "has no place"),
    "another shape": (lambda f: change(f, "mp_rank_00_000", "decoder.layers.0.mlp.linear_fc2.weight", torch.ones(2, 2)), "has shape"),
}  # fmt: skip


def test_programs_are_refused(tmp_path: Path) -> None:
    """Catches a TorchScript archive in the place of a checkpoint: torch.load would hand it to the interpreter of its code."""
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "model.pt")
    with pytest.raises(UsageError, match="holds a program"):
        read_torch(tmp_path / "model.pt")
    with pytest.raises(UsageError, match="holds a program"):
        read_torch_bytes((tmp_path / "model.pt").read_bytes(), "x")


@pytest.mark.parametrize("damage", DAMAGE)
def test_tampered_ranks(damage: str, tmp_path: Path) -> None:
    """Catches whatever is believed unseen."""
    model = MODELS["llama"]
    write_megatron(checkpoint(model, tmp_path / "ours"), tmp_path / "out", 2, 2, "te", 1, None)
    do, words = DAMAGE[damage]
    do(tmp_path / "out")
    with pytest.raises(UsageError, match=words):
        read_megatron(tmp_path / "out", model, SEQ)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 60}, "38 rows for model.embedding.weight, but model.vocab_size is 60"),
        ({"num_layers": 4}, "mp_rank_00/decoder.layers.2."),
        ({"residual": "deepnorm"}, "model.residual is 'deepnorm'"),
        ({"moe": {}}, "mlp.experts.local_experts.0.linear_fc1.weight"),
        ({"moe": {"router": "xmoe"}}, "model.moe.router is xmoe"),
        ({"moe": {"expert_bias": True}}, "model.moe.expert_bias is True"),
        ({"attention_scale": 1.0}, "model.attention_scale is 1.0"),
        ({"bias": True}, "its RMSNorm none"),
    ],
)
def test_other_models_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    """Catches weights of one model read as another."""
    write_megatron(checkpoint(MODELS["llama"], tmp_path / "ours"), tmp_path / "out", 2, 1, "te", 1, None)
    with pytest.raises(UsageError) as error:
        read_megatron(tmp_path / "out", tiny(**{"num_kv_heads": 2, "vocab_size": 37, **changes}), SEQ)
    assert words in str(error.value)


def test_the_tool_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a way that the tool does not have, and damage that goes on into another format."""
    from megascale.config.load import to_yaml

    model = MODELS["gpt"]
    ours = checkpoint(model, tmp_path / "ours")
    (tmp_path / "c.yaml").write_text(to_yaml({"model": model.model_dump(mode="json"), "train": {"seq_len": SEQ, "steps": 1}}))

    def tool(*args: object) -> None:
        assert app([*map(str, args)], standalone_mode=False) in (None, 0)

    tool(tmp_path / "ours", tmp_path / "out", "--from", "megascale", "--to", "megatron", "--tp", 2, "--pp", 2)
    assert "weights only" in capsys.readouterr().out
    tool(tmp_path / "out", tmp_path / "back", "--from", "megatron", "--to", "megascale", "--config", tmp_path / "c.yaml")
    back = open_checkpoint(tmp_path / "back")
    assert back.model == ours.model
    for name, target in ours.source.tensors.items():
        zero = (0,) * len(target.shape)
        assert torch.equal(back.source.read(name, zero, target.shape), ours.source.read(name, zero, target.shape))
    out = (tmp_path / "ours", tmp_path / "no", "--from", "megascale", "--to", "megatron")
    tool(*out[:1], tmp_path / "dist", *out[2:], "--ckpt-format", "torch_dist")
    assert_same(read_megatron(tmp_path / "dist", model, SEQ), ours)
    for args, words in (
        ((tmp_path / "out", tmp_path / "no", "--from", "megatron", "--to", "megascale"), "give --config FILE"),
        (
            (tmp_path / "ours", tmp_path / "no", "--from", "megascale", "--to", "megatron", "--tp", 3),
            "model.num_kv_heads is 4 but the weights",
        ),
        ((tmp_path / "ours", tmp_path / "no", "--from", "megascale", "--to", "megatron", "--spec", "x"), "--spec is x"),
        ((*out, "--ckpt-format", "zarr"), "--ckpt-format is zarr"),
        ((*out, "--ckpt-format", "torch_dist", "--tp", 2), "--tp is 2, --pp is 1 and --experts is sequential"),
        ((*out, "--experts", "x"), "--experts is x"),
    ):
        with pytest.raises(UsageError) as error:
            tool(*args)
        assert words in str(error.value)
    shard = next(ours.folder.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UsageError, match="its content has changed"):
        tool(tmp_path / "ours", tmp_path / "no", "--from", "megascale", "--to", "megatron")
    assert not (tmp_path / "no").exists()
