"""Makes smaller models from a trained one: weight subcloning (arXiv 2312.09299) and MatFormer's prefixes, as the same plans as growth."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megascale.checkpoint.index import read_index
from megascale.checkpoint.streaming import Progress
from megascale.config.norms import NormGrowth
from megascale.config.schema import Config, Data, Model, Optim, Train
from megascale.config.support import check
from megascale.errors import UsageError
from megascale.expand.axes import AxisMap, axis, same
from megascale.expand.depth import Layer
from megascale.expand.heads import channel_rows
from megascale.expand.importance import Importance, measure, ranked
from megascale.expand.maps import Maps, routing_space
from megascale.expand.plan import Growth, plan_tensors, refuse_unknown_parts, with_epsilons
from megascale.expand.produce import GrownTensors
from megascale.expand.proof import prove, prove_stored, some_tokens
from megascale.expand.report import describe
from megascale.expand.source import open_source, renamed
from megascale.expand.stack import growth_of, row_of
from megascale.expand.write import Effort, check_target, finish, write
from megascale.model.position import alibi_slopes
from megascale.model.residual import ends

RANKINGS = ("importance", "random", "reversed")


@dataclass(frozen=True)
class Smaller:
    """Sizes of the target; None: the source's. `ffn_sizes`: per target layer, prefixes of a MatFormer (Mix'n'Match)."""

    hidden_size: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    ffn_size: int | None = None
    num_layers: int | None = None
    ffn_sizes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Kept:
    """Source indices to keep: channels of the stream, layers, and per source layer its neurons, query heads and KV heads."""

    stream: list[int]
    layers: list[int]
    neurons: list[list[int]]
    query: list[list[int]]
    key_value: list[list[int]]


def smaller_model(source: Model, sizes: Smaller) -> Model:
    """The target's config. Raises UsageError for larger sizes, and for models that cannot shrink."""
    if source.qk_norm == "width" and (sizes.num_heads or sizes.num_kv_heads):
        raise UsageError("model.qk_norm is width: fewer heads would move its statistics; shrink hidden_size, ffn_size or num_layers")
    if source.family == "encoder_decoder":
        raise UsageError("model.family is encoder_decoder: shrinking is built for plain decoders and encoders")
    for key in ("moeut", "spacetime", "tokenformer", "ffn_sizes"):
        if getattr(source, key) is not None:
            raise UsageError(f"model.{key} is set: shrinking is built for plain decoders and encoders")
    refuse_unknown_parts(source)
    changes: dict[str, Any] = {}
    for key in ("hidden_size", "num_heads", "num_kv_heads", "ffn_size", "num_layers"):
        old, new = getattr(source, key), getattr(sizes, key)
        if new is not None and new > old:
            raise UsageError(f"--{key.replace('_', '-')} is {new} but the source has {old}: shrinking does not grow, megascale grow does")
        if new is not None and new < old:
            changes[key] = new
    if "num_heads" in changes and sizes.num_kv_heads is None and source.num_kv_heads == source.num_heads:
        changes["num_kv_heads"] = changes["num_heads"]
    if source.moe is not None and ("ffn_size" in changes or (source.moe.every > 1 and "num_layers" in changes)):
        raise UsageError("model.moe is set: widths of experts and every n-th layer stay as they are; shrink hidden_size or heads")
    heads, kv = changes.get("num_heads", source.num_heads), changes.get("num_kv_heads", source.num_kv_heads)
    if heads % kv or heads // kv > source.num_heads // source.num_kv_heads:
        raise UsageError(
            f"{heads} query heads over {kv} KV heads: each KV head keeps at most the {source.num_heads // source.num_kv_heads} it had"
        )
    if sizes.ffn_sizes is not None:
        if sizes.ffn_size is not None:
            raise UsageError("--ffn-size is one width for all layers and --ffn-sizes one for each: give one of the two")
        if source.matformer is None:
            raise UsageError("--ffn-sizes mixes prefixes that were trained together, but the source has no model.matformer: use --ffn-size")
        if len(sizes.ffn_sizes) != changes.get("num_layers", source.num_layers):
            raise UsageError(
                f"--ffn-sizes has {len(sizes.ffn_sizes)} widths but the target {changes.get('num_layers', source.num_layers)} layers"
            )
        changes["ffn_sizes"] = sizes.ffn_sizes
    if source.matformer is not None:
        wanted = sizes.ffn_sizes or ((sizes.ffn_size,) if sizes.ffn_size else ())
        untrained = [f for f in wanted if f not in source.nested_sizes]
        if untrained:
            raise UsageError(
                f"feed-forward width {untrained[0]} was not trained: model.matformer has {', '.join(map(str, source.nested_sizes))}"
            )
        if wanted:
            changes["matformer"] = None
    return source.model_copy(update=changes)


