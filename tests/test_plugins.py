"""A package beside megascale adds rows: tests/plugin is one, and the others here are what goes wrong with such packages."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from megascale import plugins
from megascale.commands.version import app as version_app
from megascale.config.activations import ACTIVATIONS
from megascale.config.attentions import ATTENTIONS, GROUPED
from megascale.config.decays import decays
from megascale.config.json_schema import schema_text
from megascale.config.load import build_config
from megascale.config.norms import NORMS
from megascale.config.optimizers import OPTIMIZERS, optimizers
from megascale.config.residuals import RESIDUALS
from megascale.config.routers import ROUTERS
from megascale.config.schema import Optim, Parallel
from megascale.data.forms import READERS, readers
from megascale.data.readers import Tally, read_blocks
from megascale.data.walk import choose_files
from megascale.errors import UsageError
from megascale.generation.run import Sampling, generate
from megascale.optim.learning_rate import learning_rate
from megascale.train.log.step_metrics import LoggedStep, StepMetric, metrics_of, step_metrics
from megascale.train.start.alike import shared_values
from tests.expand.test_growing import train as train_and_grow
from tests.layouts import Case, build, tiny, train, worst
from tests.ranks import run_ranks
from tests.runs import losses, make_tokens, rows, run, settings

ACME = Path(__file__).parent / "plugin"
PARTS = {"model__norm": "l1norm", "model__ffn": "relu2", "model__position": "nope", "model__residual": "halves"}
Install = Callable[..., Path]


def declare(folder: Path, distribution: str, version: str, entry: str) -> Path:
    """What pip would leave of a package in `folder`: its entry point. The package's code is found by PYTHONPATH, or lies there too."""
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[{plugins.GROUP}]\n{entry}\n")
    return folder


def declare_acme(folder: Path) -> Path:
    project = (ACME / "pyproject.toml").read_text()
    name, version = (re.search(rf'^{key} = "(.+)"', project, re.M)[1] for key in ("name", "version"))  # type: ignore[index]
    entry = re.search(rf'^\[project.entry-points."{plugins.GROUP}"\]\n(\w+) = "(.+)"', project, re.M)
    assert entry is not None
    return declare(folder, name, version, f"{entry[1]} = {entry[2]}")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs tests/plugin, or a module with the given `code` under a name of its own, for this process and those that it forks."""
    before = set(sys.modules)

    def now(code: str | None = None, name: str = "other") -> Path:
        folder = tmp_path / "site" / name
        if code is None:
            declare_acme(folder)
            monkeypatch.syspath_prepend(str(ACME))
        else:
            declare(folder, f"{name}-dist", "2.0", f"{name} = {name}_rows")
            (folder / f"{name}_rows.py").write_text(code)
        monkeypatch.syspath_prepend(str(folder))
        plugins.plugins.cache_clear()
        return folder

    plugins.plugins.cache_clear()
    yield now
    plugins.plugins.cache_clear()
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "acme" or name.endswith("_rows"):
            del sys.modules[name]


def acme_settings(folder: Path, **changes: Any) -> dict[str, Any]:
    make_tokens(folder / "tokens")
    return settings(folder, **{"optim__name": "signum", "optim__decay": "sqrt", "optim__lr": 1e-3, **changes})


@pytest.mark.dist
def test_a_plugin_trains_on_every_layout_and_resumes(install: Install, tmp_path: Path) -> None:
    """Catches an optimizer, a decay or a metric of a plugin that a layout, a checkpoint or a row leaves out."""
    install()
    whole = acme_settings(tmp_path / "whole", model__attention="gated", **PARTS)
    assert run(whole) == (0, "done")
    parts = acme_settings(tmp_path / "parts", parallel__tp=2, model__attention="gated", **PARTS)
    code, _ = run_ranks(2, run, parts, 3)[0]
    assert code == 75
    (tmp_path / "parts" / "run" / "STOP").unlink(missing_ok=True)
    parts["parallel"] = {"dp_shard": 2}
    assert run_ranks(2, run, parts)[0] == (0, "done")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), abs=1e-12)
    for row in rows(tmp_path / "parts"):
        assert row["bits_per_token"] == pytest.approx(row["loss"] / math.log(2))
        left = 1 - math.sqrt(max(0, row["step"] - 2) / 4)
        assert row["lr"] == pytest.approx(1e-3 * (row["step"] / 2 if row["step"] < 2 else 0.1 + 0.9 * left))
    first, again = (e for e in rows(tmp_path / "parts", "events") if e["event"] in ("start", "resume"))
    saved = json.loads((tmp_path / "parts" / "run" / "checkpoints" / "step-00000006" / "trainer.json").read_text())
    assert saved["plugins"] == first["plugins"] == again["plugins"] == {"megascale-acme": "0.1"}


@pytest.mark.dist
def test_generation_remembers_by_a_plugins_attention(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a cache that only our own attention fills, and a kind that cannot generate and ends in a traceback."""
    install()
    case = Case(tiny(attention="gated"), seq_len=32)
    prompts, how = [[5, 3, 1], [2, 4, 6, 8, 7]], Sampling(4)
    model = build(case, 1)
    found = generate(model, prompts, how)
    for prompt, more in zip(prompts, found):
        for n in range(4):
            whole = torch.tensor([prompt + more[:n]])
            assert int(model.module(whole)[0, -1].argmax()) == more[n]
    monkeypatch.setitem(ATTENTIONS, "mute", replace(GROUPED, cached=None))
    with pytest.raises(UsageError, match=r"model.attention is mute, whose row does not say what generation keeps"):
        generate(build(Case(tiny(attention="mute"), seq_len=32), 1), prompts, how)


