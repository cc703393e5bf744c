"""Text files → token files, with several processes and bounded memory."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megascale.data.aligned import read_pairs
from megascale.data.indexed import TokenWriter, token_dtype
from megascale.data.publish import Publication, publication
from megascale.data.readers import BLOCK_BYTES, LONGEST, Tally, TextBlock, can_enter, read_blocks
from megascale.data.tokenizer import Tokenizer, keep_beside, load_tokenizer
from megascale.data.workers import end_with_parent
from megascale.errors import UsageError
from megascale.files import write_durably

SAMPLE_CHARACTERS = 4 << 20  # of text to train a tokenizer on: enough for tens of thousands of pieces, seconds of work
PASSAGE = 1 << 16  # characters of the sample read at one place
IN_FLIGHT = 4  # batches read ahead per worker


@dataclass(frozen=True)
class Facts:
    """The content of PREFIX.json.

    source_bytes: of the unpacked text in UTF-8. not_utf8_files: number of files in which characters were replaced. unigram_entropy: of
    single tokens, in nats, the loss of a model that only knows token frequencies. Written only if not 0 or None: bos_id, the token that
    begins every document; null_documents and byte_order_marks, which were dropped; special_tokens, tokens of the text that should only be
    control tokens; empty_files, inputs without a document.
    """

    documents: int
    tokens: int
    source_bytes: int
    not_utf8_files: int
    vocab_size: int
    eos_id: int
    largest_token: int
    unigram_entropy: float
    tokenizer: str
    tokenizer_fingerprint: str
    bos_id: int | None = None
    null_documents: int = 0
    byte_order_marks: int = 0
    special_tokens: int = 0
    empty_files: int = 0

    def written(self) -> dict[str, object]:
        rare = {"bos_id": None, "null_documents": 0, "byte_order_marks": 0, "special_tokens": 0, "empty_files": 0}
        return {key: value for key, value in asdict(self).items() if key not in rare or value != rare[key]}


class Encoded(NamedTuple):
    """A tokenized batch of texts: concatenated `tokens`, the end of each text in `ends` [texts], and the texts' bytes in UTF-8."""

    tokens: NDArray[np.int32]
    ends: NDArray[np.int64]
    source_bytes: int


