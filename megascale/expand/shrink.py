"""Makes smaller models from a trained one: weight subcloning (arXiv 2312.09299) and MatFormer's prefixes, as the same plans as growth."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megascale.checkpoint.index import read_index
from megascale.checkpoint.streaming import Progress
from megascale.config.schema import Config, Data, Model, Optim, Train
from megascale.config.support import check
from megascale.errors import UsageError
from megascale.expand.attention import AttentionMaps
from megascale.expand.axes import AxisMap, axis, beside, same
from megascale.expand.block import BlockMaps, routing_space
from megascale.expand.depth import Layer
from megascale.expand.importance import Importance, measure, ranked
from megascale.expand.inner import inner_sizes
from megascale.expand.kinds import with_kinds
from megascale.expand.maps import Maps
from megascale.expand.normed import kept_gain
from megascale.expand.plan import Growth, with_epsilons
from megascale.expand.produce import GrownTensors
from megascale.expand.proof import prove, prove_stored, some_tokens
from megascale.expand.report import describe
from megascale.expand.said import attention_growth, growth_of
from megascale.expand.smaller import Smaller, cheapest_layers, removable, smaller_model, turn_of
from megascale.expand.source import open_source, renamed
from megascale.expand.stack import PATTERNS, check_layers, with_layers
from megascale.expand.tensors import plan_tensors
from megascale.expand.write import Effort, check_target, finish, write
from megascale.model.position import alibi_slopes
from megascale.model.residual import ends
from megascale.plugins import resolve

RANKINGS = ("importance", "random", "reversed")


@dataclass(frozen=True)
class Kept:
    """Source indices to keep: channels of the stream, layers, and per source layer its neurons, query heads, KV heads, and what its
    attention has inside by size; those of modules of multi-token prediction follow.
    """

    stream: list[int]
    layers: list[int]
    neurons: list[list[int]]
    query: list[list[int]]
    key_value: list[list[int]]
    inner: list[dict[str, list[int]]]


def choose(source: Model, target: Model, importance: Importance | None, ranking: str, seed: int, drop: tuple[int, ...] = ()) -> Kept:
    """What stays, by importance (None: nothing has to go but a MatFormer's neurons); of layers, all but those to `drop`, if any."""
    number = source.num_layers
    layers = [i for i in range(number) if i not in drop]
    if target.num_layers < len(layers):
        assert importance is not None and importance.without is not None
        if target.num_layers < 2:
            raise UsageError(f"--num-layers is {target.num_layers}: the first and the last block stay, choose at least 2")
        layers = cheapest_layers(source, target.num_layers, importance.without)
    stream = list(range(source.hidden_size))
    if target.hidden_size < source.hidden_size:
        assert importance is not None
        stream = ranked(importance.stream, target.hidden_size, ranking, seed)
    kept = Kept(stream, layers, [], [], [], [])
    for i in range(number + target.mtp_depth):
        kind = source.kind_at(i) if source.kinds else ""
        own, new = source.variants[kind], _of_kind(source, target, kind)
        width = new.ffn_size if target.ffn_sizes is None or i not in layers else target.ffn_sizes[layers.index(i)]
        how = "prefix" if source.matformer is not None or width == own.ffn_size else ranking
        scores = torch.zeros(own.ffn_size) if importance is None or not len(importance.neurons[i]) else importance.neurons[i]
        kept.neurons.append(ranked(scores, width, how, seed + i))
        query, key_value = _heads(own, new, None if importance is None else importance.heads[i], ranking, seed + i)
        kept.query.append(query)
        kept.key_value.append(key_value)
        kept.inner.append(_inner(own, new, None if importance is None else importance.inner[i], ranking, seed + i))
    return kept


def _of_kind(source: Model, target: Model, kind: str) -> Model:
    """The target's config of a kind of layer; the source's if no such layer stays."""
    return target if not kind else target.of_kind(kind) if kind in target.kinds else source.of_kind(kind)


def _heads(source: Model, target: Model, scores: torch.Tensor | None, ranking: str, seed: int) -> tuple[list[int], list[int]]:
    """The query heads and KV heads of a layer that stay, by the query heads' `scores`."""
    same_heads = (target.num_heads, target.num_kv_heads) == (source.num_heads, source.num_kv_heads)
    if same_heads or source.attention_row.scans:
        return list(range(source.num_heads)), list(range(source.num_kv_heads))
    assert scores is not None
    group, keep = source.num_heads // source.num_kv_heads, target.num_heads // target.num_kv_heads
    of_groups = scores.unflatten(0, (-1, group))
    kv = ranked(of_groups.sum(1), target.num_kv_heads, ranking, seed)
    return [g * group + q for g in kv for q in ranked(of_groups[g], keep, ranking, seed)], kv


def _inner(source: Model, target: Model, scores: Mapping[str, torch.Tensor] | None, ranking: str, seed: int) -> dict[str, list[int]]:
    """What stays of an attention's latents, channels and own heads, by size."""
    was, now = inner_sizes(source), inner_sizes(target)
    found = {key: list(range(size)) for key, size in was.items()}
    if scores is None or was == now:
        return found
    for key in ("kv_rank", "query_rank", "value_dim", "key_dim"):
        if key in was and now[key] < was[key]:
            found[key] = ranked(scores[key], now[key], ranking, seed)
    if "conv_size" in was:
        found["conv_size"] = found["conv_size"][was["conv_size"] - now["conv_size"] :]  # the nearest tokens
    if "key_heads" in was:
        of_groups = scores["value_heads"].unflatten(0, (was["key_heads"], -1))
        group, keep = of_groups.shape[1], now["value_heads"] // now["key_heads"]
        found["key_heads"] = ranked(of_groups.sum(1), now["key_heads"], ranking, seed)
        found["value_heads"] = [g * group + h for g in found["key_heads"] for h in ranked(of_groups[g], keep, ranking, seed)]
    return found


def plan_shrink(source: Model, seq_len: int, target: Model, kept: Kept) -> Growth:
    """The plan that keeps these indices, as data: the tables of growth with maps to fewer indices."""
    assert source.vocab_size
    layers = tuple(Layer(i) for i in kept.layers)
    target = with_layers(source, target, layers, {})
    check_layers(source, with_layers(source, source, layers, {key: getattr(target, key) for key in PATTERNS}), layers)
    maps = Maps({"one": same(1), "vocabulary": same(source.vocab_size), "positions": same(seq_len)}, target)
    growth, stream = growth_of(source), axis(kept.stream, source.hidden_size)
    ratio = 1.0 if growth.power is None else source.hidden_size / target.hidden_size
    maps.gain, maps.eps_factor = growth.gain(ratio), ratio
    maps.axes |= {"stream": stream, "read": stream, "read_both": beside(stream, stream), "query_source": stream}
    maps.axes |= {"gain": stream.scaled(maps.gain), "shift": stream, "scale": stream}
    for kind, own in source.variants.items():
        new = _of_kind(source, target, kind)
        maps.blocks[kind] = block = BlockMaps(own, new, {"routing": routing_space(own), **_experts(own)})
        if own.residual_row.inner_norms and growth.power is not None:
            block.eps_factor["ffn_inner_norm"] = own.ffn_size / (new.ffn_size or own.ffn_size)
        maps.axes |= {f"{name}@{kind}" if kind else name: a for name, a in block.axes.items()}
    for i, scope in enumerate([*map(str, range(source.num_layers)), *(f"mtp.{k}" for k in range(target.mtp_depth))]):
        block = maps.blocks[source.kind_at(i) if source.kinds else ""]
        maps.axes |= {f"{name}@{scope}": a for name, a in _layer(block, kept, i).items()}
    _slopes(source, maps, kept)
    variants = {kind: block.target for kind, block in maps.blocks.items() if kind in target.variants}
    maps.target = target = with_kinds(target, source, variants)
    maps.fold = ends(source).hidden_factor / ends(target).hidden_factor
    target = with_epsilons(target, source, layers, {}, maps)
    check(Config(model=target, train=Train(steps=1, seq_len=seq_len), data=Data(train="-"), optim=Optim(weight_decay=0.0)), 1)
    tensors = plan_tensors(source, target, (seq_len, seq_len), layers, maps, {})
    return Growth(source, target, (seq_len, seq_len), layers, maps.axes, tensors, "none", 0, (), (), ())


def _layer(block: BlockMaps, kept: Kept, layer: int) -> dict[str, AxisMap]:
    """The maps of one layer's heads and neurons."""
    own, growth = block.source, growth_of(block.source)
    neurons = axis(kept.neurons[layer], own.ffn_size)
    cut = resolve(attention_growth(own).cut, f"growth of the attention {own.attention}")
    inside = {"inside": kept.inner[layer]} if kept.inner[layer] else {}
    attention: AttentionMaps = cut(own, block.target, kept.query[layer], kept.key_value[layer], **inside)
    block.eps_factor |= attention.eps
    return {**attention.axes, "ffn": neurons, "ffn_out": neurons, "ffn_gain": kept_gain(growth, neurons), "ffn_shift": neurons}


def _experts(own: Model) -> dict[str, AxisMap]:
    """The maps of experts, all of which stay."""
    if own.moe is None:
        return {}
    experts, width = same(own.moe.num_experts), same(own.moe.ffn_size or own.ffn_size)
    together = same(own.moe.num_shared * width.size)
    return {"experts": experts, "routes": experts, "expert": width, "expert_out": width, "together": together, "together_out": together}


def _slopes(source: Model, maps: Maps, kept: Kept) -> None:
    """Under ALiBi every head keeps its slope."""
    for kind, block in maps.blocks.items():
        own = block.source
        if not own.position_row.slopes or block.target.num_heads == own.num_heads:
            continue
        choices = {tuple(kept.query[i]) for i in source.layers_of(kind)}
        if len(choices) > 1:
            raise UsageError(
                "model.position is alibi: a head's slope is the same in all layers, so which heads stay cannot differ; keep num_heads"
            )
        slopes = own.alibi_slopes or alibi_slopes(own.num_heads)
        block.target = block.target.model_copy(update={"alibi_slopes": tuple(slopes[h] for h in next(iter(choices)))})


def shrink(
    source: str | Path, target: Path, sizes: Smaller, ranking: str, seed: int, effort: Effort, progress: Progress | None = None
) -> dict[str, Any]:
    """Writes the smaller checkpoint (weights only) into `target` and returns the report. Errors as `grow`."""
    begun = time.perf_counter()
    if ranking not in RANKINGS:
        raise UsageError(f"--ranking is {ranking}: choose one of {', '.join(RANKINGS)}")
    opened = open_source(source, effort.check)
    model = smaller_model(opened.model, sizes)
    if model == opened.model:
        raise UsageError("nothing shrinks: name a size that is smaller than the source's, such as --num-layers or --hidden-size")
    if not effort.tokens:
        raise UsageError("--tokens is 0: importance is measured on tokens, give some")
    tokens, told = some_tokens(opened, effort)
    fewer_layers = model.num_layers < opened.model.num_layers
    by_prefix = opened.model.matformer is not None and not fewer_layers and (model.hidden_size, model.num_heads) == (
        opened.model.hidden_size, opened.model.num_heads
    )  # fmt: skip
    runs = (removable(opened.model), turn_of(opened.model)) if fewer_layers and not sizes.drop else None
    importance = None if by_prefix else measure(opened.model, opened.seq_len, opened.read, tokens, runs)
    kept = choose(opened.model, model, importance, ranking, seed, sizes.drop)
    plan = plan_shrink(opened.model, opened.seq_len, model, kept)
    made = GrownTensors(plan, opened.index)
    written = check_target(target, opened, made)
    config = renamed(opened.config, "shrunk").model_copy(update={"model": plan.target})
    transform = prove(opened, plan, GrownTensors(plan, opened.index, dtype=torch.float64), tokens)
    how = {"by": "shrink", "ranking": ranking}
    index = write(opened, target, made, config, how, effort, progress) if written is None else read_index(written)
    stored = prove_stored(opened, plan, index, tokens, transform)
    finish(target, config)
    return {
        "source": str(opened.index.folder),
        "target": str(index.folder),
        "verdict": stored["verdict"],
        **describe(plan, opened, config, index),
        "kept": asdict(kept),
        "without_block": None if importance is None else importance.without,
        "proof": {"tokens": told, "transform": transform, **stored},
        "seconds": round(time.perf_counter() - begun, 2),
    }
