"""Propagates the first two moments of a signal through each part of a transformer at initialization, forward and back (arXiv 2403.09635).

A signal is many tokens' vectors with independent channels: `mean`, `var` and, between two tokens of a sequence, the correlation `corr`.
Gradients have mean zero: g2 is their variance. If the paper has no closed form (correlations through GELU and SiLU, tanh), a 64-point
Gauss–Hermite rule takes the expectation over normal inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]
Function = Callable[[Array], Array]

_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(64)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


class Gradient(NamedTuple):
    """Variance of a gradient's entry (its mean is zero), and the correlation of the same entry of two tokens."""

    var: float
    corr: float


class Signal(NamedTuple):
    """mean and variance of an entry, and the correlation of the same entry of two tokens."""

    mean: float
    var: float
    corr: float

    @property
    def square(self) -> float:
        return self.var + self.mean**2


def linear(x: Signal, in_dim: int, weight_var: float) -> Signal:
    """Weights of mean zero: every output has variance in·w²(σ² + μ²), and two tokens share what their inputs share, including means."""
    var = in_dim * weight_var * x.square
    return Signal(0.0, var, (x.corr * x.var + x.mean**2) / x.square)


def linear_gradient(g2: float, out_dim: int, weight_var: float) -> float:
    return out_dim * g2 * weight_var


def dropout(x: Signal, p: float) -> Signal:
    """Variance (σ² + pμ²)/(1−p); masks are drawn per token, so covariances stay."""
    var = (x.var + p * x.mean**2) / (1 - p)
    return Signal(x.mean, var, x.corr * x.var / var)


def dropout_gradient(g2: float, p: float) -> float:
    return g2 / (1 - p)


def norm(x: Signal) -> Signal:
    return Signal(0.0, 1.0, x.corr)


def norm_gradient(g2: float, var: float) -> float:
    return g2 / var


def relu(x: Signal) -> Signal:
    """For an input of mean zero: mean σ/√(2π), variance σ²(π−1)/2π; covariance σ²/2π·(√(1−r²) + r(π − arccos r) − 1)."""
    r = min(1.0, x.corr)
    product = (math.sqrt(1 - r * r) + r * (math.pi - math.acos(r))) / (2 * math.pi)
    var = (math.pi - 1) / (2 * math.pi)
    return Signal(math.sqrt(x.var / (2 * math.pi)), x.var * var, (product - 1 / (2 * math.pi)) / var)


def relu_gradient(g2: float) -> float:
    return g2 / 2


def gelu(x: Signal) -> Signal:
    """For an input of mean zero, a = σ²/(1+σ²): mean σ√a/√(2π), variance σ²/2π·(π − a − arccos a + 2a√((1−a)/(1+a)))."""
    a = x.var / (1 + x.var)
    mean = math.sqrt(x.var * a / (2 * math.pi))
    var = x.var / (2 * math.pi) * (math.pi - a - math.acos(a) + 2 * a * math.sqrt((1 - a) / (1 + a)))
    return Signal(mean, var, (joint(_gelu, x) - mean**2) / var)


def gelu_gradient(g2: float, var: float) -> float:
    """g²·[½ + (−arccos a + a(5σ²+3)/(1+2σ²)^1.5)/2π]"""
    a = var / (1 + var)
    return g2 * (0.5 + (-math.acos(a) + a * (5 * var + 3) / (1 + 2 * var) ** 1.5) / (2 * math.pi))


def tanh(x: Signal, alpha: float) -> Signal:
    """tanh(αx) of DyT, odd: its mean is zero."""
    var = expectation(lambda z: np.tanh(alpha * z) ** 2, x.var)
    return Signal(0.0, var, joint(lambda z: np.tanh(alpha * z), x) / var)


def tanh_gradient(g2: float, var: float, alpha: float) -> float:
    return g2 * alpha**2 * expectation(lambda z: (1 - np.tanh(alpha * z) ** 2) ** 2, var)


def swiglu(gate: Signal, up: Signal) -> Signal:
    """silu(gate)·up for independent inputs of mean zero."""
    var = expectation(lambda z: _silu(z) ** 2, gate.var) * up.var
    return Signal(0.0, var, joint(_silu, gate) * up.corr * up.var / var)


def swiglu_gradients(g2: float, gate: Signal, up: Signal) -> tuple[float, float]:
    """Gradient variances of the gate and of up."""
    return g2 * expectation(lambda z: _silu_slope(z) ** 2, gate.var) * up.var, g2 * expectation(lambda z: _silu(z) ** 2, gate.var)


def gated(gate: Signal, y: Signal) -> Signal:
    """sigmoid(gate)·y for independent inputs of mean zero."""
    var = expectation(lambda z: _sigmoid(z) ** 2, gate.var) * y.var
    return Signal(0.0, var, joint(_sigmoid, gate) * y.corr * y.var / var)


def gated_gradients(g2: float, gate: Signal, y: Signal) -> tuple[float, float]:
    """Gradient variances of the gate and of y."""
    slope = expectation(lambda z: _sigmoid_slope(z) ** 2, gate.var)
    return g2 * slope * y.var, g2 * expectation(lambda z: _sigmoid(z) ** 2, gate.var)


def capped(var: float, cap: float) -> float:
    """Variance of cap·tanh(z/cap), z of mean zero."""
    return cap**2 * expectation(lambda z: np.tanh(z / cap) ** 2, var)


def slope_correlation(kind: str, x: Signal) -> float:
    """Factor on a gradient's correlation through φ: E[φ'(a)φ'(b)]/E[φ'²]. `kind`: relu, gelu, silu (slope) or gate (silu itself), sigmoid
    (slope) or share (the sigmoid itself).
    """
    if kind == "relu":
        return (math.pi - math.acos(min(1.0, x.corr))) / math.pi
    slopes = {"gelu": _gelu_slope, "silu": _silu_slope, "gate": _silu, "sigmoid": _sigmoid_slope, "share": _sigmoid}
    f = slopes[kind]
    return joint(f, x) / expectation(lambda z: f(z) ** 2, x.var)


def expectation(f: Function, var: float) -> float:
    """E[f(z)], z normal of mean zero."""
    return float((f(_NODES * math.sqrt(var)) * _WEIGHTS).sum())


def joint(f: Function, x: Signal) -> float:
    """E[f(a)·f(b)] for two tokens' entries a, b of mean zero."""
    r = max(-1.0, min(1.0, x.corr))
    a = _NODES[:, None] * math.sqrt(x.var)
    b = (r * _NODES[:, None] + math.sqrt(1 - r * r) * _NODES[None, :]) * math.sqrt(x.var)
    return float((f(a) * f(b) * _WEIGHTS[:, None] * _WEIGHTS[None, :]).sum())


def _sigmoid(z: Array) -> Array:
    return 1 / (1 + np.exp(-z))


def _sigmoid_slope(z: Array) -> Array:
    return _sigmoid(z) * (1 - _sigmoid(z))


def _silu(z: Array) -> Array:
    return z / (1 + np.exp(-z))


def _silu_slope(z: Array) -> Array:
    s = 1 / (1 + np.exp(-z))
    return s * (1 + z * (1 - s))


def _gelu(z: Array) -> Array:
    return z * _normal_cdf(z)


def _gelu_slope(z: Array) -> Array:
    return _normal_cdf(z) + z * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def _normal_cdf(z: Array) -> Array:
    return 0.5 * (1 + torch.erf(torch.from_numpy(z / math.sqrt(2))).numpy())
