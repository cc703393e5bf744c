"""Configs: mistakes become sentences, and the support table is exactly what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from megascale.config.attentions import ATTENTIONS, AttentionRow
from megascale.config.identity import check_identity, identity, only_moved
from megascale.config.layout import axis_sizes
from megascale.config.load import ELSEWHERE, apply_overrides, build_config, flatten, known_keys, load_config, parse_yaml, to_yaml
from megascale.config.routers import ROUTERS, RouterRow
from megascale.config.schema import Config, Parallel
from megascale.config.support import RULES, check, markdown_table, refusals
from megascale.errors import MegascaleError, UsageError
from tests.layouts import Case, train
from tests.ranks import run_ranks

BASE: dict[str, Any] = {
    "model": {"num_layers": 1, "hidden_size": 16, "num_heads": 4, "ffn_size": 24, "vocab_size": 30},
    "train": {"steps": 2, "seq_len": 8},
    "data": {"train": "x"},
}


def config(*overrides: str) -> Config:
    values = apply_overrides(BASE, [item for item in overrides if not item.startswith("grow=")])
    for item in overrides:
        if item.startswith("grow="):  # a list, no section
            values["grow"] = parse_yaml(item.removeprefix("grow="))
    return build_config(values)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.num_layer=3", "unknown key model.num_layer (= 3); did you mean model.num_layers?"),
        ("model.num_hidden_layers=3", "here it is called model.num_layers"),
        ("train.tensor-model-parallel-size=2", "here it is called parallel.tp"),
        ("parallel.tp=two", "parallel.tp is 'two'"),
        ("parallel.tp=0", "parallel.tp is 0"),
        ("optim.lr=-1", "optim.lr is -1"),
        ("precision.loss_scale=1000", "give a power of two, such as 1024"),
        ("model.residual=prenorm", "model.residual is 'prenorm'"),
        ("model.hidden_size=18", "hidden_size 18 is not a multiple of num_heads 4"),
        ("train.steps=null", "set exactly one of train.steps and train.tokens"),
        ("model=3", "write section.key=value"),
        ("data.train=[{pth: a}]", "data.train"),
        ("moddel.num_layers=3", "did you mean model?"),
        ("model.num_layers:3", "did you mean model.num_layers?"),
        ("model.moe={num_experts:8}", "in YAML a space follows the colon: {num_experts: 8}"),
        ("parallel.tensor_parallel=2", "here it is called parallel.tp"),
        ("parallel.zzzzzzzz=2", "`--dry-run --show-config` prints every key"),
        ("train.clip=true", "train.clip is True: it should be a number, and true and false are none"),
        ("parallel.tp=true", "parallel.tp is True: it should be a number"),
        ("optim.betas=[0.9,true]", "optim.betas is [0.9, True]: it should be a number"),
    ],
)
def test_mistakes_are_sentences(override: str, words: str) -> None:
    """Catches errors that name neither the key nor the way out."""
    with pytest.raises(UsageError) as error:
        config(override)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[{path: data/one, weigth: 1}]", "unknown key data.train.0.weigth (= 1); did you mean data.train.0.weight?"),
        ("[{path: data/one, share: 1}]", "unknown key data.train.0.share (= 1); a source has path, weight, name"),
        ("[{path: data/one, weight: x}, a]", "data.train.0.weight is 'x': it should be number"),
        ("[{weight: 1}]", "data.train.0.path is required but missing"),
    ],
)
def test_a_mistake_in_a_source_is_one_line(text: str, words: str) -> None:
    """Catches "it should be string" of a list that is a mixture, beside the line that says what is wrong."""
    with pytest.raises(UsageError) as error:
        config(f"data.train={text}")
    assert words in str(error.value) and str(error.value).count("\n") == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model:\n  bias: !!bool maybe\n", "'maybe' in line 2 cannot be read as bool"),
        ("model:\n  num_layers: [1, " + "9" * 6000 + "]\n", "99... in line 2 cannot be read as int"),
        ("a: &a {b: !!float x}\nc: *a", "'x' in line 1 cannot be read as float"),
    ],
)
def test_words_that_yaml_cannot_take_apart_have_a_line(tmp_path: Path, text: str, words: str) -> None:
    """Catches "is not valid YAML 1.2: 'maybe'", and advice to call a function of Python."""
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UsageError) as error:
        load_config(tmp_path / "c.yaml")
    assert words in str(error.value) and len(str(error.value)) < 300 + len(str(tmp_path))


def test_the_command_line_takes_the_place_of_the_other_length() -> None:
    """Catches `configs/llama-1m.yaml train.steps=3`, which everybody types, being refused since the file says tokens."""
    assert (config("train.tokens=160").train.steps, config("train.tokens=160").train.tokens) == (None, 160)
    file = {**BASE, "train": {"tokens": 16, "seq_len": 8}}
    assert build_config(apply_overrides(file, ["train.steps=3"])).train.tokens is None
    assert file["train"]["tokens"] == 16, "the given values stay as they are"
    with pytest.raises(UsageError, match="set exactly one"):
        config("train.tokens=160", "train.steps=2")


@pytest.mark.parametrize("word", ["2024-11-30", "20241130", "007", "1e3", "true", "0x1F", "1.50"])
def test_names_that_yaml_takes_for_numbers(word: str) -> None:
    """Catches run.name=$(date +%F) and run.name=$SLURM_JOB_ID refused, or made another word: 007 is not 7."""
    made = config(f"run.name={word}", f"run.dir={word}", f"data.train={word}", f"checkpoint.resume={word}", "data.tokenizer=null")
    assert (made.run.name, made.run.dir, made.data.train, made.checkpoint.resume) == (word,) * 4 and made.data.tokenizer is None
    assert config("run.name='007'", "data.train=[a, b]", "run.dir=null").run.name == "007"
    assert config("precision.fp8=true", "checkpoint.async=false", "run.seed=7").run.seed == 7  # other keys read YAML as before
    with pytest.raises(UsageError, match=r"run\.name is 7, but it must be text: put it in quotes"):
        build_config({**BASE, "run": {"name": 7}})


def test_other_systems_names_lead_to_real_keys() -> None:
    """Catches suggestions of keys that do not exist."""
    assert set(ELSEWHERE.values()) <= set(known_keys())


def test_yaml_is_1_2_and_configs_round_trip(tmp_path: Path) -> None:
    """Catches 1e-3 read as text, `no` read as false, and a resolved config that cannot be read back."""
    assert parse_yaml("[1e-3, no, 010, yes]") == [0.001, "no", 10, "yes"]
    resolved = config("optim.lr=1e-3", "precision.fp8=true", "checkpoint.async=false", "data.train=[{path: a, weight: 2}, b]")
    (tmp_path / "c.yaml").write_text(to_yaml(resolved.plain()))
    assert load_config(tmp_path / "c.yaml") == resolved
    assert resolved.precision.fp8 == "static" and not resolved.checkpoint.asynchronous
    assert [config(f"precision.fp8={word}").precision.fp8 for word in ("yes", "no", "dynamic")] == ["static", "false", "dynamic"]


@pytest.mark.parametrize(
    ("parallel", "ranks", "words"),
    [
        (Parallel(tp=2), 3, r"need a multiple of 2 ranks, but there are 3: start 2 ranks \(in a dry run: --ranks 2\)"),
        (Parallel(tp=2, dp_shard=2), 2, "make 4 ranks, but there are 2"),
        (Parallel(dp_shard=2), 4, "make 2 ranks, but there are 4"),
    ],
)
def test_layouts_that_do_not_fit(parallel: Parallel, ranks: int, words: str) -> None:
    """Catches idle ranks and a crash in the mesh."""
    with pytest.raises(UsageError, match=words):
        axis_sizes(parallel, ranks)


def test_remaining_ranks_go_to_the_data_axis() -> None:
    """Catches DDP left on one replica, and dp_shard taking ranks that belong to tp."""
    assert axis_sizes(Parallel(tp=2), 8)["dp_shard"] == 4
    assert axis_sizes(Parallel(tp=2, dp_replicate=2), 8)["dp_shard"] == 2
    assert axis_sizes(Parallel(engine="ddp", tp=2), 8)["dp_replicate"] == 4


GRID = "{shape: [4, 4], patch: [1, 2], channels: 1}"  # 8 tokens

SPANS = ("model.family=encoder_decoder", "data.objective=span_corruption", "model.vocab_size=130")

MUS = ("model.residual=mus", "optim.weight_decay=0")

# One config for each rule of the table, refused by it and by no other.
REFUSED: dict[str, tuple[int, tuple[str, ...]]] = {
    "encoder_position": (1, ("model.family=encoder", "model.position=xpos")),
    "encoder_window": (1, ("model.family=encoder", "model.sliding_window=4")),
    "encoder_attention": (1, ("model.attention=mute", "model.family=encoder")),
    "relative_context": (2, ("model.position=relative", "parallel.cp=2")),
    "mask_fraction": (1, ("data.mask_fraction=0.2",)),
    "mask_token": (1, ("data.mask_token=3",)),
    "spacetime_fields": (1, (f"model.spacetime={GRID}",)),
    "spacetime_tokens": (1, (f"model.spacetime={GRID}", "model.family=spacetime", "train.seq_len=9")),
    "spacetime_text": (1, (f"model.spacetime={GRID}", "model.family=spacetime", "model.sliding_window=2")),
    "spacetime_texts": (1, ("model.spacetime={shape: [4, 2], patch: [1, 1], channels: 1, text_vocab_size: 9}", "model.family=spacetime")),
    "spacetime_block": (1, (f"model.spacetime={GRID}", "model.family=spacetime", "model.residual=deepnorm")),
    "mus_block": (1, (*MUS, "model.norm=dyt")),
    "mus_tau": (1, ("model.mus_tau=0.2",)),
    "branchnorm_period": (1, ("model.residual=branchnorm",)),
    "deepscale_unit": (1, ("model.deepscale_unit=gradient",)),
    "ends_of_pairs": (1, ("model.family=encoder_decoder", "model.embedding_norm=true")),
    "mlm_head_scaled": (1, (*MUS, "model.mlm_head=true")),
    "norm_eps_of": (1, ("model.norm_eps_of={blocks.1.ffn_norm: 1e-4}",)),
    "layer_coefficients": (1, ("model.layer_coefficients=[[1, 1], [1, 1]]",)),
    "rope_exponents": (1, ("model.rope_exponents=[0.0]",)),
    "alibi_slopes": (1, ("model.alibi_slopes=[0.5, 0.25, 0.1, 0.1]",)),
    "tokenformer": (1, ("model.linear=tokenformer",)),
    "matformer": (1, ("model.matformer={sizes: [25]}",)),
    "matformer_sum": (1, ("model.matformer={sizes: [8], train: sum}", "parallel.accumulation=layered")),
    "ffn_sizes": (1, ("model.ffn_sizes=[8, 8]",)),
    "vocab_enabled": (1, ("model.vocab_enabled=31",)),
    "moe_top_k": (1, ("model.moe={num_experts: 4, top_k: 5}",)),
    "moe_groups": (1, ("model.moe={groups: 3, top_groups: 1}",)),
    "moe_top_groups": (1, ("model.moe={groups: 4, top_groups: 1, top_k: 3}",)),
    "moe_renormalize": (1, ("model.moe={router: mute, renormalize: true}",)),
    "moe_shared_gate": (1, ("model.moe={shared_gate: true}",)),
    "moe_balance_over": (1, ("model.moe={balance: bias, balance_over: batch}",)),
    "moe_sequence_loss": (1, ("model.moe={sequence_loss: 1e-4}",)),
    "moe_bias": (1, ("model.moe={}", "model.bias=true")),
    "moe_sublayer": (1, ("model.moe={}", "model.residual=subln")),
    "moe_every": (1, ("model.moe={every: 2}",)),
    "moeut_groups": (1, ("model.moe={}", "model.moeut={group_size: 2}")),
    "moeut_top_k": (1, ("model.moe={}", "model.moeut={group_size: 1, attention_experts: 2, attention_top_k: 3}")),
    "moeut_layers": (1, ("model.moeut={group_size: 1}",)),
    "moeut_block": (1, ("model.moe={}", "model.moeut={group_size: 1}", "model.qk_norm=true")),
    "moeut_scores": (1, ("model.moe={}", "model.moeut={group_size: 1}", "model.attention_scale=1")),
    "moeut_axes": (2, ("model.moe={}", "model.moeut={group_size: 1}", "parallel.accumulation=layered")),
    "latent": (1, ("model.attention=latent", "model.latent={kv_rank: 8, rope_dim: 3}")),
    "delta": (1, ("model.attention=gated_delta",)),
    "scanned_keys": (1, ("model.attention=gated_delta", "model.delta={key_heads: 1, value_heads: 2}", "model.qk_norm=true")),
    "attention_options": (1, ("model.attention=mute", "model.attention_gate=head")),
    "options_family": (1, ("model.family=encoder_decoder", "model.attention_gate=head")),
    "rope_fraction": (1, ("model.rope_fraction=0.3",)),
    "mtp_family": (1, ("model.mtp_depth=1", "model.family=encoder")),
    "kinds_family": (1, ("model.family=encoder_decoder", "model.kinds={a: {}}", "model.pattern=[a]")),
    "kinds_widths": (1, ("model.kinds={a: {ffn_size: 8}}", "model.pattern=[a]", "model.num_layers=2", "model.ffn_sizes=[8, 8]")),
    "interleaved": (1, ("model.rope_interleaved=true", "model.position=learned")),
    "kinds_tables": (1, ("model.kinds={a: {position: learned}}", "model.pattern=[a]")),
    "kinds_residual": (1, ("model.kinds={a: {residual: deepscale}}", "model.pattern=[a]")),
    "pair_keys": (1, ("model.encoder_layers=2",)),
    "pair_packing": (1, ("model.family=encoder_decoder", "train.packing=documents")),
    "source_vocabulary": (1, ("model.family=encoder_decoder", "model.source_vocab_size=20")),
    "span_vocabulary": (1, (*SPANS, "model.share_embeddings=false")),
    "span_keys": (1, ("data.mean_span=4", "model.family=encoder_decoder")),
    "span_room": (1, (*SPANS, "train.source_len=60")),
    "tp_source": (2, ("model.family=encoder_decoder", "parallel.tp=2", "parallel.tp_sequence=true", "train.source_len=9")),
    "tp_async": (2, ("parallel.tp=2", "parallel.tp_async=true")),
    "stages_without_pipeline": (1, ("parallel.pp_virtual=2",)),
    "one_stage_schedules": (2, ("parallel.pp=2", "parallel.pp_virtual=2", "model.num_layers=8")),
    "v_schedules": (2, ("parallel.pp=2", "parallel.pp_virtual=3", "parallel.pp_schedule=zbv", "model.num_layers=8")),
    "stages_and_layers": (2, ("parallel.pp=2", "parallel.pp_schedule=zbv", "model.num_layers=3")),
    "stage_layers": (2, ("parallel.pp=2", "parallel.pp_layers=[2, 3]", "model.num_layers=4")),
    "interleaved_rounds": (
        2,
        ("parallel.pp=2", "parallel.pp_schedule=interleaved_1f1b", "train.global_batch_size=5", "model.num_layers=4"),
    ),
    "dualpipev_fill": (2, ("parallel.pp=2", "parallel.pp_schedule=dualpipev", "train.global_batch_size=3", "model.num_layers=4")),
    "dsp_dimensions": (2, ("parallel.cp=2", "parallel.cp_method=dsp")),
    "cp_attention": (2, ("model.attention=mute", "parallel.cp=2")),
    "ulysses_heads": (5, ("parallel.cp=5", "parallel.cp_method=ulysses", "train.seq_len=10")),
    "ulysses_key_heads": (
        2,
        ("model.attention=gated_delta", "model.delta={key_heads: 1, value_heads: 2}", "parallel.cp=2", "parallel.cp_method=ulysses"),
    ),
    "ring_places": (3, ("parallel.cp=3", "parallel.cp_ulysses=2")),
    "cp_pieces": (2, ("parallel.cp=2", "parallel.cp_method=ulysses", "parallel.cp_pieces=4")),
    "cp_sequence": (5, ("parallel.cp=5",)),
    "ep_without_experts": (1, ("parallel.etp=1",)),
    "ep_experts": (2, ("model.moe={num_experts: 3}", "parallel.ep=2")),
    "ep_rows": (1, ("model.moe={}", "parallel.ep_rows=1.5")),
    "etp": (2, ("model.moe={}", "parallel.tp=2", "parallel.etp=4")),
    "etp_sequence": (2, ("model.moe={}", "parallel.tp=2", "parallel.etp=1")),
    "expert_mesh": (3, ("model.moe={}", "parallel.ep=2")),
    "reshard_ranks": (4, ("parallel.reshard_after_forward=3",)),
    "ep_engine": (2, ("model.moe={}", "parallel.tp=2", "parallel.tp_sequence=true", "parallel.etp=1", "parallel.engine=ddp")),
    "ep_kernels": (2, ("model.moe={}", "parallel.ep_kernels=deepep", "parallel.ep=2")),
    "ep_overlap": (2, ("model.moe={}", "parallel.ep_overlap=true", "parallel.ep=2")),
    "moe_deepspeed": (2, ("model.moe={}", "parallel.engine=deepspeed", "parallel.dp_shard=2")),
    "etp_width": (2, ("model.moe={ffn_size: 25}", "parallel.tp=2")),
    "capacity_cut": (2, ("model.moe={capacity_factor: 1.25}", "parallel.cp=2")),
    "grid_lengths": (3, (f"model.spacetime={GRID}", "model.family=spacetime", "parallel.cp=3", "parallel.cp_method=dsp")),
    "grid_exchange": (2, (f"model.spacetime={GRID}", "model.family=spacetime", "parallel.cp=2", "parallel.cp_ulysses=2")),
    "layered_engine": (1, ("parallel.accumulation=layered", "parallel.engine=ddp")),
    "layered_pipeline": (2, ("parallel.accumulation=layered", "parallel.pp=2", "model.num_layers=4")),
    "dp_comm": (2, ("parallel.dp_comm=separate", "parallel.engine=ddp", "parallel.dp_shard=1", "parallel.dp_replicate=2")),
    "pp_reduce_every": (2, ("parallel.pp_reduce_every=1", "parallel.pp=2", "parallel.pp_schedule=zbv", "model.num_layers=4")),
    "breadth_without_layers": (1, ("parallel.breadth_first=2",)),
    "breadth_divides": (1, ("parallel.breadth_first=3", "parallel.accumulation=layered")),
    "update_in_backward": (1, ("parallel.update_in_backward=true", "parallel.accumulation=layered")),
    "skip_spikes": (
        1,
        ("train.skip_spikes={}", "parallel.update_in_backward=true", "parallel.accumulation=layered", "train.clip=0"),
    ),
    "deepspeed_axes": (1, ("parallel.engine=deepspeed",)),
    "deepspeed_family": (
        2,
        (f"model.spacetime={GRID}", "model.family=spacetime", "parallel.engine=deepspeed"),
    ),
    "deepspeed_update": (2, ("parallel.engine=deepspeed", "optim.name=lion")),
    "zero_offload": (2, ("parallel.engine=deepspeed", "parallel.zero_stage=2", "parallel.offload=parameters")),
    "offload_dir": (1, ("parallel.offload_dir=disk", "parallel.offload=optimizer")),
    "offload_inputs": (1, ("parallel.offload=activations",)),
    "recompute_nested": (1, ("parallel.recompute=nested", "parallel.accumulation=layered")),
    "recompute_budget": (1, ("parallel.recompute=budget",)),
    "activation_budget": (1, ("parallel.activation_budget=0.5",)),
    "offload_parameters": (1, ("parallel.offload=parameters",)),
    "offload_experts": (2, ("model.moe={}", "parallel.ep=2", "parallel.offload=parameters")),
    "offload_muon": (1, ("parallel.offload=optimizer", "optim.name=muon")),
    "multipliers_deepspeed": (
        2,
        ("parallel.engine=deepspeed", "parallel.dp_shard=2", "optim.multipliers={head.weight: {lr: 0.5}}"),
    ),
    "ema_deepspeed": (2, ("parallel.engine=deepspeed", "parallel.dp_shard=2", "optim.ema=0.9")),
    "reduce_engine": (1, ("precision.reduce=bf16", "parallel.engine=ddp")),
    "fp8_static": (1, ("precision.fp8=true", "model.ffn_size=32")),
    "fp8_compute": (1, (*MUS, "precision.fp8=true", "model.ffn_size=32", "model.head_dim=16", "precision.compute=fp64")),
    "fp8_hidden_size": (1, (*MUS, "precision.fp8=true", "model.hidden_size=24", "model.ffn_size=32", "model.head_dim=16")),
    "fp8_heads": (1, (*MUS, "precision.fp8=true", "model.ffn_size=32", "model.num_kv_heads=1", "model.head_dim=4")),
    "fp8_attention": (1, (*MUS, "model.attention=mute", "precision.fp8=true", "model.head_dim=16", "model.ffn_size=32")),
    "fp8_ffn": (2, (*MUS, "precision.fp8=true", "model.ffn_size=48", "model.head_dim=16", "parallel.tp=2")),
    "fp8_experts": (1, (*MUS, "precision.fp8=true", "model.ffn_size=32", "model.head_dim=16", "model.moe={ffn_size: 24}")),
    "fp8_linear": (1, ("precision.fp8=dynamic", "model.ffn_size=32", "model.head_dim=16", "model.linear=bitlinear")),
    "fp8_dynamic_parts": (1, ("precision.fp8=dynamic", "model.ffn_size=32", "model.head_dim=16", "model.moe={}")),
    "fp8_engine": (2, ("precision.fp8=dynamic", "model.ffn_size=32", "model.head_dim=16", "parallel.offload=parameters")),
    "fp8_recipe": (1, ("precision.fp8_recipe=rowwise",)),
    "loss_scale": (1, ("precision.loss_scale=4",)),
    "base_width": (1, ("optim.base_width=64",)),
    "transfer_base": (1, ("optim.transfer={depth: completep}",)),
    "transfer_model": (1, ("optim.transfer={depth: completep}", "optim.base_depth=1", "model.residual=post")),
    "mus_optimizer": (1, (*MUS, "optim.name=normuon")),
    "muon_settings": (1, ("optim.muon={lr: 0.01}",)),
    "own_average": (1, ("optim.name=schedule_free",)),
    "moments": (1, ("optim.moments=bf16", "optim.name=lion")),
    "moments_decay": (1, ("optim.moments=bf16", "optim.betas=[0.9,0.999]")),
    "moments_growth": (1, ("optim.moments=int8", "grow=[{step: 1, num_layers: 4}]")),
    "mus_decay": (1, ("model.residual=mus",)),
    "decay_a_step": (1, ("optim.independent_decay=true",)),
    "evaluate_family": (1, ("model.family=encoder", "evaluate=[{name: a, path: x, kind: bits}]")),
    "evaluate_names": (1, ("evaluate=[{name: a, path: x, kind: bits}, {name: a, path: y, kind: bits}]",)),
    "ddp_shard": (2, ("parallel.engine=ddp", "parallel.dp_shard=2")),
    "kv_heads": (1, ("model.num_kv_heads=3",)),
    "rope_pairs": (1, ("model.head_dim=5",)),
    "tp_heads": (3, ("parallel.tp=3",)),
    "tp_attention": (2, ("model.attention=mute", "parallel.tp=2")),
    "tp_key_heads": (2, ("model.attention=gated_delta", "model.delta={key_heads: 1, value_heads: 2}", "parallel.tp=2")),
    "qk_norm_width": (2, ("model.qk_norm=width", "model.num_kv_heads=1", "parallel.tp=2")),
    "tp_ffn": (2, ("parallel.tp=2", "model.ffn_size=25")),
    "tp_sequence": (2, ("parallel.tp=2", "parallel.tp_sequence=true", "train.seq_len=9")),
    "vocabulary_parts": (4, ("parallel.tp=4", "model.vocab_size=3")),
    "master": (1, ("precision.master=bf16",)),
    "rope_context": (1, ("model.position=alibi", "model.rope_scaling={factor: 8}")),
    "init_ema": (1, ("checkpoint.init_ema=0.9",)),
    "init_schedule": (1, ("checkpoint.init_schedule=lemon",)),
    "decay_ends": (1, ("optim.warmup_steps=4", "optim.decay_steps=4")),
    "decay_length": (1, ("optim.decay=wsd", "optim.warmup_steps=1", "optim.decay_steps=7", "train.steps=7")),
    "decay_unused": (1, ("optim.decay=constant", "optim.decay_steps=4")),
    "grow_steps": (1, ("grow=[{step: 2, num_layers: 2}]",)),
    "grow_engine": (2, ("grow=[{step: 1, num_layers: 2}]", "parallel.engine=deepspeed", "parallel.dp_shard=2")),
    "valid_twice": (1, ("data.valid=y", "data.valid_fraction=0.1")),
    "megatron_order": (1, (f"model.spacetime={GRID}", "model.family=spacetime", "data.order=megatron")),
    "chunk": (1, ("data.chunk=4",)),
    "eval_without_data": (1, ("train.eval_every=1",)),
    "model_size": (1, ("model.hidden_size=1000000000", "model.ffn_size=1000000000")),
    "schedule_length": (1, ("parallel.accumulation=layered", "train.global_batch_size=1000000")),
}


def test_every_rule_has_its_case() -> None:
    """Catches a rule that nothing observes."""
    assert list(REFUSED) == [r.name for r in RULES]


@pytest.mark.parametrize(
    "overrides",
    [
        ("optim.warmup_steps=4", "optim.decay_steps=5"),
        ("optim.warmup_steps=0", "optim.decay_steps=1"),
        ("optim.decay_steps=5000",),  # the run ends before its decay does
        ("optim.decay=wsd", "optim.warmup_steps=1", "optim.decay_steps=6", "train.steps=7"),
        ("optim.decay=wsd", "optim.warmup_steps=30", "optim.decay_steps=50", "train.steps=1"),  # a trial
        ("optim.warmup_steps=30", "train.steps=1"),
    ],
)
def test_schedules_that_run(overrides: tuple[str, ...]) -> None:
    """Catches a refusal of a schedule at the edge of what fits, or of a short trial of a long run."""
    assert not refusals(config(*overrides), 1)


def test_the_shortest_sequence_that_cp_cuts() -> None:
    """Catches a length counted for tensor ranks twice, and sources that nobody counts."""
    cut = ("parallel.cp=2", "parallel.tp=2", "parallel.tp_sequence=true", "model.num_kv_heads=2")
    pairs = ("model.family=encoder_decoder", "train.source_len=6")
    found = [refusals(config(*cut, f"train.seq_len={n}", *more), 4) for n, more in ((8, ()), (6, ()), (8, pairs))]
    assert [[r.name for r in rules] for rules in found] == [[], ["cp_sequence"], ["cp_sequence"]]


@pytest.mark.parametrize("name", REFUSED)
def test_each_rule_refuses_its_case_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rules that overlap, and messages without the keys, their values and the fix."""
    monkeypatch.setitem(ATTENTIONS, "mute", AttentionRow("a:b", lambda m: 1, lambda m: 1))  # says nothing of what it can be combined with
    monkeypatch.setitem(ROUTERS, "mute", RouterRow("a:b"))
    ranks, overrides = REFUSED[name]
    found = config(*overrides)
    assert [r.name for r in refusals(found, ranks)] == [name]
    rule = next(r for r in RULES if r.name == name)
    with pytest.raises(UsageError) as error:
        check(found, ranks)
    assert all(key in str(error.value) for key in (*rule.keys, rule.fix))


