"""Files that somebody made to hurt: one sentence, in little memory and time, nothing executed and nothing left behind."""

from __future__ import annotations

import io
import json
import random
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megascale.checkpoint.streaming import Target, write_streamed
from megascale.config.schema import Model
from megascale.errors import UsageError
from megascale.expand.source import open_source
from megascale.files import atomic_folder
from megascale.formats.convert import ConvertOptions, hf_to_megascale
from megascale.formats.megatron.checkpoint import find_iteration, read_megatron, write_megatron, write_torch_dist
from megascale.formats.megatron.pickles import read_pickle, read_torch, read_torch_bytes
from megascale.formats.sources import open_checkpoint
from megascale.generation.open import open_any
from tests.formats.test_megatron import MODELS, SEQ, checkpoint
from tests.formats.test_real_configs import LLAMA


def made(pickled: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> bytes:
    """An archive as torch.save writes it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, content in {"byteorder": b"little", **records}.items():
            archive.writestr(f"archive/{name.replace('__', '/')}", content)
    return file.getvalue()


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def tensor_of(count: int, offset: int, size: int, stride: int, kind: str = "FloatStorage") -> bytes:
    """A pickle of one tensor with storage 0."""
    storage = b"(Vstorage\nctorch\n" + kind.encode() + b"\nV0\nVcpu\nI%d\ntQ" % count
    return REBUILD + b"(" + storage + b"I%d\n(I%d\nt(I%d\nt" % (offset, size, stride) + b"I00\n(dtR."


MEMO = b"\x80\x02Nr\x00\x00\x00\x10."  # one object kept under the number 2^28
COPIES = b"ccollections\nOrderedDict\n((VK\nI1\ndtR."
BOMBS: dict[str, tuple[bytes, str]] = {
    "a memo of 2^28": (made(MEMO), "it keeps 268435456 objects in 9 bytes"),
    "inflated": (made(b"\x80\x02]" + b"]" * 100_000 + b".", zipfile.ZIP_DEFLATED), "is compressed"),
    "a string longer than the file": (made(b"\x80\x04\x8d" + (1 << 40).to_bytes(8, "little") + b"a."), "cannot be read"),
    "a storage longer than the file": (made(tensor_of(1 << 40, 0, 2, 1), data__0=b"\0" * 8), "should have 1099511627776 numbers"),
    "a tensor beyond its storage": (made(tensor_of(2, 0, 2, 1 << 40), data__0=b"\0" * 8), "reaches beyond the 2 numbers"),
    "a tensor before its storage": (made(tensor_of(2, -4, 2, 1), data__0=b"\0" * 8), "made of something other than numbers"),
    "a storage of another kind": (made(tensor_of(2, 0, 2, 1, "ComplexFloatStorage"), data__0=b"\0" * 16), "ComplexFloatStorage are not"),
    "no such storage": (made(tensor_of(2, 0, 2, 1)), "cannot be read"),
    "another byte order": (made(b"N.", byteorder=b"big"), "another byte order"),
    "copies of a dictionary": (made(COPIES), "an OrderedDict is made from arguments"),
    "a call of a thousand": (made(b"cposix\nsystem\n(" + b"N" * 1000 + b"tR."), "called with 1000 arguments"),
    "names without end": (made(b"".join(b"cm\nn%d\n0" % i for i in range(5000)) + b"N."), "more than 4096 classes"),
    "no pickle": (made(b"\xff"), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_pickles_that_ask_for_too_much(bomb: str, tmp_path: Path) -> None:
    """Catches a file of a few bytes that takes gigabytes or reads beyond itself, mapped and from memory."""
    data, words = BOMBS[bomb]
    (tmp_path / "x.pt").write_bytes(data)
    for read in (lambda: read_torch(tmp_path / "x.pt"), lambda: read_torch_bytes(data, "x")):
        with pytest.raises(UsageError) as error:
            read()
        assert words in str(error.value) and len(str(error.value)) < 500
    (tmp_path / "bare").write_bytes(MEMO)
    with pytest.raises(UsageError, match="it keeps 268435456 objects"):
        read_pickle(tmp_path / "bare")


def test_what_torch_saves_is_read(tmp_path: Path) -> None:
    """Catches views, orders of dimensions, shared and empty storages and dtypes that torch.load reads and we do not."""
    base = torch.arange(24.0).reshape(4, 6)
    saved = {
        "model": {
            "view": base[1:, ::2],
            "transposed": base.T,
            "empty": torch.zeros(0, 3),
            "scalar": torch.tensor(3),
            "parameter": torch.nn.Parameter(base.bfloat16()),
            "bytes": torch.arange(5, dtype=torch.uint8),
        },
        "more": OrderedDict(a=base),
    }
    torch.save(saved, tmp_path / "x.pt")
    for found in (read_torch(tmp_path / "x.pt"), read_torch_bytes((tmp_path / "x.pt").read_bytes(), "x")):
        assert list(found["model"]) == list(saved["model"]) and torch.equal(found["more"]["a"], base)
        for name, tensor in saved["model"].items():
            assert torch.equal(found["model"][name], tensor) and found["model"][name].dtype == tensor.dtype


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf, a folder as transformers saves it; ours, made from it; ranks and dist, of Megatron."""
    folder = tmp_path_factory.mktemp("whole")
    d, kv, f = 32, 16, 48
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (50, d), "model.norm.weight": (d,), "lm_head.weight": (50, d)}
    for i in range(2):
        at = f"model.layers.{i}."
        shapes |= {f"{at}{n}.weight": (d,) for n in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{at}self_attn.{n}_proj.weight": (m, d) for n, m in (("q", d), ("k", kv), ("v", kv), ("o", d))}
        shapes |= {f"{at}mlp.gate_proj.weight": (f, d), f"{at}mlp.up_proj.weight": (f, d), f"{at}mlp.down_proj.weight": (d, f)}
    (folder / "hf").mkdir()
    save_file({n: torch.ones(s) for n, s in shapes.items()}, folder / "hf/model.safetensors")
    (folder / "hf/config.json").write_text(json.dumps(LLAMA))
    (folder / "hf/generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
    hf_to_megascale(folder / "hf", folder / "ours", ConvertOptions())
    ours = checkpoint(MODELS["llama"], folder / "small")
    write_megatron(ours, folder / "ranks", 2, 1, "te", 1, None)
    write_torch_dist(ours, folder / "dist", "te", 1, None)
    return folder


def renamed(folder: Path, prefix: str) -> None:
    held = load_file(folder / "model.safetensors")
    save_file({prefix + n: t for n, t in held.items()}, folder / "model.safetensors")


def config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))


FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "more layers than tensors": (lambda f: config(f, num_hidden_layers=9000), "a model of 9000 layers, but 21 tensors are stored"),
    "ten million layers": (lambda f: config(f, num_hidden_layers=10**7), "model.num_layers would be 10000000"),
    "beyond any integer": (lambda f: config(f, num_hidden_layers=10**30), "model.num_layers would be 1000000000"),
    "beyond any width": (lambda f: config(f, hidden_size=10**18, head_dim=8), "model.hidden_size would be 1000000000"),
    "torch.compile": (lambda f: renamed(f, "_orig_mod."), "named _orig_mod.…, which is what torch.compile puts before"),
    "DDP": (lambda f: renamed(f, "module."), "named module.…, which is what DistributedDataParallel puts before"),
    "a long name": (
        lambda f: (f / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x" * 300 + ".safetensors"}})),
        "which is not the name of a safetensors file in this folder",
    ),
    "integers": (
        lambda f: save_file(
            {n: t.to(torch.int8) for n, t in load_file(f / "model.safetensors").items()}, f / "model.safetensors"
        ),
        "as int8, but weights are floating-point numbers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_of_others(case: str, whole: Path, tmp_path: Path) -> None:
    """Catches sizes that are believed before they are compared with what is stored, and a refusal that does not name the wrapper."""
    shutil.copytree(whole / "hf", tmp_path / "hf")
    FOLDERS[case][0](tmp_path / "hf")
    with pytest.raises(UsageError) as error:
        hf_to_megascale(tmp_path / "hf", tmp_path / "out", ConvertOptions())
    assert FOLDERS[case][1] in str(error.value), str(error.value)
    assert {p.name for p in tmp_path.iterdir()} == {"hf"}


@pytest.mark.parametrize(
    ("layers", "words"), [(9000, "a model of 9000 layers, but 21 tensors are stored"), (10**7, "model.num_layers is 10000000")]
)
@pytest.mark.parametrize("opened", [open_checkpoint, open_source, open_any])
def test_our_own_with_too_many_layers(opened: Callable[[Path], Any], layers: int, words: str, whole: Path, tmp_path: Path) -> None:
    """Catches a trainer.json whose model is built before it is compared with the tensors in the index."""
    shutil.copytree(whole / "ours", tmp_path / "ours")
    path = tmp_path / "ours/step-00000000/trainer.json"
    trainer = json.loads(path.read_text())
    trainer["config"]["model"]["num_layers"] = layers
    path.write_text(json.dumps(trainer))
    with pytest.raises(UsageError, match=words):
        opened(tmp_path / "ours")


@pytest.mark.parametrize(
    ("changes", "words"), [({"vocab_size": None}, "vocab_size is absent"), ({"ffn_size": 10**30}, "model.ffn_size is 1000000000")]
)
def test_our_own_with_impossible_sizes(changes: dict[str, Any], words: str, whole: Path, tmp_path: Path) -> None:
    """Catches an assertion, or an overflow in torch, for a trainer.json that says what cannot be."""
    shutil.copytree(whole / "ours", tmp_path / "ours")
    path = tmp_path / "ours/step-00000000/trainer.json"
    trainer = json.loads(path.read_text())
    trainer["config"]["model"] |= changes
    path.write_text(json.dumps(trainer))
    with pytest.raises(UsageError, match=words):
        open_checkpoint(tmp_path / "ours")


@pytest.mark.parametrize("text", ["²", "9" * 5000, "../../x", "\udcff", ""])
def test_iterations_of_megatron(text: str, tmp_path: Path) -> None:
    """Catches digits that int() does not take, more of them than it takes, and a name that leads elsewhere."""
    (tmp_path / "latest_checkpointed_iteration.txt").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match="there is no such iteration"):
        find_iteration(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    (tmp_path / "iter_0000007").mkdir()
    with pytest.raises(UsageError, match="neither mp_rank_… folders"):
        read_megatron(tmp_path, MODELS["llama"], SEQ)


def test_nothing_is_left_whatever_fails(tmp_path: Path) -> None:
    """Catches `.tmp-…` beside a target, where what makes the numbers raises what nobody expected."""

    def produce(*_: Any) -> torch.Tensor:
        raise KeyError("x")

    with pytest.raises(KeyError):
        write_streamed(tmp_path / "out", 1, [Target("a", torch.float32, (2,))], produce, {}, stamp="x")
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "other"):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


TEXTS = ['"x"', "null", "-1", "1e308", "true", "[]", "{}", "9" * 30, "0", '""', '"\\ud800"', "[[1]]", '{"a": 1}', "1.5", '"../x"']


def mutated(data: bytes, draw: random.Random) -> bytes:
    """A value of a JSON text replaced, or bytes cut, flipped, doubled."""
    kind = draw.randrange(5)
    if kind < 2 and b":" in data:
        places = [i for i, b in enumerate(data) if b == ord(":")]
        at = draw.choice(places)
        end = min((e for e in (data.find(c, at) for c in (b",", b"}", b"\n")) if e > 0), default=len(data))
        return data[: at + 1] + draw.choice(TEXTS).encode() + data[end:]
    at, count = draw.randrange(max(1, len(data))), draw.randrange(1, 40)
    if kind == 2:
        return data[:at] + bytes(b ^ (1 << draw.randrange(8)) for b in data[at : at + 1]) + data[at + 1 :]
    return data[:at] + (data[at + count :] if kind == 3 else data[at : at + count] * 2 + data[at + count :])


READERS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "hf": (
        lambda p: hf_to_megascale(p, p.parent / "out", ConvertOptions()),
        ["config.json", "generation_config.json", "model.safetensors"],
    ),
    "generate": (open_any, ["config.json", "generation_config.json", "model.safetensors"]),
    "ours": (open_any, ["step-00000000/trainer.json", "step-00000000/index.json"]),
    "grow": (open_source, ["step-00000000/trainer.json", "step-00000000/index.json"]),
    "ranks": (lambda p: fully(p, MODELS["llama"]), ["iter_0000007/mp_rank_00/model_optim_rng.pt", "latest_checkpointed_iteration.txt"]),
    "dist": (lambda p: fully(p, MODELS["llama"]), ["iter_0000007/.metadata", "iter_0000007/__0_0.distcp", "iter_0000007/metadata.json"]),
}  # fmt: skip


