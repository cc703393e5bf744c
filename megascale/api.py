"""The functions of `import megascale as ms`: thin wrappers over those of the commands, with plain data in and out.

Wrong use raises UsageError with a message. Functions import torch only when called.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from megascale.config.load import apply_overrides, build_from, read_yaml
from megascale.config.paths import check_paths
from megascale.config.schema import Config
from megascale.errors import UsageError

if TYPE_CHECKING:
    from megascale.data.memory import Samples
    from megascale.generation.loaded import LoadedModel
    from megascale.train.session import Session

ConfigLike = Config | Mapping[str, Any] | str | Path


def load_config(source: ConfigLike, *overrides: str) -> Config:
    """Loads a YAML file or nested dicts, with overrides such as "train.steps=10"; for samples in memory if `data.train` is absent."""
    from megascale.data.memory import NAME, PLACE

    for given in overrides:
        if not isinstance(given, str):
            raise UsageError(f'an override is {given!r}, a {type(given).__name__}: give texts, as "train.steps=10", one after another')
    if isinstance(source, Config) and not overrides:
        return source
    values = read_yaml(Path(source)) if isinstance(source, str | Path) else _plain(source)
    values = apply_overrides(values, overrides)
    data = values.setdefault("data", {})
    if isinstance(data, dict):
        data.setdefault("train", [{"path": PLACE, "name": NAME}])
    config = build_from(Path(source) if isinstance(source, str | Path) else None, values)
    check_paths(config)
    return config


@contextmanager
def training(config: ConfigLike, samples: Samples | None = None, *, run_dir: str | Path | EllipsisType | None = ...) -> Iterator[Session]:
    """A run whose loop is in the program: `with ms.training(config) as run: for step in run: …`. Collective under a launcher.

    samples  documents as lists of token ids, instead of the files of data.train
    run_dir  the run's directory, by default from the config; None writes nothing
    """
    from megascale.train.session import open_session

    asked = load_config(config)
    if run_dir == "" or not (run_dir is None or run_dir is ... or isinstance(run_dir, str | Path)):
        raise UsageError(f"run_dir is {run_dir!r}: name a folder, give None to write nothing, or leave it out for the config's own")
    if isinstance(run_dir, str | Path):
        asked = load_config({**asked.plain(), "run": {**asked.run.model_dump(mode="json"), "dir": str(run_dir)}})
    with open_session(asked, samples, run_dir is not None) as session:
        yield session


def load_model(path: str | Path, *, device: str = "auto", dtype: str | None = None) -> LoadedModel:
    """A run, a checkpoint or a Hugging Face folder → a module: `model(tokens [b, s])` → logits [b, s, V].

    dtype  fp32, bf16, fp16 or fp64 of weights and activations; None: the one used in training
    """
    from megascale.generation.loaded import load_whole

    if not isinstance(path, str | Path):
        raise UsageError(f"the model is {path!r}: give the path of a run, a checkpoint or a Hugging Face folder")
    return load_whole(Path(path), device, dtype)


def generate(
    model: LoadedModel | Session | str | Path,
    prompts: str | Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    ignore_end: bool = False,
    tokenizer: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Continuations: [{"prompt", "tokens", "text"}]; the text is None for prompts of token ids without a `tokenizer`.

    model  a loaded model, a path, or a run in progress in one process
    """
    from megascale.generation.prompts import Asked, answer

    asked = Asked(max_new_tokens, temperature, top_p, seed, ignore_end, None if tokenizer is None else Path(tokenizer))
    return answer(load_model(model) if isinstance(model, str | Path) else model, prompts, asked)


def grow(source: str | Path, target: str | Path, *, data: str | None = None, workers: int = 1, **asked: Any) -> dict[str, Any]:
    """Writes a larger checkpoint that continues from `source` and returns the report. `asked`: sizes such as hidden_size=128, and
    methods such as depth="stack", named as in `Sizes` and `GrowthOptions` (expand/options.py); kinds={"dense": {"ffn_size": 64}} for sizes
    of one kind of layer.
    """
    from megascale.expand.grow import grow as grow_checkpoint
    from megascale.expand.options import GrowthOptions, Sizes, sizes_of
    from megascale.expand.write import Effort

    kinds = {name: sizes_of(name, given) for name, given in asked.get("kinds", {}).items()}
    sizes, options = _split("grow", {**asked, "kinds": kinds}, Sizes, GrowthOptions)
    for key, value in {**vars(sizes), "workers": workers}.items():
        if key != "kinds" and value is not None and (type(value) is not int or value < 1):
            raise UsageError(f"{key} is {value!r}: give a whole number, 1 or more")
    return grow_checkpoint(source, Path(target), sizes, options, Effort(workers, data=data))


def convert(source: str | Path, target: str | Path, *, origin: str, to: str, dtype: str | None = None, **asked: Any) -> dict[str, Any]:
    """Converts between "megascale", "hf" and "megatron" and returns the report. `asked`: fields of `ConvertOptions` and `MegatronCut`
    (formats/convert.py).
    """
    from megascale.formats.convert import ConvertOptions, MegatronCut, find_way

    way, stored = find_way(origin, to, dtype)
    paths = {key: Path(asked[key]) for key in ("tokenizer", "config") if asked.get(key) is not None}
    options, cut = _split("convert", {**asked, **paths}, ConvertOptions, MegatronCut)
    return way(Path(source), Path(target), replace(options, dtype=stored, cut=cut)).plain()


def dry_run(config: ConfigLike, ranks: int = 1) -> dict[str, Any]:
    """The report of `--dry-run` for a run on `ranks`: parameters, bytes per rank, FLOPs, schedule, the resolved config."""
    from megascale.train.estimate.dry_run import report_of

    if type(ranks) is not int or ranks < 1:
        raise UsageError(f"ranks is {ranks!r}: give the number of ranks, 1 or more")
    return report_of(load_config(config), ranks)[1]


def plan(config: ConfigLike, cluster: str | Path, gpus: int | None = None) -> dict[str, Any]:
    """Layouts on a cluster, best first: {"layouts": [{"parallel", "step_seconds", "memory_bytes", "mfu", …}], …}. Loads no torch.

    cluster  the cluster's file
    gpus     devices to use, by default all
    """
    from megascale.planning.plan import plan_layouts

    return plan_layouts(load_config(config), cluster, gpus)[1]


def _plain(source: Any) -> dict[str, Any]:
    """Nested dicts of plain values, paths as text."""
    if isinstance(source, Config):
        return source.plain()
    if not isinstance(source, Mapping):
        raise UsageError(f"the config is a {type(source).__name__}: give a YAML file, or a dict with sections such as model and train")
    return {key: _plain(v) if isinstance(v, Mapping) else str(v) if isinstance(v, Path) else v for key, v in source.items()}


def _split(call: str, asked: Mapping[str, Any], *kinds: Any) -> list[Any]:
    """Distributes keyword arguments to dataclasses by field. Raises UsageError for a name that none of them has."""
    known = [f.name for kind in kinds for f in fields(kind)]
    for key in asked:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise UsageError(f"{call}() has no argument {key}{f'; did you mean {near[0]}?' if near else ''}: it knows {', '.join(known)}")
    return [kind(**{f.name: asked[f.name] for f in fields(kind) if f.name in asked}) for kind in kinds]