def train_all(cases: list[Case]) -> list[dict[str, Any]]:
    return [train(case) for case in cases]


EXPERTS: dict[str, Any] = {"moe": {"num_experts": 4, "top_k": 2, "ffn_size": 16, "router": "softplus", "balance": "bias"}}
LAYOUTS = {
    "router": (EXPERTS, [{"tp": 2, "tp_sequence": True}, {"dp_shard": 2, "ep": 2}]),
    "attention": (
        {"attention": "gated", "qk_norm": True},
        [
            {"tp": 2, "tp_sequence": True, "recompute": "selective"},
            {"cp": 2},
            {"cp": 2, "cp_method": "ulysses"},
            {"pp": 2, "recompute": "full"},
            {"accumulation": "layered"},
        ],
    ),
    "residual": ({"residual": "halves"}, [{"tp": 2}, {"pp": 2, "recompute": "full"}]),
}


@pytest.mark.dist
@pytest.mark.parametrize("part", LAYOUTS)
def test_parts_of_blocks_train_alike_on_every_layout(install: Install, part: str) -> None:
    """Catches a part of a plugin that an axis, a schedule or recomputation takes for one of ours."""
    install()
    changes, layouts = LAYOUTS[part]
    case = Case(tiny(**changes), steps=2)
    alone = train(case)
    assert part != "attention" or "blocks.0.attention.gate.weight" in alone["grad"]
    cases = [replace(case, parallel=Parallel(**layout)) for layout in layouts]
    for layout, cut in zip(layouts, run_ranks(2, train_all, cases)[0]):
        assert cut["loss"] == pytest.approx(alone["loss"], rel=1e-12), layout
        assert worst(cut["grad"], alone["grad"])[0] < 1e-10, layout


