"""Weights of few bits and a scale per block are read as the numbers that they stand for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megascale.errors import UsageError
from megascale.formats.hf.folder import open_hf
from megascale.formats.hf.quantized import BlockFp8, Mxfp4


def folder(path: Path, tensors: dict[str, torch.Tensor]) -> Any:
    path.mkdir(exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return open_hf(path)


def value_of(bits: int, exponent: int) -> float:
    """e2m1, bit by bit (OCP Microscaling Formats 1.0, section 5.3.3): sign, two bits of exponent with a bias of 1, one of mantissa."""
    sign, power, half = -1.0 if bits & 8 else 1.0, bits >> 1 & 3, bits & 1
    size = 0.5 * half if power == 0 else (1 + 0.5 * half) * 2.0 ** (power - 1)
    return sign * size * 2.0 ** (exponent - 127)


def packed(experts: int, rows: int, groups: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random blocks and scales, and the tensor [E, 32·g, n] that they stand for."""
    draw = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, rows, groups, 16), generator=draw, dtype=torch.uint8)
    scales = torch.randint(118, 128, (experts, rows, groups), generator=draw, dtype=torch.uint8)
    want = torch.zeros(experts, rows, groups, 32)
    for at in torch.cartesian_prod(*map(torch.arange, blocks.shape)).tolist():
        byte, exponent = int(blocks[tuple(at)]), int(scales[tuple(at[:3])])
        *place, i = at
        want[(*place, 2 * i)], want[(*place, 2 * i + 1)] = value_of(byte & 15, exponent), value_of(byte >> 4, exponent)
    return blocks, scales, want.flatten(2).transpose(1, 2)


def test_mxfp4_against_its_bits(tmp_path: Path) -> None:
    """Catches the halves of a byte swapped, a scale of the neighbouring group, a missed transposition and rectangles that do not begin
    with a group; all values exist in bf16, so nothing is rounded.
    """
    blocks, scales, want = packed(3, 6, 2)
    source = Mxfp4(folder(tmp_path / "a", {"w_blocks": blocks, "w_scales": scales, "w_bias": torch.ones(3, 6)}))
    assert source.problem() is None and set(source.tensors) == {"w", "w_bias"}
    assert source.tensors["w"].shape == (3, 64, 6) and source.tensors["w"].dtype == torch.bfloat16
    assert torch.equal(source.read("w", (0, 0, 0), (3, 64, 6)), want) and torch.equal(want.bfloat16().float(), want)
    for offset, size in (((1, 5, 2), (1, 40, 3)), ((0, 33, 0), (3, 1, 6)), ((2, 31, 5), (1, 2, 1))):
        here = tuple(slice(o, o + n) for o, n in zip(offset, size))
        assert torch.equal(source.read("w", offset, size), want[here]), offset


def test_mxfp4_is_what_transformers_makes_of_it() -> None:
    """Catches a reading of the format that is ours alone."""
    module = pytest.importorskip("transformers.integrations.mxfp4", reason="transformers is not installed: pip install 'megascale[hf]'")
    blocks, scales, want = packed(2, 4, 3)
    assert torch.equal(module.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32), want)


