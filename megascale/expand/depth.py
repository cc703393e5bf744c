"""The source of each layer of a deeper model, and the changes of post-sum norms that make inserted layers exact.

Pre-norm layers change nothing if their outputs are zero. After the sum, an inserted norm gets the output of another norm: gain and bias
move from that to the last inserted norm, and epsilons compensate for normalizing again. With v the statistic of the stream, a mean of its
p-th powers, a norm maps v → v/(v + ε); a chain of n of them with ε₁, then δ, and gains (1 + δ)^(1/p), is v/(v + ε₁·(δ/(1 + δ))ⁿ⁻¹), so
ε₁ = ε·((1 + δ)/δ)ⁿ⁻¹ is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megascale.errors import UsageError

Mode = Literal["keep", "identity", "cancel"]
EXACT = ("identity", "cancel")


@dataclass(frozen=True)
class Layer:
    """A target layer: a copy of layer `source`, kept unchanged, or inserted with outputs that are zero or cancel."""

    source: int
    mode: Mode = "keep"


def insert_layers(old: int, where: list[int], method: str, placement: str, extra: int) -> tuple[Layer, ...]:
    """All `old` layers with `extra` copies of those at `where`, each after its source: spread evenly over them, or all after the last."""
    if method not in (*EXACT, "inject"):
        raise UsageError(
            f"--depth-method {method} copies whole stacks, not layers of one kind: use identity, cancel or inject, or num_layers"
        )
    mode: Mode = "keep" if method == "inject" else method  # type: ignore[assignment]
    copies = dict(zip(where, _shares(len(where), extra, placement)))
    return tuple(layer for i in range(old) for layer in (Layer(i), *(Layer(i, mode) for _ in range(copies.get(i, 0)))))


def _shares(places: int, extra: int, placement: str) -> list[int]:
    """How many of `extra` copies follow each place."""
    if placement == "end":
        return [0] * (places - 1) + [extra]
    return [(i + 1) * extra // places - i * extra // places for i in range(places)]


@dataclass(frozen=True)
class NormChange:
    """The change of a norm after the sum: epsilon as `factor` times the model's or as `absolute`; gain and bias from the norm `affine` (its
    source name within the model, None: one and zero), times `gain`.
    """

    affine: str | None
    gain: float
    factor: float | None = None
    absolute: float | None = None


def grow_layers(old: int, new: int, method: str, placement: str, period: int, beside: int = 0) -> tuple[Layer, ...]:
    """The layers of a stack of `new` from one of `old`. Raises UsageError for a depth that the method cannot reach.

    period     layers that belong together (experts in every n-th layer, a pattern of kinds, alternating grid dimensions): whole periods are
               inserted
    placement  positions of inserted layers: spread evenly, or all at the end
    beside     layers before and after the stack, which stay; they count in messages
    """
    if new < old:
        raise UsageError(
            f"num_layers is {old + beside} and cannot grow to {new + beside}: choose at least {old + beside}, or use megascale shrink"
        )
    if new == old:
        return tuple(Layer(i) for i in range(old))
    match method:
        case "stack":
            layers = tuple(Layer(i % old) for i in range(new))
        case "interleave":
            groups = (group * old // new for group in range(new // period))
            layers = tuple(Layer(group * period + i) for group in groups for i in range(period))
        case "dus":
            # The first n − m and the last n − m layers of the source (SOLAR, arXiv 2312.15166).
            if new % 2 or new > 2 * old:
                outside = f", beside the {beside} that no pattern repeats," if beside else ""
                raise UsageError(
                    f"depth up-scaling joins two halves of at most {old} layers: num_layers {new}{outside} must be even and at "
                    f"most {2 * old}"
                )
            half = new // 2
            layers = tuple(Layer(i if i < half else old - new + i) for i in range(new))
        case "identity" | "cancel" | "inject":
            if old % period or new % period:
                raise UsageError(
                    f"num_layers grows from {old + beside} to {new + beside} and {period} layers belong together: grow by a multiple of "
                    f"{period}"
                )
            mode: Mode = "keep" if method == "inject" else method  # type: ignore[assignment]
            copies = _shares(old // period, (new - old) // period, placement)
            layers = tuple(
                layer
                for group, more in enumerate(copies)
                for inside in [range(group * period, (group + 1) * period)]
                for layer in (*(Layer(i) for i in inside), *(Layer(i, mode) for _ in range(more) for i in inside))
            )
        case _:
            raise UsageError(f"no depth method {method}")
    if len(layers) != new or any((i - layer.source) % period for i, layer in enumerate(layers)):
        raise UsageError(
            f"{method} to {new + beside} layers would put layers into positions of another kind; layers come in groups of {period}"
        )
    return layers


def norm_chain(layers: tuple[Layer, ...], skips: list[float], power: float) -> dict[str, NormChange]:
    """Changes of norms after the sum, by name (blocks.3.ffn_norm), for inserted layers; `skips`: coefficients of the target's layers;
    `power` of the norms' statistic.
    """
    changes: dict[str, NormChange] = {}
    start = 0
    while start < len(layers):
        end = start + 1
        while end < len(layers) and layers[end].mode != "keep":
            end += 1
        inserted = end - start - 1
        if inserted and layers[start].mode == "keep":
            delta = float(2 * inserted)
            origin = f"blocks.{layers[start].source}.ffn_norm"
            changes[f"blocks.{start}.ffn_norm"] = NormChange(None, 1.0, factor=((1 + delta) / delta) ** (2 * inserted))
            gain = (1 + delta) ** (1 / power)
            for i in range(start + 1, end):
                last = i == end - 1
                # The norm's input is skip·x, so its epsilon counts skip^−p times.
                eps = delta * skips[i] ** power
                changes[f"blocks.{i}.attention_norm"] = NormChange(None, gain, absolute=eps)
                changes[f"blocks.{i}.ffn_norm"] = NormChange(origin if last else None, gain, absolute=eps)
        start = end
    return changes
