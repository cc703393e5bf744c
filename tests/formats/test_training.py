"""Runs that start from Hugging Face folders, on any layout, and leave such folders behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megascale.config.load import build_config
from megascale.data.loader import make_batch
from megascale.data.pairs import SpanMixture
from megascale.data.samples import masking_of, open_data
from megascale.formats.hf.compare_logits import our_logits
from megascale.formats.hf.model import read_hf
from megascale.formats.sources import open_checkpoint
from tests.formats.models import auto, save
from tests.ranks import run_ranks
from tests.runs import VOCAB, losses, make_tokens, rows, run, settings

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'megascale[hf]'")
THEIRS: dict[str, dict[str, Any]] = {
    "qwen3": {"num_key_value_heads": 2, "intermediate_size": 32, "head_dim": 8, "hidden_size": 24, "num_attention_heads": 4},
    "olmo2": {"num_key_value_heads": 4, "intermediate_size": 32, "hidden_size": 24, "num_attention_heads": 4},
    "gpt2": {"n_embd": 24, "n_head": 4, "n_layer": 2, "n_positions": 24},
    "mixtral": {"num_key_value_heads": 2, "intermediate_size": 32, "hidden_size": 24, "num_attention_heads": 4, "num_local_experts": 4},
    "bert": {"intermediate_size": 32, "hidden_size": 24, "num_attention_heads": 4},
}
OURS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 8, "qk_norm": True, "norm_eps": 1e-6},
    "olmo2": {"qk_norm": "width", "residual": "res_post", "num_kv_heads": 4},
    "gpt2": {
        "norm": "layernorm", "bias": True, "ffn": "gelu_tanh", "ffn_size": 96, "position": "learned", "num_kv_heads": 4,
        "tie_embeddings": True,
    },
    "mixtral": {"rope_theta": 1e6, "moe": {"num_experts": 4, "top_k": 2, "ffn_size": 32}},
    "bert": {
        "family": "encoder", "norm": "layernorm", "norm_eps": 1e-12, "bias": True, "ffn": "gelu", "position": "learned", "num_kv_heads": 4,
        "residual": "post", "tie_embeddings": True, "embedding_norm": True, "mlm_head": True,
    },
}  # fmt: skip
LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "zero": ("qwen3", 2, {"dp_shard": 2}),
    "tp": ("qwen3", 4, {"tp": 4, "tp_sequence": True}),
    "norm over the width": ("olmo2", 2, {"tp": 2}),
    "learned positions": ("gpt2", 2, {"tp": 2}),
    "pipeline": ("gpt2", 2, {"pp": 2}),
    "experts": ("mixtral", 2, {"ep": 2}),
    "masked": ("bert", 2, {"tp": 2}),
    "layered": ("mixtral", 2, {"accumulation": "layered", "dp_shard": 2}),
}


def hf(family: str, folder: Path) -> Path:
    common = {"vocab_size": VOCAB, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": 3, "pad_token_id": None}
    if family != "gpt2":
        common |= {"num_hidden_layers": 2, "max_position_embeddings": 64}
    save(family, {**common, **THEIRS[family]}, folder / family)
    return folder / family


def wanted(folder: Path, family: str, **changes: Any) -> dict[str, Any]:
    ours = {f"model__{key}": value for key, value in OURS[family].items()}
    return settings(folder, **{"checkpoint__init_from": str(folder / family), "optim__warmup_steps": 0, **ours, **changes})


@pytest.mark.dist
@pytest.mark.parametrize("layout", [pytest.param(x, marks=pytest.mark.slow if x in ("learned positions", "zero") else ()) for x in LAYOUTS])
def test_a_run_starts_from_a_hugging_face_folder_on_any_layout(layout: str, tmp_path: Path) -> None:
    """Catches a rank that reads another's rectangle, a piece that stays at its random start, and a cast that rounds: the first loss is
    transformers' own on the same samples, and the run goes on as one process does.
    """
    family, ranks, parallel = LAYOUTS[layout]
    make_tokens(tmp_path / "tokens")
    hf(family, tmp_path)
    masked = {"data__mask_token": 5} if family == "bert" else {}
    values = wanted(tmp_path, family, **masked)
    assert run(values) == (0, "done")
    alone = losses(tmp_path)
    values = wanted(tmp_path, family, run__dir=str(tmp_path / "other/run"), **masked)
    values["parallel"] = parallel
    assert run_ranks(ranks, run, values)[0] == (0, "done")
    assert losses(tmp_path / "other") == pytest.approx(alone, rel=1e-9)
    samples, _ = open_data(build_config(values))
    masking = masking_of(build_config(values), VOCAB) if family == "bert" else None
    batch = make_batch(samples, [0, 1, 2, 3], "concat", torch.device("cpu"), masking)  # type: ignore[arg-type]
    model = auto(family).from_pretrained(tmp_path / family).eval()
    with torch.no_grad():
        logits = model(batch.tokens).logits
    want = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-1)
    assert alone[0] == pytest.approx(want.item(), rel=1e-5)


def test_exports_stand_beside_kept_checkpoints(tmp_path: Path) -> None:
    """Catches an export of another step, one that stays when its checkpoint goes, and a run that takes the samples of the run before
    once more although it was told to go on.
    """
    make_tokens(tmp_path / "tokens")
    exported = settings(tmp_path, model__qk_norm=True, checkpoint__export="hf", checkpoint__keep_last=1, checkpoint__every=2)
    exported["precision"] = {"compute": "fp32"}
    assert run(exported) == (0, "done")
    folder = tmp_path / "run/hf/step-00000006"
    assert [p.name for p in sorted((tmp_path / "run/hf").iterdir())] == ["step-00000006"]
    assert [r["step"] for r in rows(tmp_path, "events") if r["event"] == "exported"] == [2, 4, 6]
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(16)[None]
    ours = open_checkpoint(tmp_path / "run")
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    assert (our_logits(ours.model, ours.seq_len, ours.source.read, tokens) - theirs).abs().max() < 1e-4
    folder = shutil.copytree(folder, tmp_path / "taken")
    # What the run itself would have seen next.
    exported["train"]["steps"] = 7
    assert run(exported) == (0, "done")
    next_loss = losses(tmp_path)[-1]
    for told in ("continue", "restart"):
        values = settings(tmp_path, model__qk_norm=True, run__dir=str(tmp_path / told / "run"), checkpoint__init_data=told)
        values["checkpoint"]["init_from"], values["precision"] = str(folder), {"compute": "fp32"}
        assert run(values) == (0, "done")
        assert (losses(tmp_path / told)[0] == pytest.approx(next_loss, rel=1e-5)) == (told == "continue")
    # The second run's own position holds, resumed or not.
    assert json.loads((tmp_path / "continue/run/checkpoints/step-00000006/trainer.json").read_text())["samples"] == 6 * 4 + 6 * 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__norm_eps": 1e-4}, "model.norm_eps: 0.0001 in the config, 1e-06 in the file"),
        ({"model__num_layers": 3}, "model.num_layers: 3 in the config, 2 in the file"),
        ({"checkpoint__init_data": "continue"}, "does not record its position in the data: use restart"),
        ({"checkpoint__init_from": "nowhere"}, "nowhere is not a checkpoint and holds none"),
        ({"checkpoint__export": "hf", "model__position": "alibi"}, "no Hugging Face family matches this model"),
    ],
)
def test_a_start_that_cannot_be_is_one_message(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    """Catches weights of another model taken for the config's, and a run's directory made before that is known."""
    make_tokens(tmp_path / "tokens")
    hf("qwen3", tmp_path)
    values = wanted(tmp_path, "qwen3", **changes)
    code, message = run(values)
    assert code == 2 and words in message and not (tmp_path / "run").exists()


def test_learned_positions_may_be_fewer_and_not_more(tmp_path: Path) -> None:
    """Catches GPT-2's table of positions taken whole or not at all."""
    make_tokens(tmp_path / "tokens")
    hf("gpt2", tmp_path)
    code, message = run(wanted(tmp_path, "gpt2", train__seq_len=25))
    assert code == 2 and "train.seq_len is 25" in message and "has 24 learned positions" in message


