"""Conversions from folder to folder, and their reports."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megascale.checkpoint.index import DTYPES
from megascale.checkpoint.loader import verify
from megascale.checkpoint.streaming import Progress, write_streamed
from megascale.config.load import build_config, read_yaml, to_yaml
from megascale.config.schema import Model
from megascale.errors import UsageError
from megascale.files import atomic_folder, check_absent, write_durably
from megascale.formats.fp8 import plan_inference
from megascale.formats.hf.compare_logits import check_comparable, largest_difference
from megascale.formats.hf.folder import GENERATION, encoders, tokenizer_files
from megascale.formats.hf.model import plan_export, read_hf, write_hf
from megascale.formats.json_file import read_object
from megascale.formats.megatron.checkpoint import read_megatron, write_megatron, write_torch_dist
from megascale.formats.sources import Foreign, OpenCheckpoint, open_checkpoint
from megascale.formats.tokenizer_files import check_fits, export_files, find_tokenizer, gather

NAMES: dict[str, str] = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "fp64": "F64"}
FP8 = "fp8"  # not the dtype of a whole model, only of its hidden matrices


@dataclass(frozen=True)
class MegatronCut:
    """How to split weights for Megatron: kind of experts (sequential, grouped), norm spec (te, local), the number that times tp the padded
    vocabulary is a multiple of, and whether files are per rank (torch) or independent of the layout (torch_dist).
    """

    tp: int = 1
    pp: int = 1
    spec: str = "te"
    divisible: int = 128
    ckpt_format: str = "torch"
    experts: str = "sequential"


@dataclass(frozen=True)
class ConvertOptions:
    """Options of a conversion between any formats.

    dtype      of the weights; the stored one if None
    tokens     to compare logits on; None: no comparison
    config     the config of Megatron's model
    ema        from a run: the average to take instead of the weights
    tokenizer  the one to write into a Hugging Face folder; None: the one that is found; none at all without `with_tokenizer`
    """

    dtype: torch.dtype | None = None
    workers: int = 1
    slab_bytes: int = 64 << 20
    tokenizer: Path | None = None
    with_tokenizer: bool = True
    tokens: list[int] | None = None
    progress: Progress | None = None
    config: Path | None = None
    cut: MegatronCut = MegatronCut()
    ema: str | None = None


@dataclass(frozen=True)
class Report:
    """Report of a conversion. `tokenizer`: the files that encode text; `logits`: the largest |Δ| to transformers in fp32, None if not
    requested; `notes`: further remarks.
    """

    source: str
    written: str
    model: str
    tensors: int
    parameters: int
    bytes: int
    dtypes: list[str]
    tokenizer: str | None
    logits: float | None
    notes: list[str]

    def plain(self) -> dict[str, Any]:
        return asdict(self)


Way = Callable[[Path, Path, ConvertOptions], Report]


def parse_dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    if name == FP8:
        raise UsageError("--dtype is fp8, which is for checkpoints of ours: give --from megascale --to megascale, or another dtype")
    if name not in NAMES:
        raise UsageError(f"--dtype is {name}: give one of {', '.join(NAMES)}, or leave it out to keep what is stored")
    return DTYPES[NAMES[name]]


def hf_to_megascale(source: Path, target: Path, options: ConvertOptions) -> Report:
    """A Hugging Face folder → `target`/step-00000000, with model.yaml, the tokenizer's files and the generation config next to it."""
    foreign = read_hf(source, dtype=options.dtype)
    check_comparable(foreign.model, foreign.seq_len, options.tokens)
    extra = {p.name: p.read_bytes() for p in tokenizer_files(source)} if options.with_tokenizer else {}
    held = [p.name for p in encoders(source)] if options.with_tokenizer else []
    written = write_ours(foreign, target, options, {"from": "hf", "path": str(source)}, {"hf_config": foreign.config}, extra, source)
    delta = None
    if options.tokens is not None:
        ours = open_checkpoint(target)
        delta = largest_difference(ours.model, ours.seq_len, ours.source.read, source, options.tokens)
    return _report(source, written, foreign.config["model_type"], foreign, held, delta, foreign.notes)


