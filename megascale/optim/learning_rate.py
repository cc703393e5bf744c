"""The learning rate as a function of the step."""

from __future__ import annotations

from megascale.config.decays import decays, length_of
from megascale.config.schema import Optim

FASTER = 0.6  # LEMON's BERT decays in 132k of 220k steps (arXiv 2310.07999, section 5)


def begun_again(cfg: Optim, total_steps: int) -> Optim:
    """LEMON's schedule for a grown model: the same peak rate, a warm-up if there is none, and a decay that ends at 0.6 of the run unless
    the config says otherwise.
    """
    warmup = cfg.warmup_steps or max(1, total_steps // 50)
    return cfg.model_copy(update={"warmup_steps": warmup, "decay_steps": cfg.decay_steps or max(warmup + 1, round(FASTER * total_steps))})


def learning_rate(cfg: Optim, step: float, total_steps: float) -> float:
    """Rate of the update number `step` (from 1) of `total_steps`: a linear warm-up, then the decay's row (config/decays.py). Both may be
    fractions where a schedule counts tokens (config/phases.py: Clock).
    """
    if step < cfg.warmup_steps:
        return cfg.lr * step / cfg.warmup_steps
    return cfg.lr * decays()[cfg.decay].factor(cfg, step, total_steps)


def schedule_note(cfg: Optim, total_steps: int) -> str | None:
    """A warning if the run and its schedule do not match, which is fine for a trial but unusual otherwise."""
    run = f"optim.warmup_steps is {cfg.warmup_steps} and the run has {total_steps} step{'' if total_steps == 1 else 's'}"
    if 0 < total_steps <= cfg.warmup_steps:
        reached = learning_rate(cfg, total_steps, total_steps)
        return f"{run}: it ends within its warm-up, at a rate of {reached:.2e} (optim.lr is {cfg.lr:.2e})"
    begins = total_steps - length_of(cfg, total_steps)
    if decays()[cfg.decay].decay_steps == "length" and begins < cfg.warmup_steps:
        return (
            f"{run}: the decay of {cfg.decay} begins at step {begins}, within the warm-up, so the rate drops where that ends; set "
            "decay_steps"
        )
    return None
