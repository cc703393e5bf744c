"""The layers of the target and the coefficients that they keep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from megascale.config.schema import Model
from megascale.config.stages import has_experts
from megascale.errors import UsageError
from megascale.expand.depth import EXACT, Layer, grow_layers, insert_layers
from megascale.expand.kinds import Patterned, check_kinds, pattern_of
from megascale.expand.options import GrowthOptions, Sizes, check_times
from megascale.expand.said import growth_of
from megascale.formats.shapes import our_specs
from megascale.model.families import build_part
from megascale.model.residual import Residual, Stack, residual
from megascale.model.shape import Shape
from megascale.model.spec import ParamSpec, states_of

PATTERNS = ("pattern_first", "pattern", "pattern_last")
WHY_LOSSY = {
    "stack": "stacking the layers again and again (G_stack) runs what was learned for one depth at another",
    "dus": "depth up-scaling joins two overlapping halves",
    "interleave": "interleaving feeds every layer its own output a second time",
    "inject": "injected copies act at once",
}


def row_of(model: Model, layer: int) -> Residual:
    """The layer's row of the residual table."""
    side: Literal["encoder", "decoder"] = "decoder" if model.causal else "encoder"
    if model.spacetime is not None:
        side = "decoder" if model.spacetime.objective == "next_step" else "encoder"
    return residual(model.at_layer(layer), Stack(side, model.num_layers), layer)


def specs(model: Model, seq_len: int) -> dict[str, ParamSpec]:
    """Canonical name → spec of every weight and state of a whole model."""
    return our_specs(model, seq_len)


def unlearned(model: Model, seq_len: int) -> frozenset[str]:
    """Names of stored tensors that no optimizer updates: coefficients, router biases."""
    return frozenset(states_of(_whole(model, seq_len)))


def _whole(model: Model, seq_len: int) -> nn.Module:
    return build_part(model, Shape(seq_len, torch.float32, torch.float32))


def plan_layers(source: Model, sizes: Sizes, options: GrowthOptions, every: int) -> tuple[tuple[Layer, ...], Patterned]:
    """The layers of the target, and its pattern of kinds if it has one. `every`: experts in every n-th layer of the target."""
    more = {name: own.num_layers for name, own in sizes.kinds.items() if own.num_layers is not None}
    if more and sizes.num_layers is not None:
        raise UsageError("num_layers grows by whole patterns and kinds.NAME.num_layers by layers of one kind: give one of the two")
    if more:
        return _by_kind(source, more, options)
    new = sizes.num_layers or source.num_layers
    if source.spacetime is not None:
        return grow_layers(source.num_layers, new, options.depth, options.placement, len(source.spacetime.shape)), {}
    first, last = len(source.pattern_first), len(source.pattern_last)
    beside, turn = first + last, len(source.pattern)
    if source.kinds and not turn and new != source.num_layers:
        raise UsageError(
            f"num_layers grows from {source.num_layers} to {new} by whole patterns, but model.pattern is empty: name a kind, "
            "kinds.NAME.num_layers=N"
        )
    period = math.lcm(max(turn, 1), every, *(m.moe.every for m in source.variants.values() if m.moe is not None))
    if period > 1 and turn > 1 and (new - source.num_layers) % turn:
        raise UsageError(
            f"num_layers grows from {source.num_layers} to {new}, but model.pattern has {turn} layers: grow by a multiple of {period}, or "
            "name a kind, kinds.NAME.num_layers=N"
        )
    middle = grow_layers(source.num_layers - beside, new - beside, options.depth, options.placement, period, beside)
    end = source.num_layers - last
    layers = (
        *(Layer(i) for i in range(first)),
        *(Layer(layer.source + first, layer.mode) for layer in middle),
        *(Layer(i) for i in range(end, source.num_layers)),
    )
    return layers, {key: getattr(source, key) for key in PATTERNS}


