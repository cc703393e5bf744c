"""Samples → micro-batches on the device, made one step ahead by a background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megascale.data.masking import Masking
from megascale.data.stream import Tokens

NOT_COUNTED = -1  # as a target; as a sample number it marks an empty row


class Batch(NamedTuple):
    """One micro-batch. tokens, targets [b, s] (negative targets are not counted); documents, positions [b, s], or None if attention may
    cross documents; samples [b]: global sample numbers; valid: number of targets that count; source [b, t], negative beyond its end, if
    tokens are a target or a field that goes with a text; groups [b, s]: the number of each target's group in a tally (model/tally.py).
    """

    tokens: Tensor
    targets: Tensor
    documents: Tensor | None
    positions: Tensor | None
    samples: Tensor
    valid: int
    source: Tensor | None = None
    groups: Tensor | None = None

    def inputs(self, training: bool = True) -> dict[str, Tensor | None]:
        """The arguments of a model's forward; dropout uses the sample numbers."""
        named = {"tokens": self.tokens, "targets": self.targets, "documents": self.documents, "positions": self.positions}
        samples = {"samples": self.samples} if training else {}
        more = {"source": self.source, "groups": self.groups}
        return {**named, **samples, **{name: value for name, value in more.items() if value is not None}}


def sample_numbers(first: int, count: int, micro_batch: int, part: int, parts: int) -> list[list[int]]:
    """Which of the samples first…first+count−1 go to data rank `part` of `parts`: a list per micro-batch, −1 for empty rows.

    Micro-batches are filled one after the other, each split over the ranks in order.
    """
    steps = -(-count // (micro_batch * parts))
    rows = []
    for i in range(steps):
        begin = (i * parts + part) * micro_batch
        rows.append([first + n if n < count else NOT_COUNTED for n in range(begin, begin + micro_batch)])
    return rows


class Samples(Protocol):
    """Anything with numbered samples of tokens."""

    seq_len: int

    def sample(self, number: int) -> tuple[Tokens, NDArray[np.int32]]:
        """Tokens [seq_len+1] and document numbers [seq_len+1]."""


def make_batch(mixture: Samples, numbers: list[int], packing: str, device: torch.device, masking: Masking | None = None) -> Batch:
    """The samples `numbers` of a mixture, on `device`; NOT_COUNTED among them leaves a row empty.

    `packing`: concat (attention may cross documents) or documents (attention, positions and targets stay inside them). A target is the
    next token; with `masking` it is the token itself at the chosen positions.
    """
    size = mixture.seq_len
    tokens = np.zeros((len(numbers), size + 1), np.int64)
    documents = np.zeros((len(numbers), size + 1), np.int64)
    targets = np.full((len(numbers), size), NOT_COUNTED, np.int64)
    for row, number in enumerate(numbers):
        if number != NOT_COUNTED:
            tokens[row], documents[row] = mixture.sample(number)
            targets[row] = tokens[row, 1:]
            if masking is not None:
                seen, asked = masking.corrupt(tokens[row, :-1], number)
                targets[row] = np.where(asked, tokens[row, :-1], NOT_COUNTED)
                tokens[row, :-1] = seen
    inside = positions = None
    if packing == "documents" and masking is None:
        targets[documents[:, 1:] != documents[:, :-1]] = NOT_COUNTED
    if packing == "documents":
        inside = to_device(documents[:, :-1], device)
        positions = to_device(_restarting(documents[:, :-1]), device)
    return Batch(
        to_device(tokens[:, :-1], device),
        to_device(targets, device),
        inside,
        positions,
        to_device(np.array(numbers, np.int64), device),
        int((targets >= 0).sum()),
    )


def _restarting(documents: np.ndarray) -> np.ndarray:
    """Positions that restart from 0 at each new document."""
    place = np.arange(documents.shape[1])[None, :].repeat(len(documents), 0)
    begins = np.zeros_like(place)
    begins[:, 1:] = np.where(documents[:, 1:] != documents[:, :-1], place[:, 1:], 0)
    return place - np.maximum.accumulate(begins, axis=1)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor, copied asynchronously to a GPU."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type != "cuda":
        return tensor
    # The current device is per thread: without this, every rank's prefetching thread would open a context on device 0 to pin memory.
    with torch.cuda.device(device):
        return tensor.pin_memory().to(device, non_blocking=True)


class Prefetcher(Iterator[list[Batch]]):
    """`make(step)` for step = first…last, computed ahead in one thread; an error in it is raised again in the consumer and ends the
    iteration.
    """

    def __init__(self, make: Callable[[int], list[Batch]], first: int, last: int) -> None:
        self._ready: queue.Queue[list[Batch] | BaseException | None] = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._work, args=(make, first, last), daemon=True)
        self._thread.start()

    def __next__(self) -> list[Batch]:
        if self._ended:
            raise StopIteration
        item = self._ready.get()
        self._ended = not isinstance(item, list)  # nothing follows the end or an error; do not wait forever
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Ends the thread; a step in progress is finished first."""
        self._ended = True
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def _work(self, make: Callable[[int], list[Batch]], first: int, last: int) -> None:
        try:
            for step in range(first, last + 1):
                if self._closed.is_set():
                    return
                self._ready.put(make(step))
            self._ready.put(None)
        except BaseException as error:
            self._ready.put(error)
