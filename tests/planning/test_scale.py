"""`megascale plan --scale` and `--job`: tables over numbers of GPUs, a simulated job, and wrong use as a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from megascale.config.load import build_config
from megascale.config.schema import Config
from megascale.errors import UsageError
from megascale.planning.cluster import load_cluster
from megascale.planning.plan import plan_layouts, plan_scale
from megascale.planning.scale import METHODS, counts_of, enlarged, fitted_loss, methods_of, scale
from megascale.planning.search import axes, search
from megascale.planning.step import predict
from megascale.report.plans import draw_scale, draw_study

POD = "configs/clusters/h100-pod.yaml"
PNG = b"\x89PNG"


def small() -> Config:
    model = {"num_layers": 4, "hidden_size": 256, "num_heads": 2, "ffn_size": 512, "vocab_size": 512}
    train = {"steps": 1000, "seq_len": 128, "global_batch_size": 16, "micro_batch_size": 1}
    return build_config({"model": model, "train": train, "data": {"train": "x"}, "precision": {"compute": "bf16"}})


def test_numbers_of_gpus() -> None:
    """Catches a last number that is left out or passed, and text that is taken for a range."""
    assert counts_of("8..64") == [8, 16, 32, 64] and counts_of("8..63") == [8, 16, 32] and counts_of("3..3") == [3]
    for text in ("8", "8..", "..8", "0..8", "9..8", "a..b", "8...9", "-1..8", "1..99999999"):
        with pytest.raises(UsageError, match="--scale"):
            counts_of(text)


def test_a_cluster_grows_by_whole_nodes() -> None:
    """Catches ranks without a node beyond the cluster, and a cluster that is changed although it is large enough."""
    pod = load_cluster(POD)
    assert enlarged(pod, 16384) is pod
    assert enlarged(pod, 16385).gpus == 16392


def test_tables_agree_with_the_planner(tmp_path: Path) -> None:
    """Catches a time that is not the planner's, and a method that is worse than one with fewer choices."""
    config, pod = small(), load_cluster(POD)
    found = scale(config, [2, 4], pod)
    for row in found["strong"]:
        days = [row["days"][name] for name in METHODS]
        assert days == sorted(days, reverse=True)
        assert days[-1] <= 1.0001 * search(config, row["gpus"], pod).layouts[0].prediction.step_seconds * 1000 / 86400
    assert [row["batch"] for row in found["weak"]] == [16, 32]
    assert found["strong"][0]["efficiency"] == found["weak"][0]["efficiency"] == 1.0
    assert found["shortest"]["all"]["days"] == min(row["days"]["all"] for row in found["strong"])
    text, result = plan_scale(config, POD, "2..2")
    draw_scale(result, tmp_path / "scale.png")
    assert any("shortest time" in line for line in text) and (tmp_path / "scale.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("parallel", "methods"),
    [
        ({}, METHODS),
        ({"accumulation": "layered"}, METHODS[1:]),
        ({"pp": 2, "pp_schedule": "1f1b"}, METHODS),
        ({"pp": 2, "pp_schedule": "looped_bfs", "pp_virtual": 2}, METHODS[2:]),
        ({"pp": 2, "pp_schedule": "zbv"}, METHODS[3:]),
    ],
)
def test_layouts_belong_to_methods(parallel: dict[str, object], methods: tuple[str, ...]) -> None:
    """Catches a baseline that has what it is compared with."""
    config = small()
    assert methods_of(config.model_copy(update={"parallel": config.parallel.model_copy(update=parallel)})) == methods


def test_the_fit_has_its_best_where_it_says() -> None:
    """Catches a wrong exponent in the closed form of the best size for a budget."""
    found = scale(small(), [2], load_cluster(POD))["budgets"][0]
    weights, tokens = found["best_weights"], found["best_tokens"]
    for factor in (0.9, 1.1):
        assert fitted_loss(weights, tokens) < fitted_loss(factor * weights, tokens / factor)


def test_a_job_is_the_best_layout(tmp_path: Path) -> None:
    """Catches a simulated job with a step that is not the plan's, and plots that are asked for and not made."""
    text, result = plan_layouts(small(), POD, 2, days=1.0, seed=3)
    draw_study(result["job"], tmp_path / "job.png")
    assert result["job"]["job"]["step"] == result["layouts"][0]["step_seconds"] and result["job"]["seeds"] == [3, 10]
    assert any("days simulated" in line for line in text) and (tmp_path / "job.png").read_bytes().startswith(PNG)
    with pytest.raises(UsageError, match="--job is 0 days"):
        plan_layouts(small(), POD, 2, days=0.0)


def test_a_prediction_is_the_same_for_a_larger_cluster() -> None:
    """Catches nodes that are added and change the links of those before."""
    pod, config = load_cluster(POD), small()
    assert predict(config, 4, pod) == predict(config, 4, enlarged(pod, 20000))


def test_sequences_are_split_to_keep_a_pipeline_busy() -> None:
    """Catches a search that leaves stages idle for want of micro-batches: with a batch of 16 a pipeline of 4 has 2 of them on 8 data ranks,
    and 4 if two ranks share a sequence.
    """
    found = {(p.pp, p.cp, p.dp_shard * p.dp_replicate) for p in axes(small(), 32, 8) if p.tp == 1}
    assert (4, 2, 4) in found and (4, 1, 8) in found
    assert (1, 2, 16) in found  # 32 ranks, 16 sequences
    assert (2, 2, 8) in found and (1, 2, 4) not in {(p.pp, p.cp, p.dp_shard * p.dp_replicate) for p in axes(small(), 8, 8)}
