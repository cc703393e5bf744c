"""Hugging Face folders as models: read as ours, and written from ours."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megascale.checkpoint.streaming import FilePlan, Progress, ReadSlice, SliceOfTensor, Target, write_files
from megascale.config.schema import Model
from megascale.config.stages import has_experts
from megascale.errors import UsageError
from megascale.files import atomic_folder, write_durably
from megascale.formats.hf import t5
from megascale.formats.hf.ahead import copies_ahead, drop_ahead
from megascale.formats.hf.compare import same_numbers
from megascale.formats.hf.config import differences, family_of, hf_config, model_section
from megascale.formats.hf.families import BY_TYPE
from megascale.formats.hf.family import Family
from megascale.formats.hf.folder import CONFIG, INDEX, SINGLE, as_json, open_hf
from megascale.formats.hf.paired import Interleaved, Paired, joined
from megascale.formats.hf.quantized import dequantized
from megascale.formats.hf.tensor_names import links_of
from megascale.formats.json_file import read_object
from megascale.formats.shapes import check_depth, check_floating, our_states
from megascale.formats.sources import Foreign, OpenCheckpoint
from megascale.formats.tensor_maps import (
    Rearranged,
    Sizes,
    TensorMap,
    TensorSource,
    compare_names,
    copies_to_ours,
    copies_to_theirs,
    extents,
)

# Buffers that older versions of transformers save with the weights.
BUFFERS = re.compile(
    r".*\.rotary_emb\.inv_freq|(transformer\.)?h\.\d+\.attn\.(masked_)?bias|(gpt_neox\.)?layers\.\d+\.attention\.(masked_)?bias|"
    r"(bert\.)?embeddings\.position_ids"
)
# Names of a norm's weight and bias in the first BERTs, which came from TensorFlow.
OLD_NORMS = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}
# Wrappers of models, and the prefix that they add to every name.
WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DistributedDataParallel",
    "_fsdp_wrapped_module.": "FSDP",
    "base_model.model.": "PEFT",
}
SHOWN = 4  # skipped tensors that are named
FILE_BYTES = 5 * 10**9  # per file, as in transformers


def read_hf(folder: str | Path, *, model: Model | None = None, seq_len: int | None = None, dtype: torch.dtype | None = None) -> Foreign:
    """The model in a Hugging Face folder.

    model    the expected model, if known: raises UsageError with the differences
    seq_len  number of learned positions to take from the beginning of theirs
    dtype    dtype of our weights; default: the stored one

    Raises UsageError for anything unknown, missing or damaged in the folder. Reads headers only.
    """
    folder = Path(folder)
    config = read_object(folder / CONFIG)
    where = str(folder / CONFIG)
    family = family_of(config, where)
    stored = open_hf(folder)
    source = dequantized(stored, config, str(folder)) if family.quantized else stored
    if family.model_type == "t5":
        config = t5.with_ties(config, _has_own_head(family, source))
    found, length = model_section(config, where)
    if length is None:
        raise UsageError(f"{where} has no {family.length}: add the longest sequence of the model")
    if model is not None:
        _must_agree(model, found, where)
    wanted = seq_len or length
    if found.position_row.table and wanted > length:
        raise UsageError(f"train.seq_len is {wanted} but {where} has {length} learned positions: choose a shorter train.seq_len")
    _check_counts(family, found, source, where)
    unused = sorted(n for n in source.tensors if n.startswith(family.unused))
    held = {n: t for n, t in source.tensors.items() if not BUFFERS.fullmatch(n) and n not in unused}
    check_floating(held, str(folder))
    found, ahead, told = drop_ahead(family, found, held, source, model is None or model.mtp_depth == found.mtp_depth)
    links = links_of(family, model or found, wanted if found.position_row.table else length, ahead)
    links = _as_stored(family, links, held)
    _drop_tied(family, found, held, source, folder)
    paired = frozenset(link.theirs for link in links if link.paired)
    expected = {n: joined(size) if n in paired else size for n, size in extents(copies_to_theirs(links)).items()}
    short = frozenset(n for n in (_position(family), _position(family).removeprefix(family.prefix)) if n in expected and wanted < length)
    if family.segments is not None:
        expected[f"{family.segments}.weight"] = (config.get("type_vocab_size", 2), found.hidden_size)
    compare_names(expected, held, str(folder), short)
    steps = copies_to_ours(links)
    states = our_states(model or found, length)
    dtypes = {
        name: held[parts[0].source].dtype if name in states else dtype or held[parts[0].source].dtype for name, parts in steps.items()
    }
    targets = [Target(name, dtypes[name], shape) for name, shape in extents(steps).items()]
    targets += [Target(name, torch.float32, spec.shape) for name, spec in states.items() if spec.role == "coefficient"]
    read = source if family.segments is None else Segmented(source, _position(family), f"{family.segments}.weight")
    read = Paired(read, paired) if paired else read
    fixed = {name: spec.mean for name, spec in states.items() if spec.role == "coefficient"}
    produce = Rearranged(read, steps, dtypes)
    notes = (f"skipped, since they do not affect logits: {_some(unused)}",) if unused else ()
    return Foreign(model or found, length, targets, Filled(produce, fixed) if fixed else produce, config, source.stamp, (*notes, *told))


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


@dataclass(frozen=True)
class Filled:
    """A `ReadSlice` that makes tensors of one number, by name; `produce` makes the others."""

    produce: ReadSlice
    fixed: Mapping[str, float]

    def __call__(self, name: str, offset: Sizes, shape: Sizes) -> torch.Tensor:
        return torch.full(shape, self.fixed[name]) if name in self.fixed else self.produce(name, offset, shape)


def _check_counts(family: Family, model: Model, source: TensorSource, where: str) -> None:
    """Raises UsageError for more layers or experts than stored tensors, before looking for each, and for names that all have a wrapper's
    prefix.
    """
    count = len(source.tensors)
    check_depth(model, count, where)
    each = any("{expert}" in place.theirs for place in family.inner.values())
    experts = sum(m.num_experts for i in range(model.num_layers) if has_experts(model, i) and (m := model.at_layer(i).moe) is not None)
    if each and experts > count:
        raise UsageError(f"{where} describes {experts} experts in all layers, but {count} tensors are stored: get the files again")
    for prefix, of in WRAPPERS.items():
        if source.tensors and all(n.startswith(prefix) for n in source.tensors):
            raise UsageError(
                f"the tensors beside {where} are named {prefix}…, which is what {of} puts before a model's own names: save the "
                "model inside it"
            )


def _position(family: Family) -> str:
    """The name of the table of learned positions; an impossible name if the family has none."""
    return f"{family.outer['position'].theirs}.weight" if "position" in family.outer else ""


def _as_stored(family: Family, links: list[TensorMap], held: Mapping[str, Target]) -> list[TensorMap]:
    """The maps with the tensor names of the given files."""
    if not any(n.startswith(family.prefix) for n in held):  # GPT-2's original files contain the model without its head
        links = [replace(link, theirs=link.theirs.removeprefix(family.prefix)) for link in links]
    for new, old in OLD_NORMS.items():
        if any(n.endswith(old) for n in held):
            links = [
                replace(link, theirs=f"{link.theirs.removesuffix(new)}{old}" if link.theirs.endswith(new) else link.theirs)
                for link in links
            ]
    # Until transformers 5 an untied head stored the shared tensor only once.
    twice = {f"{place.untied}.bias" for place in family.outer.values() if place.untied is not None} - held.keys()
    return [link for link in links if link.theirs not in twice]


@dataclass(frozen=True)
class Segmented:
    """A `TensorSource` whose positions are those of the first segment: adds its vector, the first row of `segments`, to each row of
    `positions`, and rounds only the result.
    """

    source: TensorSource
    positions: str
    segments: str

    @property
    def tensors(self) -> Mapping[str, Target]:
        return self.source.tensors

    @property
    def stamp(self) -> str:
        return self.source.stamp

    def read(self, name: str, offset: Sizes, shape: Sizes) -> torch.Tensor:
        found = self.source.read(name, offset, shape)
        if name != self.positions:
            return found
        first = self.source.read(self.segments, (0, offset[1]), (1, shape[1]))
        exact = torch.promote_types(found.dtype, torch.float32)
        return found.to(exact) + first.to(exact)


def _must_agree(model: Model, found: Model, where: str) -> None:
    changed = differences(model, found)
    if changed:
        lines = [f"model.{key}: {mine!r} in the config, {theirs!r} in the file" for key, (mine, theirs) in changed.items()]
        raise UsageError("\n  ".join([f"the model section is not that of {where}:", *lines]) + "\nset them as the file has them")


def _drop_tied(family: Family, model: Model, held: dict[str, Target], source: TensorSource, folder: Path) -> None:
    """Copies of the embedding, such as a stored head of a tied model, must equal it, as must two copies of a bias; removes them from
    `held`.
    """
    table = family.outer["embedding"].theirs + ".weight"
    copies = {f"{module}.weight": table for module in family.copies}
    if model.tie_embeddings:
        copies[family.outer["head"].theirs + ".weight"] = table if table in held else table.removeprefix(family.prefix)
        copies |= {f"{p.untied}.bias": f"{p.theirs}.bias" for p in family.outer.values() if p.untied is not None}
    for copy, of in copies.items():
        if copy not in held:
            continue
        if not same_numbers(source, held[copy], held.get(of)):
            what = "it is always tied" if copy.removesuffix(".weight") in family.copies else "its config says tie_word_embeddings"
            fix = "get the files again" if copy.removesuffix(".weight") in family.copies else f"set that to false in {CONFIG}"
            raise UsageError(f"{folder} has a {copy} of its own, but {what}: {fix}")
        del held[copy]


def _has_own_head(family: Family, source: TensorSource) -> bool:
    """Whether a head is stored that differs from the embedding."""
    head, table = (source.tensors.get(family.outer[n].theirs + ".weight") for n in ("head", "embedding"))
    return head is not None and not same_numbers(source, head, table)


@dataclass(frozen=True)
class Export:
    """A checkpoint of ours as a Hugging Face model, checked but not yet written. `notes`: remarks for the user."""

    config: dict[str, Any]
    files: list[FilePlan]
    targets: dict[str, Target]
    produce: ReadSlice
    stamp: str
    notes: tuple[str, ...] = ()


def plan_export(checkpoint: OpenCheckpoint, dtype: torch.dtype | None = None) -> Export:
    """Raises UsageError if no Hugging Face family matches the model.

    dtype  dtype of the weights; default: the stored one
    """
    original = checkpoint.trainer.get("hf_config")
    config = hf_config(checkpoint.model, checkpoint.seq_len, original if isinstance(original, dict) else None)
    family = BY_TYPE[config["model_type"]]
    model = checkpoint.model
    ahead = model.mtp_depth if family.ahead else 0
    links = [*links_of(family, model, checkpoint.seq_len, ahead), *copies_ahead(family, model, checkpoint.source.tensors, ahead)]
    steps, states = copies_to_theirs(links), our_states(model, checkpoint.seq_len)
    held = checkpoint.source.tensors
    kept = {n: held[parts[0].source].dtype for n, parts in steps.items()}
    dtypes = {n: kept[n] if parts[0].source in states else dtype or kept[n] for n, parts in steps.items()}
    config["torch_dtype"] = str(next(iter(dtypes.values()))).removeprefix("torch.")
    config.pop("dtype", None)  # the newer name of torch_dtype
    paired = frozenset(link.theirs for link in links if link.paired)
    shapes = {n: joined(shape) if n in paired else shape for n, shape in extents(steps).items()}
    targets = {name: Target(name, dtypes[name], shape) for name, shape in shapes.items()}
    if family.segments is not None:  # nothing writes it: zeros
        name = f"{family.segments}.weight"
        dtypes[name], steps[name] = dtypes[_position(family)], ()
        targets[name] = Target(name, dtypes[name], (config["type_vocab_size"], checkpoint.model.hidden_size))
    stamp = json.dumps([checkpoint.source.stamp, config], sort_keys=True, default=str)
    notes = _length_note(family, config, checkpoint.seq_len)
    produce = Rearranged(checkpoint.source, steps, dtypes)
    return Export(config, _files(list(targets.values())), targets, Interleaved(produce, paired) if paired else produce, stamp, notes)


def _length_note(family: Family, config: Mapping[str, Any], seq_len: int) -> tuple[str, ...]:
    """A note if the config names another longest sequence because of YaRN (`rope_keys`)."""
    scaling = config.get("rope_scaling")
    if not isinstance(scaling, Mapping) or scaling["rope_type"] != "yarn" or config[family.length] == seq_len:
        return ()
    return (f"{family.length} is {config[family.length]}, since older versions of transformers take YaRN's factor from it",)


def _files(targets: list[Target]) -> list[FilePlan]:
    """Distributes whole tensors over files named like those of transformers."""
    groups: list[list[Target]] = [[]]
    for t in targets:
        if groups[-1] and sum(x.nbytes for x in groups[-1]) + t.nbytes > FILE_BYTES:
            groups.append([])
        groups[-1].append(t)
    names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))] if len(groups) > 1 else [SINGLE]
    return [
        FilePlan(name, tuple(SliceOfTensor(t.name, t.name, t.dtype, (0,) * len(t.shape), t.shape) for t in group), (("format", "pt"),))
        for name, group in zip(names, groups)
    ]


def write_hf(
    export: Export,
    folder: str | Path,
    *,
    others: Mapping[str, bytes],
    workers: int = 1,
    slab_bytes: int = 64 << 20,
    progress: Progress | None = None,
) -> Path:
    """Writes the folder, which must not exist; it appears only when complete. Completes what a killed run with the same source left.

    others  further files: name → content

    Raises UsageError if that fails; then nothing is left.
    """
    with atomic_folder(Path(folder)) as temporary:
        write_files(temporary, export.files, export.produce, stamp=export.stamp, workers=workers, slab_bytes=slab_bytes, progress=progress)
        if len(export.files) > 1:
            weights = {b.name: f.name for f in export.files for b in f.blocks}
            total = sum(t.nbytes for t in export.targets.values())
            write_durably(temporary / INDEX, as_json({"metadata": {"total_size": total}, "weight_map": weights}))
        for name, content in {**others, CONFIG: as_json(export.config)}.items():
            write_durably(temporary / name, content)
    return Path(folder)
