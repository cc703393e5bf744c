"""The most important numbers, as words."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from megascale.report.goodput import attempts, goodput
from megascale.report.read import RunData, as_number
from megascale.report.series import gap, layouts
from megascale.report.words import count, fixed, scientific
from megascale.sizes import NONE, byte_words, duration

Facts = dict[str, str]


def highlights(run: RunData) -> Facts:
    """A few numbers for the top of the page, without those that the run lacks."""
    best = {f"best validation loss, {n}": _best(run, n).partition(" ")[0] for n in run.nested("valid_loss")}
    facts = {
        "last loss": fixed(_last(run, "loss"), 4),
        **best,
        "tokens/s, median": fixed(_median(run, "tokens_per_second"), 0),
        "MFU, median": fixed(_median(run, "mfu") * 100, 1, " %"),
        "peak memory": byte_words(_largest(run, "memory_bytes")),
        "wall time": duration(wall_seconds(run)),
        "goodput": fixed(100 * goodput(attempts(run)), 1, " %"),
    }
    return {key: value for key, value in facts.items() if value != NONE}


def headline(run: RunData) -> Facts:
    """All numbers of one run, label → value; a dash if it was not recorded."""
    facts = {
        "layouts over its life": layouts(run),
        "ranks": " → ".join(dict.fromkeys(str(s.get("ranks", NONE)) for s in run.starts)) or NONE,
        "steps": f"{run.last_step:,}",
        "tokens": fixed(_last(run, "tokens"), 0),
        "last loss": fixed(_last(run, "loss"), 4),
    }
    for name in run.nested("valid_loss"):
        facts[f"last validation loss, {name}"] = fixed(_last(run, "valid_loss", name), 4)
        facts[f"best validation loss, {name}"] = _best(run, name)
    facts |= {
        "unigram entropy": fixed(math.nan if run.entropy is None else run.entropy, 4),
        "tokens/s, median": fixed(_median(run, "tokens_per_second"), 0),
        "seconds per step, median": scientific(_median(run, "step_seconds"), 2),
        "seconds per step waiting for data, median": scientific(_median(run, "data_seconds"), 2),
        "MFU, median": fixed(_median(run, "mfu") * 100, 1, " %"),
        "peak memory": byte_words(_largest(run, "memory_bytes")),
        "wall time, first to last event": duration(wall_seconds(run)),
        "of it in training steps": duration(step_seconds(run)),
        "goodput, productive share of all attempts": fixed(100 * goodput(attempts(run)), 1, " %"),
    }
    for axis in run.nested("sent_bytes"):
        facts[f"sent per step by {axis}, median"] = byte_words(_median(run, "sent_bytes", axis))
    facts["end"] = ending(run)
    return facts


def verdict(runs: Sequence[RunData]) -> list[str]:
    """A sentence per run except the last: the distance of its loss from the last one's."""
    reference = runs[-1]
    sentences = []
    for run in runs[:-1]:
        found = gap(run, reference)
        if not len(found.steps):
            sentences.append(f"{run.name} and {reference.name} have no step with a loss in common.")
            continue
        where = int(found.steps[found.delta.argmax()])
        distance = f"at most {scientific(found.largest)} (at step {where:,})" if found.largest else "nothing"
        text = (
            f"The loss of {run.name} differs from that of {reference.name} by {distance} over {count(len(found.steps), 'common step')}; "
            f"{found.equal:,} of them are equal to the last digit."
        )
        if found.one_sided:
            text += f" At {count(found.one_sided, 'step')} only one of the two is finite."
        sentences.append(text)
    return sentences


def wall_seconds(run: RunData) -> float:
    """Seconds from the first event to the last, including pauses between a stop and its resume."""
    times = [t for e in run.events if math.isfinite(t := as_number(e.get("time")))]
    return max(times) - min(times) if len(times) > 1 else math.nan


def step_seconds(run: RunData) -> float:
    """Seconds in training steps; a logged row covers the steps since the previous row."""
    steps, seconds = run.series("step_seconds")
    return float(np.nansum(seconds * np.diff(steps, prepend=0))) if np.isfinite(seconds).any() else math.nan


def ending(run: RunData) -> str:
    """How the run ended. An exit.json older than the last resume describes an earlier end."""
    if not run.ending:
        return "none recorded: running, or killed"
    words = f"{run.ending.get('reason') or 'no reason given'} (code {run.ending.get('code', '?')})"
    step = as_number(run.ending.get("step"))
    if run.ending.get("code") == 75 and step < run.last_step:
        return f"none recorded since the resume; before: {words}"
    return words


def _best(run: RunData, name: str) -> str:
    steps, values = run.series("valid_loss", name)
    if not np.isfinite(values).any():
        return NONE
    at = int(np.nanargmin(values))
    return f"{values[at]:.4f} (step {int(steps[at]):,})"


def _last(run: RunData, *keys: str) -> float:
    values = run.series(*keys)[1]
    return float(values[-1]) if len(values) else math.nan


def _median(run: RunData, *keys: str) -> float:
    values = run.series(*keys)[1]
    return float(np.nanmedian(values)) if np.isfinite(values).any() else math.nan


def _largest(run: RunData, key: str) -> float:
    values = run.series(key)[1]
    return float(np.nanmax(values)) if np.isfinite(values).any() else math.nan
