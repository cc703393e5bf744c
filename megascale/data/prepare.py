"""Text files → token files, with several processes and bounded memory."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megascale.data.indexed import TokenWriter, token_dtype
from megascale.data.readers import BLOCK_BYTES, Block, can_enter, read_blocks, read_pairs
from megascale.data.tokenizer import Tokenizer, keep_beside, load_tokenizer
from megascale.errors import UsageError

SAMPLE_CHARACTERS = 4 << 20  # of text to train a tokenizer on: enough for tens of thousands of pieces, seconds of work
PASSAGE = 1 << 16  # characters of the sample that are read from one place
IN_FLIGHT = 4  # batches per worker that are read ahead


@dataclass(frozen=True)
class Facts:
    """What is written to PREFIX.json.

    source_bytes: of the text in UTF-8, unpacked. not_utf8_files: in how many files characters were replaced. unigram_entropy: of single
    tokens, in nats; the loss at which a model stops that knows only how often each token occurs.
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


class Encoded(NamedTuple):
    """A batch of texts in tokens: `tokens` end to end, `ends` [texts] where each ends, and the bytes of the texts in UTF-8."""

    tokens: NDArray[np.int32]
    ends: NDArray[np.int64]
    source_bytes: int


def sample_texts(files: list[Path], text_key: str, characters: int = SAMPLE_CHARACTERS) -> Iterator[str]:
    """At most `characters` of text, in passages spread evenly over the bytes of all files; a packed file gives its beginning."""
    share = characters / max(1, sum(f.stat().st_size for f in files))
    credit = 0.0  # characters that the files so far should have given and have not: small files are read in turn, but whole
    for path in files:
        size = path.stat().st_size
        credit += size * share
        if credit < min(size, PASSAGE):
            continue
        due = min(credit, size) if can_enter(path) else credit
        places = max(1, int(due) // PASSAGE) if can_enter(path) else 1
        for i in range(places):
            wanted = int(due / places)
            for block in read_blocks(path, text_key, size * i // places, PASSAGE):
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
) -> Facts:
    """`write_tokens` of every document of `files` in order."""
    nothing = f"there is no text in the input ({len(files)} files, {files[0]} first): name files that have some"
    blocks = (block for path in files for block in read_blocks(path, text_key))
    return write_tokens(blocks, prefix, tokenizer, workers, append_eos, progress, nothing)


def prepare_pairs(
    files: list[Path],
    prefix: str,
    tokenizers: tuple[Tokenizer, Tokenizer],
    keys: tuple[str, str],
    workers: int,
    progress: Callable[[int], None],
) -> tuple[Facts, Facts]:
    """`write_tokens` of aligned text (readers.py: `read_pairs`), the sources as PREFIX.source and their targets as PREFIX.target."""
    nothing = f"there is no pair in the input ({', '.join(map(str, files))}): both sides of a pair need text"
    found = [
        write_tokens(read_pairs(files, side, keys), f"{prefix}.{name}", tokenizers[side], workers, True, progress, nothing)
        for side, name in enumerate(("source", "target"))
    ]
    return found[0], found[1]


def write_tokens(
    blocks: Iterable[Block],
    prefix: str,
    tokenizer: Tokenizer,
    workers: int,
    append_eos: bool,
    progress: Callable[[int], None],
    nothing: str,
) -> Facts:
    """Encodes documents in order into PREFIX.bin, .idx and .json, the tokenizer beside them; .idx appears last.

    The result does not depend on `workers`. `progress` is told stored bytes of the input as they are done. Raises UsageError when there is
    no document (saying `nothing`), a file cannot be read or the output cannot be written; then nothing appears under PREFIX.
    """
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    end = np.array([tokenizer.eos_id] if append_eos else [], np.int32)
    documents = source = 0
    damaged: set[Path] = set()
    try:
        with TokenWriter(prefix, token_dtype(tokenizer.vocab_size)) as writer:
            for batch, encoded in _encode_in_order(_batches(blocks), tokenizer, workers):
                counts += np.bincount(encoded.tokens, minlength=len(counts))
                for block, tokens in zip(batch, np.split(encoded.tokens, encoded.ends[:-1])):
                    writer.extend(tokens)
                    if block.last:
                        writer.extend(end)
                        writer.end_document()
                        documents += 1
                source += encoded.source_bytes
                damaged |= {b.path for b in batch if b.damaged}
                progress(sum(b.read for b in batch))
            if documents == 0:
                raise UsageError(nothing)
            counts[tokenizer.eos_id] += documents * len(end)
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
                tokenizer=keep_beside(tokenizer, prefix).name,
                tokenizer_fingerprint=tokenizer.fingerprint,
            )
            _write_json(Path(prefix + ".json"), asdict(facts))
    except OSError as error:
        raise UsageError(f"{prefix} cannot be written ({error}): choose another --out, or make room there") from None
    return facts


def _write_json(path: Path, values: dict[str, object]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _batches(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    """Blocks grouped to about BLOCK_BYTES characters, so that small documents do not travel one by one."""
    batch: list[Block] = []
    size = 0
    for block in blocks:
        batch.append(block)
        size += len(block.text)
        if size >= BLOCK_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_in_order(batches: Iterable[list[Block]], tokenizer: Tokenizer, workers: int) -> Iterator[tuple[list[Block], Encoded]]:
    """Encodes in `workers` processes with a bounded number of batches under way; results keep the order of the input."""
    if workers == 1:
        for batch in batches:
            yield batch, _encode_with(tokenizer, [b.text for b in batch])
        return
    context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (tokenizer.path,)) as pool:
        under_way: list[tuple[list[Block], Future[Encoded]]] = []
        for batch in batches:
            under_way.append((batch, pool.submit(_encode, [b.text for b in batch])))
            if len(under_way) >= IN_FLIGHT * workers:
                blocks, future = under_way.pop(0)
                yield blocks, future.result()
        for blocks, future in under_way:
            yield blocks, future.result()


_worker: list[Tokenizer] = []  # one per worker process, since a native tokenizer does not travel between processes


def _start_worker(path: Path) -> None:
    # Hugging Face's tokenizers would start a thread per core in every worker.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker[:] = [load_tokenizer(path)]


def _encode(texts: list[str]) -> Encoded:
    return _encode_with(_worker[0], texts)


def _encode_with(tokenizer: Tokenizer, texts: list[str]) -> Encoded:
    parts = tokenizer.encode_batch(texts)
    ends = np.cumsum([len(p) for p in parts], dtype=np.int64)
    return Encoded(np.concatenate(parts), ends, sum(len(t.encode()) for t in texts))
