"""Text files → token files, with several processes and bounded memory."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megascale.data.indexed import TokenWriter, token_dtype
from megascale.data.readers import BLOCK_CHARACTERS, Block, read_blocks
from megascale.data.tokenizer import Tokenizer, keep_beside, load_tokenizer, train_sentencepiece
from megascale.errors import UsageError

SAMPLE_CHARACTERS = 4 << 20  # of text to train a tokenizer on: enough for tens of thousands of pieces, half a minute's work
IN_FLIGHT = 4  # batches per worker that are read ahead


@dataclass(frozen=True)
class Facts:
    """What is written to PREFIX.json. Entropy: of single tokens, in nats; a model that knows only frequencies reaches it."""

    documents: int
    tokens: int
    source_bytes: int
    vocab_size: int
    eos_id: int
    unigram_entropy: float
    tokenizer: str
    tokenizer_fingerprint: str


def sample_texts(files: list[Path], text_key: str) -> Iterator[str]:
    """At most SAMPLE_CHARACTERS of text, spread evenly over the files."""
    budget = SAMPLE_CHARACTERS
    stride = max(1, sum(f.stat().st_size for f in files) // (2 * SAMPLE_CHARACTERS)) if len(files) > 1 else 1
    share = max(BLOCK_CHARACTERS // 64, SAMPLE_CHARACTERS // max(1, len(files) // stride))
    for path in files[::stride]:
        left = share
        for block in read_blocks(path, text_key):
            text = block.text[: min(left, budget)]
            yield text
            budget, left = budget - len(text), left - len(text)
            if left <= 0 or budget <= 0:
                break
        if budget <= 0:
            return


def make_tokenizer(files: list[Path], text_key: str, vocab_size: int, prefix: str) -> Tokenizer:
    """Trains PREFIX.model on a sample of the input."""
    path = Path(prefix + ".model")
    train_sentencepiece(sample_texts(files, text_key), vocab_size, path)
    return load_tokenizer(path)


def prepare(
    files: list[Path],
    prefix: str,
    tokenizer: Tokenizer,
    text_key: str,
    workers: int,
    append_eos: bool,
    progress: Callable[[int], None],
) -> Facts:
    """Encodes every document of `files` in order into PREFIX.bin, .idx and .json, the tokenizer beside them.

    The result does not depend on `workers`. `progress` is told source bytes as they are done. Raises UsageError when there is no text.
    """
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    end = np.array([tokenizer.eos_id] if append_eos else [], np.int32)
    documents = source = 0
    with TokenWriter(prefix, token_dtype(tokenizer.vocab_size)) as writer:
        open_document: list[NDArray[np.int32]] = []
        for blocks, encoded in _encode_in_order(_batches(files, text_key), tokenizer.path, workers):
            for block, tokens in zip(blocks, encoded):
                counts += np.bincount(tokens, minlength=len(counts))
                open_document.append(tokens)
                if block.last:
                    writer.add(np.concatenate([*open_document, end]))
                    counts[tokenizer.eos_id] += len(end)
                    open_document, documents = [], documents + 1
            done = sum(b.source_bytes for b in blocks)
            source += done
            progress(done)
        if documents == 0 or counts.sum() == 0:
            raise UsageError(f"there is no text in the {len(files)} input files")
    share = counts[counts > 0] / counts.sum()
    facts = Facts(
        documents=documents,
        tokens=int(counts.sum()),
        source_bytes=source,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        unigram_entropy=float(-(share * np.log(share)).sum()),
        tokenizer=keep_beside(tokenizer, prefix).name,
        tokenizer_fingerprint=tokenizer.fingerprint,
    )
    assert math.isfinite(facts.unigram_entropy)
    Path(prefix + ".json").write_text(json.dumps(asdict(facts), indent=1) + "\n", encoding="utf-8")
    return facts


def _batches(files: list[Path], text_key: str) -> Iterator[list[Block]]:
    """Blocks grouped to about BLOCK_CHARACTERS, so that small documents do not travel one by one."""
    batch: list[Block] = []
    size = 0
    for path in files:
        for block in read_blocks(path, text_key):
            batch.append(block)
            size += len(block.text)
            if size >= BLOCK_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _encode_in_order(
    batches: Iterable[list[Block]], tokenizer: Path, workers: int
) -> Iterator[tuple[list[Block], list[NDArray[np.int32]]]]:
    """Encodes in `workers` processes with a bounded number of batches under way; results keep the order of the input."""
    context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (tokenizer,)) as pool:
        under_way: list[tuple[list[Block], Future[list[NDArray[np.int32]]]]] = []
        for batch in batches:
            under_way.append((batch, pool.submit(_encode, [b.text for b in batch])))
            if len(under_way) >= IN_FLIGHT * workers:
                blocks, future = under_way.pop(0)
                yield blocks, future.result()
        for blocks, future in under_way:
            yield blocks, future.result()


_worker: list[Tokenizer] = []  # one per worker process, since a native tokenizer does not travel between processes


def _start_worker(path: Path) -> None:
    _worker[:] = [load_tokenizer(path)]


def _encode(texts: list[str]) -> list[NDArray[np.int32]]:
    return _worker[0].encode_batch(texts)
