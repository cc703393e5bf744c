"""The models that there are, as passes and tools see them: whatever the family, they work on `units()`, hooks and specs."""

from __future__ import annotations

from megascale.config.schema import Model
from megascale.config.stages import Part
from megascale.model.decoder import Decoder, Shape
from megascale.model.kernels import NormKernel
from megascale.model.spacetime import Spacetime

Family = Decoder | Spacetime


def build_part(cfg: Model, shape: Shape, norm_kernel: NormKernel, part: Part | None = None) -> Family:
    """The meta module of `cfg.family`, or of one stage of it."""
    return (Spacetime if cfg.family == "spacetime" else Decoder)(cfg, shape, norm_kernel, part)
