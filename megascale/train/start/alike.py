"""Checks that all ranks train the same run: compares their configs, versions and data before anything is built."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from megascale.comm.agreement import Agreement, on_all_ranks
from megascale.config.identity import PATHS, SOURCES
from megascale.config.load import flatten
from megascale.config.rules.pairs import spans_asked
from megascale.config.schema import Config
from megascale.data.vocabulary import end_token, translates
from megascale.plugins import versions
from megascale.train.start.changes import Prints, sources_of

# Keys that may differ between nodes. Paths of data may differ too, since their contents are compared.
OF_A_NODE = ("run.device", "run.threads", "run.peak_tflops", "parallel.offload_dir", *SOURCES, *PATHS)


def check_config(config: Config) -> None:
    """Collective. Raises UsageError on all ranks if one was started with a different config or has a different version installed."""
    Agreement().alike(on_all_ranks(lambda: shared_values(config)), "the same config file, arguments and versions are needed on every node")


def shared_values(config: Config) -> dict[str, Any]:
    """{key: value} of everything that must be equal on every rank."""
    flat = {k: v for k, v in flatten(config.plain()).items() if k not in OF_A_NODE}
    plugins = {f"plugin {name}": number for name, number in versions().items()}
    mixture = [[name, weight] for name, _, weight in sources_of(config)]
    return {**flat, "data.train": mixture, "torch": torch.__version__, "megascale": own_version(), **plugins}


def own_version() -> str:
    try:
        return version("megascale")
    except PackageNotFoundError:  # runs from a checkout
        return "uninstalled"


def check_data(config: Config, prints: Prints) -> None:
    """Collective. Raises UsageError on all ranks if one reads different data or builds a different vocabulary from its tokenizer."""
    model = {k: v for k, v in flatten(config.plain()).items() if k.startswith("model.")}
    files = {f"data.{part}[{name}].{end}": told for part in prints for name, its in prints[part].items() for end, told in its.items()}
    Agreement().alike({**files, **model, **on_all_ranks(lambda: special_tokens(config))}, "copy the same data and tokenizers to every node")


def special_tokens(config: Config) -> dict[str, int]:
    """Special tokens that enter samples and come from a tokenizer."""
    return {"the token that ends a text": end_token(config)} if spans_asked(config) or translates(config) else {}