@pytest.mark.dist
def test_span_corruption_goes_on_from_t5(tmp_path: Path) -> None:
    """Catches a table of distances, a factor or a first token that training has otherwise than transformers: the first loss is its own on
    the same pairs, and the run goes on as one process does, from whose end a T5 folder is exported again.
    """
    make_tokens(tmp_path / "tokens")
    theirs = {
        "vocab_size": 160, "d_model": 24, "d_kv": 6, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 4,
        "eos_token_id": 1, "initializer_factor": 0.5, "feed_forward_proj": "relu",
    }  # fmt: skip
    save("t5", theirs, tmp_path / "t5")
    changes = {
        "family": "encoder_decoder", "encoder_layers": 2, "num_layers": 1, "vocab_size": 160, "position": "relative", "ffn": "relu",
        "norm_eps": 1e-6, "attention_scale": 1.0, "head_scale": 24**-0.5, "tie_embeddings": True, "num_kv_heads": 4,
    }  # fmt: skip
    values = settings(tmp_path, **{f"model__{k}": v for k, v in changes.items()}, optim__warmup_steps=0, train__source_len=20)
    values["data"] |= {"objective": "span_corruption", "start_token": 0, "mark_token": 149}
    values["checkpoint"] |= {"init_from": str(tmp_path / "t5"), "export": "hf", "every": 0}
    (tmp_path / "tokens.json").write_text(json.dumps({"eos_id": 1, "vocab_size": VOCAB}))
    assert run(values) == (0, "done")
    alone = losses(tmp_path)
    values["run"]["dir"] = str(tmp_path / "other/run")
    values["parallel"] = {"pp": 2}
    assert run_ranks(2, run, values)[0] == (0, "done")
    assert losses(tmp_path / "other") == pytest.approx(alone, rel=1e-9)
    samples, _ = open_data(build_config(values))
    assert isinstance(samples, SpanMixture)
    batch = samples.batch([0, 1, 2, 3], torch.device("cpu"))
    assert batch.source is not None and (batch.tokens[:, 0] == 0).all() and (batch.targets[:, 0] == 149).all()
    model = auto("t5").from_pretrained(tmp_path / "t5").eval()
    with torch.no_grad():
        mask = (batch.source >= 0).long()
        logits = model(batch.source.clamp(min=0), attention_mask=mask, decoder_input_ids=batch.tokens).logits
    want = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-1)
    assert alone[0] == pytest.approx(want.item(), rel=1e-5)
    again = read_hf(tmp_path / "run/hf/step-00000006")
    assert again.model.head_scale == 24**-0.5 and again.model.num_layers == 1
