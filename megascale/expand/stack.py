"""The layers of the target and the coefficients that they keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from megascale.config.attentions import AttentionGrowth, attentions
from megascale.config.norms import NormGrowth, norms
from megascale.config.routers import RouterGrowth, routers
from megascale.config.schema import Model, Moe
from megascale.errors import UsageError
from megascale.expand.depth import EXACT, Layer, grow_layers
from megascale.expand.options import GrowthOptions
from megascale.formats.shapes import our_specs
from megascale.model.families import build_part
from megascale.model.residual import Residual, Stack, residual
from megascale.model.shape import Shape
from megascale.model.spec import ParamSpec, states_of

G = TypeVar("G")
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
    return residual(model, Stack(side, model.num_layers), layer)


def growth_of(model: Model) -> NormGrowth:
    """How the model's norms grow. Raises UsageError for a norm that does not say."""
    return _said(
        model.norm_row.growth, f"model.norm is {model.norm}", "a model with it cannot change its sizes", "a model with one of", norms()
    )


def attention_growth(model: Model) -> AttentionGrowth:
    """How the model's attention grows. Raises UsageError for a kind that does not say."""
    what, refused = f"model.attention is {model.attention}", "sizes cannot be changed of a model that has it"
    return _said(model.attention_row.growth, what, refused, "a model with one of", attentions())


def gates_of(moe: Moe) -> RouterGrowth:
    """How the gates of a mixture take more experts. Raises UsageError for a router that does not say."""
    what, refused = f"model.moe.router is {moe.router}", "the number of experts cannot be changed under it"
    return _said(moe.router_row.growth, what, refused, "a router such as", routers())


def _said(growth: G | None, what: str, refused: str, instead: str, rows: Mapping[str, Any]) -> G:
    """`growth`, which a row gives. Raises UsageError if it gives none, naming the rows that do."""
    if growth is None:
        known = ", ".join(name for name, row in rows.items() if row.growth is not None)
        raise UsageError(f"{what}, whose row does not say how it grows: {refused}; set `growth` in its row, or use {instead} {known}")
    return growth


def specs(model: Model, seq_len: int) -> dict[str, ParamSpec]:
    """Canonical name → spec of every weight and state of a whole model."""
    return our_specs(model, seq_len)


def unlearned(model: Model, seq_len: int) -> frozenset[str]:
    """Names of stored tensors that no optimizer updates: coefficients, router biases."""
    return frozenset(states_of(_whole(model, seq_len)))


def _whole(model: Model, seq_len: int) -> nn.Module:
    return build_part(model, Shape(seq_len, torch.float32, torch.float32))


def plan_layers(source: Model, target: Model, options: GrowthOptions) -> tuple[tuple[Layer, ...], Model, tuple[str, ...]]:
    """Layers, the target with their coefficients if they differ from its scheme's, and what is lossy about them."""
    period = _period(source, target)
    layers = grow_layers(source.num_layers, target.num_layers, options.depth, options.placement, period)
    target = target.model_copy(update={"num_layers": len(layers), "layer_coefficients": None})
    rows = [row_of(source, layer.source) for layer in layers]
    position = source.residual_row.norm
    coefficients = [
        # Zero outputs keep the stream only if it is not scaled; a norm after the sum undoes a scale.
        (1.0 if layer.mode != "keep" and position != "after" else row.skip, row.branch)
        for layer, row in zip(layers, rows)
    ]
    own = [row_of(target, i) for i in range(len(layers))]
    if any((row.skip, row.branch) != pair for row, pair in zip(own, coefficients)):
        target = target.model_copy(update={"layer_coefficients": tuple(coefficients)})
    lossy: tuple[str, ...] = ()
    if len(layers) > source.num_layers:
        if position == "within" and options.depth == "cancel":
            raise UsageError(
                "--depth-method cancel with a norm at the branch's end: it would divide what cancels by its own size; identity is exact"
            )
        if source.tokenformer is not None and options.depth == "cancel":
            raise UsageError(
                "--depth-method cancel with linear tokenformer: scores that cancel would be divided by their own length; identity is exact"
            )
        if options.depth not in EXACT:
            lossy = (f"--depth-method {options.depth}: {WHY_LOSSY[options.depth]}; identity and cancel are exact",)
        elif position == "after" and growth_of(source).behind is not None:
            raise UsageError(
                f"num_layers grows from {source.num_layers} to {len(layers)} with norm {source.norm} after the sum: "
                f"{growth_of(source).behind}, so no inserted layer keeps the stream unchanged; grow in width, or use --depth-method stack, "
                "which is lossy"
            )
    return layers, target, lossy


def _period(source: Model, target: Model) -> int:
    """Layers that belong together: up to the next one with experts, or one per dimension of a grid."""
    if source.spacetime is not None:
        return len(source.spacetime.shape)
    moe = source.moe or target.moe
    return moe.every if moe is not None else 1
