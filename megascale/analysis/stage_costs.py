"""Measures the cost of a layer, the embedding and the head on this machine, and the `parallel.pp_layers` that balances stages."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from megascale.config.schema import Config
from megascale.config.stages import StagePart, estimated_costs, split_kinds
from megascale.config.support import check
from megascale.data.vocabulary import resolve_vocabulary
from megascale.errors import UsageError
from megascale.launch.ranks import RankInfo
from megascale.model.decoder import Decoder
from megascale.model.ops.norm_kernels import choose_kernels
from megascale.model.shape import DTYPES, Shape
from megascale.parallel.kernels import call_norm_kernel
from megascale.train.device import choose_device

WARM, ROUNDS = 1, 7


def balance(config: Config) -> None:
    """Prints the forward and backward time of each part at the config's micro-batch, and the split by measured and by estimated cost."""
    p = config.parallel
    if p.pp == 1:
        raise UsageError("parallel.pp is 1, so there are no stages to balance: add parallel.pp=4")
    if config.model.family != "decoder":
        raise UsageError(f"model.family is {config.model.family}, but this tool measures decoders: set parallel.pp_layers by hand")
    config = check(resolve_vocabulary(config), p.pp * p.tp * p.cp)
    device = choose_device(config, RankInfo())
    model, stages = config.model, p.pp * p.stages_per_rank
    firsts = {kind: model.layers_of(kind)[0] for kind in model.variants}
    parts = [(f"a layer {kind}".rstrip(), StagePart(range(i, i + 1), False, False)) for kind, i in firsts.items()]
    parts += [("embedding", StagePart(range(0), True, False)), ("head and loss", StagePart(range(0), False, True))]
    costs: list[float] = []
    for name, part in parts:
        costs.append(seconds(config, part, device))
        # Print each at once: a large model takes minutes on a CPU.
        print(f"{name:<14}{costs[-1] * 1e3:10.2f} ms forward and backward, {costs[-1] / costs[0]:6.2f} layers", flush=True)
    *own, before, after = costs
    took = dict(zip(firsts, own))
    guess = {kind: estimated_costs(m, config.train.seq_len) for kind, m in model.variants.items()}
    layer = [took[model.kind_at(i) if model.kinds else ""] for i in range(model.num_layers)]
    for name, by in (("estimated", guess), ("measured", {kind: (cost, before, after) for kind, cost in took.items()})):
        split = split_kinds(model, stages, by)
        loads = [sum(layer[r.start : r.stop]) + before * (i == 0) + after * (i == stages - 1) for i, r in enumerate(split)]
        words = ",".join(str(len(r)) for r in split)
        print(f"by {name} cost: parallel.pp_layers=[{words}], dearest stage {max(loads) / statistics.mean(loads):.2f} of the mean")


def seconds(config: Config, part: StagePart, device: torch.device) -> float:
    """Minimum seconds of one micro-batch through a stage with `part`, unsharded (tp shards all parts alike).

    The minimum over rounds, since other load on the machine only adds to a round.
    """
    t, cfg = config.train, config.model
    compute = DTYPES[config.precision.compute]
    shape = Shape(t.seq_len, compute, compute)
    with torch.device(device):
        stage = Decoder(cfg, shape, part)
        call_norm_kernel(stage, choose_kernels(config.run.kernels, cfg.norm, device).norm)
        stage = stage.to_empty(device=device)
        for parameter in stage.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        tokens = torch.randint(0, cfg.vocab_size or 1, (t.micro_batch_size, t.seq_len))
        stream = None if part.first else torch.randn(t.micro_batch_size, t.seq_len, cfg.hidden_size, dtype=compute, requires_grad=True)

    def once() -> float:
        start = time.perf_counter()
        y: Tensor = stage(tokens, tokens if part.last else None, stream=stream, scale=1.0)
        (y if part.last else y.sum()).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return min([once() for _ in range(WARM + ROUNDS)][WARM:])
