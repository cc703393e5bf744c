"""How large, how deep and how long a config may be. Checked before anything else: what is small in a file can be
large in memory.

YAML aliases make a document of 400 bytes that is a tree of 10⁹ nodes, or one that holds itself; a number of 5,000 digits is text that no
int() reads. All of these end in one sentence.
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
NODES = 100_000  # of a document with its aliases written out
DEPTH = 64  # of lists and mappings inside each other
TOO_DEEP = f"lists and mappings are nested more than {DEPTH} deep: this is no config"
NUMBER = 10**18
PATH_BYTES = 4096  # what Linux takes as a path
NAME_BYTES = 255  # what file systems take as one name in it


def read_small_file(path: Path) -> str:
    """The text of a regular file of at most FILE_BYTES. Raises FileNotFoundError, and UsageError for anything else that cannot be read.

    A pipe or a device would be waited for, or never end, and every rank reads the file.
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
            raise UsageError(f"the config file {path} has more than {FILE_BYTES:,} bytes: this is no config")
        return content.decode("utf-8")
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the config file {path} cannot be read: {error}") from None


def check_document(root: Node | None) -> None:
    """Raises UsageError for YAML that is too deep or too large once its aliases are written out, or that holds itself."""
    measured: dict[int, tuple[int, int]] = {}  # by id of a node: for how many it stands, and how deep it is
    above: set[int] = set()

    def measure(node: Node) -> tuple[int, int]:
        if id(node) in measured:
            return measured[id(node)]
        if id(node) in above:
            raise UsageError("a YAML alias holds itself: write out what it stands for")
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
            raise UsageError(f"with its aliases written out this YAML has more than {NODES:,} values: this is no config")
        measured[id(node)] = total, depth
        return total, depth

    if root is not None:
        measure(root)


def check_values(value: Any, key: str = "", depth: int = 0) -> None:
    """Raises UsageError naming the key of a number, a text or a nesting that nothing here could use. For plain values, also of an API."""
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
    """Why `text` can be neither a path nor any other word of a config; None where it can."""
    if any(letter < " " or "\x7f" <= letter <= "\x9f" or letter in "\u2028\u2029" for letter in text):
        return "line ends, NUL and other control characters cannot stand in it"
    try:
        content = os.fsencode(text)
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "it is no valid text (bytes that are not UTF-8, or half a surrogate pair)"
    if len(content) >= PATH_BYTES:
        return f"it has {len(content):,} bytes, and a path may have {PATH_BYTES - 1:,}"
    if any(len(part) > NAME_BYTES for part in content.split(b"/")):
        return f"one of its names has more than {NAME_BYTES} bytes, which no file system takes"
    return None
