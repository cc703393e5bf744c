"""`megascale plan`: what it offers runs, what it leaves out does not, and wrong use is a sentence."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import megascale as ms
from megascale.config.load import build_config, load_config
from megascale.config.schema import Config
from megascale.config.support import check, refusals
from megascale.errors import UsageError
from megascale.planning.cluster import load_cluster
from megascale.planning.goodput import best_interval, share_at
from megascale.planning.search import axes, search
from megascale.planning.step import predict
from megascale.planning.weights import units_of

POD = "configs/clusters/h100-pod.yaml"


def gpt(layers: int, width: int, heads: int, **changes: Any) -> Config:
    """A GPT of Megatron's SC21 paper."""
    model = {"num_layers": layers, "hidden_size": width, "num_heads": heads, "ffn": "gelu", "bias": True, "norm": "layernorm"}
    model |= {"position": "learned", "tie_embeddings": True, "vocab_size": 51200}
    train = {"steps": 1, "seq_len": 2048, "global_batch_size": changes.pop("batch", 512)}
    return build_config({"model": model, "train": train, "data": {"train": "x"}, "precision": {"compute": "bf16"}, **changes})


@pytest.mark.parametrize(
    ("billions", "layers", "width", "heads"),
    [
        (1.7, 24, 2304, 24),
        (7.5, 36, 4096, 32),
        (18.4, 40, 6144, 48),
        (39.1, 48, 8192, 64),
        (145.6, 80, 12288, 96),
        (1008.0, 128, 25600, 160),
    ],
)
def test_parameters_of_published_models(billions: float, layers: int, width: int, heads: int) -> None:
    """Catches a matrix that is forgotten or counted twice: table 1 of Megatron's SC21 paper (arXiv 2104.04473), to 0.1 billion."""
    assert units_of(gpt(layers, width, heads)).parameters / 1e9 == pytest.approx(billions, abs=0.0501)


@pytest.mark.parametrize(("x", "billions"), [(160, 1258.0), (108, 176.0), (64, 12.9)])
def test_the_x_family(x: int, billions: float) -> None:
    """Catches wrong hidden products: the X family (arXiv 2106.02679) has 12·x⁵ weights in them."""
    layers = units_of(gpt(x, x**2, x // 2)).layers
    products = sum(w.numel for unit in layers for w in unit.weights if w.product)
    assert products == 12 * x**5 and products / 1e9 == pytest.approx(billions, rel=5e-3)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([4, 6, 8, 12]), st.sampled_from([96, 128, 176]), st.sampled_from([2, 4, 8, 12]), st.sampled_from([32, 36]))
def test_what_is_offered_is_accepted_and_what_is_skipped_is_refused(heads: int, ffn: int, ranks: int, length: int) -> None:
    """Catches a layout that the program then refuses, and one that is skipped although no rule refuses it."""
    model = {"num_layers": 4, "hidden_size": 8 * heads, "num_heads": heads, "ffn_size": ffn, "vocab_size": 512}
    train = {"steps": 1, "seq_len": length, "global_batch_size": 16}
    config = build_config({"model": model, "train": train, "data": {"train": "x"}, "precision": {"compute": "bf16"}})
    found = search(config, ranks, load_cluster(POD))
    assert found.layouts and not found.refused
    for layout in (*found.layouts, *found.pareto):
        assert not refusals(layout.config, ranks)
    tried = {p.tp for p in axes(config, ranks, 8)}
    for tp in (d for d in range(1, ranks + 1) if ranks % d == 0):
        asked = config.model_copy(update={"parallel": config.parallel.model_copy(update={"tp": tp, "tp_sequence": tp > 1})})
        if tp not in tried:
            with pytest.raises(UsageError, match="tp"):
                check(asked, ranks)


def test_a_plan_is_plain_data_and_ranked() -> None:
    """Catches an order that is not by time, a Pareto list with a layout that another beats, and a pasted section that does not load."""
    result = ms.plan("configs/llama-8b.yaml", POD, 64)
    times = [layout["step_seconds"] for layout in result["layouts"]]
    assert times == sorted(times) and {"parallel", "step_seconds", "memory_bytes", "mfu"} <= set(result["layouts"][0])
    pareto = [(layout["step_seconds"], layout["memory_bytes"]) for layout in result["pareto"]]
    assert pareto == sorted(pareto) and [m for _, m in pareto] == sorted((m for _, m in pareto), reverse=True)
    plain = ms.load_config("configs/llama-8b.yaml").plain()
    again = build_config({**plain, "parallel": result["layouts"][0]["parallel"], "train": {**plain["train"], "micro_batch_size": 1}})
    check(again, 64)
    json.dumps(result)


def test_more_recomputation_is_slower_and_smaller() -> None:
    """Catches a sign: recomputing costs time and saves memory, a slower network costs time, twice the ranks halve the work."""
    cluster = load_cluster(POD)
    found = {
        m: predict(check(load_config("configs/llama-8b.yaml", [f"parallel.recompute={m}"]), 64), 64, cluster) for m in ("none", "full")
    }
    assert found["none"].step_seconds < found["full"].step_seconds and found["none"].memory_bytes > found["full"].memory_bytes
    config = load_config("configs/llama-70b.yaml")
    pool = cluster.pools[0]
    slow = cluster.model_copy(
        update={"pools": (pool.model_copy(update={"between": pool.between.model_copy(update={"bytes_per_second": 1e9})}),)}
    )
    assert predict(check(config, 512), 512, slow).step_seconds > predict(check(config, 512), 512, cluster).step_seconds
    a, b = (predict(check(config, n), n, cluster).parts["compute"] for n in (256, 512))
    assert a == pytest.approx(2 * b, rel=1e-3)


def test_the_best_interval_is_the_best() -> None:
    """Catches an approximation far from its range: neighbours of the exact interval are worse, and it is Young's where saves are short."""
    for save, failure in ((1.0, 1e5), (100.0, 1000.0), (30.0, 1e7)):
        best = best_interval(save, failure)
        assert all(share_at(best, save, failure, 60) > share_at(best * f, save, failure, 60) for f in (0.9, 1.1))
    assert best_interval(1.0, 1e7) == pytest.approx(math.sqrt(2 * 1.0 * 1e7), rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "0"], "--gpus is 0"),
        (["--gpus", "100000"], "has 16,384"),
        (["--gpus", "4", "model.num_layers=600"], "too much"),
        (["--cluster", "none.yaml"], "no cluster file none.yaml"),
        (["model.vocab_size=null"], "vocab_size"),
    ],
)
def test_wrong_use_is_a_sentence(arguments: list[str], words: str, tmp_path: Path) -> None:
    """Catches a traceback, another exit code than 2, and a file written in spite of it."""
    out = tmp_path / "plan.json"
    command = [sys.executable, "tools/plan.py", "configs/llama-405b.yaml", "--cluster", POD, "--json", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr and not out.exists()


def test_planning_loads_no_torch() -> None:
    """Catches an import that makes every plan wait for torch."""
    code = "import sys, megascale.planning.plan, megascale.commands.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
