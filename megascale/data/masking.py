"""The masked-token objective (BERT, arXiv 1810.04805): which tokens of a sample are hidden from an encoder, which must predict them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megascale.splitmix import GOLDEN, mix64

Tokens = NDArray[np.int64]
HIDDEN, RANDOM = 0.8, 0.1  # of the chosen tokens; the rest stay unchanged
ODD = np.uint64(GOLDEN)


@dataclass(frozen=True)
class Masking:
    """`fraction` of the tokens is chosen; `mask_token` replaces hidden ones, and random ones come from `vocabulary`."""

    seed: int
    fraction: float
    mask_token: int
    vocabulary: int

    def corrupt(self, tokens: Tokens, sample: int) -> tuple[Tokens, NDArray[np.bool_]]:
        """tokens [s] of sample number `sample` → the encoder's input [s], and a mask of the tokens to predict [s]. Depends only on its
        arguments: the same on every layout and at every resume; another epoch has other sample numbers and hides other tokens.
        """
        place = np.arange(len(tokens), dtype=np.uint64) * ODD + seed_of(self.seed, "mask", sample)
        chosen = _uniform(mix64(place)) < self.fraction
        kind = _uniform(mix64(place ^ ODD))
        other = (mix64(place + np.uint64(1)) % np.uint64(self.vocabulary)).astype(np.int64)
        seen = np.where(chosen & (kind < HIDDEN), self.mask_token, tokens)
        return np.where(chosen & (kind >= HIDDEN) & (kind < HIDDEN + RANDOM), other, seen), chosen


def seed_of(seed: int, purpose: str, sample: int) -> np.uint64:
    """Seed of the choices for one sample."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{sample}".encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def _uniform(x: NDArray[np.uint64]) -> NDArray[np.float64]:
    return (x >> np.uint64(11)).astype(np.float64) / float(1 << 53)