def choose(source: Model, target: Model, importance: Importance | None, ranking: str, seed: int) -> Kept:
    """What stays, by importance (None: nothing has to go but a MatFormer's neurons)."""
    number = source.num_layers
    layers = list(range(number))
    if target.num_layers < number:
        assert importance is not None and importance.without is not None
        # Never the first or the last block: what they do, no other does.
        inner = sorted(range(1, number - 1), key=lambda i: importance.without[i])  # type: ignore[index]
        drop = inner[: number - target.num_layers]
        if target.num_layers < 2:
            raise UsageError(f"--num-layers is {target.num_layers}: the first and the last block stay, choose at least 2")
        layers = [i for i in layers if i not in drop]
    stream = list(range(source.hidden_size))
    neurons, query, key_value = [], [], []
    if target.hidden_size < source.hidden_size:
        assert importance is not None
        stream = ranked(importance.stream, target.hidden_size, ranking, seed)
    group, keep = source.num_heads // source.num_kv_heads, target.num_heads // target.num_kv_heads
    for i in range(number):
        width = target.ffn_size if target.ffn_sizes is None or i not in layers else target.ffn_sizes[layers.index(i)]
        how = "prefix" if source.matformer is not None or width == source.ffn_size else ranking
        scores = torch.zeros(source.ffn_size) if importance is None or not len(importance.neurons[i]) else importance.neurons[i]
        neurons.append(ranked(scores, width, how, seed + i))
        if target.num_heads == source.num_heads and target.num_kv_heads == source.num_kv_heads:
            query.append(list(range(source.num_heads)))
            key_value.append(list(range(source.num_kv_heads)))
            continue
        assert importance is not None
        of_groups = importance.heads[i].unflatten(0, (-1, group))
        kv = ranked(of_groups.sum(1), target.num_kv_heads, ranking, seed + i)
        key_value.append(kv)
        query.append([g * group + q for g in kv for q in ranked(of_groups[g], keep, ranking, seed + i)])
    return Kept(stream, layers, neurons, query, key_value)


