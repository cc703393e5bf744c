"""What a trace costs and says: every shipped config at its stated size, and a trillion parameters on 4,096 ranks.

    python -m benchmarks.planning.trace [NAME …]

CPU seconds of the tracing process for one rank and its resident memory, beside peak bytes, model time and waits of the host. It needs no
data and no GPU.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.common import write
from megascale.config.layout import axis_sizes, describe
from megascale.config.load import load_config
from megascale.config.support import check
from megascale.sizes import byte_words
from megascale.trace.run import Asked, TraceFailedError, trace

TRILLION = ["model.num_layers=192", "model.hidden_size=20480", "model.num_heads=160", "model.ffn_size=65536", "parallel.pp=16"]
# Config, ranks, and overrides: those with a tokenizer of their own need the number of its pieces.
CASES: dict[str, tuple[str, int, list[str]]] = {
    **{name: (name, 8, []) for name in ("llama-1m", "llama-29m", "llama-125m", "llama-1.2b", "moeut-1.04b")},
    **{name: (name, 1, ["model.vocab_size=8000"]) for name in ("moeut-44m", "mus-fp8", "quickstart")},
    **{name: (name, 1, ["model.vocab_size=256"]) for name in ("depth-100", "depth-200", "depth-1000")},
    "translate": ("translate", 4, ["model.vocab_size=2000"]),
    "shallow-water": ("shallow-water", 2, ["parallel.cp=2", "parallel.cp_method=dsp"]),
    "llama-8b": ("llama-8b", 64, []),
    "llama-70b": ("llama-70b", 512, []),
    "llama-405b": ("llama-405b", 4096, []),
    "mixtral-8x7b": ("mixtral-8x7b", 64, []),
    "olmo3-7b": ("olmo3-7b", 64, []),
    # torch's grouped product has no rule for fp32 on CUDA without a device.
    "hybrid-30m": ("hybrid-30m", 1, ["model.vocab_size=8000", "precision.compute=bf16"]),
    "gpt-oss-20b": ("gpt-oss-20b", 64, []),
    "qwen3-next-80b": ("qwen3-next-80b", 256, []),
    "deepseek-v3": ("deepseek-v3", 2048, []),
    "1T": ("llama-405b", 4096, TRILLION),
}


def traced(name: str) -> dict[str, Any]:
    file, ranks, overrides = CASES[name]
    config = check(load_config(f"configs/{file}.yaml", overrides), ranks)
    try:
        found = trace(config, ranks, Asked())
    except TraceFailedError as error:
        return {"failed": str(error)}
    facts = found["ranks"]["0"]
    sizes = axis_sizes(config.parallel, ranks)
    return {
        "ranks": ranks,
        "layout": describe(config.parallel),
        "axes": {axis: n for axis, n in sizes.items() if n > 1},
        "runs": facts["runs"],
        "cpu_seconds": round(facts["cpu_seconds"], 1),
        "resident_bytes": found["resident_bytes"],
        "peak": byte_words(sum(facts["peak_bytes"].values())),
        "peak_bytes": {kind: round(n) for kind, n in facts["peak_bytes"].items()},
        "sent_bytes": {axis: round(n) for axis, n in facts["sent_bytes"].items()},
        "rank_seconds": facts["rank_seconds"],
        "exposed_seconds": facts["exposed_seconds"],
        "kernels": round(facts["kernels"]),
        "host_syncs": {where: round(n) for where, n in facts["host_syncs"].items()},
        "wrong_device": facts["wrong_device"],
    }


if __name__ == "__main__":
    write(__file__, "trace", {name: traced(name) for name in sys.argv[1:] or CASES})
