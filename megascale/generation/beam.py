"""Beam search for encoder–decoders on one process, for evaluation: the source is encoded once, the target is decoded again for each token.

No keys and values are kept between tokens, so a target of n tokens costs n(n+1)/2 token passes: fine for sentences, and the same forward
pass as in training.

Shapes: b sources, t source, w hypotheses per source, n tokens so far, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megascale.model.block import Memory
from megascale.model.encoder_decoder import EncoderDecoder


class Hypothesis(NamedTuple):
    """A target without its end token; `score` is its log-probability divided by its length (with the end) to the power of the penalty."""

    tokens: list[int]
    score: float


@torch.no_grad()
def beam_search(
    model: EncoderDecoder,
    source: Tensor,
    end: int,
    longest: int,
    width: int = 1,
    length_penalty: float = 1.0,
    start: int | None = None,
) -> list[Hypothesis]:
    """The best target of each source [b, t] (negative beyond its end), of at most `longest` tokens including the end. The decoder's input
    begins with `start`, by default the end token.

    Each step keeps the `width` likeliest of all continued hypotheses and collects those that ended. A source is done once no remaining
    hypothesis can reach a better score: it only loses probability, and at best becomes as long as allowed. Width 1 is greedy search, which
    takes the first end.
    """
    b, done = source.shape[0], [list[Hypothesis]() for _ in range(source.shape[0])]
    valid = source >= 0
    read = model.encode(model.embed_source(source), source, valid, None, None, model.tables())
    memory = model.memory(read.repeat_interleave(width, 0), valid.repeat_interleave(width, 0))
    assert memory is not None
    tokens = torch.full((b, width, 1), end if start is None else start, device=source.device)
    # All hypotheses of a source start equal: only the first may continue, or they would stay equal.
    scores = torch.full((b, width), float("-inf"), dtype=torch.float64, device=source.device)
    scores[:, 0] = 0.0
    for length in range(1, longest + 1):
        total = scores.unsqueeze(2) + next_log_probabilities(model, tokens.flatten(0, 1), memory).unflatten(0, (b, width))
        vocab = total.shape[2]
        # Twice as many as are kept: at most half of them end.
        best, place = total.flatten(1).topk(2 * width)
        parent, token = place // vocab, place % vocab
        ends = token == end
        for i, j in (ends[:, :width] & best[:, :width].isfinite()).nonzero().tolist():
            done[i].append(Hypothesis(tokens[i, parent[i, j], 1:].tolist(), best[i, j].item() / length**length_penalty))
        kept = ends.to(torch.int8).argsort(dim=1, stable=True)[:, :width]
        scores, parent, token = best.gather(1, kept), parent.gather(1, kept), token.gather(1, kept)
        tokens = torch.cat((tokens.gather(1, parent.unsqueeze(2).expand(-1, -1, length)), token.unsqueeze(2)), 2)
        hope = (scores[:, 0] / longest**length_penalty).tolist()
        if all(found and (width == 1 or max(h.score for h in found) >= reach) for found, reach in zip(done, hope)):
            break
    for i, found in enumerate(done):
        if not found:  # nothing ended within the limit
            found.append(Hypothesis(tokens[i, 0, 1:].tolist(), scores[i, 0].item() / longest**length_penalty))
    return [max(found[:1] if width == 1 else found, key=lambda h: h.score) for found in done]


def next_log_probabilities(model: EncoderDecoder, tokens: Tensor, memory: Memory) -> Tensor:
    """tokens [b·w, n] → log-probabilities [b·w, V] of the next token, in fp64."""
    x = model.decode(model.embed(tokens, None), tokens, memory, tables=model.tables())
    return torch.log_softmax(model.finish(x[:, -1:], None, 1.0)[:, 0].to(torch.float64), -1)
