"""The tensors of our models."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from megascale.checkpoint.streaming import Target
from megascale.config.load import flatten
from megascale.config.schema import Model
from megascale.errors import UsageError
from megascale.formats.tensor_maps import Sizes
from megascale.model.families import build_part
from megascale.model.shape import Shape
from megascale.model.spec import ParamSpec, specs_of, states_of

LARGEST = 1 << 48  # largest size
MODEL = "model."  # prefix of weights in a checkpoint


def check_depth(model: Model, tensors: int, where: str) -> None:
    """Raises UsageError for a model with more layers than stored tensors, and for sizes that are absent or beyond any memory, before it is
    built. `where`: the file that describes it.
    """
    for key, value in flatten(model.model_dump(mode="json")).items():
        if isinstance(value, int) and value > LARGEST and key not in ("num_layers", "encoder_layers"):
            raise UsageError(f"{where}: model.{key} would be {value}, but no size is above {LARGEST}: correct it or get the file again")
    if model.vocab_size is None and model.spacetime is None:
        raise UsageError(f"{where}: model.vocab_size is absent: correct it or get the file again")
    layers = model.total_layers if model.moeut is None else model.moeut.group_size
    if layers > tensors:
        raise UsageError(
            f"{where} describes a model of {layers} layers, but {tensors} tensors are stored: correct it or get the files again"
        )


def check_floating(tensors: Mapping[str, Target], where: str) -> None:
    """Raises UsageError for other numbers than weights have, such as those of a quantized model."""
    odd = next((n for n, t in tensors.items() if not t.dtype.is_floating_point), None)
    if odd is not None:
        said = str(tensors[odd].dtype).removeprefix("torch.")
        raise UsageError(f"{where} stores {odd} as {said}, but weights are floating-point numbers: get the model unquantized")


def our_shapes(model: Model, seq_len: int) -> dict[str, Sizes]:
    """Canonical name → unsharded shape of every weight and state of a model; see `our_specs`."""
    return {name: spec.shape for name, spec in our_specs(model, seq_len).items()}


def our_states(model: Model, seq_len: int) -> dict[str, ParamSpec]:
    """Name in a checkpoint → spec of what is stored beside weights: coefficients of layers, biases of routers."""
    return {MODEL + name: spec for name, spec in states_of(_built(model, seq_len)).items()}


def our_specs(model: Model, seq_len: int) -> dict[str, ParamSpec]:
    """Canonical name → spec of every weight and state of a model, in the order of the forward pass.

    seq_len  number of learned positions

    Raises UsageError for sizes that torch cannot count.
    """
    built = _built(model, seq_len)
    return {**specs_of(built), **states_of(built)}


def _built(model: Model, seq_len: int) -> nn.Module:
    try:
        return build_part(model, Shape(seq_len, torch.float32, torch.float32))
    except (RuntimeError, OverflowError) as error:
        raise UsageError(f"a model of these sizes cannot be ({str(error).splitlines()[0]}): correct the file that describes it") from None
