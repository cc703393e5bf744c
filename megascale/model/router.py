"""Routing of tokens to experts: gates, and the losses and biases that balance the load. Pure functions, and the module with the weights.

Shapes: b micro-batch, s local sequence, k experts per token, E experts, d hidden. Everything is computed in at least fp32.

`loss_weights` [b, s] is each token's weight in an auxiliary loss: the loss's fixed scale if its target counts, else zero. Losses are not
linear in how tokens are grouped, so each is computed per sequence: per micro-batch or per rank, the curve would depend on how the batch is
split. If a sequence is split over ranks, `over_sequence` sums over them, and each rank returns its share of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascale.config.routers import routers
from megascale.config.schema import Moe
from megascale.model.attention import identity
from megascale.model.spec import ParamSpec, declare, declare_state
from megascale.plugins import resolve


class Choice(NamedTuple):
    """Routing of all tokens: `experts` [b, s, k], their `gates` [b, s, k], and the `probabilities` [b, s, E] for balance losses."""

    experts: Tensor
    gates: Tensor
    probabilities: Tensor


class Scored(NamedTuple):
    """The result of a router's `score` of logits [..., E]: `scores`, of which the k largest are chosen, and a function from the chosen
    experts [..., k] to the `Choice`.

    gates  the gates of chosen experts, divided by their sum or not, for `moe.renormalize`; None: the choice's alone
    """

    scores: Tensor
    choice: Callable[[Tensor], Choice]
    gates: Callable[[Tensor, bool], Tensor] | None = None


class Among(NamedTuple):
    """Groups of consecutive experts: a token chooses among those of its `top` best groups (DeepSeek-V3, arXiv 2412.19437).

    best  how many of a group's largest scores make the group's own, which is their sum
    """

    groups: int
    top: int
    best: int

    @classmethod
    def of(cls, cfg: Moe) -> Among | None:
        if cfg.groups is None or cfg.top_groups is None:
            return None
        return cls(cfg.groups, cfg.top_groups, min(2, cfg.num_experts // cfg.groups) if cfg.group_score == "top2" else 1)

    @torch.no_grad()
    def limit(self, scores: Tensor) -> Tensor:
        """scores [..., E] → the same, −∞ for experts of other groups."""
        of_group = scores.unflatten(-1, (self.groups, -1))
        chosen = of_group.topk(self.best, -1).values.sum(-1).topk(self.top, -1).indices
        open_ = torch.zeros(of_group.shape[:-1], dtype=torch.bool, device=scores.device).scatter_(-1, chosen, True)
        return of_group.where(open_.unsqueeze(-1), float("-inf")).flatten(-2)


def choose(
    score: Callable[[Tensor], Scored],
    logits: Tensor,
    top_k: int,
    bias: Tensor | None,
    among: Among | None = None,
    divided: bool | None = None,
    scale: float = 1.0,
) -> Choice:
    """logits [..., E] → the choice of each token: the k largest scores.

    bias     [E], added to scores; affects the selection only
    among    the groups that the selection is limited to
    divided  whether the gates of several experts are divided by their sum; None: as the router does
    scale    factor on the gates
    """
    scored = score(logits)
    scores = scored.scores if bias is None else scored.scores + bias
    experts = (scores if among is None else among.limit(scores)).topk(top_k, -1).indices
    choice = scored.choice(experts)
    if divided is not None and scored.gates is not None:
        choice = choice._replace(gates=scored.gates(experts, divided and top_k > 1))
    return choice if scale == 1.0 else choice._replace(gates=choice.gates * scale)


def topk_softmax(logits: Tensor) -> Scored:
    """Gates are the softmax over the chosen logits (Mixtral, arXiv 2401.04088). A single gate comes from the softmax over all: over one
    logit it would be 1 whatever the router says (Switch; top-1 gates of X-MoE and TorchScale).
    """
    probabilities = torch.softmax(logits, -1)
    return _scored(logits, probabilities, logits, lambda: probabilities, divides=True)


def softmax_topk(logits: Tensor) -> Scored:
    """Gates come unchanged from the softmax over all experts (Switch, arXiv 2101.03961)."""
    probabilities = torch.softmax(logits, -1)
    return _scored(probabilities, probabilities, logits, lambda: probabilities, divides=False)


def sigmoid(logits: Tensor) -> Scored:
    """Gates are σ, divided by their sum if several experts are chosen (DeepSeek-V3, arXiv 2412.19437)."""
    scores = torch.sigmoid(logits)
    return _scored(scores, scores, logits, lambda: _divided(scores, logits), divides=True, divided=_sigmoids)


def sigma(logits: Tensor) -> Scored:
    """Gates are plain σ; balance losses use the softmax (σ-MoE, arXiv 2310.10837)."""
    probabilities, scores = torch.softmax(logits, -1), torch.sigmoid(logits)
    return _scored(scores, scores, logits, lambda: probabilities, divides=False, divided=_sigmoids)


def _softmax(own: Tensor, logits: Tensor, experts: Tensor) -> Tensor:
    """The shares of the chosen `experts` [..., k] in a softmax, divided by their sum: the softmax of their logits."""
    return torch.softmax(logits.gather(-1, experts), -1)


def _sigmoids(own: Tensor, logits: Tensor, experts: Tensor) -> Tensor:
    return _divided(own.gather(-1, experts), logits.gather(-1, experts))


def _scored(
    scores: Tensor,
    own: Tensor,
    logits: Tensor,
    probabilities: Callable[[], Tensor],
    divides: bool,
    divided: Callable[[Tensor, Tensor, Tensor], Tensor] = _softmax,
) -> Scored:
    """Experts are chosen by `scores`. Their gates are their `own` [..., E] or, if the router `divides` those of several, what `divided`
    makes of these, the logits and the choice.
    """

    def gates(experts: Tensor, divide: bool) -> Tensor:
        return divided(own, logits, experts) if divide else own.gather(-1, experts)

    return Scored(scores, lambda experts: Choice(experts, gates(experts, divides and experts.shape[-1] > 1), probabilities()), gates)


def _divided(scores: Tensor, logits: Tensor) -> Tensor:
    """σ [..., n] of the logits, divided by their sum. If all of them underflow, the limit of that: the softmax of log σ."""
    total, smallest = scores.sum(-1, keepdim=True), torch.finfo(scores.dtype).tiny
    return torch.where(total < smallest, torch.softmax(F.logsigmoid(logits), -1), scores / total.clamp(min=smallest))


def batch_loss(choice: Choice, loss_weights: Tensor, share: Tensor) -> Tensor:
    """`balance_loss` with the `share` [E] of the load that each expert has had in a whole batch: linear in the tokens."""
    return choice.probabilities.shape[-1] * (share.to(loss_weights.dtype) * mass_of(choice.probabilities, loss_weights)).sum()


def balance_loss(choice: Choice, loss_weights: Tensor, over_sequence: Callable[[Tensor], Tensor] = identity) -> Tensor:
    """E·Σᵢ fᵢ·Pᵢ per sequence, weighted by its counted tokens: 1 per token if all experts are equally busy (Switch, equation 4).

    fᵢ is the share of the sequence's assignments that expert i gets, Pᵢ its mean probability.
    """
    num_experts, top_k = choice.probabilities.shape[-1], choice.experts.shape[-1]
    with torch.no_grad():
        chosen = torch.zeros_like(choice.probabilities, dtype=loss_weights.dtype).scatter_(2, choice.experts, 1.0)
        share = _shares(mass_of(chosen, loss_weights) / top_k, over_sequence)
    # The share carries no gradient and the rest is linear in the tokens, so ranks may add their parts.
    return num_experts * (share * mass_of(choice.probabilities, loss_weights)).sum()


def entropy_loss(choice: Choice, loss_weights: Tensor, over_sequence: Callable[[Tensor], Tensor] = identity) -> Tensor:
    """Σᵢ Pᵢ·log Pᵢ per sequence, weighted by its counted tokens: −log E per token if all experts are equally likely (MoEUT, arXiv
    2405.16039, section 2.1).
    """
    return entropy_of(mass_of(choice.probabilities, loss_weights), over_sequence)


def mass_of(probabilities: Tensor, loss_weights: Tensor) -> Tensor:
    """[b, s, …, E] weighted by [b, s] and summed over the local tokens: [b, …, E]."""
    return (loss_weights.view(*loss_weights.shape, *[1] * (probabilities.ndim - 2)) * probabilities).sum(1)


def entropy_of(mass: Tensor, over_sequence: Callable[[Tensor], Tensor] = identity) -> Tensor:
    """mass [n, E] → Σ mass·log P, where P is each row's shares: the rows' negative entropies, weighted by their mass.

    Its gradient is that of the mass times a fixed log P; the other term vanishes, since ΣP = 1. So it is linear in the tokens, too.
    """
    with torch.no_grad():
        log_share = _shares(mass, over_sequence).clamp(min=torch.finfo(mass.dtype).tiny).log()
    return (log_share * mass).sum()


def _shares(mass: Tensor, over_sequence: Callable[[Tensor], Tensor]) -> Tensor:
    """[n, E] masses of the local tokens → shares over whole sequences, zero if nothing counts."""
    mass = over_sequence(mass)
    return mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)


def z_loss(logits: Tensor, loss_weights: Tensor) -> Tensor:
    """Σ over counted tokens of logsumexp(logits)², which keeps logits small (ST-MoE, arXiv 2202.08906, equation 5)."""
    return (loss_weights * torch.logsumexp(logits, -1).square()).sum()


def within_capacity(experts: Tensor, num_experts: int, factor: float) -> Tensor:
    """experts [b, s, k] → which assignments [b, s, k] fit if each expert takes ⌈s·k/E·factor⌉ of them per sequence.

    First choices of all tokens come before second choices, and earlier tokens before later ones (GShard, arXiv 2006.16668, algorithm 1).
    Counting per sequence makes the result independent of how the batch is split.
    """
    _, length, top_k = experts.shape
    room = math.ceil(length * top_k / num_experts * factor)
    queue = experts.transpose(1, 2).flatten(1).unsqueeze(-1)  # [b, k·s, 1]
    takes = torch.zeros((*queue.shape[:2], num_experts), dtype=torch.int32, device=experts.device).scatter_(2, queue, 1)
    place = takes.cumsum(1, dtype=torch.int32).gather(2, queue).squeeze(-1)  # from 1
    return (place <= room).unflatten(1, (top_k, length)).transpose(1, 2)


def moved_bias(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """The selection bias [E] after a step in which the experts got `counts` [E] (int64) assignments of the global batch.

    b + rate·sign(mean − count), recentred (auxiliary-loss-free balancing, arXiv 2408.15664). The sign is that of integers, so multiplying
    all counts by a factor changes nothing.
    """
    moved = bias + rate * torch.sign(counts.sum() - counts.numel() * counts).to(bias.dtype)
    return moved - moved.mean()


def share_of(counts: Tensor) -> Tensor:
    """The share [E] of the load that each expert had, from the `counts` [E] (int64) of its assignments. A factor on all counts changes
    nothing, not even a bit: both numbers are whole.
    """
    return counts.double() / counts.sum().double()


class Router(nn.Module):
    """Tokens → logits → choice. Weights are rounded to the compute dtype like all others; the products run in at least fp32.

    `scale` multiplies the input; `logit_bias` is learned. Two states, which the end of each step updates (parallel/expert.py): `bias`,
    under `balance: bias`, by `moved_bias`; `share`, under `balance_over: batch`, to the load of the global batch.
    """

    bias: Tensor | None
    share: Tensor | None

    def __init__(self, hidden: int, cfg: Moe, std: float, truncated: bool, dtype: torch.dtype, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.row, self.top_k, self.among = routers()[cfg.router], cfg.top_k, Among.of(cfg)
        self.divided, self.gate_scale = cfg.renormalize, cfg.routed_scale
        self.score = resolve(self.row.score, f"the router {cfg.router}")
        # Every rank holds the whole router but gets only its own experts' share of the gates' gradients, hence "heads".
        wide = ParamSpec((cfg.num_experts, hidden), "router", "heads", std, truncated=truncated, equal_rows=self.row.equal_rows)
        self.project: nn.Parameter | None = None
        self.temperature: nn.Parameter | None = None
        if (of := self.row.directions) is not None:
            row_std = of.length / math.sqrt(of.dim)
            wide = ParamSpec((cfg.num_experts, of.dim), "router", "heads", row_std, orthogonal=True, equal_rows=True)
            self.project = declare(ParamSpec((of.dim, hidden), "router", "heads", std, truncated=truncated), dtype)
            self.temperature = declare(ParamSpec((1,), "norm", "heads", mean=of.temperature), dtype)
        self.weight = declare(wide, dtype)
        self.logit_bias = declare(ParamSpec((cfg.num_experts,), "bias", "heads"), dtype) if cfg.router_bias else None
        self._state("bias", cfg.balance == "bias", 0.0)
        self._state("share", cfg.balance_over == "batch", 1.0 / cfg.num_experts)

    def _state(self, name: str, used: bool, start: float) -> None:
        """A number per expert that no optimizer updates; None if it is not used."""
        if used:
            declare_state(self, name, ParamSpec((self.weight.shape[0],), "bias", "tokens", mean=start), torch.float32)
        else:
            self.register_buffer(name, None)

    def logits(self, x: Tensor) -> Tensor:
        """x [b, s, d] → [b, s, E]"""
        rounded, exact = x.dtype, torch.promote_types(x.dtype, torch.float32)
        x, weight = x.to(exact), self.weight.to(rounded).to(exact)
        if self.scale != 1.0:
            x = x * self.scale
        if self.project is None or self.temperature is None:
            logits = F.linear(x, weight)
        else:
            x = F.linear(x, self.project.to(rounded).to(exact))
            logits = F.linear(x, F.normalize(weight, dim=-1)) / self.temperature.to(rounded).to(exact)
        return logits if self.logit_bias is None else logits + self.logit_bias.to(rounded).to(exact)

    def forward(self, x: Tensor) -> tuple[Tensor, Choice]:
        """x [b, s, d] → logits [b, s, E] and the choice."""
        logits = self.logits(x)
        bias = None if self.bias is None else self.bias.to(logits.dtype)
        return logits, choose(self.score, logits, self.top_k, bias, self.among, self.divided, self.gate_scale)

    def by_score(self, logits: Tensor) -> Choice:
        """The choice that the scores alone would make, without biases and groups."""
        return choose(self.score, logits, self.top_k, None)
