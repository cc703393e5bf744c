"""Muon and NorMuon: orthogonalized momentum, for hidden matrices; config/optimizers.py has their rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megascale.comm.collectives import all_reduce
from megascale.comm.mesh import Mesh
from megascale.config.schema import Muon as Settings
from megascale.config.schema import Optim
from megascale.model.ops.matmul import product
from megascale.optim.optimizers import scale_gradients
from megascale.optim.owners import Matrix, take_turns, work_in_turns
from megascale.optim.rates import Rate
from megascale.parallel.model import Weight

BATCH_ELEMENTS = 1 << 27  # elements of matrices that an owner orthogonalizes together: 256 MiB in bf16

Polynomial = tuple[float, float, float]
JORDAN: tuple[Polynomial, ...] = ((3.4445, -4.7750, 2.0315),)  # of every round; singular values end within 0.7 to 1.2
# Each round's is the best for the singular values that the ones before it leave (arXiv 2505.16932, for values from 0.001 on), contracted by
# 1.01 so that rounding does not carry a value beyond 1. The last is Newton–Schulz's own.
POLAR_EXPRESS: tuple[Polynomial, ...] = (
    *(
        (a / 1.01, b / 1.01**3, c / 1.01**5)
        for a, b, c in (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
            (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
            (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        )
    ),
    (1.875, -1.25, 0.375),
)


def polynomials(settings: Settings) -> tuple[Polynomial, ...]:
    """That of each round."""
    named = settings.coefficients
    listed = (JORDAN if named == "jordan" else POLAR_EXPRESS) if isinstance(named, str) else named
    return tuple(listed[min(i, len(listed) - 1)] for i in range(settings.rounds))


class Muon:
    """The rule is `torch.optim.Muon`'s by default (Nesterov momentum, five Newton–Schulz rounds, step sizes matched to AdamW's), which
    needs a whole matrix. If several ranks share a matrix, one of them, its owner, gathers the momentum, orthogonalizes it in the weight's
    own precision or in `muon_dtype`, so that every layout takes the same step, and sends the pieces back.
    """

    def __init__(self, weights: list[Weight], cfg: Optim, rates: Mapping[str, Rate], mesh: Mesh) -> None:
        self.weights, self.settings, self.rates = weights, cfg.orthogonal, rates
        self.beta = cfg.betas[0] if self.settings.momentum is None else self.settings.momentum
        self.momentum = {w.name: torch.zeros_like(w.local) for w in weights}
        self.dtype = None if cfg.muon_dtype is None else torch.bfloat16
        self.polynomials = polynomials(self.settings)
        self.turns = take_turns(weights, mesh, lambda w: orthogonalization_flops(w.placement.spec.shape), batch_of)

    @torch.no_grad()
    def step(self, lr: float, factor: Tensor, finite: Tensor) -> None:
        scale_gradients(self.weights, factor)

        def direction(m: Matrix) -> Tensor:
            found = self._direction(m.weight, finite)
            return found if self.dtype is None else found.to(self.dtype)

        def move(m: Matrix, update: Tensor) -> None:
            local, rate = m.weight.local, self.rates[m.weight.name]
            go = finite.to(local.dtype)
            own = lr * rate.factor
            local.mul_(1 - own * rate.decay * go).sub_(self._even(m, update, finite) * (own * rate.size * go))

        work_in_turns(self.turns, direction, lambda xs: orthogonalized(xs, self.polynomials), move)

    def _direction(self, w: Weight, finite: Tensor) -> Tensor:
        """Updates the weight's momentum, and looks one step ahead (Nesterov)."""
        beta, m = self.beta, self.momentum[w.name]
        grad = torch.zeros_like(m) if w.local_grad is None else torch.where(finite, w.local_grad, torch.zeros_like(m))
        m.add_((grad - m) * ((1 - beta) * finite.to(m.dtype)))
        return torch.lerp(grad, m, beta) if self.settings.nesterov else m

    def _even(self, matrix: Matrix, update: Tensor, finite: Tensor) -> Tensor:
        """This rank's piece of the update as it is taken."""
        return update

    def state(self) -> dict[str, dict[str, Tensor]]:
        return {"momentum": self.momentum}


