"""Log-likelihoods of requests, and likeliest next tokens, from the forward pass of an engine on any layout.

Requests are packed into rows; each has its own document, so that nothing crosses from one to the next, and its number as the group of its
targets in the head's tally. One sum over all ranks then gives every rank every number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megascale.data.loader import NOT_COUNTED, Batch, Prefetcher, sample_numbers, to_device
from megascale.evaluation.requests import Request
from megascale.model.decoder import Decoder
from megascale.model.tally import Tally
from megascale.parallel.model import ParallelModel


class Score(NamedTuple):
    """The log-likelihood of a request's tokens, and whether each of them is the likeliest."""

    log_likelihood: float
    greedy: bool


class Piece(NamedTuple):
    """Inputs in a row, the targets of the last ones, and their group."""

    inputs: list[int]
    targets: list[int]
    group: int


Row = list[Piece]
Forward = Callable[[Sequence[Batch]], Tensor]


@dataclass(frozen=True)
class Scorer:
    """How requests pass the model.

    length   the most inputs of a request; the width of all rows if `packed`
    packed   several requests share a row, by documents. Otherwise each has its own, and those of similar length share a batch.
    batch    rows of a global batch; `micro_batch` of them on each data rank together
    forward  the engine's `evaluate`
    """

    model: ParallelModel
    forward: Forward
    device: torch.device
    length: int
    batch: int
    micro_batch: int
    packed: bool

    def scores(self, requests: Sequence[Request]) -> list[Score]:
        """Collective. Raises Halted if the run is asked to stop."""
        pieces = [Piece(*r.cut(self.length), i) for i, r in enumerate(requests)]
        losses, _, others = self.sums(pieces, "losses").tolist()
        return [Score(-loss, other == 0) for loss, other in zip(losses, others)]

    def next_tokens(self, texts: Sequence[Sequence[int]]) -> list[int]:
        """The likeliest token after each text, from its last `length` tokens. Collective."""
        pieces = [Piece(list(t[-self.length :]), [0], i) for i, t in enumerate(texts)]
        return [int(t) for t in self.sums(pieces, "tokens")[0].tolist()]

    def sums(self, pieces: Sequence[Piece], adds: Literal["losses", "tokens"]) -> Tensor:
        """The tally of all pieces over all ranks, [3, pieces] on the host."""
        rows = pack(pieces, self.length) if self.packed else [[p] for p in sorted(pieces, key=lambda p: -len(p.inputs))]
        tally = Tally(len(pieces), adds)
        stages = [s for s in self.model.stages if isinstance(s, Decoder)]
        kept = [s.tally for s in stages]
        batches = Prefetcher(partial(self.step, rows), 0, -(-len(rows) // self.batch) - 1)
        try:
            for stage in stages:
                stage.tally = tally
            with torch.no_grad():
                for step in batches:
                    self.forward(step)
        finally:
            batches.close()
            for stage, own in zip(stages, kept):
                stage.tally = own
        found = tally.take(self.device) * float(self.model.mesh.tells_loss)
        if self.model.mesh.size > 1:
            dist.all_reduce(found)
        return found.cpu()

    def step(self, rows: Sequence[Row], step: int) -> list[Batch]:
        """This rank's micro-batches of a global batch, all of one width."""
        mesh, some = self.model.mesh, rows[step * self.batch : (step + 1) * self.batch]
        width = self.length if self.packed else max(len(row[0].inputs) for row in some)
        count = self.batch if self.packed else len(some)  # a pipeline's messages are of one size
        numbers = sample_numbers(0, count, self.micro_batch, mesh.data_rank, mesh.data_size)
        empty: Row = []
        return [make_batch([some[n] if 0 <= n < len(some) else empty for n in part], width, self.packed, self.device) for part in numbers]


def pack(pieces: Sequence[Piece], width: int) -> list[Row]:
    """First fit, longest first: few rows, the same for the same pieces."""
    rows: list[Row] = []
    room: list[int] = []
    first = 0  # rows before it are full
    for piece in sorted(pieces, key=lambda p: -len(p.inputs)):
        need = len(piece.inputs)
        while first < len(room) and room[first] == 0:
            first += 1
        place = next((i for i in range(first, len(room)) if room[i] >= need), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(width)
        rows[place].append(piece)
        room[place] -= need
    return rows


def make_batch(rows: Sequence[Row], width: int, packed: bool, device: torch.device) -> Batch:
    """Rows as one micro-batch; what is left of a row is a document of its own that counts nothing."""
    shape = len(rows), width
    tokens, documents, positions = (np.zeros(shape, np.int64) for _ in range(3))
    targets, groups = (np.full(shape, NOT_COUNTED, np.int64) for _ in range(2))
    for i, row in enumerate(rows):
        begin = 0
        for number, piece in enumerate(row):
            end = begin + len(piece.inputs)
            tokens[i, begin:end] = piece.inputs
            targets[i, end - len(piece.targets) : end] = piece.targets
            groups[i, end - len(piece.targets) : end] = piece.group
            documents[i, begin:end] = number
            positions[i, begin:end] = np.arange(end - begin)
            begin = end
        documents[i, begin:] = len(row)
        positions[i, begin:] = np.arange(width - begin)
    inside, places = (to_device(x, device) if packed else None for x in (documents, positions))
    samples = to_device(np.full(len(rows), NOT_COUNTED, np.int64), device)
    valid = int((targets >= 0).sum())
    return Batch(to_device(tokens, device), to_device(targets, device), inside, places, samples, valid, groups=to_device(groups, device))
