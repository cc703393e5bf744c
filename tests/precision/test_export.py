"""Checkpoints for inference: e4m3 in the files, the trainer's logits out of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megascale.checkpoint.index import read_index
from megascale.comm.mesh import build_mesh
from megascale.config.axes import NAMES
from megascale.config.load import load_config
from megascale.config.schema import Parallel
from megascale.errors import UsageError
from megascale.expand.source import open_source
from megascale.formats.convert import ConvertOptions, megascale_to_fp8
from megascale.formats.load import load_model
from megascale.formats.sources import open_checkpoint
from megascale.generation.open import layout, open_model
from megascale.model.layers import Fp8
from tests.layouts import CPU
from tests.runs import make_tokens, run, settings

pytestmark = pytest.mark.dist


def trained(folder: Path, **changes: Any) -> Path:
    make_tokens(folder / "tokens")
    model = {"model__residual": "mus", "model__hidden_size": 64, "model__ffn_size": 64, "model__moe": {"num_experts": 2}}
    values = settings(folder, **{**model, "optim__weight_decay": 0.0, "precision__compute": "bf16", "precision__fp8": "static", **changes})
    assert run(values)[0] == 0
    return folder / "run"


def logits(path: Path, fp8: Fp8 | None = None) -> torch.Tensor:
    opened = open_model(path)
    mesh = build_mesh(dict.fromkeys(NAMES, 1), "cpu")
    model = load_model(opened.model, opened.seq_len, opened.produce, mesh, Parallel(), CPU, opened.dtype, fp8 or opened.fp8)
    with torch.no_grad():
        return model.module(torch.arange(12).view(2, 6))


def test_exported_logits_are_the_trainers(tmp_path: Path) -> None:
    """Catches weights that are rounded otherwise than in training, and products that are computed in another precision afterwards."""
    source = trained(tmp_path)
    report = megascale_to_fp8(source, tmp_path / "small", ConvertOptions(workers=2))
    tensors = read_index(Path(report.written)).tensors
    narrow = {n for n, t in tensors.items() if t.dtype == "F8_E4M3"}
    assert len(narrow) == 2 * (4 + 3) and all(".router." not in n and "embedding" not in n for n in narrow)
    assert tensors["model.blocks.0.skip"].dtype == "F32" and tensors["model.head.weight"].dtype == "BF16"
    assert torch.equal(logits(tmp_path / "small"), logits(source))
    assert not torch.equal(logits(tmp_path / "small"), logits(source, "false"))  # which rounds no input


def test_what_reads_and_what_refuses_an_export(tmp_path: Path) -> None:
    """Catches a generator that asks a unit-scaled model for a decay, and growth from weights without masters."""
    source = trained(tmp_path)
    megascale_to_fp8(source, tmp_path / "small", ConvertOptions())
    for path in (source, tmp_path / "small"):
        assert layout(open_model(path), 1, "cpu").precision.fp8 == "static"
    with pytest.raises(UsageError, match="masters are gone"):
        open_source(tmp_path / "small")
    for key in ("resume", "init_from"):
        values = load_config(source / "config.yaml").plain()
        values["run"]["dir"], values["checkpoint"][key] = str(tmp_path / key), str(tmp_path / "small")
        code, message = run(values)
        assert code == 2 and "in FP8, for inference: start from" in message


def test_other_models_are_not_narrowed(tmp_path: Path) -> None:
    """Catches a bf16 model whose weights lose five bits without a word, and leftovers."""
    source = trained(tmp_path, precision__fp8="false")
    with pytest.raises(UsageError, match=r"trained with precision.fp8 false"):
        megascale_to_fp8(source, tmp_path / "small", ConvertOptions())
    assert not (tmp_path / "small").exists()
    assert open_checkpoint(source).model.residual == "mus"