def write_ours(
    foreign: Foreign,
    target: Path,
    options: ConvertOptions,
    origin: dict[str, Any],
    keep: Mapping[str, Any],
    extra: dict[str, bytes],
    source: Path,
) -> Path:
    """Writes the checkpoint of a foreign model and the files next to it. Raises UsageError and then leaves nothing."""
    trainer: dict[str, Any] = {
        "step": 0,
        "converted": origin,
        **keep,
        "config": {"model": foreign.model.model_dump(mode="json"), "train": {"seq_len": foreign.seq_len}},
    }
    if (source / GENERATION).is_file():
        trainer["hf_generation_config"] = read_object(source / GENERATION)
        extra = {**extra, GENERATION: (source / GENERATION).read_bytes()}
    section = {"model": _told(foreign.model)}
    with atomic_folder(target) as temporary:
        step = write_streamed(
            temporary,
            0,
            foreign.targets,
            foreign.produce,
            trainer,
            stamp=json.dumps([foreign.stamp, str(options.dtype)]),
            workers=options.workers,
            slab_bytes=options.slab_bytes,
            progress=options.progress,
        )
        for name, content in {**extra, "model.yaml": to_yaml(section).encode()}.items():
            write_durably(temporary / name, content)
    return target / step.name


def _told(model: Model) -> dict[str, Any]:
    """The model section without what is the default; a null in a kind is a value."""
    told = {k: v for k, v in model.model_dump(mode="json", exclude_defaults=True).items() if v is not None}
    return {**told, **({"kinds": model.model_dump(mode="json")["kinds"]} if model.kinds else {})}


def whole_checkpoint(path: Path, average: str | None = None) -> OpenCheckpoint:
    """Opens a checkpoint of ours and verifies its checksums. Raises UsageError, so that no damage spreads into another format."""
    checkpoint = open_checkpoint(path, average)
    problems = verify(checkpoint.source.index)
    if problems:
        raise UsageError(f"{checkpoint.folder} is damaged: {'; '.join(problems[:3])}; use an older checkpoint")
    return checkpoint


def megascale_to_hf(source: Path, target: Path, options: ConvertOptions) -> Report:
    """A checkpoint of ours → a Hugging Face folder."""
    check_absent(target)
    checkpoint = whole_checkpoint(source, options.ema)
    export = plan_export(checkpoint, options.dtype)
    path = options.tokenizer or (find_tokenizer(checkpoint.config, checkpoint.folder) if options.with_tokenizer else None)
    tokenizer = gather(path, options.tokenizer is not None)
    assert checkpoint.model.vocab_size is not None
    check_fits(tokenizer, path, checkpoint.model.vocab_size)
    check_comparable(checkpoint.model, checkpoint.seq_len, options.tokens)
    others = export_files(tokenizer, checkpoint.trainer)
    write_hf(export, target, others=others, workers=options.workers, slab_bytes=options.slab_bytes, progress=options.progress)
    delta = None
    if options.tokens is not None:
        delta = largest_difference(checkpoint.model, checkpoint.seq_len, checkpoint.source.read, target, options.tokens)
    held = [p.name for p in encoders(target)]
    return _report(checkpoint.folder, target, export.config["model_type"], export, held, delta, (*export.notes, *tokenizer.notes))


def megascale_to_fp8(source: Path, target: Path, options: ConvertOptions) -> Report:
    """A checkpoint of ours → `target`/step-…, for inference with weights in e4m3."""
    checkpoint = whole_checkpoint(source, options.ema)
    plan = plan_inference(checkpoint)
    with atomic_folder(target) as temporary:
        step = write_streamed(
            temporary,
            checkpoint.step,
            plan.targets,
            plan.produce,
            plan.trainer,
            stamp=checkpoint.source.stamp,
            workers=options.workers,
            slab_bytes=options.slab_bytes,
            progress=options.progress,
        )
    return _report(checkpoint.folder, target / step.name, "for inference, hidden matrices in e4m3", plan, [], None)


