"""A family's table of modules, expanded to tensor maps for a model of given sizes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from megascale.config.schema import Model
from megascale.errors import UsageError
from megascale.formats.hf.family import Family, ModuleMap
from megascale.formats.hf.layers import LINEAR, type_of
from megascale.formats.shapes import MODEL, our_specs
from megascale.formats.tensor_maps import Sizes, TensorMap, whole

BLOCK = re.compile(r"(blocks|encoder|mtp)\.(\d+)\.(.+)")


def links_of(family: Family, model: Model, seq_len: int, ahead: int = 0) -> list[TensorMap]:
    """One map per weight, or per expert of a bank. Our names are those in checkpoints.

    ahead  modules of multi-token prediction that are stored with it

    Raises UsageError for a weight that has no place in the family.
    """
    links: list[TensorMap] = []
    specs = our_specs(model, seq_len)
    shapes = {name: spec.shape for name, spec in specs.items()}
    for name, spec in specs.items():
        if spec.role == "coefficient" or (name.startswith("mtp.") and not ahead):
            continue  # the config says it; or logits do not depend on it
        links += _of_weight(family, model, shapes, name)
    return links


def ahead_prefix(family: Family, model: Model, number: int) -> str:
    """What their names of a module of multi-token prediction begin with."""
    return f"{family.layer}{model.num_layers + number}."


def _of_weight(family: Family, model: Model, shapes: Mapping[str, Sizes], name: str) -> Iterator[TensorMap]:
    shape = shapes[name]
    module, _, leaf = name.rpartition(".")
    stack, own, number, inner = _split(module)
    place: ModuleMap | None
    if stack is None:
        prefix, place = "", family.outer.get(module)
    elif stack == "encoder":
        prefix, place = f"{family.encoder}{number}.", family.encoder_inner.get(inner)
    else:
        at_ahead = stack == "mtp" and own == f"mtp.{number}."
        layer = number + (model.num_layers if stack == "mtp" else 0)
        model = model.at_layer(layer) if stack == "blocks" else model.at_layer(model.num_layers - 1)
        here = {**family.inner, **family.linear_inner} if type_of(model) == LINEAR else family.inner
        prefix, place = f"{family.layer}{layer}.", (family.ahead if at_ahead else here).get(inner)
    if place is None:
        raise UsageError(f"the weight {name} has no place in a {family.model_type} model: export another model")
    ours, stem = MODEL + name, prefix + place.stem(model)
    theirs = place.named(stem, leaf)
    if place.untied is not None and not model.tie_embeddings:
        yield from _links(ours, shape, f"{place.untied}.{leaf}", place)  # first, since the first of two is used
    if place.fused:
        row = sum(shapes[f"{own}{n}.{leaf}"][0] for n in place.fused[: place.fused.index(inner)])
        yield _at_row(ours, shape, theirs, row, taps=place.taps)
    elif place.by_head:
        heads = _counted(model, place.heads)
        rows = [shapes[f"{own}{n}.{leaf}"][0] // heads for n in place.by_head]
        part = place.by_head.index(inner)
        for head in range(heads):
            yield _at_row(ours, (rows[part], *shape[1:]), theirs, head * sum(rows) + sum(rows[:part]), head * rows[part])
    elif place.paired:
        yield _paired(ours, shape, theirs, place.paired.index(inner), place.transposed)
    else:
        yield from _links(ours, shape, theirs, place)


def _split(module: str) -> tuple[str | None, str, int, str]:
    """The stack of a module in a block, the prefix of our names there, the block's number, and the module in it."""
    block = BLOCK.fullmatch(module)
    if block is None:
        return None, "", 0, module
    stack, number, inner = block[1], int(block[2]), block[3]
    own = f"{stack}.{number}."
    if stack == "mtp" and inner.startswith("block."):
        return stack, f"{own}block.", number, inner.removeprefix("block.")
    return stack, own, number, inner


def _counted(model: Model, key: str) -> int:
    section, _, inner = key.rpartition(".")
    return int(getattr(getattr(model, section) if section else model, inner))


def _at_row(ours: str, size: Sizes, theirs: str, row: int, begin: int = 0, taps: bool = False) -> TensorMap:
    """Our rows from `begin` on at rows from `row` on of theirs."""
    rest = (0,) * (len(size) - 1)
    if taps:
        return TensorMap(ours, (begin, *rest), size, theirs, (row, 0, 0), (0, 2))
    return TensorMap(ours, (begin, *rest), size, theirs, (row, *rest), tuple(range(len(size))))


def _paired(ours: str, shape: Sizes, theirs: str, part: int, transposed: bool) -> TensorMap:
    """Our outputs at every second output of theirs, whose last dimension is seen as pairs."""
    axes = (0, 2, 1) if transposed and len(shape) == 3 else tuple(range(len(shape)))
    whole_map = TensorMap(ours, (0,) * len(shape), shape, theirs, (*[0] * len(shape), part), axes)
    return replace(whole_map, paired=True)


def _links(ours: str, shape: Sizes, theirs: str, place: ModuleMap) -> list[TensorMap]:
    if "{expert}" in theirs:
        return [TensorMap(ours, (e, 0, 0), (1, *shape[1:]), theirs.format(expert=e), (0, 0), (None, 0, 1)) for e in range(shape[0])]
    if place.bank and place.transposed and len(shape) == 3:
        return [TensorMap(ours, (0, 0, 0), shape, theirs, (0, 0, 0), (0, 2, 1))]
    if place.swapped:
        return _swapped(ours, shape, theirs)
    if not place.transposed or place.bank:
        return [whole(ours, shape, theirs)]
    to = (0, place.part * shape[0]) if len(shape) == 2 else (place.part * shape[0],)
    return [whole(ours, shape, theirs, transposed=True, to=to)]


def _swapped(ours: str, shape: Sizes, theirs: str) -> list[TensorMap]:
    """A product of two inputs whose order is the other way round in theirs."""
    rows, half = shape[0], shape[1] // 2
    return [TensorMap(ours, (0, at), (rows, half), theirs, (0, half - at), (0, 1)) for at in (0, half)]
