"""Cheap fingerprints of a source's files: their sizes and a digest of parts of them. They detect other data under the same name; a few
tokens changed in the middle of a large file may go unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from megascale.data.facts import source_facts
from megascale.errors import UsageError

BLOCK = 4096  # bytes read per place
PLACES = 64  # places read per file, besides its beginning and its end; smaller files are read whole
OF_FIELDS = ("mean", "std", "run_length")  # facts that enter the samples; facts about tokens do not

Print = dict[str, str]  # {"bin": "4800 bytes, 3f2a…"}


def print_of(prefix: str, ends: Sequence[str], fields: bool = False) -> Print:
    """Fingerprint of the files PREFIX.END of one source; `fields`: with the facts in PREFIX.json. Raises UsageError."""
    prints = {end: file_print(Path(f"{prefix}.{end}")) for end in ends}
    if fields:
        facts = source_facts(prefix)
        text = json.dumps({key: facts.get(key) for key in OF_FIELDS})
        prints["json"] = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return prints


def file_print(path: Path) -> str:
    """Size and digest. Raises UsageError if the file cannot be read."""
    digest = hashlib.blake2b(digest_size=8)
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            for start in places(size):
                file.seek(start)
                digest.update(file.read(BLOCK))
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error}): check the disk, or correct the path") from None
    return f"{size} bytes, {digest.hexdigest()}"


def places(size: int) -> list[int]:
    """Offsets of the blocks to read: the first, the last, and some evenly between them."""
    blocks = -(-size // BLOCK)
    if blocks <= PLACES + 2:
        return [n * BLOCK for n in range(blocks)]
    return [*(n * (blocks - 1) // (PLACES + 1) * BLOCK for n in range(PLACES + 1)), size - BLOCK]