def _report(
    source: Path, written: Path, kind: str, made: Any, tokenizer: list[str], delta: float | None, notes: Iterable[str] = ()
) -> Report:
    targets = list(made.targets.values()) if isinstance(made.targets, dict) else made.targets
    return Report(
        str(source),
        str(written),
        kind,
        len(targets),
        sum(math.prod(t.shape) for t in targets),
        sum(t.nbytes for t in targets),
        sorted({str(t.dtype).removeprefix("torch.") for t in targets}),
        ", ".join(tokenizer) or None,
        delta,
        list(notes),
    )


def megatron_to_megascale(source: Path, target: Path, options: ConvertOptions) -> Report:
    """Weights of megatron-core, of the model that `options.config` describes → `target`/step-00000000."""
    model, seq_len = model_of(options.config)
    foreign = read_megatron(source, model, seq_len, options.dtype)
    written = write_ours(foreign, target, options, {"from": "megatron", "path": str(source)}, {}, {}, source)
    return _report(source, written, "GPT model of megatron-core, weights only", foreign, [], None)


def megascale_to_megatron(source: Path, target: Path, options: ConvertOptions) -> Report:
    """A checkpoint of ours → `target`/iter_… with mp_rank_… folders or a distributed checkpoint in it, weights only."""
    check_absent(target)
    checkpoint = whole_checkpoint(source, options.ema)
    cut = options.cut
    if cut.ckpt_format == "torch_dist":
        made = write_torch_dist(checkpoint, target, cut.spec, cut.divisible, options.dtype)
    else:
        made = write_megatron(checkpoint, target, cut.tp, cut.pp, cut.spec, cut.divisible, options.dtype, cut.experts)
    return _report(checkpoint.folder, target, "GPT model of megatron-core, weights only", made, [], None)


def model_of(path: Path | None) -> tuple[Model, int]:
    """The model section of a config file and its sequence length, for formats that do not describe the model."""
    if path is None:
        raise UsageError("Megatron's files do not describe the model: give --config FILE with the sections model and train (its seq_len)")
    values = read_yaml(path)
    if not isinstance(values.get("model"), Mapping):
        raise UsageError(f"{path} has no section model: describe the weights' model there")
    config = build_config({"data": {"train": "none"}, "train": {"steps": 1}, **{k: values[k] for k in ("model", "train") if k in values}})
    if config.model.vocab_size is None:
        raise UsageError(
            f"{path} leaves model.vocab_size out, but Megatron's files have rows of padding: write `vocab_size: N` into its section model, "
            "the tokenizer's number of tokens"
        )
    return config.model, config.train.seq_len


WAYS: dict[tuple[str, str], Way] = {
    ("hf", "megascale"): hf_to_megascale,
    ("megascale", "hf"): megascale_to_hf,
    ("megatron", "megascale"): megatron_to_megascale,
    ("megascale", "megatron"): megascale_to_megatron,
}


def find_way(origin: str, to: str, dtype: str | None) -> tuple[Way, torch.dtype | None]:
    """The converter between two formats, and the dtype to store weights in (None: as stored). Raises UsageError."""
    if (origin, to, dtype) == ("megascale", "megascale", FP8):
        return megascale_to_fp8, None
    if (origin, to) not in WAYS:
        ways = ", ".join(f"--from {a} --to {b}" for a, b in WAYS)
        raise UsageError(f"--from is {origin} and --to is {to}: give one of {ways}, or --from megascale --to megascale --dtype fp8")
    return WAYS[origin, to], parse_dtype(dtype)
