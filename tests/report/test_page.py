"""The page and the command: what a reader sees, what is escaped, what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from megascale.commands import report
from megascale.errors import UsageError
from megascale.report.canvas import label, pack
from megascale.report.loss import NARROW, WIDE, Look, loss_figure
from megascale.report.page import config_of, page
from megascale.report.panels import heat_figure, lines_figure, traffic_figure
from megascale.report.read import RunData, read_run
from tests.disk import small_files
from tests.report.runs import curve, event, make_run, metric, start, steps, write_run

EVIL = "<script>alert('x')</script> $\\frac{$ \u202e\x07 日本 \"&\" _"


class Tags(HTMLParser):
    """Every tag and attribute of a page, and whether the ones that need closing are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str]] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {(name, value or "") for name, value in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {(name, value or "") for name, value in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def resumed(folder: Path, name: str = "run") -> RunData:
    events = [start(), event(20, "stop"), start("tp2", 20), event(30, "skip"), event(40, "done")]
    config = {"run": {"name": name}, "optim": {"lr": 1e-3, "betas": [0.9, 0.95]}, "parallel": {"tp": 2}}
    rows = steps(40, lambda s: {"valid_loss": {"web": curve(s) + 0.1}} if s % 10 == 0 else {"loss": None} if s == 33 else {})
    return make_run(folder, rows, events, config)


def test_page_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    """Catches unclosed tags, scripts, and whatever a reader without a network would miss."""
    runs = [resumed(tmp_path / "a", "a"), resumed(tmp_path / "b", "b")]
    text = page(runs, "title")
    tags = Tags(text)
    assert tags.open == []
    assert "script" not in tags.tags and "link" not in tags.tags and "img" not in tags.tags
    outside = [v for n, v in tags.attributes if n in ("src", "href", "xlink:href") and not v.startswith("#")]
    assert outside == []
    assert not re.search(r"@import|url\((?!#)", text)
    for words in ("tokens/s, median", "MFU", "peak memory", "best validation loss, web", "dp_shard2 → tp2", "unigram entropy"):
        assert words in text
    assert text == page(runs, "title")


def test_everything_from_a_run_is_escaped(tmp_path: Path) -> None:
    """Catches names, layouts, sets, axes, events or config values that reach the page, or the figures' TeX, as they are."""
    rows = steps(5, lambda s: {"valid_loss": {EVIL: 4.0}, "sent_bytes": {EVIL: 5}})
    events = [start(EVIL), event(2, "signal", signal=EVIL), event(3, EVIL, **{EVIL: [EVIL]}), event(4, "change", changes={EVIL: [EVIL, 1]})]
    named = EVIL.replace("\x07", "")  # control characters in a config are refused
    runs = [make_run(tmp_path / n, rows, events, {"run": {"name": n + named}, named: {named: named}}) for n in "ab"]
    text = page(runs, EVIL)
    tags = Tags(text)
    assert "script" not in tags.tags and tags.open == []
    assert "&lt;script&gt;" in text
    assert "<script" not in text and text.count("&lt;script&gt;") > 20


@pytest.mark.parametrize("look", [WIDE, NARROW], ids=["wide", "narrow"])
def test_labels_stay_inside_and_apart(tmp_path: Path, look: Look) -> None:
    """Catches text that leaves the figure, and layout names that lie over one another, on short stretches and with long names."""
    events = [start("pp2·dp_shard4·cp2·tp4"), start("tp2", 30), start("dp_shard2·tp2", 32), start("1 process", 38)]
    rows = steps(40, lambda s: {"valid_loss": {"code": 4.0, "web": 5.0}})
    run = make_run(tmp_path / "run", rows, events, {"run": {"name": "a-rather-long-name-for-a-run-of-some-model"}})
    figure = loss_figure([run, run], "a title", look)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = []
    legend = figure.legends[0]
    for text in [legend.get_title(), *legend.get_texts(), *(t for axes in figure.axes for t in axes.texts)]:
        box = text.get_window_extent(renderer)
        assert box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, text.get_text()
        boxes.append((text.get_text(), box))
    for i, (one, a) in enumerate(boxes):
        for other, b in boxes[:i]:
            apart = a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1
            assert apart or "entropy" in one + other, (one, other)


def test_no_number_of_an_axis_is_cut_off(tmp_path: Path) -> None:
    """Catches tick labels and a colour bar that run over the edge of a small figure, and a legend that takes the curve's room."""
    told = {"layers": [1, 3], "load_max_over_mean": [1.01, 1.42]}
    runs = [make_run(tmp_path / f"{i}", steps(9, lambda s: {"lr": 1e-5 * s, "experts": told})) for i in range(8)]
    figures = (lines_figure(runs[:1], "lr", "learning rate"), heat_figure(runs[0], "experts", "load_max_over_mean", "load"))
    for figure in (*figures, lines_figure(runs, "lr", "learning rate")):
        assert figure is not None
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        for axes in figure.axes:
            box = axes.get_tightbbox(canvas.get_renderer())
            assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1
            assert axes.get_position().height * figure.get_size_inches()[1] > 1.6


def test_curve_has_no_hole_where_the_layout_changes(tmp_path: Path) -> None:
    """Catches segments that leave the step between two layouts undrawn, and a null that is bridged."""
    run = resumed(tmp_path / "run")
    curves = [line for line in loss_figure([run, run]).axes[0].lines if line.get_linewidth() == 1.7]
    ends = [(line.get_xdata()[0], line.get_xdata()[-1]) for line in curves]
    assert ends == [(1, 20), (20, 40)]
    assert curves[0].get_color() != curves[1].get_color()
    assert [x for x, y in zip(curves[1].get_xdata(), curves[1].get_ydata()) if y != y] == [33]


def test_figures_of_poor_runs(tmp_path: Path) -> None:
    """Catches tracebacks where nothing, one point, or nothing finite is there to draw."""
    bare = make_run(tmp_path / "bare", [{"step": 1}])
    none = make_run(tmp_path / "none", steps(3, lambda s: {"loss": None, "sent_bytes": {}, "grad_norm": 0.0}))
    for run in (bare, none):
        assert lines_figure([run], "grad_norm", "norm", log=True) is None
        assert traffic_figure(run) is None
        assert Tags(page([run], "x")).open == []
        assert Tags(page([run, bare], "x")).open == []


def test_many_runs_and_many_events_stay_small(tmp_path: Path) -> None:
    """Catches a page that grows with every step: long runs are what reports are for."""
    rows = [metric(s, sent_bytes={"dp_shard": 1_000_000 + s % 3}) for s in range(1, 8001)]
    run = make_run(tmp_path / "long", rows, [start(), *(event(s, "saved", seconds=1) for s in range(1, 8001, 40))])
    text = page([run], "long")
    assert len(text) < 3_000_000
    assert "all 201 events" in text
    several = [make_run(tmp_path / f"r{i}", steps(5), [start(f"tp{i + 2}")]) for i in range(9)]
    assert Tags(page(several, "several")).open == []


def test_config_differences(tmp_path: Path) -> None:
    """Catches keys that differ and are not shown, a key that only one run has among them."""
    a = make_run(tmp_path / "a", config={"optim": {"lr": 1e-3, "eps": 1e-8}})
    b = make_run(tmp_path / "b", config={"optim": {"lr": 2e-3, "eps": 1e-8, "extra": None}})
    found = config_of([a, b])
    assert found.differing is not None and found.keys is not None
    assert [key for key, *_ in found.differing.rows] == ["optim.lr", "optim.extra"]
    assert [key for key, *_ in found.keys.rows] == ["optim.lr", "optim.eps", "optim.extra"]
    text = page([a, b], "two")
    assert text.index("Keys that differ") < text.index("optim.extra") < text.index("all 3 keys") < text.index("optim.eps")
    assert "No key differs" in page([a, a], "equal") and "differ" not in page([a], "one")


def test_text_for_figures() -> None:
    """Catches TeX, control characters, endless names, and names that matplotlib hides from legends."""
    assert label("a$b$") == r"a\$b\$"
    assert label("x\x07\n y") == "x y"
    assert len(label("x" * 500)) == 48
    assert not label("_hidden").startswith("_")
    assert pack([(0, 2), (1, 2), (2.5, 1), (2.6, 1)], 0.1) == [0, 1, 0, 2]


def call(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "tools/report.py", *map(str, args)], capture_output=True, text=True, check=False)


def test_command_writes_page_and_picture(tmp_path: Path) -> None:
    """Catches options that are not wired, and folders that are not made."""
    folders = [write_run(tmp_path / n, steps(20), [start()]) for n in ("a", "b")]
    out, picture = tmp_path / "new" / "page.html", tmp_path / "other" / "loss.png"
    done = call(*folders, "--out", out, "--png", picture, "--title", "A & B")
    assert (done.returncode, done.stderr) == (0, "")
    assert "<h1>A &amp; B</h1>" in out.read_text(encoding="utf-8")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_command_refuses_in_one_message(tmp_path: Path) -> None:
    """Catches tracebacks, other exit codes, and a page that is written all the same."""
    good = write_run(tmp_path / "good", steps(3))
    out = tmp_path / "report.html"
    broken = write_run(tmp_path / "broken")
    (broken / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    mistakes = {
        (tmp_path / "none", "--out", out): "there is no folder",
        (good, broken, "--out", out): "line 2 is not JSON",
        (good, "--out", out, "--png", tmp_path / "x.pdf"): "x.png",
        (good, "--out", tmp_path / "folder.html"): "cannot be written",
        (good, "--out", tmp_path / "my.yaml"): "name it my.yaml.html",
    }
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "my.yaml").write_text("run:")
    for args, words in mistakes.items():
        done = call(*args)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr and "Traceback" not in done.stderr
        assert done.stderr.count("\n") == 1
    assert not out.exists()
    assert (tmp_path / "my.yaml").read_text() == "run:"


@pytest.mark.parametrize("limit", [1000, 25_000])
def test_a_full_disk_leaves_the_older_page(tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an older page or picture that is gone, with a torso in its place, where the new one did not fit."""
    monkeypatch.setattr("megascale.report.page.page", lambda runs, title: "new" * 8000)
    run, out, picture = write_run(tmp_path / "run", steps(3)), tmp_path / "out" / "page.html", tmp_path / "out" / "loss.png"
    out.parent.mkdir()
    out.write_text("older")
    picture.write_text("older")
    with small_files(limit), pytest.raises(UsageError, match=r"cannot be written.*File too large"):
        report.main([run], out, picture, None)
    assert picture.read_text() == "older" and out.read_text() == ("older" if limit == 1000 else "new" * 8000)
    assert sorted(p.name for p in out.parent.iterdir()) == ["loss.png", "page.html"]


def test_quickstart_can_read_a_run_that_is_starting(tmp_path: Path) -> None:
    """Catches a reader that quickstart, which polls a young run, could not use."""
    run = read_run(write_run(tmp_path / "run", steps(2), [start()], {"train": {"steps": 4}}))
    assert int(run.config["train.steps"]) == 4
    assert run.metrics[-1]["step"] == 2


def test_experts_are_seen(tmp_path: Path) -> None:
    """Catches a heat map of the wrong layer, one that a step without rows shifts, and a run without experts that gets an empty chapter."""
    told = {"layers": [1, 3], "load_max_over_mean": [1.5, None], "dropped_share": [0.0, 0.1]}
    rows = steps(9, lambda s: {"experts": {**told, "load_max_over_mean": [float(s), None]}} if s != 4 else {"experts": "broken"})
    run = make_run(tmp_path / "a", rows)
    figure = heat_figure(run, "experts", "load_max_over_mean", "load")
    assert figure is not None
    mesh = figure.axes[0].collections[0]
    values, edges = mesh.get_array(), mesh.get_coordinates()[0, :, 0].tolist()  # type: ignore[attr-defined]
    assert values is not None and values.mask[1].all() and values[0].tolist() == [1, 2, 3, 5, 6, 7, 8, 9]
    assert edges == [0.5, 1.5, 2.5, 3.5, 5.5, 6.5, 7.5, 8.5, 9.5]  # step 4 was not told: the row of 5 stands for it
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["1", "3"]
    assert heat_figure(run, "experts", "z_loss", "z") is None
    text = page([run], "t")
    assert "<h2>Experts</h2>" in text and Tags(text).open == []
    assert "<h2>Experts</h2>" not in page([make_run(tmp_path / "b")], "t")


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 0, "loss": 2.0, "grad_norm": 1.0, "time": 1.0}],
        [metric(1, loss=1e308), metric(2, loss=-1e308), metric(3, loss=1e308, lr=-1e308, mfu=1e308)],
        [metric(1, loss=10**400, tokens=-(10**400), sent_bytes={"tp": 1e308, "pp": -1.0, "cp": None})],
        [metric(1, time=float("nan"), step_seconds=float("inf"), valid_loss={"web": 1e308, "": None})],
        [metric(2**53 - 1)],
        [metric(1, loss=5e-324, grad_norm=5e-324, lr=0.0)],
    ],
)
def test_numbers_that_no_run_writes(tmp_path: Path, rows: list[dict[str, object]]) -> None:
    """Catches a traceback for values at the edge of what files can hold."""
    run = make_run(tmp_path / "run", rows, [start(time=1e308), event(0, "stop", time=-1e308), event(1, "done", time=None)])
    Tags(page([run, run], "odd"))
