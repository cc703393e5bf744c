"""Modules of multi-token prediction in a Hugging Face folder: further layers behind the last, with copies of embedding and head.

Logits do not depend on them. They are read where a folder has them whole, and left out aloud otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping

from megascale.checkpoint.streaming import Target
from megascale.config.schema import Model
from megascale.formats.hf.compare import same_numbers
from megascale.formats.hf.family import Family
from megascale.formats.hf.tensor_names import ahead_prefix
from megascale.formats.shapes import MODEL
from megascale.formats.tensor_maps import TensorMap, TensorSource, whole


def drop_ahead(
    family: Family, model: Model, held: dict[str, Target], source: TensorSource, wanted: bool
) -> tuple[Model, int, tuple[str, ...]]:
    """The model with the modules that can be read, their number, and notes. Removes from `held` what is not read.

    wanted  whether the model that is asked for has as many modules
    """
    if not family.ahead:
        return model, 0, ()
    stored = [k for k in range(model.mtp_depth) if any(n.startswith(ahead_prefix(family, model, k)) for n in held)]
    why = None if wanted else "model.mtp_depth is another"
    if len(stored) != model.mtp_depth:
        why = f"{len(stored)} of {model.mtp_depth} are stored"
    for number in stored:
        for module, table in family.ahead_copies.items():
            copy = held.pop(f"{ahead_prefix(family, model, number)}{module}.weight", None)
            ours = held.get(f"{family.outer[table].theirs}.weight", held.get(f"{family.outer['embedding'].theirs}.weight"))
            if copy is not None and not same_numbers(source, copy, ours):
                why = f"{copy.name} is not the model's own table, which modules share here"
    if why is None:
        return model, model.mtp_depth, ()
    for number in stored:
        for name in [n for n in held if n.startswith(ahead_prefix(family, model, number))]:
            del held[name]
    notes = (f"modules of multi-token prediction are left out, on which no logit depends ({why})",) if stored and why else ()
    return model.model_copy(update={"mtp_depth": 0}), 0, notes


def copies_ahead(family: Family, model: Model, tensors: Mapping[str, Target], ahead: int) -> list[TensorMap]:
    """An export's copies of tables in its modules of multi-token prediction."""
    links = []
    for number in range(ahead):
        for module, table in family.ahead_copies.items():
            ours = f"{MODEL}{'embedding' if model.tie_embeddings else table}.weight"
            links.append(whole(ours, tensors[ours].shape, f"{ahead_prefix(family, model, number)}{module}.weight"))
    return links
