"""How the parts of a model grow, as their rows say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from megascale.config.attentions import AttentionGrowth, attentions
from megascale.config.norms import NormGrowth, norms
from megascale.config.routers import RouterGrowth, routers
from megascale.config.schema import Model, Moe
from megascale.errors import UsageError

G = TypeVar("G")


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
    gates = _said(moe.router_row.growth, what, refused, "a router such as", routers())
    return gates if moe.renormalize is None else replace(gates, normed=moe.renormalize)


def _said(growth: G | None, what: str, refused: str, instead: str, rows: Mapping[str, Any]) -> G:
    """`growth`, which a row gives. Raises UsageError if it gives none, naming the rows that do."""
    if growth is None:
        known = ", ".join(name for name, row in rows.items() if row.growth is not None)
        raise UsageError(f"{what}, whose row does not say how it grows: {refused}; set `growth` in its row, or use {instead} {known}")
    return growth
