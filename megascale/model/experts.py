"""Mixture of experts: a router, a bank of experts as stacked weights, shared experts, and the exchange of tokens between them.

Shapes: b micro-batch, s sequence, T = b·s tokens, k chosen experts per token, E experts, n rows (assignments of a token to an expert), d
hidden, f this rank's share of an expert's width.

Rows are sorted by expert, so that each expert's form one block and one grouped product serves all; an expert without rows costs nothing.
`dispatch` is where expert parallelism sends rows to the ranks of their experts; on one rank it is the identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascale.config.schema import Model, Moe
from megascale.handles import handle_of
from megascale.model.activations import activation
from megascale.model.attention import identity
from megascale.model.auxiliary import ride_on
from megascale.model.deferred import Deferred, deferred_product
from megascale.model.feedforward import FeedForward
from megascale.model.module_metrics import ModuleMetrics, Totals
from megascale.model.ops.grouped_matmul import Permutation, add_bias, add_by_expert, by_expert, grouped_product
from megascale.model.residual import Residual
from megascale.model.router import Choice, Router, balance_loss, batch_loss, entropy_loss, within_capacity, z_loss
from megascale.model.shadow import product_weight
from megascale.model.spec import Cut, ParamSpec, Role, declare
from megascale.precision.fp8 import E4M3, E5M2, fp8_grouped, grouped_weight_gradient, to_fp8


class Arrival(NamedTuple):
    """Rows in flight to the ranks of their experts: `wait` for the incoming ones, with their number per local expert [E_here], and send the
    results `back` to where the rows came from, in their order.
    """

    wait: Callable[[], tuple[Tensor, Tensor]]
    back: Callable[[Tensor], Tensor]


# Rows [n, d] sorted by expert → their arrival, in one round or several. A round's results are zero for rows of others.
Departure = Callable[[Tensor], list[Arrival]]
# (counts [E]; rows beyond their sum belong to no expert) → what sends the rows. Counts come first, so that they travel while the rows are
# gathered.
Dispatch = Callable[[Tensor], Departure]


# The local experts: rows [n, d] sorted by expert and their counts [E_here] → [n, d].
Run = Callable[[Tensor, Tensor], Tensor]
# (tokens x [T, d], experts [T, k], gates [T, k]) → what runs the experts where the tokens arrive and returns each token's sum [T, d].
# `num_experts` instead of an expert: none.
Travel = Callable[[Tensor, Tensor, Tensor], Callable[[Run], Tensor]]


def stay(counts: Tensor) -> Departure:
    """The dispatch without expert parallelism."""
    return lambda rows: [Arrival(lambda: (rows, counts), identity)]


class Bank(nn.Module):
    """One matrix of all experts, [E, out, in], and their biases [E, out]. `scale`, `deferred`, `fp8`, `watch`, `metrics` and `shadow` as in
    `Linear`.

    If the matrices are split along their inputs, the results of `copies` ranks are summed, and each adds its share of the bias.
    """

    bias: Tensor | None

    def __init__(self, spec: ParamSpec, dtype: torch.dtype, scale: float = 1.0, bias: bool = False) -> None:
        super().__init__()
        self.weight, self.scale = declare(spec, dtype), scale
        # Split with the outputs; every rank has that of an input-split weight, with a part of its gradient.
        cut: Cut = 1 if spec.cut == 1 else "heads"
        self.bias = declare(ParamSpec(spec.shape[:2], "bias", cut, experts=True, uses=spec.uses), dtype) if bias else None
        self.copies = 1
        self.deferred: Deferred | None = None
        self.handle: Tensor | None = None
        self.fp8 = False
        self.watch: Tensor | None = None
        self.metrics: ModuleMetrics | None = None
        self.shadow: Tensor | None = None

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        y = self.product(x, counts)
        if self.bias is None:
            return y
        bias = self.bias.to(y.dtype)
        return add_bias(y, bias if self.copies == 1 else bias / self.copies, counts)

    def product(self, x: Tensor, counts: Tensor) -> Tensor:
        weight = product_weight(self)
        if self.deferred is None or not torch.is_grad_enabled():
            return self._product(x, weight, counts)
        product = partial(self._product, weight=weight.detach(), counts=counts)
        return deferred_product(self, x, product, self.weight.shape[1], counts)

    def _product(self, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        if self.fp8:
            return fp8_grouped(x, weight, counts, self.scale, self.watch)
        y = grouped_product(x, weight, counts)
        return y if self.scale == 1.0 else y * self.scale

    def hear(self, about: str, *values: Tensor) -> None:
        assert self.deferred is not None
        self.deferred.append(partial(self._add_gradient, *values))

    @torch.no_grad()
    def _add_gradient(self, g: Tensor, x: Tensor, counts: Tensor) -> None:
        """Adds the weights' gradient [E, out, in] from the rows' g [n, out] and x [n, in]."""
        weight = self.weight
        if self.fp8:
            part = grouped_weight_gradient(to_fp8(g, E5M2), to_fp8(x, E4M3), counts, self.scale, g.dtype)
        else:
            g = g if self.scale == 1.0 else g * self.scale
            if by_expert(x, weight):
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                add_by_expert(weight.grad, x, g, counts)
                return
            part = torch._grouped_mm(g.t(), x, offs=counts.cumsum(0).to(torch.int32))
        part = part.to(weight.dtype)
        weight.grad = part if weight.grad is None else weight.grad + part


def unscaled(in_dim: int) -> float:
    return 1.0


class ExpertInit(NamedTuple):
    """Initial weights of a mixture: the standard deviation of each role, and whether it is truncated; `product_scale` as in `Residual`."""

    std: dict[Role, float]
    truncated: bool = False
    product_scale: Callable[[int], float] = unscaled


def spread_through(bank: Bank, x: Tensor, experts: Tensor) -> Tensor:
    """Multiplies each token x [n, in] by the matrices `experts` [n, k] of a bank → [n, k, out]."""
    sort = Permutation.of(experts)
    return sort.gather(bank(sort.permute(x), load(experts, bank.weight.shape[0])))


class Experts(nn.Module):
    """The feed-forward sublayers of the local experts, each on its own block of rows."""

    def __init__(self, cfg: Model, moe: Moe, start: ExpertInit, dtype: torch.dtype) -> None:
        super().__init__()
        assert moe.ffn_size
        d, f, uses = cfg.hidden_size, moe.ffn_size, moe.top_k / moe.num_experts
        self.activation = activation(cfg.ffn)

        def bank(out_dim: int, in_dim: int, role: Role, cut: int) -> Bank:
            shape = (moe.num_experts, out_dim, in_dim)
            spec = ParamSpec(shape, role, cut, start.std[role], truncated=start.truncated, experts=True, uses=uses)
            return Bank(spec, dtype, start.product_scale(in_dim), moe.expert_bias)

        self.up = bank(f, d, "up", 1)
        self.gate = bank(f, d, "gate", 1) if cfg.gated else None
        self.down = bank(d, f, "down", 2)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x [n, d] sorted by expert, counts [E_here] → [n, d], a partial sum if the width is split over ranks."""
        y = self.up(x, counts)
        return self.down(self.activation(y, None if self.gate is None else self.gate(x, counts)), counts)  # type: ignore[no-any-return]