@st.composite
def any_config(draw: st.DrawFn) -> tuple[int, Config]:
    """Values in and out of what is supported."""
    pick = {
        "model.num_kv_heads": [1, 2, 3, 4],
        "model.family": ["decoder", "encoder", "encoder_decoder"],
        "model.norm": ["rmsnorm", "layernorm", "dyt"],
        "model.residual": ["pre", "post", "deepnorm", "branchnorm", "deepscale", "subln", "parallel", "res_post", "mus"],
        "model.branchnorm_period": ["null", "null", 3],
        "model.linear": ["dense", "bitlinear"],
        "model.matformer": ["null", "{sizes: [8]}", "{sizes: [6, 12], train: sum}"],
        "model.qk_norm": ["true", "width"],
        "model.position": ["rope", "alibi", "learned", "xpos"],
        "model.head_dim": [3, 4],
        "model.ffn_size": [24, 25],
        "parallel.tp": [1, 2, 3],
        "parallel.tp_sequence": ["true", "false"],
        "parallel.engine": ["fsdp2", "ddp"],
        "parallel.dp_shard": [-1, 1, 2],
        "model.moe": ["{num_experts: 4}", "{num_experts: 3, num_shared: 1, top_k: 4}", "{num_experts: 2, capacity_factor: 1.0}"],
        "parallel.ep": [1, 2, 3],
        "parallel.etp": [1, 2],
        "parallel.cp": [1, 1, 2, 3, 4],
        "parallel.cp_method": ["ring", "ulysses", "dsp"],
        "parallel.cp_ulysses": [1, 1, 2],
        "parallel.accumulation": ["depth_first", "layered"],
        "parallel.pp": [1, 1, 2, 2, 3],
        "parallel.pp_schedule": list(get_args(Parallel.model_fields["pp_schedule"].annotation)),
        "parallel.pp_virtual": [1, 2, 3],
        "model.num_layers": [2, 5],
        "parallel.recompute": ["none", "full", "nested"],
        "parallel.offload": ["none", "optimizer", "parameters", "activations", "[optimizer, activations]"],
        "train.seq_len": [8, 9],
    }
    keys = draw(st.lists(st.sampled_from(sorted(pick)), max_size=5, unique=True))
    return draw(st.integers(1, 4)), config(*(f"{k}={draw(st.sampled_from(pick[k]))}" for k in keys))


