"""Feed-forwards as rows, by their activation φ: what models, starts, rules, growth and formats ask of them. No torch is needed here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megascale.plugins import with_plugins


@dataclass(frozen=True)
class ActivationRow:
    """One feed-forward: down(φ(up·x)), or down(φ(gate·x) ⊙ up·x) (arXiv 2002.05202).

    phi              a function of a tensor, or "module:name" of one, which is imported where a model is built
    gated            φ of one product is multiplied with another product: three matrices
    second_moment    E[φ(z)²] of a standard normal z; a gated one's is that of its gate, times a second factor of unit variance
    gradient_moment  what of a gradient's variance comes back, E[φ'(z)²]. A product gives it to both its factors: E[φ²] + E[φ'²]
    homogeneous      the output is proportional to `up` (ReLU: to a positive factor), so that the size may be shared between both matrices
    grows            φ takes each channel alone and leaves a zero a zero: new channels beside the old ones change nothing
    hf, hf_gated     its names in Hugging Face's configs, without and with a gate, the one that an export writes first; of ours alone
    theory           by which rule of analysis/moments.py its output is predicted; None: by none
    """

    phi: str | Callable[..., Any]
    gated: bool
    second_moment: float
    gradient_moment: float
    homogeneous: bool = False
    grows: bool = False
    hf: tuple[str, ...] = ()
    hf_gated: tuple[str, ...] = ()
    theory: Literal["relu", "gelu", "swiglu"] | None = None

    @property
    def matrices(self) -> int:
        """Of a feed-forward."""
        return 3 if self.gated else 2


F = "torch.nn.functional"
GELU_TANH = "megascale.model.activations:gelu_tanh"  # GPT-2's approximation; T5 1.1 has a gate through it
ACTIVATIONS: dict[str, ActivationRow] = {
    "swiglu": ActivationRow(f"{F}:silu", True, 0.356, 0.735, homogeneous=True, grows=True, hf_gated=("gated-silu",), theory="swiglu"),
    "geglu_tanh": ActivationRow(GELU_TANH, True, 0.426, 0.882, homogeneous=True, grows=True, hf_gated=("gated-gelu", "gated-gelu_new")),
    "gelu": ActivationRow(f"{F}:gelu", False, 0.426, 0.456, grows=True, hf=("gelu",), theory="gelu"),
    "gelu_tanh": ActivationRow(GELU_TANH, False, 0.426, 0.456, grows=True, hf=("gelu_new", "gelu_pytorch_tanh"), theory="gelu"),
    "relu": ActivationRow(f"{F}:relu", False, 0.5, 0.5, homogeneous=True, grows=True, hf=("relu",), theory="relu"),
}


def activations() -> Mapping[str, ActivationRow]:
    return with_plugins("activations", ACTIVATIONS, ActivationRow)
