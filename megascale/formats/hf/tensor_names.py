"""A family's table of modules, expanded to tensor maps for a model of given sizes."""

from __future__ import annotations

import re

from megascale.config.schema import Model
from megascale.errors import UsageError
from megascale.formats.hf.families import Family, ModuleMap
from megascale.formats.shapes import MODEL, our_shapes
from megascale.formats.tensor_maps import Sizes, TensorMap, whole

BLOCK = re.compile(r"(blocks|encoder)\.(\d+)\.(.+)")


def links_of(family: Family, model: Model, seq_len: int) -> list[TensorMap]:
    """One map per weight, or per expert of a bank. Our names are those in checkpoints.

    Raises UsageError for a weight that has no place in the family.
    """
    links = []
    for name, shape in our_shapes(model, seq_len).items():
        module, _, leaf = name.rpartition(".")
        block = BLOCK.fullmatch(module)
        prefix, inner = (family.encoder, family.encoder_inner) if block and block[1] == "encoder" else (family.layer, family.inner)
        place = inner.get(block[3]) if block else family.outer.get(module)
        if place is None:
            raise UsageError(f"the weight {name} has no place in a {family.model_type} model: export another model")
        held = place.gated if place.gated is not None and model.gated else place.theirs
        stem = f"{prefix}{block[2]}.{held}" if block else held
        if place.untied is not None and not model.tie_embeddings:
            links += _links(MODEL + name, shape, f"{place.untied}.{leaf}", place)  # first, since the first of two is used
        links += _links(MODEL + name, shape, f"{stem}.{leaf}", place)
    return links


def _links(ours: str, shape: Sizes, theirs: str, place: ModuleMap) -> list[TensorMap]:
    if "{expert}" in theirs:
        return [TensorMap(ours, (e, 0, 0), (1, *shape[1:]), theirs.format(expert=e), (0, 0), (None, 0, 1)) for e in range(shape[0])]
    if not place.transposed:
        return [whole(ours, shape, theirs)]
    to = (0, place.part * shape[0]) if len(shape) == 2 else (place.part * shape[0],)
    return [whole(ours, shape, theirs, transposed=True, to=to)]
