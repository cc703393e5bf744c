"""Verifies a growth: both models on the same tokens, in fp64 directly from the transform, and in the run's dtype as stored."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megascale.checkpoint.index import Index
from megascale.checkpoint.shards import read_slice
from megascale.data.dataset import Mixture, read_sources
from megascale.errors import UsageError
from megascale.expand.apply import Read
from megascale.expand.plan import Growth
from megascale.expand.produce import GrownTensors
from megascale.expand.source import GrowthSource
from megascale.expand.verify import Measured, compare, run, slack, typical, verdict
from megascale.expand.write import Effort

COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def some_tokens(source: GrowthSource, effort: Effort) -> tuple[Tensor, str]:
    """Tokens [b, s] for the comparison and their description: from the given data, else the source's own, else random."""
    if source.model.spacetime is not None:
        fields = source.model.spacetime
        shape = (1, fields.frames, *fields.shape[1:], fields.channels)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)), "random fields"
    vocab = source.model.vocab_size
    assert vocab is not None
    length = min(source.seq_len, effort.tokens)
    count = max(1, effort.tokens // length)
    try:
        sources = read_sources(effort.data or source.config.data.train, "data.train")
        samples = Mixture(sources, length, 0, vocab, "all", 0.0, True)
        rows = [torch.from_numpy(samples.sample(n)[0][:-1].astype("int64")) for n in range(count)]
        return torch.stack(rows), f"{count} × {length} tokens of {', '.join(s.path for s in sources)}"
    except UsageError:
        if effort.data is not None:
            raise
    drawn = torch.randint(0, vocab, (count, length), generator=torch.Generator().manual_seed(0))
    return drawn, f"{count} × {length} random tokens, since the source's data are not here"


def prove(opened: GrowthSource, growth: Growth, made: GrownTensors, tokens: Tensor) -> dict[str, Any]:
    """Compares both models in fp64, the grown one directly from the transform."""

    def new(name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        return made(f"model.{name}", offset, shape)

    small = run(growth.source, growth.seq_lens[0], opened.read, torch.float64, tokens)
    return compare(growth, small, run(growth.target, growth.seq_lens[1], new, torch.float64, tokens), tokens)


def prove_stored(opened: GrowthSource, growth: Growth, index: Index, tokens: Tensor, transform: dict[str, Any]) -> dict[str, Any]:
    """Compares both models in the run's dtype, the grown one as stored, with the small one in fp64, and stored numbers with the
    transform's, one by one.
    """
    made = GrownTensors(growth, opened.index, dtype=torch.float64)

    def exact(name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        return made(f"model.{name}", offset, shape)

    def stored(name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        return read_slice(index, f"model.{name}", offset, shape)

    return judge(growth, opened.read, exact, stored, opened.config.precision.compute, tokens, transform)


def judge(
    growth: Growth, source: Read, exact: Read, stored: Read, compute: str, tokens: Tensor, transform: dict[str, Any]
) -> dict[str, Any]:
    """The verdict on a growth of `source` that should store `exact`, rounded, and has stored `stored`."""
    dtype, units = COMPUTE[compute], [0.0]

    def checked(name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        found = stored(name, offset, shape)
        units.append(units_apart(found, exact(name, offset, shape)))
        return found

    no_streams: Callable[[int], bool] = lambda layer: False  # noqa: E731
    quick = partial(run, tokens=tokens, keep=no_streams)
    true = quick(growth.source, growth.seq_lens[0], source, torch.float64)
    small = quick(growth.source, growth.seq_lens[0], source, dtype)
    grown = quick(growth.target, growth.seq_lens[1], checked, dtype)
    against = compare(growth, true, grown, tokens)
    measured = Measured(
        size=transform["logits_std"],
        transform=transform["logits_max"],
        units=max(units),
        own=(small.logits.to(torch.float64) - true.logits).abs().max().item(),
        stored=against["logits_max"],
        own_typical=typical(small.logits, true.logits),
        stored_typical=against["logits_typical"],
        slack=slack(growth),
    )
    return {
        "dtype": compute,
        "own_error": measured.own,
        "own_error_typical": measured.own_typical,
        "stored_error": measured.stored,
        "stored_error_mean": against["logits_mean"],
        "stored_error_typical": measured.stored_typical,
        "stored_error_allowed": measured.allowed,
        "stored_units": measured.units,
        "stored_loss_change": against.get("loss_change"),
        "verdict": verdict(measured),
    }


def units_apart(stored: Tensor, exact: Tensor) -> float:
    """The largest distance of stored numbers from exact ones, in units of the last place of the stored dtype; inf if one of them is not a
    number.
    """
    kind = torch.finfo(stored.dtype)
    unit = exact.to(torch.float64).abs().clamp(min=kind.tiny) * kind.eps
    apart = (stored.to(torch.float64) - exact.to(torch.float64)).abs() / unit
    return apart.nan_to_num(nan=float("inf")).max().item() if apart.numel() else 0.0
