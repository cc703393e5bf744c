"""Feed-forwards as rows by their activation φ: the facts that models, initialization, rules, growth and formats need. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megascale.plugins import with_plugins


@dataclass(frozen=True)
class ActivationRow:
    """One feed-forward: down(φ(up·x)), or down(φ(gate·x) ⊙ up·x) (arXiv 2002.05202).

    phi              a function of a tensor, or "module:name" of one, imported when a model is built
    gated            φ(gate·x) multiplies a second product: three matrices
    psi              another such function ψ of the second product: φ(gate·x) ⊙ ψ(up·x); None: the product itself
    second_moment    E[φ(z)²] for a standard normal z; for a gated kind that of its gate, since the other factor has unit variance (times
                     E[ψ(z)²] if there is a ψ)
    gradient_moment  share of a gradient's variance that passes back, E[φ'(z)²]. A product passes it to both factors: E[φ²] + E[φ'²]
    homogeneous      the output is proportional to `up` (ReLU: for positive factors), so both matrices may share a change of scale
    grows            φ acts on each channel alone and maps 0 to 0: new channels next to the old ones change nothing
    hf, hf_gated     its names in Hugging Face configs, ungated and gated; an export writes the first. Empty: Hugging Face has none
    theory           the rule of analysis/moments.py that predicts its output; None: no rule does
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
    psi: str | Callable[..., Any] | None = None

    @property
    def matrices(self) -> int:
        """Weight matrices per feed-forward."""
        return 3 if self.gated else 2


F = "torch.nn.functional"
OURS = "megascale.model.activations"
GELU_TANH = f"{OURS}:gelu_tanh"  # GPT-2's approximation; T5 1.1 gates with it
ACTIVATIONS: dict[str, ActivationRow] = {
    "swiglu": ActivationRow(f"{F}:silu", True, 0.356, 0.735, homogeneous=True, grows=True, hf_gated=("gated-silu",), theory="swiglu"),
    "swiglu_clamped": ActivationRow(f"{OURS}:clamped_swish", True, 0.844, 1.321, psi=f"{OURS}:clamped_plus_one", grows=True),
    "geglu_tanh": ActivationRow(GELU_TANH, True, 0.426, 0.882, homogeneous=True, grows=True, hf_gated=("gated-gelu", "gated-gelu_new")),
    "gelu": ActivationRow(f"{F}:gelu", False, 0.426, 0.456, grows=True, hf=("gelu",), theory="gelu"),
    "gelu_tanh": ActivationRow(GELU_TANH, False, 0.426, 0.456, grows=True, hf=("gelu_new", "gelu_pytorch_tanh"), theory="gelu"),
    "relu": ActivationRow(f"{F}:relu", False, 0.5, 0.5, homogeneous=True, grows=True, hf=("relu",), theory="relu"),
}


def activations() -> Mapping[str, ActivationRow]:
    return with_plugins("activations", ACTIVATIONS, ActivationRow)
