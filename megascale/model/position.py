"""Positions: rotary angles (stretched as in Llama 3, YaRN or interpolation), XPos decay and ALiBi slopes.

Shapes: b micro-batch, s sequence, h heads, e head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megascale.comm.host import constant
from megascale.config.schema import RopeScaling


class Rotary(NamedTuple):
    """Cosines and sines [1 or b, 1, s, e/2] for queries and for keys (they differ under XPos only)."""

    q_cos: Tensor
    q_sin: Tensor
    k_cos: Tensor
    k_sin: Tensor


def pair_exponents(dim: int, own: Sequence[float] | None, device: torch.device) -> Tensor:
    """u of each pair of channels in fp64: 2i/e for i < e/2 (RoFormer, arXiv 2104.09864), or the model's own."""
    if own is not None:
        return constant(tuple(own), device, torch.float64)
    return torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim


def inverse_frequencies(exponents: Tensor, theta: float, scaling: RopeScaling | None) -> Tensor:
    """θ^−u for exponents u [e/2], stretched by `scaling`."""
    freq = theta**-exponents
    if scaling is None:
        return freq
    if scaling.type == "linear":
        return freq / scaling.factor
    if scaling.type == "yarn":
        return _yarn(freq, exponents, theta, scaling)
    wavelength = 2 * math.pi / freq
    low = scaling.original_seq_len / scaling.low_freq_factor
    high = scaling.original_seq_len / scaling.high_freq_factor
    span = scaling.high_freq_factor - scaling.low_freq_factor
    blend = (scaling.original_seq_len / wavelength - scaling.low_freq_factor) / span
    between = (1 - blend) * freq / scaling.factor + blend * freq
    return torch.where(wavelength > low, freq / scaling.factor, torch.where(wavelength < high, freq, between))


def _yarn(freq: Tensor, exponents: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """YaRN's blend (arXiv 2309.00071, section 3.2): a ramp over channels, between those with beta_fast and beta_slow turns."""

    dim = 2 * freq.numel()

    def channel(turns: float) -> float:
        return dim * math.log(scaling.original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = channel(scaling.beta_fast), channel(scaling.beta_slow)
    low, high = (math.floor(first), math.ceil(last)) if scaling.truncate else (first, last)
    low, high = max(0, low), min(dim - 1, high)
    ramp = ((exponents * dim / 2 - low) / (high - low or 1e-3)).clamp(0, 1)
    return freq / scaling.factor * ramp + freq * (1 - ramp)


def rotary(positions: Tensor, freq: Tensor, dtype: torch.dtype, xpos: tuple[Tensor, int] | None, amplitude: float = 1.0) -> Rotary:
    """Angles of positions [1 or b, s] in fp64, so that long contexts keep their phase, rounded once to `dtype`; YaRN has an `amplitude`.

    XPos (arXiv 2212.10554) multiplies queries by ζ^(n/512) and keys by ζ^(−n/512), ζ = (u + 0.4)/1.4 of exponents u. Only differences of
    n matter; counting from the middle of the sequence keeps both factors small. `xpos`: exponents and middle; None: no XPos.
    """
    angle = positions.to(torch.float64)[:, None, :, None] * freq
    cos, sin = angle.cos() * amplitude, angle.sin() * amplitude
    if xpos is None:
        return Rotary(*(t.to(dtype) for t in (cos, sin, cos, sin)))
    exponents, middle = xpos
    zeta = (exponents + 0.4) / 1.4
    power = (positions.to(torch.float64) - middle)[:, None, :, None] / 512
    scale = zeta**power
    return Rotary(*(t.to(dtype) for t in (cos * scale, sin * scale, cos / scale, sin / scale)))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotates the first r channels of x [b, h, s, e] by cos and sin [1 or b, 1, s, r/2]: pair i is (x_i, x_{i+r/2}), as in Llama's and
    Hugging Face's weights; or (x_{2i}, x_{2i+1}) if they are `interleaved`. The other channels stay.
    """
    turned = 2 * cos.shape[-1]
    if interleaved:
        even, odd = x[..., :turned].unflatten(-1, (-1, 2)).unbind(-1)
        pairs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
        return pairs if turned == x.shape[-1] else torch.cat((pairs, x[..., turned:]), -1)
    first, second = (x if turned == x.shape[-1] else x[..., :turned]).chunk(2, dim=-1)
    parts = first * cos - second * sin, second * cos + first * sin
    return torch.cat(parts if turned == x.shape[-1] else (*parts, x[..., turned:]), dim=-1)


def alibi_slopes(heads: int) -> list[float]:
    """One slope per head (arXiv 2108.12409): geometric for powers of two, otherwise the next power's odd entries fill up."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(heads - power)]
    return slopes
