"""A family's table of modules, expanded to tensor maps for a model of given sizes."""

from __future__ import annotations

import re

from megascale.config.schema import Model
from megascale.errors import UsageError
from megascale.formats.hf.family import Family, ModuleMap
from megascale.formats.shapes import MODEL, our_shapes
from megascale.formats.tensor_maps import Sizes, TensorMap, whole

BLOCK = re.compile(r"(blocks|encoder)\.(\d+)\.(.+)")


def links_of(family: Family, model: Model, seq_len: int) -> list[TensorMap]:
    """One map per weight, or per expert of a bank. Our names are those in checkpoints.

    Raises UsageError for a weight that has no place in the family.
    """
    links = []
    shapes = our_shapes(model, seq_len)
    for name, shape in shapes.items():
        if name.startswith("mtp."):
            continue  # logits do not depend on them
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
        if place.fused and block:
            own = f"{block[1]}.{block[2]}."
            before = place.fused[: place.fused.index(block[3])]
            links.append(_at_row(MODEL + name, shape, f"{stem}.{leaf}", sum(shapes[f"{own}{n}.{leaf}"][0] for n in before)))
        elif place.by_head:
            rows = model.head_dim
            links += [
                _at_row(MODEL + name, (rows, *shape[1:]), f"{stem}.{leaf}", (place.by_head * head + place.part) * rows, head * rows)
                for head in range(model.num_heads)
            ]
        else:
            links += _links(MODEL + name, shape, f"{stem}.{leaf}", place)
    return links


def _at_row(ours: str, size: Sizes, theirs: str, row: int, begin: int = 0) -> TensorMap:
    """Our rows from `begin` on at rows from `row` on of theirs."""
    rest = (0,) * (len(size) - 1)
    return TensorMap(ours, (begin, *rest), size, theirs, (row, *rest), tuple(range(len(size))))


def _links(ours: str, shape: Sizes, theirs: str, place: ModuleMap) -> list[TensorMap]:
    if "{expert}" in theirs:
        return [TensorMap(ours, (e, 0, 0), (1, *shape[1:]), theirs.format(expert=e), (0, 0), (None, 0, 1)) for e in range(shape[0])]
    if not place.transposed:
        return [whole(ours, shape, theirs)]
    to = (0, place.part * shape[0]) if len(shape) == 2 else (place.part * shape[0],)
    return [whole(ours, shape, theirs, transposed=True, to=to)]
