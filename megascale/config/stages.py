"""Which layers each pipeline stage holds and which rank holds each stage. Imports no torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import inf

from megascale.config.schema import Model, Parallel

# Two stages per rank, the second on the way back: the first and the last stage share rank 0 (Qi et al., arXiv 2401.10241).
V_SHAPED = ("zbv", "dualpipev")
# They compute weight gradients apart from the gradients that the stage before waits for.
SPLIT_BACKWARD = ("interleaved_zero_bubble", "zbv", "dualpipev")


@dataclass(frozen=True)
class StagePart:
    """What one stage holds: global layer numbers, and whether it has the embedding (`first`) and the head (`last`)."""

    layers: range
    first: bool = True
    last: bool = True

    def of_stack(self, begin: int, count: int) -> range:
        """The part's layers in a stack of `count` layers that begins at global number `begin`, counted from 0 within the stack."""
        first = min(max(self.layers.start - begin, 0), count)
        return range(first, min(max(self.layers.stop - begin, first), count))


def stages_of_rank(schedule: str, ranks: int, virtual: int, rank: int) -> list[int]:
    """Stage numbers of one pipeline rank, ascending: rank + ranks·v, or a V for zbv and dualpipev."""
    if schedule in V_SHAPED:
        return [rank, 2 * ranks - 1 - rank]
    return [rank + ranks * v for v in range(virtual)]


def split_layers(layers: int, stages: int, cost: float, before: float, after: float) -> list[range]:
    """Contiguous layers for each stage so that the most expensive stage is as cheap as possible.

    `cost` of a layer in any unit; `before` (embedding) and `after` (head and loss) add to the first and the last stage, which may get no
    layers; the others get at least one. A remainder goes to the earlier stages, which wait less at the end.
    """
    count = [0 if i in (0, stages - 1) else 1 for i in range(stages)]
    load = [n * cost for n in count]
    load[0] += before
    load[-1] += after
    for _ in range(layers - sum(count)):
        lightest = min(range(stages), key=lambda i: load[i])
        count[lightest] += 1
        load[lightest] += cost
    return [range(sum(count[:i]), sum(count[: i + 1])) for i in range(stages)]


def has_experts(model: Model, layer: int) -> bool:
    """Whether the layer's feed-forward sublayer is a mixture of experts: every n-th layer, the first being layer n."""
    moe = model.of_kind(model.kind_at(layer)).moe if model.kinds else model.moe
    return moe is not None and (layer + 1) % moe.every == 0


def split_unequal(costs: Sequence[float], stages: int, before: float, after: float) -> list[range]:
    """`split_layers` for layers of different costs: minimizes the cost of the most expensive stage."""
    n = len(costs)
    ends = [0.0, *accumulate(costs)]
    # cheapest[j]: the most expensive stage so far if they hold j layers; begins[s][j]: where the last of them begins.
    cheapest = [before + c for c in ends]
    begins: list[list[int]] = []
    for stage in range(1, stages):
        last = stage == stages - 1
        found, begin = [inf] * (n + 1), [0] * (n + 1)
        rising = [c + e for c, e in zip(cheapest, ends)]
        for j in range(stage - 1 if last else stage, n + 1):
            end = ends[j] + (after if last else 0.0)
            # With every layer the stages before cost more and this one less: the best cut is where they meet, or just before.
            first, stop = stage - 1, j + 1 if last else j
            meet = bisect_left(rising, end, first, stop)
            for i in (meet, meet - 1):
                if first <= i < stop and max(cheapest[i], end - ends[i]) < found[j]:
                    found[j], begin[j] = max(cheapest[i], end - ends[i]), i
        cheapest = found
        begins.append(begin)
    borders = [n]
    for begin in reversed(begins):
        borders.append(begin[borders[-1]])
    return [range(a, b) for a, b in pairwise([0, *reversed(borders)])]


def split_kinds(model: Model, stages: int, costs: Mapping[str, tuple[float, float, float]]) -> list[range]:
    """The layers of each stage. `costs` by kind of layer: of one layer, of the embedding and of the head."""
    _, before, after = next(iter(costs.values()))
    if not model.kinds:
        return split_layers(model.num_layers, stages, costs[""][0], before, after)
    return split_unequal([costs[model.kind_at(i)][0] for i in range(model.num_layers)], stages, before, after)


