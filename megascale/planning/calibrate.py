"""`megascale plan --calibrate`: a cluster file from what was measured, on this machine or by the benchmarks of a GPU."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from megascale.errors import UsageError
from megascale.planning.cluster import Cluster, load_cluster

FP8 = "e4m3, fp32 sums"  # the row of products as static FP8 runs them
BUDGET = 0.3  # seconds of a number
MOST = 64  # ranks that are measured at once


def calibrate(out: Path, ranks: int | None, base: Path | None, results: Path | None) -> list[str]:
    """Writes the cluster file `out` and returns lines about it. `base`: a cluster file whose other numbers stay; `results`: a JSON file of
    benchmarks/gpu instead of measuring here, which needs a `base`. Raises UsageError for wrong use, and if measuring fails.
    """
    if results is not None:
        if base is None:
            raise UsageError(
                f"--measured {results} has rates of a device but no links, nodes and prices: add --cluster FILE to lay them over"
            )
        cluster = laid_over(load_cluster(base), rates_of(results))
        source = f"the device's rates are those of {results.name}"
    else:
        cluster, source = measured_here(ranks, None if base is None else load_cluster(base)), "measured on this machine"
    try:
        out.write_text(text_of(cluster, source), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--calibrate {out} cannot be written: {error.strerror}") from None
    device = cluster.pools[0].device
    best = max(device.peak_flops, key=lambda name: device.peak_flops[name])
    rate, copied = device.product_rate(best) / 1e9, device.memory_bytes_per_second / 1e9
    return [
        f"wrote {out}: {cluster.gpus:,} × {device.name}, {source}",
        f"  products up to {rate:,.0f} GFLOP/s in {best}, casts {copied:,.1f} GB/s",
    ]


def measured_here(ranks: int | None, base: Cluster | None) -> Cluster:
    """One node of this machine's devices; with a `base` that cluster, with the device and the link inside a node as measured here."""
    import torch

    from megascale.planning.measured import measure

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    count = ranks if ranks is not None else torch.cuda.device_count() if kind == "cuda" else 1
    most = torch.cuda.device_count() if kind == "cuda" else MOST
    if not 1 <= count <= most:
        what = "GPUs of this machine" if kind == "cuda" else "ranks that are measured at once"
        raise UsageError(f"--gpus is {count}: calibrating takes 1 to {most}, the {what}")
    try:
        found = measure(count, kind, BUDGET)
    except RuntimeError as error:
        raise UsageError(f"measuring failed: {error}") from None
    return from_measured(found, count, kind, base)


def from_measured(found: Mapping[str, Any], count: int, kind: str, base: Cluster | None) -> Cluster:
    """A cluster from measured rates."""
    from megascale.planning.measured import known_peak

    products: Mapping[str, Sequence[tuple[float, float]]] = found["products"]
    fastest = {name: max(rate for _, rate in pairs) for name, pairs in products.items()}
    known = known_peak(found["name"])
    peaks = {**fastest, **({"bf16": known} if known is not None else {})}
    peaks["fp64"] = fastest["fp32"] / 2
    first = next(iter(products))
    device = {
        "name": found["name"],
        "kind": kind,
        "memory_bytes": found["memory"],
        "reserve_bytes": min(4e9 if kind == "cuda" else 0.5e9, found["memory"] / 4),
        "peak_flops": peaks,
        "product_share": fastest[first] / peaks[first],
        "product_share_of": {name: fastest[name] / peaks[name] for name in products if name != first},
        "attention_share": min(1.0, found["attention"] / peaks[first]),
        "product_table": _rising(products[first]),
        "memory_bytes_per_second": found["copied"],
        "kernel_seconds": found["kernel"],
        "launch_seconds": found["kernel"] if kind == "cuda" else 0.0,
    }
    table = _rising(found["links"])
    rate, latency = (max(r for _, r in table), table[0][0] / table[0][1]) if table else (found["copied"] / 2, 0.0)
    link = {"bytes_per_second": rate, "latency_seconds": latency, "table": table}
    if base is not None:
        return laid_over(base, {**device, "link": link})
    pool = {"name": "here", "nodes": 1, "gpus_per_node": count, "device": device, "inside": link, "between": link}
    return Cluster.model_validate({"name": "this machine", "pools": [pool]})


def _rising(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return sorted(dict(pairs).items())


def rates_of(results: Path) -> dict[str, Any]:
    """The device's rates in the JSON of benchmarks/gpu/ceilings.py, itself or as a step of the bring-up."""
    try:
        found = json.loads(results.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--measured {results} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"--measured {results} is not JSON: {error}") from None
    machine = found.get("machine", {}) if isinstance(found, dict) else {}
    if isinstance(found, dict) and isinstance(found.get("result"), dict):
        found = found["result"]
    needed = ("products_teraflops", "attention_teraflops", "copy_terabytes_per_second")
    missing = [key for key in needed if not (isinstance(found, dict) and found.get(key))]
    if missing:
        raise UsageError(f"--measured {results} has no {', '.join(missing)}: give the result of python -m benchmarks.gpu.ceilings")
    try:
        rows = list(found["products_teraflops"].values())
        bf16 = [float(row["bf16"]) * 1e12 for row in rows]
        fp8 = [float(row[FP8]) * 1e12 for row in rows if FP8 in row]
        attention = max(float(row["as chosen"]) for row in found["attention_teraflops"].values()) * 1e12
        copied = float(found["copy_terabytes_per_second"]) * 1e12
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"--measured {results} is not as benchmarks.gpu.ceilings writes it: {error!r}") from None
    rates: dict[str, Any] = {"memory_bytes_per_second": copied, "attention": attention}
    rates |= {"rates": {"bf16": fmean(bf16), **({"fp8": fmean(fp8)} if fp8 else {})}}
    return rates | ({"name": machine["gpu"]} if machine.get("gpu") else {})


def laid_over(base: Cluster, rates: Mapping[str, Any]) -> Cluster:
    """`base` with the first pool's device as measured. The `rates` of large products by format, and that of attention, become shares of its
    peaks.
    """
    values = base.model_dump(mode="json")
    device = values["pools"][0]["device"]
    given = {key: value for key, value in rates.items() if key not in ("rates", "attention", "link")}
    device |= given
    peaks = device["peak_flops"]
    if "rates" in rates:
        device["product_share"] = min(1.0, rates["rates"]["bf16"] / peaks["bf16"])
        others = {name: min(1.0, rate / peaks[name]) for name, rate in rates["rates"].items() if name != "bf16" and name in peaks}
        device["product_share_of"] = {**device["product_share_of"], **others}
        device["attention_share"] = min(1.0, rates["attention"] / peaks["bf16"])
    if "link" in rates:
        values["pools"][0]["inside"] = rates["link"]
    return Cluster.model_validate(values)


def text_of(cluster: Cluster, source: str) -> str:
    """The cluster as a file, numbers to four digits."""
    import io

    from ruamel.yaml import YAML

    out = io.StringIO()
    yaml = YAML()
    yaml.width = 140
    yaml.dump(_short(cluster.model_dump(mode="json", exclude_none=True)), out)
    return f"# Written by megascale plan --calibrate: {source}.\n{out.getvalue()}"


def _short(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: _short(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_short(value) for value in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x
