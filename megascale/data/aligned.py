"""Aligned text (sources and their targets) from the lines of two text files or from two keys of JSON lines."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from megascale.data.forms import Form, form_of
from megascale.data.readers import LONGEST, MARK, Tally, TextBlock, decode, json_lines, lines_of
from megascale.data.unpack import UNREADABLE, Input
from megascale.errors import UsageError


def read_pairs(
    inputs: list[Path], side: int, keys: tuple[str, str], longest: int = LONGEST, tally: Tally | None = None
) -> Iterator[TextBlock]:
    """One side of aligned text, 0 for sources and 1 for targets: lines of two text files, or two keys of JSON lines, each a document.

    A pair with an empty or null side is skipped on both sides. Raises UsageError if one file has more lines than the other, or an input is
    of another kind.
    """
    tally = tally or Tally()
    try:
        forms = {path: form_of(path, keys) for path in inputs}
        for path, form in forms.items():
            if form.kind not in ("text", "json"):
                raise UsageError(f"{path} {form.why or f'is of the kind {form.kind}, but pairs are read from text or JSON lines'}")
        as_json = [path for path, form in forms.items() if form.kind == "json"]
        if as_json and len(as_json) < len(inputs):
            raise UsageError(f"{as_json[0]} is JSONL but {next(p for p in inputs if p not in as_json)} is not: give one kind")
        if not as_json and len(inputs) != 2:
            raise UsageError(f"{len(inputs)} text files were given, but pairs are the lines of two: sources first, then targets")
        if as_json:
            for path in inputs:
                yield from _json_pairs(path, forms[path], side, keys, longest, tally)
        else:
            yield from _line_pairs(inputs, forms, side, longest, tally)
    except UNREADABLE as error:
        names = " or ".join(map(str, inputs))
        raise UsageError(f"{names} cannot be read: {' '.join(str(error).split())}; make or copy it again") from None


def pair_files(files: list[Path], keys: tuple[str, str]) -> tuple[list[Path], list[Path]]:
    """(files with sources, files with targets): of two text files one each, while JSON lines have both."""
    return (files[:1], files[1:]) if len(files) == 2 and form_of(files[0], keys).kind == "text" else (files, files)


def _line_pairs(inputs: list[Path], forms: dict[Path, Form], side: int, longest: int, tally: Tally) -> Iterator[TextBlock]:
    with Input(inputs[0], forms[inputs[0]].packing) as first, Input(inputs[1], forms[inputs[1]].packing) as second:
        sources = (first, second)
        streams = [lines_of(s.bytes, f"{path}, line", longest) for s, path in zip(sources, inputs)]
        for number, lines in enumerate(zip_longest(*streams), 1):
            if None in lines:
                ended = lines.index(None)
                raise UsageError(
                    f"{inputs[ended]} ends before line {number} but {inputs[1 - ended]} does not: pairs need the same number of lines in "
                    "both files"
                )
            texts = [decode(line) for line in lines]
            if all(text.removeprefix(MARK).strip() for text, _ in texts):
                text, damaged = texts[side]
                yield TextBlock(inputs[side], tally.unmarked(text).rstrip("\r\n"), True, sources[side].taken(), damaged)


def _json_pairs(path: Path, form: Form, side: int, keys: tuple[str, str], longest: int, tally: Tally) -> Iterator[TextBlock]:
    counts = [tally if i == side else Tally() for i in range(2)]
    both = [json_lines(path, form.packing, key, 0, longest, count, empty=True) for key, count in zip(keys, counts)]
    for blocks in zip(*both):
        if all(b.text.strip() for b in blocks):
            yield blocks[side]
