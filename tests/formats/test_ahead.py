"""Modules of multi-token prediction travel with DeepSeek's and GLM's folders."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megascale.comm.mesh import build_mesh
from megascale.config.axes import EXPERT_AXES, NAMES
from megascale.config.schema import Parallel
from megascale.formats.convert import ConvertOptions, hf_to_megascale, megascale_to_hf
from megascale.formats.hf.model import read_hf
from megascale.formats.load import load_model
from megascale.formats.sources import OpenCheckpoint, open_checkpoint
from megascale.model.ahead import shifted
from megascale.model.decoder import Decoder
from tests.formats.models import PLAIN, save
from tests.formats.test_hf import same_bits, tokens_of

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'megascale[hf]'")


def with_modules(family: str, folder: Path) -> Path:
    """A folder with one module behind the last layer, named as DeepSeek-V3's files have it."""
    save(family, PLAIN[family], folder)
    held = load_file(folder / "model.safetensors")
    draw = torch.Generator().manual_seed(5)
    more = {
        n.replace("layers.1.", "layers.2."): t + 0.1 * torch.randn(t.shape, generator=draw) for n, t in held.items() if ".layers.1." in n
    }
    more |= {f"model.layers.2.{n}.weight": torch.rand(32, generator=draw) + 0.5 for n in ("enorm", "hnorm", "shared_head.norm")}
    more |= {"model.layers.2.eh_proj.weight": torch.randn(32, 64, generator=draw) * 0.2}
    more |= {"model.layers.2.embed_tokens.weight": held["model.embed_tokens.weight"].clone()}
    more |= {"model.layers.2.shared_head.head.weight": held["lm_head.weight"].clone()}
    save_file({n: t.contiguous() for n, t in {**held, **more}.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


@torch.no_grad()
def ours_ahead(checkpoint: OpenCheckpoint, tokens: torch.Tensor) -> torch.Tensor:
    """The module's logits in our model, at every position but the last."""
    mesh = build_mesh(dict.fromkeys((*NAMES, *EXPERT_AXES), 1), "cpu")
    built = load_model(checkpoint.model, checkpoint.seq_len, checkpoint.source.read, mesh, Parallel(), torch.device("cpu"), torch.float32)
    model = built.module
    assert isinstance(model, Decoder)
    seen: list[torch.Tensor] = []
    handle = model.final_norm.register_forward_hook(lambda m, inputs, out: seen.append(out))  # type: ignore[union-attr]
    model(tokens)
    handle.remove()
    mask = partial(model.attention_mask, documents=None, seq_len=tokens.shape[1], device=tokens.device, tables=[])
    context = next(iter(model.contexts(range(2, 3), tokens, mask, None, None, None)))
    ahead: Any = model.mtp["0"]
    stream = ahead(seen[0], model.embedded(shifted(tokens, 1, 0), model.embedding), context)
    return (ahead.norm(stream) @ model.head_weight().t())[:, :-1]  # type: ignore[no-any-return]


@torch.no_grad()
def theirs_ahead(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    modeling = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(modeling, "MtpModel"):
        pytest.skip("this version of transformers has no modules of multi-token prediction")
    from transformers import AutoModelForCausalLM

    main = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    main._keys_to_ignore_on_load_unexpected = [r"model\.layers\.2\."]  # as it knows the layers of the models that are published
    module = modeling.MtpModel.from_pretrained(main).eval()
    stream = main.model(tokens).last_hidden_state[:, :-1]
    embedded = main.get_input_embeddings()(tokens[:, 1:])
    place = torch.arange(stream.shape[1])[None]
    causal = torch.full((1, 1, stream.shape[1], stream.shape[1]), float("-inf")).triu(1)
    angles = main.model.rotary_emb(stream, place)
    y = module.layers[0](embedded, stream, position_embeddings=angles, attention_mask=causal, position_ids=place, cache=None)
    return main.lm_head(y)  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_modules_travel(family: str, tmp_path: Path) -> None:
    """Catches halves of the joining product in the wrong order, norms of the stream and the embedding swapped, a module that is dropped,
    and copies of tables that an export forgets.
    """
    folder = with_modules(family, tmp_path / "hf")
    hf_to_megascale(folder, tmp_path / "ours", ConvertOptions())
    ours = open_checkpoint(tmp_path / "ours")
    assert ours.model.mtp_depth == 1
    tokens = tokens_of(50)
    assert (ours_ahead(ours, tokens) - theirs_ahead(folder, tokens)).abs().max() <= 1e-4
    megascale_to_hf(tmp_path / "ours", tmp_path / "back", ConvertOptions())
    same_bits(folder, tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text())["num_nextn_predict_layers"] == 1


def test_modules_that_are_not_whole_are_left_out_aloud(tmp_path: Path) -> None:
    """Catches a model that is refused for modules that no logit depends on, and tables of their own that are lost in silence."""
    folder = with_modules("deepseek_v3", tmp_path / "hf")
    held = load_file(folder / "model.safetensors")
    copy = "model.layers.2.embed_tokens.weight"
    save_file({**held, copy: held[copy] + 1}, folder / "model.safetensors")
    found = read_hf(folder)
    assert found.model.mtp_depth == 0 and copy in found.notes[0] and not any("mtp" in t.name for t in found.targets)
    save_file({n: t for n, t in held.items() if ".layers.2." not in n}, folder / "model.safetensors")
    assert read_hf(folder).model.mtp_depth == 0 and read_hf(folder).notes == ()
