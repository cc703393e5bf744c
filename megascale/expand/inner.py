"""What an attention has inside besides heads, when a model shrinks: latents, channels of values, heads and channels of linear attention.
Which channels stay is one choice for all heads of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megascale.config.schema import Model
from megascale.errors import UsageError
from megascale.expand.options import DELTA_SIZES, LATENT_SIZES, Sizes

INNER_SIZES = tuple(dict.fromkeys((*LATENT_SIZES, *DELTA_SIZES)))


def inner_sizes(model: Model) -> dict[str, int]:
    """The sizes of the section that the model's attention reads; empty without one."""
    if model.latent is not None:
        sizes = {key: getattr(model.latent, key) for key in LATENT_SIZES}
        return {key: size for key, size in (sizes | {"value_dim": sizes["value_dim"] or model.head_dim}).items() if size is not None}
    return {} if model.delta is None else {key: getattr(model.delta, key) for key in DELTA_SIZES}


def smaller_section(source: Model, asked: Sizes) -> dict[str, Any]:
    """{section: smaller one} of the sizes asked for. Raises UsageError for sizes that the model does not have, or that are larger."""
    changes, sizes = {}, inner_sizes(source)
    for key in INNER_SIZES:
        new, flag = getattr(asked, key), f"--{key.replace('_', '-')}"
        if new is None or new == sizes.get(key):
            continue
        if key not in sizes:
            raise UsageError(f"{flag} is {new}, but attention {source.attention} has no {key} here: leave it out")
        if key == "rope_dim":
            raise UsageError(f"{flag} is {new}: channels that hold positions stay as they are; shrink kv_rank, value_dim or heads")
        if new > sizes[key]:
            raise UsageError(f"{flag} is {new} but the source has {sizes[key]}: shrinking does not grow, megascale grow does")
        changes[key] = new
    if not changes:
        return {}
    name = "latent" if source.latent is not None else "delta"
    found = sizes | changes
    if name == "delta":
        per_key, was = found["value_heads"] / found["key_heads"], sizes["value_heads"] // sizes["key_heads"]
        if found["value_heads"] % found["key_heads"] or per_key > was:
            raise UsageError(
                f"{found['value_heads']} value heads over {found['key_heads']} key heads: each key head keeps at most the {was} it had"
            )
    return {name: getattr(source, name).model_copy(update=changes)}


def latent_scores(own: Model, attention: Any, seen: Mapping[str, Tensor], out: Tensor) -> dict[str, Tensor]:
    """Importance of the channels of latent attention. `seen`: mean sizes of the inputs of its products; `out` [h·f]: importance of what
    its output product takes.
    """
    scores = {"kv_rank": seen["k"] * (attention.k.weight.norm(dim=0) + attention.v.weight.norm(dim=0))}
    if attention.q_down is not None:
        scores["query_rank"] = seen["q"] * attention.q.weight.norm(dim=0)
    return {**scores, "value_dim": out.unflatten(0, (own.num_heads, -1)).sum(0)}


def delta_scores(own: Model, attention: Any, seen: Mapping[str, Tensor], out: Tensor) -> dict[str, Tensor]:
    """Importance of the heads and channels of the gated delta rule. Queries and keys, which are divided by their length, count by the sizes
    of their weights and taps.
    """
    sizes = own.delta
    assert sizes is not None
    heads = out.unflatten(0, (sizes.value_heads, -1))
    keys = torch.ones(())
    for product, taps in ((attention.q, attention.q_conv), (attention.k, attention.k_conv)):
        keys = keys * product.weight.norm(dim=1) * taps.weight.norm(dim=1)
    return {"value_heads": heads.sum(1), "value_dim": heads.sum(0), "key_dim": keys.unflatten(0, (sizes.key_heads, -1)).sum(0)}


def inner_products(model: Model) -> tuple[str, ...]:
    """Names of the products whose inputs `latent_scores` needs."""
    return () if model.latent is None else ("k", *(() if model.latent.query_rank is None else ("q",)))


def inner_scores(own: Model, attention: nn.Module, seen: Mapping[str, Tensor], out: Tensor) -> dict[str, Tensor]:
    """Importance by size of the section that the attention reads; empty without one."""
    if own.latent is not None:
        return latent_scores(own, attention, seen, out)
    return {} if own.delta is None else delta_scores(own, attention, seen, out)
