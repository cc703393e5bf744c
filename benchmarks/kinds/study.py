"""Does multi-token prediction help, and what does a hybrid of linear and full attention cost?

Small decoders on the quickstart corpus with equal parameters and tokens, three seeds; the validation loss of the next token.

    python -m benchmarks.kinds.study data/stdlib           # `make quickstart` prepares it
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from benchmarks.studies import study

RESULTS = Path(__file__).parent / "results" / "study.json"
SEEDS = (1, 2, 3)
STEPS = 300
CONFIG = {
    "model": {"num_layers": 4, "hidden_size": 128, "num_heads": 4, "ffn_size": 384, "tie_embeddings": True},
    "train": {"steps": STEPS, "global_batch_size": 16, "micro_batch_size": 8, "seq_len": 128, "eval_every": STEPS, "eval_steps": 16},
    "optim": {"lr": 3e-3, "warmup_steps": 30, "decay": "cosine"},
    "data": {"train": "", "valid_fraction": 0.02},
}
# 65,512 weights a layer beside 65,536 of full attention.
DELTA = "{key_heads: 4, value_heads: 4, key_dim: 14, value_dim: 32}"
ARMS: dict[str, tuple[str, ...]] = {
    "full": (),
    "hybrid": (
        f"model.kinds={{linear: {{attention: gated_delta, delta: {DELTA}}}, full: {{}}}}",
        "model.pattern=[linear,linear,linear,full]",
    ),
    "mtp": ("model.mtp_depth=1",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prefix", help="prepared tokens of the corpus")
    parser.add_argument("--processes", type=int, default=2)
    asked = parser.parse_args()
    RESULTS.parent.mkdir(exist_ok=True)
    config = RESULTS.with_suffix(".yaml")
    config.write_text(json.dumps(CONFIG))  # which is YAML, too
    try:
        of_data = f"data.train={asked.prefix}"
        runs = {f"{arm} {seed}": (*keys, f"run.seed={seed}", of_data) for seed in SEEDS for arm, keys in ARMS.items()}
        found = study(RESULTS, {"config": CONFIG, "arms": ARMS}, config, runs, asked.processes)
    finally:
        config.unlink()
    for arm in ARMS:
        losses = [found[f"{arm} {seed}"]["valid"] for seed in SEEDS]
        gaps = [found[f"{arm} {seed}"]["valid"] - found[f"full {seed}"]["valid"] for seed in SEEDS]
        beyond = f"{statistics.mean(gaps):+.4f} ({min(gaps):+.4f} to {max(gaps):+.4f})"
        print(f"{arm}: validation {', '.join(f'{x:.4f}' for x in losses)}; beyond full {beyond}")


if __name__ == "__main__":
    main()