def estimated_costs(model: Model, seq_len: int) -> tuple[float, float, float]:
    """Forward FLOPs per token of one layer, of the embedding and of the head; a lookup costs memory traffic but hardly FLOPs. If only some
    layers have experts, a layer costs the mean.
    """
    d, heads, kv = _widths(model)
    products, pair = _products(model), model.attention_row.pair_flops(model)
    if model.spacetime is not None:
        mean = sum(model.spacetime.grid) / len(model.spacetime.grid)
        text = model.spacetime.text_len or 0
        told = 4.0 * d * heads + 4.0 * heads * text + 4.0 * d * kv * text / model.spacetime.tokens if text else 0.0
        return 2.0 * products + pair * mean + told, 2.0 * d * model.spacetime.values, 2.0 * d * model.spacetime.values
    assert model.vocab_size is not None
    window = min(seq_len, model.sliding_window or seq_len)
    layer = 2.0 * products + 0.5 * pair * window + model.attention_row.token_flops(model)
    head = 2.0 * d * model.vocab_size
    return layer, 0.0, head + model.mtp_depth * (layer + 4.0 * d * d + head)


def pair_costs(model: Model, seq_len: int, source_len: int) -> tuple[float, float, float]:
    """Forward FLOPs per sample of one encoder layer, of one decoder layer and of the head."""
    assert model.vocab_size is not None
    d, heads, kv = _widths(model)
    products, pair = _products(model), model.attention_row.pair_flops(model)
    encoder = source_len * (2.0 * products + pair * source_len)
    cross = seq_len * (4.0 * d * heads + 4.0 * heads * source_len) + source_len * 4.0 * d * kv
    return encoder, seq_len * (2.0 * products + 0.5 * pair * seq_len) + cross, seq_len * 2.0 * d * model.vocab_size


def keys_met(cfg: Model, seq_len: int, documents: Sequence[int] = ()) -> float:
    """Mean number of keys per query of a text.

    The whole sequence, although causal masks skip half, as is customary; but with a sliding window, or inside `documents` (their lengths in
    some samples; empty if attention may cross them), exactly what is computed.
    """
    window = min(cfg.sliding_window or seq_len, seq_len)
    if window == seq_len and not documents:
        return float(seq_len)
    met = sum(_pairs(length, min(window, length)) if cfg.causal else length**2 for length in documents or (seq_len,))
    return met / sum(documents or (seq_len,))


def _pairs(length: int, window: int) -> int:
    """Query-key pairs if each of `length` tokens attends to the last `window`, including itself."""
    return window * (2 * length - window + 1) // 2


def _widths(model: Model) -> tuple[int, int, int]:
    """Widths of the stream, of all query heads and of all KV heads."""
    return model.hidden_size, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim


def _products(model: Model) -> float:
    """Weights per layer that a token passes through, without cross-attention."""
    width: float = model.ffn_size
    if model.moe is not None and model.moe.ffn_size is not None:
        share = sum(has_experts(model, i) for i in range(model.num_layers)) / model.num_layers
        width += share * ((model.moe.top_k + model.moe.num_shared) * model.moe.ffn_size - model.ffn_size)
    return model.attention_row.weights(model) + model.hidden_size * width * model.ffn_row.matrices


def layered_parts(layers: int) -> list[StagePart]:
    """The finest stages: the embedding, every layer, and the final norm with the head, all on one rank."""
    blocks = [StagePart(range(i, i + 1), False, False) for i in range(layers)]
    return [StagePart(range(0), True, False), *blocks, StagePart(range(layers, layers), False, True)]


def stage_parts(model: Model, parallel: Parallel, seq_len: int, source_len: int = 0) -> list[StagePart]:
    """The part of every stage, in stage order. A single one if neither a pipeline nor layered accumulation splits the model."""
    if parallel.accumulation == "layered":
        return layered_parts(model.total_layers)
    stages = parallel.pp * parallel.stages_per_rank
    if parallel.pp_layers is not None:
        ends = [sum(parallel.pp_layers[: i + 1]) for i in range(stages)]
        ranges = [range(end - n, end) for end, n in zip(ends, parallel.pp_layers)]
    elif model.encoder_layers is not None:
        encoder, decoder, head = pair_costs(model, seq_len, source_len)
        ranges = split_unequal([encoder] * model.encoder_layers + [decoder] * model.num_layers, stages, 0.0, head)
    else:
        ranges = split_kinds(model, stages, {name: estimated_costs(m, seq_len) for name, m in model.variants.items()})
    return [StagePart(layers, i == 0, i == stages - 1) for i, layers in enumerate(ranges)]