class SharedGate(nn.Module):
    """σ(w·x), the share of the shared experts' output that a token takes (Qwen2-MoE, arXiv 2407.10671). Like a router's logits it is
    computed in at least fp32.
    """

    def __init__(self, hidden: int, std: float, truncated: bool, dtype: torch.dtype, scale: float) -> None:
        super().__init__()
        self.scale = scale
        # A tensor rank multiplies its part of a sum, so it has a part of the gradient.
        self.weight = declare(ParamSpec((1, hidden), "router", "heads", std, truncated=truncated), dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [b, s, d] → [b, s, 1]"""
        exact = torch.promote_types(x.dtype, torch.float32)
        return torch.sigmoid(F.linear(x.to(exact), self.weight.to(x.dtype).to(exact)) * self.scale)


class MixtureOfExperts(nn.Module):
    """y = Σ over a token's chosen experts of gate · expert(x), plus shared experts for every token.

    `enter` and `leave` are tensor parallelism's, `dispatch` is expert parallelism's. `copies` is the number of ranks that route the same
    tokens: each takes its share of the auxiliary losses. If tokens stay split along the sequence, `loss_weights_here` selects this rank's
    and `over_sequence` sums over the ranks that hold the others.
    """

    def __init__(self, cfg: Model, row: Residual, dtype: torch.dtype, start: ExpertInit | None = None) -> None:
        super().__init__()
        moe = cfg.moe
        assert moe is not None and moe.ffn_size is not None
        start = start or start_of(cfg, moe, row)
        self.moe, self.num_experts, self.unit_gates = moe, moe.num_experts, row.scheme.unit_gates
        self.balance_weight = moe.aux_loss if moe.balance in ("loss", "entropy") else moe.sequence_loss
        router_scale = start.product_scale(cfg.hidden_size)
        self.router = Router(cfg.hidden_size, moe, start.std["router"], start.truncated, dtype, router_scale)
        self.experts = Experts(cfg, moe, start, dtype)
        self.shared = FeedForward(cfg, row, dtype, moe.num_shared * moe.ffn_size) if moe.num_shared else None
        self.shared_gate: SharedGate | None = None
        if moe.shared_gate:
            self.shared_gate = SharedGate(cfg.hidden_size, start.std["router"], start.truncated, dtype, router_scale)
        self.enter: Callable[[Tensor], Tensor] = identity
        self.leave: Callable[[Tensor], Tensor] = identity
        self.over_sequence: Callable[[Tensor], Tensor] = identity
        self.loss_weights_here: Callable[[Tensor], Tensor] = identity
        self.dispatch: Dispatch = stay
        self.travel: Travel | None = None  # instead of `dispatch`, whose rows travel one by one
        self.copies = 1
        self.handle = handle_of(self)  # of what hears about a micro-batch
        self.metrics = ModuleMetrics(
            "experts", {"counts": moe.num_experts, "dropped": 1, "counted": 1, "balance": 1, "z": 1}, {"logits": 1}, readings
        )

    def forward(self, x: Tensor, loss_weights: Tensor | None) -> Tensor:
        """x [b, s, d] → [b, s, d]; `loss_weights` [b, s]: see router.py, None without an auxiliary loss."""
        x = self.enter(x)
        return self.leave(self.chosen_by(x, x, loss_weights)[0])

    def chosen_by(self, h: Tensor, x: Tensor, loss_weights: Tensor | None) -> tuple[Tensor, Choice]:
        """Applies the experts chosen by h [b, s, d] to x [b, s, d]; returns the result and the choice."""
        logits, choice = self.router(h)
        kept = None
        if self.moe.capacity_factor is not None:
            factor = self.moe.capacity_factor if self.training else self.moe.eval_capacity_factor
            kept = within_capacity(choice.experts, self.num_experts, factor)
        if loss_weights is not None and torch.is_grad_enabled():
            x = self._with_losses(x, logits, choice, kept, loss_weights)
        return self._mix(x, choice, kept), choice

    def _mix(self, x: Tensor, choice: Choice, kept: Tensor | None) -> Tensor:
        # Dropped assignments belong to no expert and are sorted after all others.
        experts = (choice.experts if kept is None else choice.experts.where(kept, self.num_experts)).flatten(0, 1)
        tokens, gates = x.flatten(0, 1), choice.gates.flatten(0, 1).to(x.dtype)
        arrive = self._by_row(tokens, experts, gates, kept is not None) if self.travel is None else self.travel(tokens, experts, gates)
        shared, share = self._shared(x)  # while the rows are in flight
        y = arrive(self.experts).view_as(x)
        y = y if shared is None else y + shared
        if not self.unit_gates:
            return y
        # Experts are independent at initialization: their variances add up, and the shared ones count in full.
        squares = choice.gates.square().sum(-1, keepdim=True) + (float(shared is not None) if share is None else share.square())
        size = squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()
        if self.moe.top_k == 1 and shared is None:
            size = size.detach()  # a gate divided by itself would be 1 and give the router no gradient; divided by its value it is 1, too
        return y / size.to(y.dtype)

    def _by_row(self, x: Tensor, experts: Tensor, gates: Tensor, drops: bool) -> Callable[[Callable[[Tensor, Tensor], Tensor]], Tensor]:
        """`Travel` of one row for each assignment, through `dispatch`. `drops`: some assignments may be to no expert."""
        sort, counts = Permutation.of(experts), load(experts, self.num_experts)
        depart = self.dispatch(counts)
        rows = sort.permute(x)
        # The products leave rows without an expert, and their gradients, undefined.
        exists = (torch.arange(rows.shape[0], device=x.device) < counts.sum()).unsqueeze(1) if drops else None
        rows = rows if exists is None else rows.where(exists, rows.new_zeros(()))
        rounds = depart(rows)

        def arrive(run: Run) -> Tensor:
            parts = [arrival.back(run(*arrival.wait())) for arrival in rounds]
            results = sum(parts[1:], parts[0])
            results = results if exists is None else results.where(exists, results.new_zeros(()))
            return sort.unpermute(results, gates)

        return arrive

    def _shared(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The shared experts' output [b, s, d], and the gate [b, s, 1] in it; None for what there is not."""
        if self.shared is None:
            return None, None
        y = self.shared(x)
        if self.shared_gate is None:
            return y, None
        gate = self.shared_gate(x)
        return y * gate.to(y.dtype), gate

    def _with_losses(self, x: Tensor, logits: Tensor, choice: Choice, kept: Tensor | None, loss_weights: Tensor) -> Tensor:
        moe, loss_weights = self.moe, self.loss_weights_here(loss_weights).to(logits.dtype)
        balance, z = self._balance(logits, choice, loss_weights), z_loss(logits, loss_weights)
        loss = moe.z_loss * z + self.balance_weight * balance
        with torch.no_grad():
            here = (loss_weights > 0).unsqueeze(-1)
            counts = load(choice.experts.where(here, self.num_experts), self.num_experts)
            dropped = [] if kept is None else [(here & ~kept).sum()]
            values = [counts, loss_weights.sum(), balance.detach(), z.detach(), logits.abs().amax(), *dropped]
        return ride_on(x, loss, 1.0 / self.copies, self.handle, values)

    def _balance(self, logits: Tensor, choice: Choice, loss_weights: Tensor) -> Tensor:
        if self.router.share is not None:
            return batch_loss(choice, loss_weights, self.router.share)
        if self.moe.sequence_loss:
            choice = self.router.by_score(logits)
        form = entropy_loss if self.moe.balance == "entropy" else balance_loss
        return form(choice, loss_weights, self.over_sequence)

    def hear(self, about: str, *values: Tensor) -> None:
        """Adds the values of a micro-batch to the metrics."""
        for name, value in zip(("counts", "counted", "balance", "z", "logits", "dropped"), values):
            (self.metrics.maximum if name == "logits" else self.metrics.add)(name, value)


def load(experts: Tensor, num_experts: int) -> Tensor:
    """How often each expert [E] was chosen (int64); ignores numbers from E on. Unlike bincount it does not synchronize with the device."""
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=experts.device)
    return counts.scatter_add_(0, experts.flatten(), torch.ones_like(experts).flatten())[:num_experts]