def test_fp8_blocks_against_a_loop(tmp_path: Path) -> None:
    """Catches a scale of the neighbouring block, blocks counted along the wrong dimension, and rectangles and matrices that do not end
    with a block.
    """
    weight = torch.randn(10, 7, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 4, generator=torch.Generator().manual_seed(2)) + 0.5
    want = torch.tensor([[float(weight[i, j]) * float(scales[i // 4, j // 2]) for j in range(7)] for i in range(10)])
    source = BlockFp8(folder(tmp_path / "a", {"w": weight, "w_scale_inv": scales, "n": torch.ones(3)}), (4, 2))
    assert source.problem() is None and set(source.tensors) == {"w", "n"} and source.tensors["w"].dtype == torch.bfloat16
    assert torch.equal(source.read("w", (0, 0), (10, 7)), want)
    for offset, size in (((3, 1), (6, 5)), ((9, 6), (1, 1)), ((4, 0), (4, 7))):
        assert torch.equal(source.read("w", offset, size), want[offset[0] : offset[0] + size[0], offset[1] : offset[1] + size[1]])


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"w_blocks": torch.zeros(2, 3, 1, 16, dtype=torch.uint8)}, "w_scales is missing"),
        (
            {"w_blocks": torch.zeros(2, 3, 1, 16, dtype=torch.uint8), "w_scales": torch.zeros(2, 3, 2, dtype=torch.uint8)},
            r"w_scales has shape \[2, 3, 2\]",
        ),
        ({"w_blocks": torch.zeros(2, 3, 16, dtype=torch.uint8)}, r"w_blocks has shape \[2, 3, 16\]"),
        ({"w": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, "w_scale_inv is missing"),
        ({"w": torch.zeros(4, 4).to(torch.float8_e4m3fn), "w_scale_inv": torch.ones(2, 1)}, r"w_scale_inv has shape \[2, 1\]"),
    ],
)
def test_scales_that_do_not_fit(tmp_path: Path, tensors: dict[str, torch.Tensor], words: str) -> None:
    """Catches a folder with half of its numbers that is read as if scales were 1, or ends in a traceback."""
    stored = folder(tmp_path / "a", tensors)
    made = Mxfp4(stored) if "w_blocks" in tensors else BlockFp8(stored, (4, 4))
    assert re.search(words, made.problem() or "")


def test_packed_folders_are_their_models(tmp_path: Path) -> None:
    """Catches packed experts that are read into the wrong half of a pair, weights of a quantized folder that are left scaled, and a kind
    of quantization that passes unread: logits equal those of transformers for the same numbers unpacked.
    """
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'megascale[hf]'")
    from megascale.formats.hf.compare_logits import our_logits
    from megascale.formats.hf.model import read_hf
    from tests.formats.models import PLAIN, auto, logits, save

    tokens = torch.arange(20)[None] % 50
    for family, kind in (("gpt_oss", "mxfp4"), ("deepseek_v3", "fp8")):
        here = tmp_path / family
        values = {**PLAIN[family], **({"hidden_size": 64, "intermediate_size": 32} if kind == "mxfp4" else {}), "initializer_range": 0.1}
        save(family, values, here)
        held = load_file(here / "model.safetensors")
        plain, narrow = dict(held), dict(held)
        for number, (name, tensor) in enumerate(held.items()):
            if kind == "mxfp4" and name.endswith(("gate_up_proj", "down_proj")):
                blocks, scales, plain[name] = packed(tensor.shape[0], tensor.shape[2], tensor.shape[1] // 32, number)
                narrow |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
                del narrow[name]
            elif kind == "fp8" and name.endswith("proj.weight"):
                scales = torch.rand(-(-tensor.shape[0] // 16), -(-tensor.shape[1] // 16)) + 0.5
                narrow |= {name: tensor.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}
                whole = scales.repeat_interleave(16, 0).repeat_interleave(16, 1)[: tensor.shape[0], : tensor.shape[1]]
                plain[name] = narrow[name].float() * whole
        save_file({n: t.contiguous() for n, t in plain.items()}, here / "model.safetensors", {"format": "pt"})
        with torch.no_grad():
            want = logits(auto(family).from_pretrained(here).eval(), tokens)
        save_file({n: t.contiguous() for n, t in narrow.items()}, here / "model.safetensors", {"format": "pt"})
        config = json.loads((here / "config.json").read_text())
        given = {
            "quant_method": kind,
            **({"fmt": "e4m3", "weight_block_size": [16, 16]} if kind == "fp8" else {"modules_to_not_convert": []}),
        }
        (here / "config.json").write_text(json.dumps({**config, "quantization_config": given}))
        foreign = read_hf(here, dtype=torch.float32)
        assert (our_logits(foreign.model, foreign.seq_len, foreign.produce, tokens) - want).abs().max() <= 1e-4
        for changes, words in (
            ({"quant_method": "awq"}, f"of {family} only {kind} is undone"),
            ({"group": 3}, "quantization_config.group"),
        ):
            (here / "config.json").write_text(json.dumps({**config, "quantization_config": {**given, **changes}}))
            with pytest.raises(UsageError, match=words):
                read_hf(here)