def test_growth_follows_the_row_and_refuses_what_it_does_not_say(install: Install, tmp_path: Path) -> None:
    """Catches state of a plugin's optimizer that grows by a guess: the doubled run would leave the small one's curve, without a word."""
    install()
    changes: dict[str, Any] = {"optim__weight_decay": 0.0, "checkpoint__asynchronous": False, "train__steps": 5, **PARTS}
    alone, grown = acme_settings(tmp_path / "alone", **changes), acme_settings(tmp_path / "grown", **changes)
    grown["grow"] = [{"step": 3, "hidden_size": 48, "num_heads": 8, "num_kv_heads": 4, "ffn_size": 64, "symmetry": "none"}]
    assert run(alone) == (0, "done")
    assert train_and_grow(grown) == (0, "done")
    assert losses(tmp_path / "grown") == pytest.approx(losses(tmp_path / "alone"), abs=1e-10)
    silent = acme_settings(tmp_path / "silent", optim__name="heavyball")
    silent["grow"] = grown["grow"]
    code, message = train_and_grow(silent)
    assert code == 2 and "optim.name is heavyball" in message and "velocity" in message and "choose optimizer reset" in message
    assert not (tmp_path / "silent" / "run").exists()
    silent["optim"]["name"], silent["model"]["norm"] = "signum", "silent"
    code, message = train_and_grow(silent)
    assert code == 2 and "model.norm is silent, whose row does not say how it grows" in message
    silent["model"] |= {"norm": "l1norm", "attention": "gated"}
    code, message = train_and_grow(silent)
    assert code == 2 and "model.attention is gated, whose row does not say how it grows" in message
    silent["model"] |= {"attention": "grouped", **EXPERTS}
    silent["grow"] = [{"step": 3, "num_experts": 8}]
    code, message = train_and_grow(silent)
    assert code == 2 and "model.moe.router is softplus, whose row does not say how it grows" in message
    assert not (tmp_path / "silent" / "run").exists()


def pretrain(site: Path, *args: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), str(ACME), *sys.path])
    return subprocess.run([sys.executable, "pretrain.py", *args], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})


def test_a_dry_run_shows_it(tmp_path: Path) -> None:
    """Catches plugins that nobody is told of, and memory counted as AdamW's for another optimizer."""
    site = declare_acme(tmp_path / "site")
    (tmp_path / "c.yaml").write_text(json.dumps(acme_settings(tmp_path, precision__compute="fp32")))
    told = pretrain(site, str(tmp_path / "c.yaml"), "--dry-run", "--json", str(tmp_path / "dry.json"))
    assert told.returncode == 0, told.stderr
    assert "plugin megascale-acme 0.1: optimizers signum, heavyball; decays sqrt" in told.stdout
    report = json.loads((tmp_path / "dry.json").read_text())
    assert report["bytes_per_rank"]["optimizer"] == report["bytes_per_rank"]["parameters"]
    assert report["plugins"]["megascale-acme 0.1"]["metrics"] == ["bits_per_token"]


def test_an_editor_and_a_bug_report_know_it(install: Install) -> None:
    """Catches a JSON Schema that marks a plugin's optimizer as wrong, and `megascale version` without what decides how a run computes."""
    install()
    assert json.loads(schema_text())["$defs"]["Optim"]["properties"]["name"]["enum"][-2:] == ["signum", "heavyball"]
    told = CliRunner().invoke(version_app, []).stdout
    assert "plugin megascale-acme 0.1: optimizers signum, heavyball; decays sqrt" in told


