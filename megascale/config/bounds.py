"""Bounds on the size, depth and length of a config, checked before anything else: a small file can be large in memory.

A YAML document of 400 bytes can expand to a tree of 10⁹ nodes through aliases, or contain itself; int() refuses a number of 5,000 digits.
Each of these cases ends in one sentence.
"""

from __future__ import annotations

import datetime
import math
import os
import stat
from pathlib import Path
from typing import Any

from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from megascale.errors import UsageError

FILE_BYTES = 2**19  # three seconds of reading
NODES = 100_000  # in a document after expanding its aliases
DEPTH = 64  # of nested lists and mappings
TOO_DEEP = f"lists and mappings are nested more than {DEPTH} deep: this is not a config"
NUMBER = 10**18
PATH_BYTES = 4096  # Linux's limit for a path
NAME_BYTES = 255  # file systems' limit for one name in a path


def read_small_file(path: Path) -> str:
    """Reads a regular file of at most FILE_BYTES. Raises FileNotFoundError, or UsageError for anything else that cannot be read.

    Every rank reads the file, so a pipe or a device would block them, or never end.
    """
    wrong = path_mistake(str(path))
    if wrong is not None:
        raise UsageError(f"{str(path)[:60]!r} cannot be a config file: {wrong}")
    try:
        kind = path.stat().st_mode
        if not stat.S_ISREG(kind):
            what = "a folder" if stat.S_ISDIR(kind) else "a pipe, a socket or a device"
            raise UsageError(f"the config file {path} is {what}, and every rank reads it: give a regular file")
        with path.open("rb") as file:
            content = file.read(FILE_BYTES + 1)
        if len(content) > FILE_BYTES:
            raise UsageError(f"the config file {path} has more than {FILE_BYTES:,} bytes: this is not a config")
        return content.decode("utf-8")
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the config file {path} cannot be read: {error}") from None


def check_document(root: Node | None) -> None:
    """Raises UsageError for YAML that contains itself, or is too deep or too large after expanding its aliases."""
    measured: dict[int, tuple[int, int]] = {}  # id of a node → (nodes after expansion, depth)
    above: set[int] = set()

    def measure(node: Node) -> tuple[int, int]:
        if id(node) in measured:
            return measured[id(node)]
        if id(node) in above:
            raise UsageError("a YAML alias contains itself: write out its value")
        above.add(id(node))
        children: list[Node] = []
        if isinstance(node, SequenceNode):
            children = list(node.value)
        elif isinstance(node, MappingNode):
            children = [child for pair in node.value for child in pair]
        inner = [measure(child) for child in children]
        above.discard(id(node))
        total, depth = 1 + sum(n for n, _ in inner), 1 + max((d for _, d in inner), default=0)
        if depth > DEPTH:
            raise UsageError(TOO_DEEP)
        if total > NODES:
            raise UsageError(f"with its aliases expanded this YAML has more than {NODES:,} values: this is not a config")
        measured[id(node)] = total, depth
        return total, depth

    if root is not None:
        measure(root)


def check_values(value: Any, key: str = "", depth: int = 0) -> None:
    """Raises UsageError for a number, text or nesting that no key could use, and names its key. Takes plain values, also from the API."""
    if depth > DEPTH:
        raise UsageError(f"{key[:60]}: {TOO_DEEP}")
    if isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise UsageError(f"{key or 'the config'} has the key {str(name)[:60]!r}, a {type(name).__name__}: keys are words")
            check_values(name, f"a key of {key or 'the config'}", depth + 1)
            check_values(inner, f"{key}.{name}" if key else name, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            check_values(item, key, depth + 1)
    elif isinstance(value, bytes | set | datetime.date):
        raise UsageError(f"{key} is a {type(value).__name__}: no key takes one; in YAML, quotes make a word of it")
    elif isinstance(value, int) and abs(value) > NUMBER:
        raise UsageError(f"{key} is a number of {value.bit_length()} bits: whole numbers go to {NUMBER:.0e} here")
    elif isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{key} is {value}: a finite number is needed")
    elif isinstance(value, str):
        wrong = path_mistake(value)
        if wrong is not None:
            raise UsageError(f"{key} is {value[:60]!r}: {wrong}")


def path_mistake(text: str) -> str | None:
    """Why `text` can be neither a path nor any other text of a config; None if it can."""
    if any(letter < " " or "\x7f" <= letter <= "\x9f" or letter in "\u2028\u2029" for letter in text):
        return "line ends, NUL and other control characters are not allowed in it"
    try:
        content = os.fsencode(text)
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "it is not valid text (bytes that are not UTF-8, or half a surrogate pair)"
    if len(content) >= PATH_BYTES:
        return f"it has {len(content):,} bytes, but a path may have at most {PATH_BYTES - 1:,}"
    if any(len(part) > NAME_BYTES for part in content.split(b"/")):
        return f"one of its names has more than {NAME_BYTES} bytes, more than any file system allows"
    return None
