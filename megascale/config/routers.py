"""Routers as rows: what mixtures, growth, formats and rules ask of them. The functions are in model/router.py; no torch is needed here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megascale.plugins import with_plugins


@dataclass(frozen=True)
class Directions:
    """Tokens are projected to `dim` dimensions and compared by direction with the experts' rows there, at a learned temperature
    (arXiv 2204.09179).

    length       of the experts' rows, to which they return after every update
    temperature  at the start
    """

    dim: int
    length: float
    temperature: float


@dataclass(frozen=True)
class RouterGrowth:
    """How gates keep their sum when there are more experts.

    normed    several gates are divided by their sum; a single one is not, or it would be 1 whatever the router says
    alone     the gate of a zero logit where it is not divided; None: equal logits share 1 among all experts, as under a softmax
    by_share  the scores to which a bias is added are shares of 1 among all experts
    """

    normed: bool
    alone: float | None = None
    by_share: bool = False

    def __post_init__(self) -> None:
        if self.alone is not None and not 0 < self.alone < float("inf"):
            raise ValueError(f"the gate of a zero logit is {self.alone}: give a positive number, or None")

    @property
    def own(self) -> bool:
        """A gate depends on its own expert's logit alone, so that copies do not share it."""
        return not self.normed and self.alone is not None


@dataclass(frozen=True)
class RouterRow:
    """One router.

    score       logits [..., E] → `model.router.Scored`, or "module:name" of that: by what experts are chosen, and what their gates are
    equal_rows  the experts' rows start at equal length, or the longest would be chosen first
    directions  where logits are no plain product of tokens and experts' rows
    growth      None: it does not say, and models with it keep their experts
    single      the router that gives the same where a token has one expert, for formats in which this one's only gate is 1; None: itself
    megatron    weights of models with it are exchanged with megatron-core
    """

    score: str | Callable[..., Any]
    equal_rows: bool = False
    directions: Directions | None = None
    growth: RouterGrowth | None = None
    single: str | None = None
    megatron: bool = False


OURS = "megascale.model.router"
ROUTERS: dict[str, RouterRow] = {
    "topk_softmax": RouterRow(f"{OURS}:topk_softmax", growth=RouterGrowth(normed=True), single="softmax_topk", megatron=True),
    "softmax_topk": RouterRow(f"{OURS}:softmax_topk", growth=RouterGrowth(normed=False, by_share=True), megatron=True),
    "sigmoid": RouterRow(f"{OURS}:sigmoid", growth=RouterGrowth(normed=True, alone=0.5), megatron=True),
    "sigma": RouterRow(f"{OURS}:sigma", equal_rows=True, growth=RouterGrowth(normed=False, alone=0.5)),
    "xmoe": RouterRow(f"{OURS}:topk_softmax", directions=Directions(16, 1.5, 0.3), growth=RouterGrowth(normed=True)),
}


def routers() -> Mapping[str, RouterRow]:
    return with_plugins("routers", ROUTERS, RouterRow)