def start_of(cfg: Model, moe: Moe, row: Residual) -> ExpertInit:
    """Each expert starts like the scheme's feed-forward and the router with `init_std`; or all with √(0.1/fan_in), truncated at two
    standard deviations (ST-MoE, arXiv 2202.08906, section 3).
    """
    assert moe.ffn_size
    d, f = cfg.hidden_size, moe.ffn_size
    if moe.init == "model":
        roles: tuple[tuple[Role, int, int], ...] = (("up", f, d), ("gate", f, d), ("down", d, f))
        # A router is not an FP8 product, but unit scaling scales its initial weights and rate with the width like the others'.
        router = 1.0 if row.scheme.unit_scaled else cfg.init_std
        stds: dict[Role, float] = {"router": router, **{role: row.starts.std(role, out, into) for role, out, into in roles}}
        return ExpertInit(stds, product_scale=row.product_scale)
    wide, narrow = math.sqrt(0.1 / d), math.sqrt(0.1 / f)
    return ExpertInit({"router": wide, "up": wide, "gate": wide, "down": narrow}, truncated=True)


def readings(raw: Totals) -> dict[str, float]:
    """One layer's totals over all ranks → evenness of the load (entropy as a share of log E), dropped share, losses per token, logits."""
    counts, loss_weights = raw["counts"], float(raw["counted"])
    total = float(counts.sum())
    if total == 0.0:
        return dict.fromkeys(("load_max_over_mean", "load_entropy", "dropped_share", "aux_loss", "z_loss", "router_logits"), float("nan"))
    share = counts / total
    entropy = float(torch.special.entr(share).sum()) / float(torch.log(torch.tensor(float(counts.numel())))) if counts.numel() > 1 else 1.0
    return {
        "load_max_over_mean": float(share.max()) * counts.numel(),
        "load_entropy": entropy,
        "dropped_share": float(raw["dropped"]) / total,
        "aux_loss": float(raw["balance"]) / loss_weights,
        "z_loss": float(raw["z"]) / loss_weights,
        "router_logits": float(raw["logits"]),
    }
