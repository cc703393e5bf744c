"""Layers of different kinds: a kind is a variation of the block, a pattern says which layer is of which kind.

`Kind` has the keys of `model` that may differ from layer to layer, each optional; whatever a kind does not set is the model's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, create_model

from megascale.config.schema.model import Model
from megascale.config.schema.model_parts import Given, Moe
from megascale.config.schema.section import Section

__all__ = ["Kind", "Model", "MoeOfKind"]  # the model is complete here

# Attention, positions, feed-forward and experts, and how they join the stream. The stream itself, norms and tables belong to the model.
KEYS = (
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "ffn_size",
    "ffn",
    "attention",
    "latent",
    "delta",
    "bias",
    "attention_bias",
    "dropout",
    "residual",
    "position",
    "rope_theta",
    "rope_fraction",
    "rope_interleaved",
    "rope_scaling",
    "rope_exponents",
    "alibi_slopes",
    "attention_scale",
    "sliding_window",
    "qk_norm",
    "attention_sink",
    "attention_softcap",
    "attention_gate",
)


def _optional(section: type[Section], keys: tuple[str, ...]) -> dict[str, Any]:
    """The fields `keys` of a section, with their types and descriptions; none of them is required."""
    found = {}
    for key in keys:
        field = section.model_fields[key]
        # Subscripted at run time: a checker takes Annotated for a declaration.
        kind = Annotated.__class_getitem__((field.annotation, *field.metadata)) if field.metadata else field.annotation  # type: ignore[attr-defined]
        found[key] = (kind, Field(None, description=field.description))
    return found


if TYPE_CHECKING:

    class MoeOfKind(Given): ...

    class Kind(Given):
        moe: Moe | None

else:
    MoeOfKind = create_model("MoeOfKind", __base__=Given, __module__=__name__, **_optional(Moe, tuple(Moe.model_fields)))
    EXPERTS = Field(None, description="Keys of `model.moe` that differ, or null: a dense feed-forward.")
    Kind = create_model("Kind", __base__=Given, __module__=__name__, moe=(MoeOfKind | None, EXPERTS), **_optional(Model, KEYS))
    Model.model_rebuild(_types_namespace={"Kind": Kind})
