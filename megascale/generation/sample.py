"""From logits to tokens. Shapes: b batch, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """logits [b, V] → tokens [b]. Temperature 0 takes the largest; otherwise one is drawn from softmax(logits/temperature), restricted to
    the fewest tokens whose probability adds up to `top_p` (nucleus sampling, arXiv 1904.09751).

    Drawn on the CPU in fp64, so that every rank with the same logits and seed draws the same.
    """
    if temperature == 0.0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.cpu().to(torch.float64) / temperature, -1)
    if top_p < 1.0:
        ordered, order = probabilities.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1).to(logits.device)
