"""Shortest time of a trillion parameters by method: do layered accumulation and modular pipelines halve it (arXiv 2106.02679)?

X_160 of that paper (160 layers, width 25,600, 80 heads, sequences of 2,560) with an assumed batch of 2,400 sequences, on as many A100s as
wanted: tensor groups of one node, every pipeline that divides the layers, every number of data ranks that divides the batch.

    python -m benchmarks.planning.halving [--batch 2400] [--cluster configs/clusters/a100-pod.yaml]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from megascale.config.load import build_config
from megascale.config.schema import Config
from megascale.config.support import check
from megascale.errors import UsageError
from megascale.planning.cluster import load_cluster
from megascale.planning.scale import METHODS, enlarged, methods_of
from megascale.planning.search import divisors
from megascale.planning.step import Links, predict

RESULT = Path(__file__).parent / "results" / "halving.json"
MOST = 131072  # GPUs


def x160(batch: int) -> Config:
    model = {"num_layers": 160, "hidden_size": 25600, "num_heads": 80, "ffn": "gelu", "bias": True, "norm": "layernorm"}
    model |= {"position": "learned", "tie_embeddings": True, "vocab_size": 51200}
    train = {"steps": 1, "seq_len": 2560, "global_batch_size": batch, "micro_batch_size": 1}
    return build_config({"model": model, "train": train, "data": {"train": "x"}, "precision": {"compute": "bf16"}})


def choices(config: Config, tensor: int) -> Iterator[tuple[int, Config]]:
    """Layouts with their numbers of GPUs."""
    layers, batch = config.model.num_layers, config.train.global_batch_size
    for pp in divisors(layers, layers):
        for data in divisors(batch, min(batch, MOST // tensor // pp)):
            options: list[dict[str, object]] = [{"pp_schedule": "1f1b"}]
            if pp == 1:
                options = [{}, {"accumulation": "layered"}] if data < batch else [{}]
            elif pp < layers:
                options.append({"pp_schedule": "looped_bfs", "pp_virtual": layers // pp})
                options.append({"pp_schedule": "interleaved_1f1b", "pp_virtual": layers // pp})
            for option in options:
                for recompute in ("none", "selective", "full"):
                    base = {"tp": tensor, "tp_sequence": True, "pp": pp, "dp_shard": data, "recompute": recompute}
                    yield tensor * pp * data, config.model_copy(update={"parallel": config.parallel.model_copy(update={**base, **option})})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2400)
    parser.add_argument("--cluster", default="configs/clusters/a100-pod.yaml")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    cluster = enlarged(load_cluster(given.cluster), MOST)
    links: dict[int, Links] = {}
    best: dict[str, tuple[float, int, Config]] = {}
    fewest: dict[str, dict[int, float]] = {name: {} for name in METHODS}
    for ranks, config in choices(x160(given.batch), cluster.pools[0].gpus_per_node):
        found = predict(config, ranks, cluster, links.setdefault(ranks, Links(cluster, ranks)))
        if found.memory_bytes > found.room:
            continue
        for name in methods_of(config):
            step = found.step_seconds
            if step >= best.get(name, (float("inf"),))[0] and step >= fewest[name].get(ranks, float("inf")):
                continue
            try:
                check(config, ranks)
            except UsageError:
                continue
            fewest[name][ranks] = min(step, fewest[name].get(ranks, float("inf")))
            if step < best.get(name, (float("inf"),))[0]:
                best[name] = (step, ranks, config)
    result = {
        "batch": given.batch,
        "cluster": cluster.name,
        "shortest": {
            name: {
                "step_seconds": step,
                "gpus": ranks,
                "mfu": predict(config, ranks, cluster, links[ranks]).mfu,
                "parts": predict(config, ranks, cluster, links[ranks]).parts,
                "parallel": config.parallel.model_dump(mode="json", exclude_defaults=True),
            }
            for name, (step, ranks, config) in best.items()
        },
        "by_gpus": {name: sorted(steps.items()) for name, steps in fewest.items()},
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, (step, ranks, config) in best.items():
        p = config.parallel
        print(
            f"{name:>8}: {step:7.2f} s a step on {ranks:,} GPUs, pp{p.pp} {p.pp_schedule} x{p.pp_virtual}, {p.accumulation}, {p.recompute}"
        )
    print(f"plain ÷ modular: {best['plain'][0] / best['modular'][0]:.2f}")


if __name__ == "__main__":
    main()
