"""DSP, Ulysses, ring and tensor + sequence parallelism on one spacetime model: bytes of real training steps, seconds between two hosts.

`python -m benchmarks.sequence.methods bytes` (any machine), `… hosts [--steps N] [--mbit 30 300] [--draw FILE]` (Linux, root).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import machine, write
from benchmarks.layered import hosts
from benchmarks.sequence.worker import BATCH, GRID, LAYERS, MODEL

MODULE, RANKS = "benchmarks.sequence.worker", 4
COLORS = ("#2a7f62", "#4c78a8", "#9ecae9", "#f58518", "#b5304f")


def count(n: int) -> dict[str, Any]:
    """Bytes that a rank of n sends in a step."""
    with tempfile.TemporaryDirectory() as folder:
        words = [str(n), "0", f"file://{folder}/store"]
        command = [sys.executable, "-m", MODULE]
        running = [subprocess.Popen([*command, str(r), *words], stdout=subprocess.PIPE, text=True) for r in range(n)]
        outputs = [process.communicate()[0] for process in running]
    return json.loads(outputs[0].strip().splitlines()[-1])  # type: ignore[no-any-return]


def compare_bytes() -> dict[str, Any]:
    m, table = 4 * BATCH * GRID[0] * GRID[1] * int(str(MODEL["hidden_size"])), {}
    for n in (2, 3, 4, 8):
        pair = {name: found["sent_bytes_of_a_pair"] for name, found in count(n).items()}
        dsp = pair["DSP"]
        table[str(n)] = {
            "pair": pair,
            "pair_in_activations": {name: sent / m for name, sent in pair.items()},
            "dsp_over": {name: dsp / sent for name, sent in pair.items()},
        }
    return {"activation_bytes": m, "by_ranks": table}


def compare_seconds(steps: int, bandwidths: list[int]) -> dict[str, Any]:
    words = [str(RANKS), str(steps), "-", "-", *map(str, bandwidths)]
    with hosts.two_hosts() as names:
        running = [hosts.start(names[r // 2], MODULE, [str(r), *words], {"LOCAL_RANK": str(r % 2)}) for r in range(RANKS)]
        outputs = [process.communicate()[0] for process in running]
    measured = json.loads(outputs[0].strip().splitlines()[-1])
    tokens = BATCH * GRID[0] * GRID[1]
    rates = {n: {b: tokens / statistics.median(s) for b, s in found["seconds"].items()} for n, found in measured.items()}
    speed = {b: {n: rates["DSP"][b] / rates[n][b] for n in rates} for b in rates["DSP"]}
    return {"measured": measured, "tokens_per_second": rates, "dsp_speed_over": speed}


def draw(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    rates = result["tokens_per_second"]
    links = list(rates["DSP"])
    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    axes: Any = figure.subplots(1, len(links))
    for plot, link in zip(axes, links):
        for i, name in enumerate(rates):
            plot.barh(-i, rates[name][link], color=COLORS[i])
            plot.text(rates[name][link], -i, f" {rates[name][link]:,.0f}", va="center", fontsize=8)
        plot.set_yticks([-i for i in range(len(rates))], list(rates) if link == links[0] else [""] * len(rates), fontsize=8)
        plot.set_title("link unlimited" if link == "unlimited" else f"{link} Mbit/s", fontsize=9)
        plot.set_xlim(0, 1.3 * max(r[link] for r in rates.values()))
        plot.set_xlabel("tokens/s", fontsize=8)
        plot.tick_params(axis="x", labelsize=7)
        for side in ("top", "right"):
            plot.spines[side].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["bytes", "hosts"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--mbit", type=int, nargs="+", default=[30, 300])
    parser.add_argument("--draw", type=Path, default=None)
    args = parser.parse_args()
    about = {"machine": machine() | {"threads": 1}, "model": MODEL, "layers": LAYERS, "grid": GRID, "batch": BATCH}
    if args.what == "bytes":
        write(__file__, "bytes", about | compare_bytes())
        return
    result = about | {"ranks": RANKS, "hosts": 2} | compare_seconds(args.steps, args.mbit)
    write(__file__, "two_hosts", result)
    if args.draw:
        draw(result, args.draw)


if __name__ == "__main__":
    main()
