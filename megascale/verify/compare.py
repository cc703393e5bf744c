"""What may differ between a layout and one process, and what of it does."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

from megascale.verify.steps import worst

# Relative difference of a loss, and of a gradient or a weight beside the tensor's largest entry. fp64 rounds at 1e-16, fp32 at 6e-8 and
# bf16 at 4e-3; sums of tens of terms in another order stay within these.
BOUNDS = {"fp64": (1e-12, 1e-9), "fp32": (2e-5, 1e-4), "bf16": (2e-2, 1e-1)}


@dataclass(frozen=True)
class Verdict:
    """One layout in one precision: the largest differences, and the first thing that is beyond its bound ("" if none is)."""

    precision: str
    loss: float
    grad: float
    weight: float
    wrong: str = ""

    @property
    def equal(self) -> bool:
        return not self.wrong


def judge(precision: str, got: list[dict[str, Any]], reference: dict[str, Any], batch: int, routed: bool = False) -> Verdict:
    """`got`: the result of every rank. What is wrong is looked for in the order in which it happens: the start, the samples, the first loss
    and gradient, norms, later losses, the weights at the end. `routed`: tokens choose experts, and in bf16 one near the border may choose
    another one, so that only losses count there.
    """
    first = got[0]
    bound, tensors = BOUNDS[precision]
    if routed and precision == "bf16":
        tensors = inf
    losses = [abs(a - b) / max(abs(b), 1e-30) for a, b in zip(first["loss"], reference["loss"])]
    norms = [abs(a - b) / max(abs(b), 1e-30) for a, b in zip(first["norm"], reference["norm"])]
    (grad, where), (weight, moved) = worst(first["grad"], reference["grad"]), worst(first["weight"], reference["weight"])
    wrong = [
        *_starts(first["start"], reference["start"]),
        *_samples([rank["samples"] for rank in got], batch),
        *([f"the loss of step 1 is {first['loss'][0]!r} and {reference['loss'][0]!r} on one process"] if not losses[0] <= bound else []),
        *([f"the gradient of {where} differs by {grad:.1e} of its largest entry"] if not grad <= tensors else []),
        *([f"the norm of step {s} differs by {norms[s - 1]:.1e}" for s in range(1, len(norms) + 1) if not norms[s - 1] <= tensors]),
        *([f"the loss of step {s} differs by {losses[s - 1]:.1e}" for s in range(2, len(losses) + 1) if not losses[s - 1] <= bound]),
        *([f"{moved} differs by {weight:.1e} of its largest entry after step {len(losses)}"] if not weight <= tensors else []),
    ]
    return Verdict(precision, max(losses), grad, weight, wrong[0] if wrong else "")


def _starts(got: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    """Weights are drawn by name and place: they must be the same to the bit."""
    if got.keys() != reference.keys():
        odd = sorted(got.keys() ^ reference.keys())[0]
        return [f"{odd} is there on {'this layout' if odd in got else 'one process'} only"]
    return [f"{name} starts from other values" for name, tensor in got.items() if not bool((tensor == reference[name]).all())][:1]


def _samples(ranks: list[list[list[int]]], batch: int) -> list[str]:
    """In each step every sample of the global batch is on some rank, and no other."""
    for step in range(len(ranks[0])):
        held = {n for rank in ranks for n in rank[step] if n >= 0}
        wanted = set(range(step * batch, (step + 1) * batch))
        if held != wanted:
            return [f"step {step + 1} trains on samples {sorted(held ^ wanted)[:4]} wrongly: they are missing, or of another step"]
    return []