class NorMuon(Muon):
    """Muon whose rows are divided by the root of their mean square over the past (arXiv 2510.05491); the update is then as large as an
    orthogonal matrix again. Ranks that share a row add up its squares, so each knows its rows' numbers without the owner.
    """

    EPS = 1e-10

    def __init__(self, weights: list[Weight], cfg: Optim, rates: Mapping[str, Rate], mesh: Mesh) -> None:
        super().__init__(weights, cfg, rates, mesh)
        self.beta_rows = cfg.betas[1]
        self.row_sq = {w.name: w.local.new_zeros(*w.local.shape[:-1], 1) for w in weights}

    def _even(self, matrix: Matrix, update: Tensor, finite: Tensor) -> Tensor:
        w, update = matrix.weight, update.to(matrix.weight.local.dtype)
        rows, columns = w.placement.spec.shape[-2:]
        squares = self._over_ranks(matrix, update.square().sum(-1, keepdim=True), -1)
        kept = self.row_sq[w.name]
        kept.add_((squares / columns - kept) * ((1 - self.beta_rows) * finite.to(kept.dtype)))
        shares = 1 / (kept.sqrt() + self.EPS)
        size = self._over_ranks(matrix, (squares * shares.square()).sum(-2, keepdim=True), -2).sqrt()
        # A matrix without a gradient yet is zero, and remains so.
        return update * shares * (min(rows, columns) ** 0.5 / size.clamp(min=self.EPS))

    def _over_ranks(self, matrix: Matrix, sums: Tensor, dim: int) -> Tensor:
        """Sums over the ranks that split the matrix along `dim`."""
        dims = matrix.weight.local.ndim
        for step in matrix.steps:
            if step.dim == dims + dim:
                sums = all_reduce(sums, step.axis)
        return sums

    def state(self) -> dict[str, dict[str, Tensor]]:
        return {**super().state(), "row_sq": self.row_sq}


def batch_of(w: Weight) -> int:
    """How many matrices like this one an owner takes together. One on CPUs, where a batched product is no faster and rounds otherwise."""
    return 1 if w.local.device.type == "cpu" else max(1, BATCH_ELEMENTS // math.prod(w.placement.spec.shape))


def orthogonalized(matrices: list[Tensor], coefficients: Sequence[Polynomial]) -> list[Tensor]:
    """`orthogonalize` for each, those of one shape in the same products."""
    found: dict[int, Tensor] = {}
    for shape in dict.fromkeys(x.shape for x in matrices):
        numbers = [i for i, x in enumerate(matrices) if x.shape == shape]
        if len(numbers) == 1:
            found[numbers[0]] = orthogonalize(matrices[numbers[0]], coefficients)
        else:
            done = orthogonalize(torch.stack([matrices[i] for i in numbers]), coefficients)
            found.update(zip(numbers, done.unbind()))
    return [found[i] for i in range(len(matrices))]


def orthogonalize(matrix: Tensor, coefficients: Sequence[Polynomial]) -> Tensor:
    """The nearest matrix with equal singular values, roughly: Newton–Schulz rounds of X ← aX + b(XXᵀ)X + c(XXᵀ)²X with the coefficients of
    each. The last two dimensions are the matrix's.
    """
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for a, b, c in coefficients:
        gram = product(x, x.mT)
        x = a * x + product(b * gram + product(c * gram, gram), x)
    return x.mT if tall else x


def orthogonalization_flops(shape: tuple[int, ...]) -> float:
    """FLOPs of one round, for matrices of `shape`: three products with the smaller side's Gram matrix."""
    small, large = sorted(shape[-2:])
    return math.prod(shape[:-2]) * (4.0 * small**2 * large + 2.0 * small**3)
