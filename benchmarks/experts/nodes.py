"""How many bytes leave a node for experts elsewhere, with and without a limit on the groups that a token may choose from?

64 experts in 8 groups lie on 8 simulated nodes of one expert rank each, so that what the counters of `ep` see leaves a node. One layer of
width 1024 in bf16, 8 experts per token, a new router, random tokens; forward and backward of a step. The first row sends a row for each
expert, the others a copy of a token to each node that it meets.

    python -m benchmarks.experts.nodes
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import LR, machine, next_token_batch, toy, trained, write
from megascale.config.schema import Model, Parallel
from megascale.train.engines.engine import backward
from tests.ranks import run_ranks

NODES, SEQ, SEED = 8, 512, 1
MOE: dict[str, Any] = {"num_experts": 64, "top_k": 8, "ffn_size": 32, "router": "sigmoid", "aux_loss": 0.0, "z_loss": 0.0}
LIMITS: dict[str, dict[str, int]] = {"no groups": {}, **{f"at most {n} of 8": {"groups": 8, "top_groups": n} for n in (8, 4, 3, 2, 1)}}


def bytes_between_nodes() -> list[int]:
    """Bytes that this rank has sent over ep in a step, for each limit."""
    torch.set_num_threads(1)
    found = []
    for limit in LIMITS.values():
        model = Model(num_layers=1, hidden_size=1024, num_heads=8, ffn_size=32, vocab_size=256, moe=MOE | limit)  # type: ignore[arg-type]
        parallel, engine = trained(toy(model, SEQ, Parallel(ep=NODES, dp_shard=NODES), "bf16"), NODES, torch.device("cpu"))
        tokens = torch.randint(0, 256, (1, SEQ + 1), generator=torch.Generator().manual_seed(SEED + dist.get_rank()))
        parallel.mesh.traffic.take()
        backward(engine, [next_token_batch(tokens)], 1.0, LR)
        found.append(parallel.mesh.traffic.take()[0]["ep"])
    return found


def main() -> None:
    totals = [sum(ranks) for ranks in zip(*run_ranks(NODES, bytes_between_nodes, timeout=600))]
    rows = {
        name: {"bytes_per_token_and_layer": round(total / (NODES * SEQ), 1), "of_no_groups": round(total / totals[0], 3)}
        for name, total in zip(LIMITS, totals)
    }
    setting = {"nodes": NODES, "tokens_per_rank": SEQ, "hidden_size": 1024, "item": 2, **MOE}
    write(__file__, "nodes", {"machine": machine(), "setting": setting, "limits": rows})


if __name__ == "__main__":
    main()
