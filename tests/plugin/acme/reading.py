"""Common Crawl's WET files: pages of plain text, each behind headers that end at an empty line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

from megascale.data.readers import Reading, TextBlock, documents


def wet(reading: Reading) -> Iterator[TextBlock]:
    return documents(reading, pages)


def pages(file: IO[bytes], text_key: str) -> Iterator[str]:
    for record in file.read().decode("utf-8", "replace").split("WARC/1.0\r\n")[1:]:
        headers, _, text = record.partition("\r\n\r\n")
        if "WARC-Type: conversion" in headers:
            yield text.strip()