@pytest.mark.dist
@given(any_config())
@hypothesis_settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_what_the_table_does_not_refuse_runs(drawn: tuple[int, Config]) -> None:
    """Catches both a combination that is refused although it works and one that is let through and fails later."""
    ranks, found = drawn
    try:
        resolved = check(found, ranks)
    except UsageError:
        refused = bool(refusals(found, ranks))
        fits = True
        try:
            axis_sizes(found.parallel, ranks)
        except UsageError:
            fits = False
        assert refused or not fits
        return
    case = Case(resolved.model, resolved.parallel, seq_len=resolved.train.seq_len, steps=1, keep_tensors=False)
    assert len(run_ranks(ranks, train, case)[0]["loss"]) == 1


def cli(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "pretrain.py", *args], capture_output=True, text=True, check=False, env={**os.environ, **(env or {})}
    )


@pytest.mark.parametrize(
    ("args", "env", "words"),
    [
        (["configs/nowhere.yaml"], {}, "there is no config file configs/nowhere.yaml"),
        (["configs/quickstart.yml"], {}, "did you mean configs/quickstart.yaml"),
        (["configs/quickstart.yaml", "data.train=nowhere/x", "run.dir=/tmp/never"], {}, "nowhere/x"),
        (["configs/quickstart.yaml"], {"RANK": "0"}, "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing"),
        (
            ["configs/quickstart.yaml"],
            {"OMPI_COMM_WORLD_SIZE": "4"},
            "OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_LOCAL_RANK, OMPI_COMM_WORLD_LOCAL_SIZE missing",
        ),
        (
            ["configs/quickstart.yaml", "data.train=nowhere/x", "parallel.tp=3", "model.vocab_size=9"],
            {},
            "parallel.tp is 3, model.num_heads is 4",
        ),
        (["configs/quickstart.yaml", "run.device=cuda", "model.vocab_size=9"], {}, "cuda"),
    ],
)
def test_wrong_use_is_one_message_and_code_2(args: list[str], env: dict[str, str], words: str) -> None:
    """Catches tracebacks and other exit codes for what the user can mend."""
    done = cli(*args, env=env)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr and done.stderr.count("error:") == 1