def test_a_plugin_that_cannot_be_imported_ends_a_run_with_a_sentence(tmp_path: Path) -> None:
    """Catches a traceback, and a run that goes on without the rows that somebody installed."""
    site = declare(tmp_path / "site", "broken-dist", "2.0", "broken = broken_rows")
    (site / "broken_rows.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "c.yaml").write_text(json.dumps(acme_settings(tmp_path, optim__name="adamw", optim__decay="cosine")))
    told = pretrain(site, str(tmp_path / "c.yaml"))
    assert told.returncode == 2 and told.stderr.count("\n") == 1
    for words in ("the plugin broken of broken-dist 2.0 cannot be imported", "nothing_of_that_name", "`pip uninstall broken-dist`"):
        assert words in told.stderr
    assert not (tmp_path / "run").exists()


def test_a_config_with_plugins_needs_no_torch(tmp_path: Path) -> None:
    """Catches a plugin, or its loading, that makes a login node import torch to check a config."""
    site = declare_acme(tmp_path)
    code = (
        "import sys; from megascale.config.load import build_config\n"
        "c = {'model': {'num_layers': 1, 'hidden_size': 8, 'num_heads': 1}, 'train': {'steps': 1}, 'data': {'train': 'x'}}\n"
        "print(build_config({**c, 'optim': {'name': 'signum', 'decay': 'sqrt'}}).optim.name, 'torch' in sys.modules)"
    )
    path = os.pathsep.join([str(site), str(ACME), *sys.path])
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert told.stdout.split() == ["signum", "False"], told.stderr


ROW = "from megascale.config.optimizers import OptimizerRow as Row\n"
READER = "from megascale.data.forms import Reader\n"
MISTAKES = {
    "no rows": ("X = 1", ("has no ROWS", "pip uninstall other-dist")),
    "a list": ("ROWS = []", ("ROWS is a list", "{kind: {name: row}}")),
    "a kind": ("ROWS = {'optimiser': {}}", ("the kind 'optimiser'; did you mean optimizers?",)),
    "a name": ("ROWS = {'decays': {'no name': 1}}", ("decays has 'no name'",)),
    "shadow": (ROW + "ROWS = {'optimizers': {'lion': Row('a:b')}}", ("has lion among its optimizers", "built-in of that name")),
    "twice": (ROW + "ROWS = {'optimizers': {'signum': Row('a:b')}}", ("has signum among", "megascale-acme 0.1 has one")),
    "a type": ("ROWS = {'decays': {'mine': 5}}", ("has mine among its decays, a int, and a megascale.config.decays.DecayRow",)),
    "the rest": (ROW + "ROWS = {'optimizers': {'mine': Row('a:b', rest='muon')}}", ("leaves the rest of the weights to muon",)),
    "deepspeed": (ROW + "ROWS = {'optimizers': {'mine': Row('a:b', deepspeed=True)}}", ("the optimizer mine of a plugin sets deepspeed",)),
    "an ending": (READER + "ROWS = {'readers': {'mine': Reader('a:b', ('.jsonl',))}}", ("claims the ending .jsonl, which json reads",)),
    "a dot": (READER + "ROWS = {'readers': {'mine': Reader('a:b', ('WET',))}}", ("claims the ending WET, but one such as .wet",)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_is_wrong_with_a_plugin_is_told(install: Install, name: str) -> None:
    """Catches a plugin that takes the place of a built-in row, and one whose rows are passed over or end in a traceback."""
    code, words = MISTAKES[name]
    install()
    install(code)
    with pytest.raises(UsageError) as told:
        [table() for table in (optimizers, decays, step_metrics, readers)]
    assert all(w in str(told.value) for w in words), told.value


def test_a_row_that_needs_what_is_not_there(install: Install, tmp_path: Path) -> None:
    """Catches a run that is under way, or has written something, before the code of its optimizer turns out to be missing or another."""
    install(ROW + "ROWS = {'optimizers': {'gone': Row('other_rows:Gone'), 'odd': Row('megascale.optim.optimizers:Lion', state={'m': 1})}}")
    code, message = run(acme_settings(tmp_path, optim__name="gone", optim__decay="cosine"))
    assert code == 2 and "the optimizer gone needs other_rows:Gone, which cannot be imported (AttributeError" in message
    code, message = run(acme_settings(tmp_path, optim__name="odd", optim__decay="cosine"))
    assert code == 2 and "the optimizer odd keeps exp_avg but its row says m" in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_unknown_names_suggest_the_nearest(install: Install, tmp_path: Path) -> None:
    """Catches a message that knows built-in names only, and a resume without the plugin whose message does not think of plugins."""

    def told(**changes: Any) -> str:
        with pytest.raises(UsageError) as error:
            build_config(settings(tmp_path, **changes))
        return str(error.value)

    missing = told(optim__name="signum")
    assert "optim.name is 'signum': it should be 'adamw', 'lion', " in missing and "; plugins may add more (installed: none)" in missing
    assert told(model__family="decoders").endswith("did you mean decoder?")
    install()
    assert "'signum' or 'heavyball'; did you mean signum?" in told(optim__name="sigum")
    assert "'constant' or 'sqrt'; did you mean cosine?" in told(optim__decay="cosin")


def test_a_reader(install: Install, tmp_path: Path) -> None:
    """Catches files of a plugin's kind that are read as text, packed ones too, and a reader's failure without the file's name."""
    page = "WARC/1.0\r\nWARC-Type: conversion\r\n\r\n{}\r\n\r\n"
    text = "WARC/1.0\r\nWARC-Type: warcinfo\r\n\r\nnot this\r\n\r\n" + page.format("one") + page.format("") + page.format("\ufefftwo\n2")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.wet").write_text(text, newline="")
    (tmp_path / "in" / "b.WET.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "in" / "c.txt").write_text("three")
    install()
    tally, found = Tally(), choose_files([tmp_path / "in"], "*", (), ("text",))
    assert [[b.text for b in read_blocks(p, "text", tally=tally)] for p in found.files] == [["one", "two\n2"]] * 2 + [["three"]]
    assert tally.marks == 2 and "1 of text (c.txt …), 2 of wet (a.wet …)" in found.sentences()[0]
    install(
        "from megascale.data.readers import documents\n"
        f"{READER}ROWS = {{'readers': {{'bad': Reader(lambda r: documents(r, lambda f, key: (1 / 0 for _ in 'a')), ('.bad',))}}}}"
    )
    (tmp_path / "x.bad").write_text("x")
    with pytest.raises(UsageError, match=r"x\.bad cannot be read: its reader says ZeroDivisionError"):
        list(read_blocks(tmp_path / "x.bad", "text"))


def on_rank_1(folder: Path, values: dict[str, Any]) -> tuple[int, str]:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        sys.path.insert(0, str(declare_acme(folder)))
        sys.path.insert(0, str(ACME))
        plugins.plugins.cache_clear()
    return run(values)


@pytest.mark.dist
def test_ranks_have_the_same_plugins(tmp_path: Path) -> None:
    """Catches a node with another version of a plugin, whose updates enter the weights of all."""
    values = acme_settings(tmp_path, optim__name="adamw", optim__decay="cosine")
    for code, message in run_ranks(2, on_rank_1, tmp_path / "site", values):
        assert code == 2 and "has plugin megascale-acme 0.1 and rank 0 on" in message
    assert not any(key.startswith("plugin ") for key in shared_values(build_config(values)))


def test_a_resume_without_a_plugin_says_so(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that goes on in silence when a plugin that it was trained with is gone."""
    values = acme_settings(tmp_path, optim__name="adamw", optim__decay="cosine", checkpoint__asynchronous=False)
    site = install()
    assert run(values, stop_at=2)[0] == 75
    (tmp_path / "run" / "STOP").unlink(missing_ok=True)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(site)])
    plugins.plugins.cache_clear()
    assert run(values) == (0, "done")
    (told,) = [e for e in rows(tmp_path, "events") if e["event"] == "plugins"]
    assert "megascale-acme 0.1, which is not installed here" in told["message"] and told["now"] == {}


def test_what_needs_a_plugin_that_is_gone_names_it(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches "signum is none of ours", or "use an older checkpoint", where the checkpoint tells which package has to be installed."""
    from megascale.expand.source import open_source
    from megascale.formats.sources import open_checkpoint

    values = acme_settings(tmp_path, model__norm="l1norm", train__steps=1, optim__decay="cosine")
    site = install()
    assert run(values) == (0, "done")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(site)])
    plugins.plugins.cache_clear()
    words = r"trained with the plugin megascale-acme 0\.1, which is not installed here: `pip install megascale-acme`"
    for use in (build_config, lambda _: open_checkpoint(tmp_path / "run"), lambda _: open_source(tmp_path / "run")):
        with pytest.raises(UsageError, match=words):
            use(values)
    with pytest.raises(UsageError, match=r"model.norm is 'l2norm'") as told:
        build_config({**values, "model": {**values["model"], "norm": "l2norm"}, "run": {"name": "new"}})
    assert "pip install" not in str(told.value)


def test_a_metric_that_fails_ends_no_run() -> None:
    """Catches training that ends, or a row that is lost, since a plugin divides by zero."""
    config = build_config({"model": {"num_layers": 1, "hidden_size": 8, "num_heads": 1}, "train": {"steps": 1}, "data": {"train": "x"}})
    step = LoggedStep(1, 2.0, 1.0, 0.1, 8, 1.0, 1, 1.0, 0.0, {}, 1, 1, config.train, 1.0)
    known = {**step_metrics(), "bad": StepMetric(lambda s: 1 / 0), "text": StepMetric(lambda s: "x"), "good": StepMetric(lambda s: s.loss)}
    row, wrong = metrics_of(step, known)
    assert row["bad"] is row["text"] is None and row["good"] == row["loss"] == 2.0 and set(wrong) == {"bad", "text"}
    assert "valid_loss" not in row and json.dumps(row)


def test_no_metric_hides_what_modules_tell(install: Install) -> None:
    """Catches a plugin's metric in the place of a row's numbers of experts, and modules that tell under a name that plugins may take."""
    from megascale.model.module_metrics import ModuleMetrics

    install(
        "from megascale.train.log.step_metrics import StepMetric as Metric\nROWS = {'metrics': {'experts': Metric(lambda s: 1.0)}}",
    )
    with pytest.raises(UsageError, match=r"the plugin other-dist 2\.0 has experts among its metrics, and what modules tell"):
        step_metrics()
    with pytest.raises(AssertionError, match="GROUPS"):
        ModuleMetrics("loads", {}, {}, lambda totals: {})


def test_every_built_in_row_names_what_is_there() -> None:
    """Catches a row whose module or name was moved: nothing imports it until somebody asks for it."""
    parts = [*((n, r.build) for n, r in OPTIMIZERS.items()), *((n, r.read) for n, r in READERS.items())]
    parts += [(n, p) for n, r in NORMS.items() for p in (r.normalize, r.kernel) if p]
    parts += [(n, p) for n, r in ACTIVATIONS.items() for p in (r.phi, r.psi) if p]
    parts += [(n, r.build) for n, r in ATTENTIONS.items()]
    parts += [*((n, r.score) for n, r in ROUTERS.items()), *((n, p) for n, r in RESIDUALS.items() for p in (r.layer, r.ends))]
    for name, part in parts:
        assert callable(plugins.resolve(part, name))


def test_a_decay_of_ours_is_what_it_was() -> None:
    """Catches a formula that changed on its way into a row."""
    cfg = Optim(lr=2.0, min_lr_ratio=0.25, warmup_steps=2, decay="cosine")
    assert learning_rate(cfg, 1, 10) == 1.0
    for decay, at in (("cosine", 2.0 * (0.25 + 0.75 * 0.5)), ("linear", 2.0 * (0.25 + 0.75 * 0.5)), ("constant", 2.0), ("wsd", 2.0)):
        assert learning_rate(cfg.model_copy(update={"decay": decay}), 6, 10) == pytest.approx(at)
    assert learning_rate(cfg.model_copy(update={"decay": "wsd", "decay_steps": 4}), 8, 10) == pytest.approx(2.0 * (0.25 + 0.75 * 0.5))
