"""The graphs that torch.compile makes of a block and the loss: the real model on meta tensors, and a backend that only keeps graphs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from megascale.config.schema import Config, Parallel
from megascale.data.loader import Batch
from megascale.model import attention
from megascale.parallel.recompute import wrap_blocks
from megascale.schedule.accumulate import Accumulation
from megascale.train.build import place_model

META = torch.device("meta")


def captured(config: Config) -> dict[str, torch.fx.GraphModule]:
    """Name → graph, of each kind of layer of the config and of its loss, forward and backward as AOTAutograd partitions them for Inductor;
    its `meta["runs"]` says how often a micro-batch runs it. One rank computes whole layers: without the axes that would cut them. It
    changes torch, so it needs a process of its own.
    """
    import torch._functorch.partitioners
    import torch._inductor.config as settings

    torch._dynamo.reset()
    partitioners: Any = torch._functorch.partitioners
    functional: Any = torch.nn.functional
    whole = place_model(config.model_copy(update={"parallel": Parallel()}), 1, META)
    found: dict[str, torch.fx.GraphModule] = {}
    asked = config.parallel
    wrap_blocks(whole.stages[0], asked.recompute, keeping(found), asked.budget)
    functional.scaled_dot_product_attention = cudnn_attention
    grouped: Any = attention
    grouped.flex_attention = one_call
    # Attention may drop out, so a recomputed one would come with the state of a generator, which there is none of. We never use it.
    partitioners.functionalize_rng_ops = lambda joint, forward, backward, symbols: (forward, backward)
    with settings.patch(joint_graph_constant_folding=False):  # it would compute constants, and there is nothing to compute with
        Accumulation(whole).run([meta_batch(config)], 1.0)
    return found


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **_: Any) -> Tensor:
    """The kernel that torch chooses on Hopper. On meta tensors it would take its formula with all scores."""
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, attn_mask, True, 0.0, is_causal)[0]  # type: ignore[no-any-return]


def one_call(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """FlexAttention reads and writes the same tensors in one kernel of its own, and refuses meta tensors."""
    return cudnn_attention(q, k, v, is_causal=True)


def meta_batch(config: Config) -> Batch:
    t, fields = config.train, config.model.spacetime
    if fields is not None:
        values = torch.empty(t.micro_batch_size, fields.frames, *fields.shape[1:], fields.channels, device=META)
        targets = torch.empty(t.micro_batch_size, fields.tokens, dtype=torch.int64, device=META)
        return Batch(values, targets, None, None, torch.empty(t.micro_batch_size, dtype=torch.int64, device=META), targets.numel())
    tokens = torch.empty(t.micro_batch_size, t.seq_len, dtype=torch.int64, device=META)
    samples = torch.empty(t.micro_batch_size, dtype=torch.int64, device=META)
    source = torch.empty(t.micro_batch_size, t.source_length, dtype=torch.int64, device=META) if config.model.encoder_layers else None
    return Batch(tokens, tokens, None, None, samples, tokens.numel(), source)


def results(graph: torch.fx.GraphModule, *_: Any) -> list[Any]:
    """What a graph would return, without running it: some operators, such as those that keep a generator's state, refuse meta tensors."""
    graph.meta["runs"] = graph.meta.get("runs", 0) + 1
    (output,) = next(iter(graph.graph.find_nodes(op="output"))).args
    values = [n.meta["val"] if isinstance(n, torch.fx.Node) else n for n in output]
    return [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=META) if isinstance(v, Tensor) else v for v in values]


def keeping(found: dict[str, torch.fx.GraphModule]) -> Any:
    """A backend of torch.compile that keeps the graphs Inductor would get, in `found`."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor.compile_fx import partition_fn
    from torch._inductor.decomposition import select_decomp_table

    def keep(part: str) -> Any:
        def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            number = sum(name.endswith(part) for name in found)
            found[f"{number}: {part}"] = graph
            return make_boxed_func(partial(results, graph))

        return compiler

    return aot_autograd(
        fw_compiler=keep("forward"),
        bw_compiler=keep("backward"),
        inference_compiler=keep("inference"),
        partition_fn=partition_fn,
        decompositions=select_decomp_table(),
    )