def test_errors_are_of_the_documented_codes() -> None:
    """Catches an exit code that scripts do not know."""
    assert {e.code for e in MegascaleError.__subclasses__()} == {2, 3, 4, 5, 75}


def test_every_config_that_ships_is_valid() -> None:
    """Catches a typo in configs/; sizes are those of their names, to 3 % or to the digits that the name has."""
    from megascale.train.estimate.dry_run import describe_run

    shipped = sorted(Path("configs").glob("*.yaml"))
    assert len(shipped) >= 8
    for path in shipped:
        loaded = load_config(path)
        if loaded.model.vocab_size is None:
            loaded = loaded.model_copy(update={"model": loaded.model.model_copy(update={"vocab_size": 8192})})
        ranks = max(1, loaded.parallel.tp * loaded.parallel.pp * loaded.parallel.dp_replicate * loaded.parallel.ep)
        report = describe_run(check(loaded, ranks), ranks)
        number = path.stem.rsplit("-", 1)[-1]
        if number[-1] in "mb" and number[:-1].replace(".", "").isdigit():
            nominal = float(number[:-1]) * {"m": 1e6, "b": 1e9}[number[-1]]
            nominal = 20.9e9 if path.stem == "gpt-oss-20b" else nominal  # so it is called
            assert abs(report["parameters"] / nominal - 1) < 0.03 or f"{report['parameters'] / 1e9:.0f}b" == number, path


