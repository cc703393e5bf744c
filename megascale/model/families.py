"""The models by family name."""

from __future__ import annotations

from megascale.config.schema import Model
from megascale.config.stages import StagePart
from megascale.model.decoder import Decoder
from megascale.model.encoder_decoder import EncoderDecoder
from megascale.model.family import Family
from megascale.model.shape import Shape
from megascale.model.spacetime import Spacetime


def build_part(cfg: Model, shape: Shape, part: StagePart | None = None) -> Family:
    """The meta module of `cfg.family`, or of one stage of it."""
    match cfg.family:
        case "spacetime":
            return Spacetime(cfg, shape, part)
        case "encoder_decoder":
            return EncoderDecoder(cfg, shape, part)
        case _:
            return Decoder(cfg, shape, part)
