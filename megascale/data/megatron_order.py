"""Samples in the order of megatron-core's GPTDataset and BlendedDataset (0.16), so that a run can move here on the same data.

Megatron draws an order for the number of samples that a run needs, so another number of steps is another order. Ours does not.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from megascale.data.dataset import Corpus, check_source, check_tokens
from megascale.data.stream import Tokens, TokenStream
from megascale.errors import UsageError

SURPLUS = 0.005  # samples that each source of a blend has to spare
MOST = 2**31  # most documents of an order, 20 bytes each while it is drawn
SEPARATE = 0.8  # share of an epoch below which the last one is shuffled on its own


class MegatronMixture:
    """`sample(n)` for n < `samples`, as in `Mixture`. Memory: 4 bytes per sample and per document, and 10 per sample if there are several
    sources.
    """

    def __init__(
        self, sources: list[Corpus], seq_len: int, seed: int, vocab_size: int, part: str, valid_fraction: float, samples: int
    ) -> None:
        """`part`: "train" or "valid", the last `valid_fraction` of each source's documents, or "all".

        Raises UsageError as `Mixture` does.
        """
        self.seq_len, self.vocab_size, self.sources, self.samples = seq_len, vocab_size, sources, samples
        weights = np.array([s.weight for s in sources]) / sum(s.weight for s in sources)
        self.blend = None if len(sources) == 1 else blend(weights.tolist(), samples)
        self.streams: list[TokenStream] = []
        self.shuffles: list[NDArray[np.integer]] = []
        for source, weight in zip(sources, weights.tolist()):
            wanted = samples if len(sources) == 1 else math.ceil(math.ceil(samples * weight) * (1 + SURPLUS))
            file = source.open()
            check_source(source, vocab_size)
            documents, shuffle = draw(file.lengths, _documents(len(file), part, valid_fraction), seq_len, wanted, seed, source.path)
            self.streams.append(TokenStream(file, documents))
            self.shuffles.append(shuffle)

    def sample(self, number: int) -> tuple[Tokens, NDArray[np.int32]]:
        """Tokens [seq_len+1] and document numbers [seq_len+1] of sample `number`."""
        if number >= self.samples:
            raise UsageError(
                f"data.order is megatron, but sample {number} is beyond the order drawn for {self.samples}: start a new run, or use "
                "order megascale"
            )
        which, index = (0, number) if self.blend is None else (int(self.blend[0][number]), int(self.blend[1][number]))
        tokens, documents = self.streams[which].read(int(self.shuffles[which][index]) * self.seq_len, self.seq_len + 1)
        check_tokens(tokens, self.sources[which], self.vocab_size)
        return tokens, documents


def blend(weights: list[float], samples: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """For each sample its source and its number within the source. Each sample comes from the source furthest behind its weight."""
    which, index = np.zeros(samples, np.int16), np.zeros(samples, np.int64)
    taken = [0] * len(weights)
    for number in range(samples):
        place = max(float(number), 1.0)
        behind = [w * place - n for w, n in zip(weights, taken)]
        source = behind.index(max(behind))
        which[number], index[number] = source, taken[source]
        taken[source] += 1
    return which, index


def draw(
    lengths: NDArray[np.integer], documents: NDArray[np.int32], seq_len: int, samples: int, seed: int, where: str
) -> tuple[NDArray[np.int64], NDArray[np.integer]]:
    """The stream: documents in order, over as many epochs as `samples` need; and each sample's window of the stream."""
    tokens = int(lengths[documents].sum(dtype=np.int64)) if len(documents) else 0
    if tokens <= seq_len:
        raise UsageError(
            f"{where} has {tokens} tokens for this part, but one sample of train.seq_len {seq_len} needs {seq_len + 1}: add data, or "
            "use order megascale, which can hold out a part of a document"
        )
    epochs = -(-(samples * seq_len + 1) // tokens)
    if epochs * len(documents) > MOST:
        raise UsageError(
            f"{where} has {tokens} tokens in {len(documents)} documents, but {samples} samples are {epochs} epochs of it: data.order "
            f"megatron keeps every document of every epoch in memory, at most {MOST}; use order megascale, which keeps none, or fewer steps"
        )
    windows = (epochs * tokens - 1) // seq_len
    before_last = ((epochs - 1) * tokens - 1) // seq_len if epochs > 1 else windows
    apart = epochs > 1 and samples - before_last < int(SEPARATE * ((tokens - 1) // seq_len))
    random = np.random.RandomState(seed)
    parts = [np.tile(documents, epochs - 1), documents.copy()] if apart else [np.tile(documents, epochs)]
    ranges = [(0, before_last), (before_last, windows)] if apart else [(0, windows)]
    kind = np.int64 if windows >= np.iinfo(np.uint32).max - 1 else np.uint32
    shuffled = [np.arange(first, end, dtype=kind) for first, end in ranges]
    for array in (*parts, *shuffled):
        random.shuffle(array)
    return np.concatenate(parts).astype(np.int64), np.concatenate(shuffled)


def _documents(count: int, part: str, valid_fraction: float) -> NDArray[np.int32]:
    border = round((1.0 - valid_fraction) * count)
    first, end = {"train": (0, border), "valid": (border, count), "all": (0, count)}[part]
    return np.arange(first, end, dtype=np.int32)
