"""Out of memory: code 4, with the numbers and with settings that would fit."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from megascale.config.load import build_config, to_yaml
from megascale.config.support import check
from megascale.launch.ranks import RankInfo
from megascale.train.estimate import memory, oom_advice
from tests.runs import make_tokens, settings

ROOT = Path(__file__).resolve().parents[2]
WIDE: dict[str, Any] = {"train__global_batch_size": 4096, "train__micro_batch_size": 4096, "model__vocab_size": 64}


def test_a_run_that_is_too_large(tmp_path: Path) -> None:
    """Catches a traceback, a kill without a word, or advice without its arithmetic."""
    make_tokens(tmp_path / "tokens")
    wide = {"model__hidden_size": 256, "train__seq_len": 64, "precision__compute": "fp32", "precision__master": None, **WIDE}
    (tmp_path / "wide.yaml").write_text(to_yaml(settings(tmp_path, **wide)))
    limit = 4 * 2**30
    done = subprocess.run(
        [sys.executable, "pretrain.py", tmp_path / "wide.yaml"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    ending = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert done.returncode == ending["code"] == 4 and "Traceback" not in done.stderr, done.stderr
    for word in ("this rank has 4.29 GB on", "activations of 4096 × 64 tokens about", "would fit: train.micro_batch_size="):
        assert word in ending["reason"]


def test_advice_fits(tmp_path: Path, monkeypatch: Any) -> None:
    """Catches advice that needs more than there is, that is refused, or that is milder than what just failed."""
    make_tokens(tmp_path / "tokens")
    config = build_config(settings(tmp_path, **WIDE))
    for ranks in (1, 2):
        state, live = memory.needed(check(config, ranks), ranks)
        for group in oom_advice.options(check(config, ranks), ranks):
            assert group and all(need < state + live for _, need in group)
            alone = [need for words, need in group if " " not in words]
            assert alone == sorted(alone, reverse=True)
    monkeypatch.setattr(oom_advice, "limit_of", lambda device, ranks: (state + live) * 0.6)
    text = oom_advice.what_fits(config, torch.device("cpu"), RankInfo())
    assert "train.micro_batch_size=2048" in text or "train.micro_batch_size=1024" in text
    monkeypatch.setattr(oom_advice, "limit_of", lambda device, ranks: 1000.0)
    assert "smaller model.hidden_size" in oom_advice.what_fits(config, torch.device("cpu"), RankInfo())
