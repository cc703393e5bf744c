"""Encoder–decoders of growing depth on a translation task: expressions of Python's standard library into prefix notation.

`a.b(c, d + 1)` becomes `(call (. a b) c (+ d 1))`: operators move in front of what they join, brackets must be balanced, names are carried
over. `python -m benchmarks.depth.translation` makes the pairs from the installed sources and trains 6, 18 and 50 layers a side under three
residual schemes with the same data, order and budget, about 20 minutes of one core; `--steps`, `--rates`, `--seeds` and `--depths` make it
larger. Runs that are in the results already are kept. After each run a greedy search translates held-out expressions.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import machine, write
from benchmarks.studies import last
from megascale.config.load import load_config
from megascale.data.pairs import PairMixture
from megascale.data.prepare import prepare_pairs
from megascale.data.samples import open_data
from megascale.data.tokenizer import load_tokenizer, train_sentencepiece
from megascale.errors import TrainingError
from megascale.generation.beam import beam_search
from megascale.launch.ranks import RankInfo
from megascale.model.encoder_decoder import EncoderDecoder
from megascale.train.setup import build_trainer

CONFIG = Path(__file__).parents[2] / "configs" / "translate.yaml"
SCHEMES = ("deepnorm", "pre", "post")
PIECES, LONGEST = 512, 24  # of the vocabulary; tokens of a source and of a target
BINARY = {"Add": "+", "Sub": "-", "Mult": "*", "Div": "/", "Mod": "%", "FloorDiv": "//", "BitAnd": "&", "BitOr": "|", "LShift": "<<"}
COMPARE = {
    "Eq": "==",
    "NotEq": "!=",
    "Lt": "<",
    "LtE": "<=",
    "Gt": ">",
    "GtE": ">=",
    "Is": "is",
    "IsNot": "isnt",
    "In": "in",
    "NotIn": "nin",
}


def prefix(node: ast.AST) -> str:
    """An expression in prefix notation. Raises KeyError for what it has no form for."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Constant(value=value):
            return repr(value)
        case ast.Attribute(value=value, attr=name):
            return f"(. {prefix(value)} {name})"
        case ast.Subscript(value=value, slice=index):
            return f"(at {prefix(value)} {prefix(index)})"
        case ast.BinOp(left=left, op=op, right=right):
            return f"({BINARY[type(op).__name__]} {prefix(left)} {prefix(right)})"
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            return f"({COMPARE[type(op).__name__]} {prefix(left)} {prefix(right)})"
        case ast.BoolOp(op=op, values=values):
            return f"({type(op).__name__.lower()} {' '.join(map(prefix, values))})"
        case ast.UnaryOp(op=op, operand=operand):
            return f"({type(op).__name__.lower()} {prefix(operand)})"
        case ast.Tuple(elts=values) | ast.List(elts=values):
            return f"({type(node).__name__.lower()} {' '.join(map(prefix, values))})"
        case ast.Call(func=func, args=args, keywords=[]):
            return f"(call {' '.join(map(prefix, [func, *args]))})"
    raise KeyError(type(node).__name__)


def expressions(folder: Path) -> Iterator[tuple[str, str]]:
    """Every expression below `folder` that has an operator or a call and is not long, once, with its prefix form."""
    seen: set[str] = set()
    for path in sorted(folder.rglob("*.py")):
        if "site-packages" in path.parts or "test" in path.parts:
            continue
        with suppress(SyntaxError, UnicodeDecodeError, ValueError):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.BinOp | ast.Compare | ast.BoolOp | ast.Call | ast.Subscript):
                    text = ast.unparse(node)
                    if 8 <= len(text) <= 48 and "\n" not in text and text not in seen:
                        with suppress(KeyError):
                            pair = text, prefix(node)
                            seen.add(text)
                            yield pair


def prepare(out: Path) -> None:
    """The token files `out`.source and `out`.target with one vocabulary."""
    pairs = list(expressions(Path(sysconfig.get_paths()["stdlib"])))
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = out.with_suffix(".jsonl")
    lines.write_text("".join(json.dumps({"source": a, "target": b}) + "\n" for a, b in pairs), encoding="utf-8")
    train_sentencepiece((text for pair in pairs for text in pair), PIECES, out.with_suffix(".model"))
    tokenizer = load_tokenizer(out.with_suffix(".model"))
    prepare_pairs([lines], str(out), (tokenizer, tokenizer), ("source", "target"), 1, lambda _: None)


