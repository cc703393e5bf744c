"""Keys of T5's config with two meanings: whether the head is tied to the embedding, and the scale of its input.

Until transformers 5 `tie_word_embeddings` meant both, since T5 1.0 ties and scales and 1.1 does neither. Since then `scale_decoder_outputs`
has the scale, the key for ties is always true, and a stored head that differs from the embedding is untied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megascale.config.schema import Model

SCALED, TIED = "scale_decoder_outputs", "tie_word_embeddings"
ACTIVATIONS = {"gated-gelu": "gelu_new"}  # exceptions to "the word after the dash"


def scaled(config: Mapping[str, Any]) -> bool:
    """Whether the head's input is multiplied by 1/√d_model."""
    return bool(config.get(SCALED, config.get(TIED) is not False))


def with_ties(config: Mapping[str, Any], own_head: bool) -> dict[str, Any]:
    """The config with a correct key for ties. own_head: a stored head differs from the embedding."""
    return {**config, TIED: not own_head} if SCALED in config else dict(config)


def head_scale(config: Mapping[str, Any]) -> float | None:
    width = config.get("d_model")
    return width**-0.5 if scaled(config) and isinstance(width, int) and width > 0 else None


def problems(config: Mapping[str, Any]) -> list[str]:
    """Stored values that contradict `feed_forward_proj`."""
    kind = str(config.get("feed_forward_proj", "relu"))
    follows = {"dense_act_fn": ACTIVATIONS.get(kind, kind.rpartition("-")[2]), "is_gated_act": kind.startswith("gated-")}
    return [
        f"{key} is {config[key]!r}, and feed_forward_proj {kind!r} makes it {value!r}"
        for key, value in follows.items()
        if config.get(key, value) != value
    ]


def keys(model: Model) -> dict[str, Any]:
    """An export's keys in addition to the table's."""
    return {SCALED: model.head_scale is not None}