def _by_kind(source: Model, more: Mapping[str, int], options: GrowthOptions) -> tuple[tuple[Layer, ...], Patterned]:
    """Layers of some kinds inserted after others of their kind, and the pattern that they make."""
    check_kinds(source, more)
    layers = tuple(Layer(i) for i in range(source.num_layers))
    for name, new in more.items():
        where = [i for i, layer in enumerate(layers) if source.kind_at(layer.source) == name]
        if new < len(where):
            raise UsageError(
                f"kinds.{name}.num_layers is {new} but the source has {len(where)} layers of that kind: growth does not shrink, megascale "
                "shrink does"
            )
        check_times(f"kinds.{name}.num_layers", len(where), new)
        inserted = insert_layers(len(layers), where, options.depth, options.placement, new - len(where))
        layers = tuple(Layer(layers[i.source].source, i.mode if i.mode != "keep" else layers[i.source].mode) for i in inserted)
    return layers, pattern_of([source.kind_at(layer.source) for layer in layers])


def check_layers(source: Model, target: Model, layers: tuple[Layer, ...]) -> None:
    """Raises UsageError if a layer would stand where another kind belongs, or if multi-token prediction would get other blocks.

    target  the source's config with the target's layers
    """
    experts = [has_experts(source, layer.source) for layer in layers]
    odd = next((i for i, has in enumerate(experts) if has != has_experts(target, i)), None)
    if odd is not None:
        raise UsageError(
            f"layer {layers[odd].source} would become layer {odd}, where moe.every puts {'no ' if experts[odd] else ''}experts: insert or "
            "remove as many layers as moe.every counts"
        )
    if source.mtp_depth and target.mtp_depth:
        was, now = source.num_layers - 1, target.num_layers - 1
        rows = [row_of(source, was), row_of(target, now)]
        same_kind = not source.kinds or source.kind_at(was) == target.kind_at(now)
        if not same_kind or has_experts(source, was) != has_experts(target, now):
            raise UsageError("modules of multi-token prediction have blocks of the last layer's kind: end with a layer of the same kind")
        if (rows[0].skip, rows[0].branch) != (rows[1].skip, rows[1].branch):
            raise UsageError(
                f"model.mtp_depth is {source.mtp_depth}, and its blocks have the last layer's coefficients, which {source.residual} "
                "changes with the depth: grow in width"
            )


def with_layers(source: Model, target: Model, layers: tuple[Layer, ...], patterned: Patterned) -> Model:
    """The target with these layers, and with their coefficients if they differ from its scheme's."""
    target = target.model_copy(update={"num_layers": len(layers), "layer_coefficients": None, **patterned})
    coefficients = [
        # Zero outputs keep the stream only if it is not scaled; a norm after the sum undoes a scale.
        (1.0 if layer.mode != "keep" and source.at_layer(layer.source).residual_row.norm != "after" else row.skip, row.branch)
        for layer, row in ((layer, row_of(source, layer.source)) for layer in layers)
    ]
    own = [row_of(target, i) for i in range(len(layers))]
    if any((row.skip, row.branch) != pair for row, pair in zip(own, coefficients)):
        target = target.model_copy(update={"layer_coefficients": tuple(coefficients)})
    return target


def check_depth_method(source: Model, layers: tuple[Layer, ...], options: GrowthOptions) -> tuple[str, ...]:
    """What is lossy about more layers. Raises UsageError for what no inserted layer can do."""
    if len(layers) <= source.num_layers:
        return ()
    positions = {source.at_layer(layer.source).residual_row.norm for layer in layers}
    if positions & {"within", "around"} and options.depth == "cancel":
        raise UsageError(
            "--depth-method cancel with a norm at the branch's end: it would divide what cancels by its own size; identity is exact"
        )
    if source.tokenformer is not None and options.depth == "cancel":
        raise UsageError(
            "--depth-method cancel with linear tokenformer: scores that cancel would be divided by their own length; identity is exact"
        )
    if options.depth not in EXACT:
        return (f"--depth-method {options.depth}: {WHY_LOSSY[options.depth]}; identity and cancel are exact",)
    if "after" in positions and growth_of(source).behind is not None:
        raise UsageError(
            f"num_layers grows from {source.num_layers} to {len(layers)} with norm {source.norm} after the sum: "
            f"{growth_of(source).behind}, so no inserted layer keeps the stream unchanged; grow in width, or use --depth-method stack, "
            "which is lossy"
        )
    return ()
