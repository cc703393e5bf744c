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
    """

    scores: Tensor
    choice: Callable[[Tensor], Choice]


def choose(score: Callable[[Tensor], Scored], logits: Tensor, top_k: int, bias: Tensor | None) -> Choice:
    """logits [..., E] → the choice of each token: the k largest scores. A `bias` [E] affects the selection only."""
    scores, choice = score(logits)
    return choice((scores if bias is None else scores + bias).topk(top_k, -1).indices)


def topk_softmax(logits: Tensor) -> Scored:
    """Gates are the softmax over the chosen logits (Mixtral, arXiv 2401.04088). A single gate comes from the softmax over all: over one
    logit it would be 1 whatever the router says (Switch; top-1 gates of X-MoE and TorchScale).
    """
    probabilities = torch.softmax(logits, -1)

    def choice(experts: Tensor) -> Choice:
        several = experts.shape[-1] > 1
        gates = torch.softmax(logits.gather(-1, experts), -1) if several else probabilities.gather(-1, experts)
        return Choice(experts, gates, probabilities)

    return Scored(logits, choice)


def softmax_topk(logits: Tensor) -> Scored:
    """Gates come unchanged from the softmax over all experts (Switch, arXiv 2101.03961)."""
    probabilities = torch.softmax(logits, -1)
    return Scored(probabilities, lambda experts: Choice(experts, probabilities.gather(-1, experts), probabilities))


def sigmoid(logits: Tensor) -> Scored:
    """Gates are σ, divided by their sum if several experts are chosen (DeepSeek-V3, arXiv 2412.19437)."""
    scores = torch.sigmoid(logits)

    def choice(experts: Tensor) -> Choice:
        own = scores.gather(-1, experts)
        gates = _divided(own, logits.gather(-1, experts)) if experts.shape[-1] > 1 else own
        return Choice(experts, gates, _divided(scores, logits))

    return Scored(scores, choice)


def sigma(logits: Tensor) -> Scored:
    """Gates are plain σ; balance losses use the softmax (σ-MoE, arXiv 2310.10837)."""
    probabilities, scores = torch.softmax(logits, -1), torch.sigmoid(logits)
    return Scored(scores, lambda experts: Choice(experts, scores.gather(-1, experts), probabilities))


def _divided(scores: Tensor, logits: Tensor) -> Tensor:
    """σ [..., n] of the logits, divided by their sum. If all of them underflow, the limit of that: the softmax of log σ."""
    total, smallest = scores.sum(-1, keepdim=True), torch.finfo(scores.dtype).tiny
    return torch.where(total < smallest, torch.softmax(F.logsigmoid(logits), -1), scores / total.clamp(min=smallest))


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


class Router(nn.Module):
    """Tokens → logits → choice. Weights are rounded to the compute dtype like all others; the products run in at least fp32.

    `scale` multiplies the input. `bias`, under `balance: bias`, is state: `moved_bias` updates it after each step.
    """

    bias: Tensor | None

    def __init__(self, hidden: int, cfg: Moe, std: float, truncated: bool, dtype: torch.dtype, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.row, self.top_k = routers()[cfg.router], cfg.top_k
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
        if cfg.balance == "bias":
            declare_state(self, "bias", ParamSpec((cfg.num_experts,), "bias", "tokens"), torch.float32)
        else:
            self.bias = None

    def logits(self, x: Tensor) -> Tensor:
        """x [b, s, d] → [b, s, E]"""
        rounded, exact = x.dtype, torch.promote_types(x.dtype, torch.float32)
        x, weight = x.to(exact), self.weight.to(rounded).to(exact)
        if self.scale != 1.0:
            x = x * self.scale
        if self.project is None or self.temperature is None:
            return F.linear(x, weight)
        x = F.linear(x, self.project.to(rounded).to(exact))
        return F.linear(x, F.normalize(weight, dim=-1)) / self.temperature.to(rounded).to(exact)

    def forward(self, x: Tensor) -> tuple[Tensor, Choice]:
        """x [b, s, d] → logits [b, s, E] and the choice."""
        logits = self.logits(x)
        bias = None if self.bias is None else self.bias.to(logits.dtype)
        return logits, choose(self.score, logits, self.top_k, bias)