def train(scheme: str, depth: int, lr: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Losses of all steps (None where not finite), the held-out loss, and what share of held-out expressions a greedy search gets right."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"model.residual={scheme}",
            f"model.num_layers={depth}",
            f"model.encoder_layers={depth}",
            f"model.hidden_size={args.width}",
            "model.num_heads=4",
            f"model.init_std={args.width**-0.5}",
            f"train.steps={args.steps}",
            f"train.global_batch_size={args.batch}",
            f"train.micro_batch_size={args.batch}",
            f"train.source_len={LONGEST}",
            f"train.seq_len={LONGEST}",
            f"train.eval_every={args.steps}",
            f"optim.lr={lr}",
            f"optim.warmup_steps={args.steps // 10}",
            f"data.train={args.data}",
            f"run.seed={seed}",
            f"run.dir={folder}/run",
            "run.threads=1",
            "run.device=cpu",
            "run.peak_tflops=0.05",
            "checkpoint.every=0",
        ]
        config = load_config(CONFIG, overrides)
        quiet = redirect_stdout(StringIO()), redirect_stderr(StringIO()), suppress(TrainingError)
        with quiet[0], quiet[1], build_trainer(config, RankInfo()) as trainer:
            with quiet[2]:
                trainer.train()
            exact = right(trainer.model.model, trainer.config, args.translated) if trainer.progress.step == args.steps else 0.0
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows]
    valid = next(iter(rows[-1]["valid_loss"].values())) if "valid_loss" in rows[-1] else None
    return {"last": last(losses), "valid": valid, "exact": exact, "loss": [x and round(x, 4) for x in losses]}


def right(model: Any, config: Any, count: int) -> float:
    """The share of `count` held-out pairs whose target a greedy search finds."""
    assert isinstance(model, EncoderDecoder)
    held = next(iter(open_data(config)[1].values()))
    assert isinstance(held, PairMixture)
    model.train(False)
    batch, wanted = held.batch(list(range(count)), torch.device("cpu")), [held.pair(n)[1].tolist() for n in range(count)]
    assert batch.source is not None
    found = beam_search(model, batch.source, held.start, LONGEST)
    return sum([*f.tokens, held.start] == w for f, w in zip(found, wanted)) / count


def draw(runs: list[dict[str, Any]], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    depths = sorted({r["depth"] for r in runs})
    figure = Figure(figsize=(4.2 * len(depths), 4.2), layout="constrained")
    for axes, depth in zip(figure.subplots(1, len(depths), squeeze=False, sharey=True)[0], depths):
        for run in (r for r in runs if r["depth"] == depth):
            values = [math.nan if x is None else x for x in run["loss"]]
            smooth = [sum(values[max(0, i - 9) : i + 1]) / len(values[max(0, i - 9) : i + 1]) for i in range(len(values))]
            style = ("-", "--", ":")[sorted({r["lr"] for r in runs}).index(run["lr"])]
            color = f"C{SCHEMES.index(run['scheme'])}"
            axes.plot(range(1, len(values) + 1), smooth, style, color=color, linewidth=1.2, label=f"{run['scheme']}, lr {run['lr']:g}")
        axes.set_title(f"{depth} + {depth} layers", fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0.0, top=6.5)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8, loc="upper right")
    figure.axes[0].set_ylabel("loss, nats a token of the target")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/expressions"), help="prefix of the pairs, made if it is not there")
    parser.add_argument("--depths", type=int, nargs="+", default=[6, 18, 50], help="layers a side")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--translated", type=int, default=200, help="held-out expressions that are translated at the end")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.data.with_suffix(".source.idx").exists():
        prepare(args.data)
    path = Path(__file__).parent / "results" / f"translation-{args.steps}-steps.json"
    runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else []
    runs = [r for r in runs if len(r["loss"]) == args.steps]  # what was stopped on the way is trained again
    done = {(r["scheme"], r["depth"], r["lr"], r["seed"]) for r in runs}
    facts = {k: v for k, v in vars(args).items() if k in ("width", "steps", "batch", "translated")}
    for point in ((s, d, lr, seed) for seed in args.seeds for lr in args.rates for d in args.depths for s in args.schemes):
        if point not in done:
            found = train(*point, args)
            runs.append(dict(zip(("scheme", "depth", "lr", "seed"), point), **found))
            print(*point, f"loss {found['last']:.3f}, held out {found['valid']}, exact {found['exact']:.3f}", flush=True)
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({"machine": machine() | {"threads": 1}, **facts, "runs": runs}) + "\n")
    draw(
        runs,
        f"Python expressions into prefix notation, width {args.width}, {args.steps} steps of {args.batch} pairs",
        path.with_suffix(".png"),
    )
    keys = ("last", "valid", "exact")
    named = {f"{r['scheme']} {r['depth']} lr {r['lr']:g} seed {r['seed']}": {k: r[k] and round(r[k], 3) for k in keys} for r in runs}
    write(__file__, f"translation-{args.steps}-steps-last", named)


if __name__ == "__main__":
    main()