def test_keys_that_are_younger_than_a_checkpoint() -> None:
    """Catches a release whose new keys make every older run another one, and a new key in use that passes unseen."""
    old = {k: v for k, v in identity(config()).items() if k not in ("model.linear", "model.dyt_alpha", "data.mask_fraction")}
    assert check_identity(config(), old, "x") == {}
    with pytest.raises(UsageError, match=r"model.linear: 'dense' there, 'bitlinear' now"):
        check_identity(config("model.linear=bitlinear"), old, "x")
    stretched = config("model.rope_scaling={factor: 8}")
    old = {k: v for k, v in identity(stretched).items() if k not in ("model.rope_scaling.type", "model.rope_scaling.beta_fast")}
    assert check_identity(stretched, old, "x") == {}
    with pytest.raises(UsageError, match=r"model.rope_scaling.type: 'llama3' there, 'yarn' now"):
        check_identity(config("model.rope_scaling={factor: 8, type: yarn}"), old, "x")


def test_spelling_of_a_path_is_no_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run refused for ./data, an absolute path or a list of one, another file or order let through, and missing advice."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data")
    saved = identity(config("data.train=data/t", "data.tokenizer=data/t.model"))
    for same in ("./data/t", str(tmp_path / "data" / "t"), "[data/t]", "[{path: data/../data/t}]", "link/t"):
        assert check_identity(config(f"data.train={same}", "data.tokenizer=./data/t.model"), saved, "x") == {}, same
    for other in ("other/t", "[{path: data/t, name: u}]", "[{path: data/t, weight: 2}]", "[data/t, data/u]", "t.yaml"):
        with pytest.raises(UsageError, match=r"data.train: 'data/t' there"):
            check_identity(config(f"data.train={other}", "data.tokenizer=data/t.model"), saved, "x")
    moved = config("data.train=elsewhere/u", "data.tokenizer=data/t.model")
    with pytest.raises(UsageError, match=r"use data.train='\[\{path: /.*/elsewhere/u, name: t\}\]'"):
        check_identity(moved, saved, "x")
    assert check_identity(moved, saved, "x", moved=["data.train"]) == {}
    assert only_moved("data.train", "data/t", ["/elsewhere/t"]) and not only_moved("data.train", "data/t", "data/u")


def test_flatten() -> None:
    """Catches keys of nested sections that lose their path."""
    assert flatten({"a": {"b": {"c": 1}, "d": [2]}}) == {"a.b.c": 1, "a.d": [2]}


def test_the_docs_show_the_table() -> None:
    """Catches a rule that was changed without its page."""
    text = Path("docs/layouts.md").read_text(encoding="utf-8")
    assert markdown_table() in text, "docs/layouts.md: put the output of megascale.config.support.markdown_table() between the marks"