def fully(folder: Path, model: Model) -> None:
    found = read_megatron(folder, model, SEQ)
    for target in found.targets:
        found.produce(target.name, (0,) * len(target.shape), target.shape)


def message(read: Callable[[Path], Any], folder: Path) -> str:
    """A reader's refusal of a folder; empty if it reads it."""
    try:
        read(folder)
    except UsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("reader", READERS)
def test_any_damage_is_a_sentence(reader: str, whole: Path, tmp_path: Path) -> None:
    """Catches anything but a model or one sentence, for files of every kind damaged at random (seeded; more with another range)."""
    read, names = READERS[reader]
    source = whole / {"generate": "hf", "grow": "ours"}.get(reader, reader)
    for seed in range(FUZZ):
        draw = random.Random(seed)
        shutil.copytree(source, tmp_path / "x")
        path = tmp_path / "x" / draw.choice(names)
        data = path.read_bytes()
        for _ in range(draw.randrange(1, 3)):
            data = mutated(data, draw)
        path.write_bytes(data)
        said = message(read, tmp_path / "x")
        assert len(said) < 2500, (seed, said[:3000])
        for folder in tmp_path.iterdir():
            assert not folder.name.startswith(".tmp-"), seed
            shutil.rmtree(folder)


FUZZ = 40
