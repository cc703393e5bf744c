"""Routers as rows: the facts that mixtures, growth, formats and rules need. The functions are in model/router.py. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megascale.plugins import with_plugins


@dataclass(frozen=True)
class Directions:
    """Tokens are projected to `dim` dimensions and compared by direction with the experts' rows there, at a learned temperature (arXiv
    2204.09179).

    length       length of the experts' rows, restored after every update
    temperature  its initial value
    """

    dim: int
    length: float
    temperature: float


@dataclass(frozen=True)
class RouterGrowth:
    """How gates keep their sum when experts are added.

    normed    gates are divided by their sum, unless there is only one: that would be 1 whatever the router says
    alone     gate of a zero logit if gates are not divided; None: equal logits share 1 among all experts, as under a softmax
    by_share  the scores that a bias is added to are shares of 1 among all experts
    """

    normed: bool
    alone: float | None = None
    by_share: bool = False

    def __post_init__(self) -> None:
        if self.alone is not None and not 0 < self.alone < float("inf"):
            raise ValueError(f"the gate of a zero logit is {self.alone}: give a positive number, or None")

    @property
    def own(self) -> bool:
        """Whether a gate depends on its own expert's logit alone, so that copies do not share it."""
        return not self.normed and self.alone is not None


@dataclass(frozen=True)
class RouterRow:
    """One router.

    score       logits [..., E] → `model.router.Scored`, or its "module:name": the scores that experts are chosen by, and their gates
    equal_rows  the experts' rows start with equal length; otherwise the longest would be chosen first
    directions  for logits that are not a plain product of tokens and experts' rows
    growth      None: unknown; models with it keep their number of experts
    single      the router that gives the same with one expert per token, for formats in which a single gate of this one is always 1; None:
                itself
    megatron    models with it can be converted to and from Megatron
    divides     whether the gates of several experts are divided by their sum; `moe.renormalize` can turn that. None: unknown, and it cannot
    """

    score: str | Callable[..., Any]
    equal_rows: bool = False
    directions: Directions | None = None
    growth: RouterGrowth | None = None
    single: str | None = None
    megatron: bool = False
    divides: bool | None = None


OURS = "megascale.model.router"
ROUTERS: dict[str, RouterRow] = {
    "topk_softmax": RouterRow(f"{OURS}:topk_softmax", growth=RouterGrowth(normed=True), single="softmax_topk", megatron=True, divides=True),
    "softmax_topk": RouterRow(f"{OURS}:softmax_topk", growth=RouterGrowth(normed=False, by_share=True), megatron=True, divides=False),
    "sigmoid": RouterRow(f"{OURS}:sigmoid", growth=RouterGrowth(normed=True, alone=0.5), megatron=True, divides=True),
    "sigma": RouterRow(f"{OURS}:sigma", equal_rows=True, growth=RouterGrowth(normed=False, alone=0.5), divides=False),
    "xmoe": RouterRow(f"{OURS}:topk_softmax", directions=Directions(16, 1.5, 0.3), growth=RouterGrowth(normed=True), divides=True),
}


def routers() -> Mapping[str, RouterRow]:
    return with_plugins("routers", ROUTERS, RouterRow)