def sample_texts(files: list[Path], text_key: str, characters: int = SAMPLE_CHARACTERS, longest: int = LONGEST) -> Iterator[str]:
    """At most `characters` of text, in passages spread evenly over the bytes of all files; a compressed file gives its beginning."""
    share = characters / max(1, sum(f.stat().st_size for f in files))
    credit = 0.0  # characters still due from the files so far: small files are skipped in turn, but read whole
    for path in files:
        size = path.stat().st_size
        credit += size * share
        if credit < min(size, PASSAGE):
            continue
        due = min(credit, size) if can_enter(path) else credit
        places = max(1, int(due) // PASSAGE) if can_enter(path) else 1
        for i in range(places):
            wanted = int(due / places)
            for block in read_blocks(path, text_key, size * i // places, PASSAGE, longest):
                text = block.text[:wanted]
                wanted, credit = wanted - len(text), credit - len(text)
                yield text
                if wanted <= 0:
                    break


def prepare(
    files: list[Path],
    prefix: str,
    tokenizer: Tokenizer,
    text_key: str,
    workers: int,
    append_eos: bool,
    progress: Callable[[int], None],
    bos: bool = False,
    longest: int = LONGEST,
) -> Facts:
    """`write_tokens` of every document of `files` in order; the files appear together, or none of them. `append_eos`, `bos`: whether
    documents get an end token and a beginning token. `longest`: bytes of a JSON line or a Parquet value.
    """
    nothing = f"there is no text in the input ({len(files)} files, {files[0]} first): name files that have some"
    tally = Tally()
    blocks = _blocks_of(files, text_key, longest, tally)
    around = ([tokenizer.bos_id] if bos else [], [tokenizer.eos_id] if append_eos else [])
    with publishing(prefix) as made:
        return write_tokens(blocks, tally, prefix, tokenizer, workers, around, progress, nothing, made)


def prepare_pairs(
    files: list[Path],
    prefix: str,
    tokenizers: tuple[Tokenizer, Tokenizer],
    keys: tuple[str, str],
    workers: int,
    progress: Callable[[int], None],
    longest: int = LONGEST,
) -> tuple[Facts, Facts]:
    """`write_tokens` of aligned text (aligned.py), the sources as PREFIX.source and the targets as PREFIX.target, which appear together."""
    nothing = f"there is no pair in the input ({', '.join(map(str, files))}): both sides of a pair need text"
    tallies = Tally(), Tally()
    with publishing(prefix) as made:
        found: list[Facts] = []
        for side, (name, tokenizer, tally) in enumerate(zip(("source", "target"), tokenizers, tallies)):
            blocks, around = read_pairs(files, side, keys, longest, tally), (list[int](), [tokenizer.eos_id])
            found.append(write_tokens(blocks, tally, f"{prefix}.{name}", tokenizer, workers, around, progress, nothing, made))
    return found[0], found[1]


def _blocks_of(files: list[Path], text_key: str, longest: int, tally: Tally) -> Iterator[TextBlock]:
    """The documents of all files; counts files without one in `tally`."""
    for path in files:
        empty = True
        for block in read_blocks(path, text_key, longest=longest, tally=tally):
            empty = False
            yield block
        tally.empty += empty


@contextmanager
def publishing(prefix: str) -> Iterator[Publication]:
    """Turns a disk error into a UsageError; then nothing is left of the files."""
    try:
        with publication() as made:
            yield made
    except OSError as error:
        raise UsageError(f"{prefix} cannot be written ({error}): choose another --out, or make room there") from None


def write_tokens(
    blocks: Iterable[TextBlock],
    tally: Tally,
    prefix: str,
    tokenizer: Tokenizer,
    workers: int,
    around: tuple[list[int], list[int]],
    progress: Callable[[int], None],
    nothing: str,
    made: Publication,
) -> Facts:
    """Encodes documents in order into what `made` will publish as PREFIX.bin, .idx and .json with the tokenizer next to them.

    The result does not depend on `workers`. `around`: tokens that begin and end each document. `progress` is called with stored bytes of
    the input as they are done; `tally` has the counts of `blocks`. Raises UsageError if there is no document (with the message `nothing`)
    or a file cannot be read, OSError for the output's disk.
    """
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    begin, end = (np.array(ids, np.int32) for ids in around)
    documents = source = 0
    first = True  # first block of a document
    damaged: set[Path] = set()
    with TokenWriter(prefix, token_dtype(tokenizer.vocab_size), publication=made) as writer:
        for batch, encoded in _encode_in_order(_batches(blocks), tokenizer, workers):
            counts += np.bincount(encoded.tokens, minlength=len(counts))
            for block, tokens in zip(batch, np.split(encoded.tokens, encoded.ends[:-1])):
                if first:
                    writer.extend(begin)
                writer.extend(tokens)
                first = block.last
                if block.last:
                    writer.extend(end)
                    writer.end_document()
                    documents += 1
            source += encoded.source_bytes
            damaged |= {b.path for b in batch if b.damaged}
            progress(sum(b.read for b in batch))
        if documents == 0:
            raise UsageError(nothing)
    special = int(counts[sorted({*tokenizer.specials, tokenizer.eos_id})].sum())
    for token in (*around[0], *around[1]):
        counts[token] += documents
    share = counts[counts > 0] / counts.sum()
    facts = Facts(
        documents=documents,
        tokens=int(counts.sum()),
        source_bytes=source,
        not_utf8_files=len(damaged),
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        largest_token=int(np.flatnonzero(counts)[-1]),
        unigram_entropy=float(-(share * np.log(share)).sum()),
        tokenizer=keep_beside(tokenizer, prefix, made).name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        bos_id=around[0][0] if around[0] else None,
        null_documents=tally.nulls,
        byte_order_marks=tally.marks,
        special_tokens=special,
        empty_files=tally.empty,
    )
    write_durably(made.stage(Path(prefix + ".json")), (json.dumps(facts.written(), indent=1) + "\n").encode())
    return facts


def _batches(blocks: Iterable[TextBlock]) -> Iterator[list[TextBlock]]:
    """Groups blocks to about BLOCK_BYTES characters, so that small documents are not sent one by one."""
    batch: list[TextBlock] = []
    size = 0
    for block in blocks:
        batch.append(block)
        size += len(block.text)
        if size >= BLOCK_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_in_order(batches: Iterable[list[TextBlock]], tokenizer: Tokenizer, workers: int) -> Iterator[tuple[list[TextBlock], Encoded]]:
    """Encodes in `workers` processes with a bounded number of batches in flight; results keep the input's order."""
    if workers == 1:
        for batch in batches:
            yield batch, _encode_with(tokenizer, [b.text for b in batch])
        return
    context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (tokenizer.path,))
    under_way: list[tuple[list[TextBlock], Future[Encoded]]] = []
    try:
        for batch in batches:
            under_way.append((batch, pool.submit(_encode, [b.text for b in batch])))
            if len(under_way) >= IN_FLIGHT * workers:
                blocks, future = under_way.pop(0)
                yield blocks, future.result()
        for blocks, future in under_way:
            yield blocks, future.result()
    except (BrokenProcessPool, MemoryError):
        raise UsageError(
            f"one of {workers} workers was killed or found no memory, most likely since there is too little: give fewer --workers, or ask "
            "for more memory"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker: list[Tokenizer] = []  # one per worker process, since a native tokenizer cannot be pickled


def _start_worker(path: Path) -> None:
    end_with_parent()
    # Hugging Face's tokenizers would start a thread per core in every worker.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker[:] = [load_tokenizer(path)]


def _encode(texts: list[str]) -> Encoded:
    return _encode_with(_worker[0], texts)


def _encode_with(tokenizer: Tokenizer, texts: list[str]) -> Encoded:
    parts = tokenizer.encode_batch(texts)
    ends = np.cumsum([len(p) for p in parts], dtype=np.int64)
    return Encoded(np.concatenate(parts), ends, sum(len(t.encode()) for t in texts))