def plan_shrink(source: Model, seq_len: int, target: Model, kept: Kept) -> Growth:
    """The plan that keeps these indices, as data: the tables of growth with maps to fewer indices."""
    d = source.hidden_size
    assert source.vocab_size
    maps = Maps({}, target)
    growth = growth_of(source)
    ratio = 1.0 if growth.power is None else d / target.hidden_size
    maps.gain, maps.eps_factor["stream"] = growth.gain(ratio), ratio
    stream = axis(kept.stream, d)
    head = same(source.head_dim)
    maps.axes |= {"one": same(1), "routing": routing_space(source), "vocabulary": same(source.vocab_size), "positions": same(seq_len)}
    maps.axes |= {"stream": stream, "read": stream, "gain": stream.scaled(maps.gain), "shift": stream, "scale": stream}
    maps.axes |= {"query_norm": _norm_axis(source, source.num_heads), "key_norm": _norm_axis(source, source.num_kv_heads)}
    maps.by_layer = frozenset(("query", "key", "value", "heads", "heads_gain", "heads_shift", "ffn", "ffn_out", "ffn_gain", "ffn_shift"))
    for i in range(source.num_layers):
        neurons = axis(kept.neurons[i], source.ffn_size)
        query = channel_rows(axis(kept.query[i], source.num_heads), head)
        key_value = channel_rows(axis(kept.key_value[i], source.num_kv_heads), head)
        own = {"query": query, "key": key_value, "value": key_value, "heads": query, "ffn": neurons, "ffn_out": neurons}
        own |= _inner(growth, "heads", query) | _inner(growth, "ffn", neurons)
        maps.axes |= {f"{name}@{i}": a for name, a in own.items()}
    if source.qk_norm or source.residual_row.qk_norm:
        maps.eps_factor["qk_norm"] = 1.0  # a head keeps all channels
    if source.residual_row.inner_norms and growth.power is not None:
        maps.eps_factor |= {
            "attention_inner_norm": source.num_heads / target.num_heads,
            "ffn_inner_norm": source.ffn_size / (target.ffn_size or source.ffn_size),
        }
    if source.moe is not None:
        experts, width = source.moe.num_experts, source.moe.ffn_size or source.ffn_size
        maps.axes |= {"experts": same(experts), "routes": same(experts), "expert": same(width), "expert_out": same(width)}
        maps.axes |= {"together": same(source.moe.num_shared * width), "together_out": same(source.moe.num_shared * width)}
    maps.fold = ends(source).hidden_factor / ends(target).hidden_factor
    layers = tuple(Layer(i) for i in kept.layers)
    own_rows = [row_of(source, i) for i in kept.layers]
    target = target.model_copy(update={"layer_coefficients": None})
    if any((row_of(target, n).skip, row_of(target, n).branch) != (r.skip, r.branch) for n, r in enumerate(own_rows)):
        target = target.model_copy(update={"layer_coefficients": tuple((r.skip, r.branch) for r in own_rows)})
    if source.position_row.slopes and target.num_heads < source.num_heads:
        slopes = source.alibi_slopes or alibi_slopes(source.num_heads)
        if len({tuple(q) for q in kept.query}) > 1:
            raise UsageError(
                "model.position is alibi: a head's slope is the same in all layers, so which heads stay cannot differ; keep num_heads"
            )
        target = target.model_copy(update={"alibi_slopes": tuple(slopes[h] for h in kept.query[0])})
    target = with_epsilons(target, source, layers, {}, maps)
    check(Config(model=target, train=Train(steps=1, seq_len=seq_len), data=Data(train="-"), optim=Optim(weight_decay=0.0)), 1)
    tensors = plan_tensors(source, target, (seq_len, seq_len), layers, maps, {})
    return Growth(source, target, (seq_len, seq_len), layers, maps.axes, tensors, "none", 0, (), (), ())


def _norm_axis(source: Model, heads: int) -> AxisMap:
    """The axis of QK-norm: a head's channels, or all heads'."""
    return same(source.head_dim * (heads if source.qk_norm == "width" else 1))


def _inner(growth: NormGrowth, name: str, kept: AxisMap) -> dict[str, AxisMap]:
    """Changes of a norm over these channels: the kept ones are as large as if the others had been zero."""
    return {f"{name}_gain": kept.scaled(growth.gain(kept.old / kept.size)), f"{name}_shift": kept}


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
    importance = None if by_prefix else measure(opened.model, opened.seq_len, opened.read, tokens, fewer_layers)
    kept = choose(opened.model, model, importance, ranking, seed)
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
        "kept": {"stream": kept.stream, "layers": kept.layers, "neurons": kept.neurons, "query": kept.query, "key_value": kept.key_value},
        "without_block": None if importance is None else importance.without,
        "proof": {"tokens": told, "transform": transform, **stored},
        "seconds": round(time.perf_counter() - begun, 2),
    }
