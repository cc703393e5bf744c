"""The exactness matrix: every axis and family of growth, and each naive variant with its error. `python -m benchmarks.growth.exactness`.

A toy model with random weights, norms and biases that matter is grown in fp64 and both run on the same tokens: the largest |Δlogit| over
the old vocabulary, logits having a deviation of about 1. A naive variant is the same plan with one rule taken out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megascale.config.load import read_yaml
from megascale.config.schema import Model
from megascale.errors import UsageError
from megascale.expand.apply import Read, element_block
from megascale.expand.axes import FRESH, AxisMap
from megascale.expand.options import GrowthOptions, Sizes
from megascale.expand.plan import Growth, plan_growth
from megascale.expand.stack import specs
from megascale.expand.tensors import TensorPlan
from megascale.expand.verify import compare, run

SEQ = 16
BASE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 24,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_size": 32,
    "vocab_size": 37,
    "init_std": 0.2,
}
MOE = {"num_experts": 4, "top_k": 2, "ffn_size": 16}


def toy(**changes: Any) -> Model:
    return Model(**{**BASE, **changes})


def random_state(model: Model, seed: int = 0, seq_len: int = SEQ) -> dict[str, Tensor]:
    """Weights at which every norm, gain and bias has a say; μS has its own size."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    matrix = 1.0 if model.residual_row.unit_scaled else 0.2
    for name, spec in specs(model, seq_len).items():
        drawn = torch.randn(spec.shape, generator=generator, dtype=torch.float64)
        if spec.role == "coefficient":
            state[name] = torch.full(spec.shape, spec.mean, dtype=torch.float64)
        elif spec.role in ("norm", "scale"):
            state[name] = spec.mean + 0.3 * drawn
        elif spec.role == "head" and model.residual_row.unit_scaled:
            state[name] = drawn * math.sqrt(model.hidden_size)  # else the logits would be small and so would their differences
        else:
            state[name] = drawn * {"bias": 0.2, "embedding": 1.0}.get(spec.role, matrix)
    return state


def reader(state: dict[str, Tensor]) -> Read:
    return lambda name, offset, shape: state[name][tuple(slice(o, o + n) for o, n in zip(offset, shape))]


def grown_reader(growth: Growth, state: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> Read:
    """The grown tensors, made when asked for."""
    plans = {t.name: t for t in growth.tensors}
    shapes = {n: tuple(t.shape) for n, t in state.items()}
    return lambda name, offset, shape: element_block(growth, plans[name], shapes, reader(state), dtype, offset, shape)


def measure(growth: Growth, state: dict[str, Tensor], seed: int = 3) -> dict[str, Any]:
    """Both models on the same tokens, in fp64."""
    vocab = growth.source.vocab_size
    assert vocab is not None
    tokens = torch.randint(0, vocab, (3, growth.seq_lens[0]), generator=torch.Generator().manual_seed(seed))
    small = run(growth.source, growth.seq_lens[0], reader(state), torch.float64, tokens)
    return compare(growth, small, run(growth.target, growth.seq_lens[1], grown_reader(growth, state), torch.float64, tokens), tokens)


Change = Callable[[Growth], Growth]


@dataclass(frozen=True)
class Row:
    """One line of the matrix. `wrong`: naive variants of it, each with the change of the plan that makes it."""

    axis: str
    family: str
    model: Model
    sizes: Sizes
    options: GrowthOptions = GrowthOptions()
    wrong: dict[str, Change] = field(default_factory=dict)


def with_axis(name: str, change: Callable[[AxisMap], AxisMap]) -> Change:
    return lambda g: replace(g, axes={**g.axes, name: change(g.axes[name])})


def with_target(**changes: Any) -> Change:
    return lambda g: replace(g, target=g.target.model_copy(update=changes))


def with_tensors(change: Callable[[TensorPlan], TensorPlan]) -> Change:
    return lambda g: replace(g, tensors=tuple(change(t) for t in g.tensors))


def unweighted(axis: AxisMap) -> AxisMap:
    return replace(axis, weight=np.ones_like(axis.weight))


def tiled(axis: AxisMap, head: int, old: int) -> AxisMap:
    """Query heads 0 1 2 3 0 1 2 3, whatever their groups."""
    heads = np.arange(axis.size // head) % old
    return replace(axis, source=(heads[:, None] * head + np.arange(head)[None]).reshape(-1))


def fresh_beyond(axis: AxisMap) -> AxisMap:
    return axis.filled(FRESH)


def appended(g: Growth) -> Growth:
    """Old rotary pairs first, then new ones, at the plain frequencies of the larger head."""
    old, new = g.source.head_dim or 0, g.target.head_dim or 0
    axes = {}
    for name, a in g.axes.items():
        if name in ("query", "key"):
            half, half2 = old // 2, new // 2
            pairs = [p if p < half else a.source.min() for p in range(half2)]
            one = np.array([*pairs, *(p + half if p >= 0 else p for p in pairs)])
            heads = a.size // new
            source = np.concatenate([np.where(one >= 0, one + h * old, one) for h in range(heads)])
            a = replace(a, source=source, weight=np.where(source >= 0, a.weight.max(), 1.0))
        axes[name] = a
    return replace(g, axes=axes)


def scale_of(ending: str, scale: float) -> Change:
    return with_tensors(lambda t: replace(t, scale=scale) if t.name.endswith(ending) else t)


def cube_root(parts: int) -> Change:
    """All three matrices of the finer experts by the cube root instead of `down` by the number of parts."""
    root = parts ** (1 / 3)
    return with_tensors(lambda t: replace(t, scale=root) if ".experts." in t.name else t)


def started_router(t: TensorPlan) -> TensorPlan:
    return replace(t, constant=None) if t.name.endswith("router.weight") else t


def of_the_scheme(g: Growth) -> Growth:
    """Coefficients as the scheme gives them at the new depth, instead of each layer's own."""
    target = g.target.model_copy(update={"layer_coefficients": None})
    own = {n: TensorPlan(n, s, constant=s.mean) for n, s in specs(target, g.seq_lens[1]).items() if s.role == "coefficient"}
    return replace(g, target=target, tensors=(*(t for t in g.tensors if t.spec.role != "coefficient"), *own.values()))


def without_chain(g: Growth) -> Growth:
    """Inserted norms as copies of their source's, with the model's own epsilon: a block of zero outputs and nothing more."""

    def plain(t: TensorPlan) -> TensorPlan:
        if not t.name.split(".")[-2].endswith("_norm") or not t.name.startswith("blocks."):
            return t
        _, number, rest = t.name.split(".", 2)
        return replace(t, source=f"blocks.{g.layers[int(number)].source}.{rest}", axes=("gain",), constant=None, scale=1.0)

    return replace(g, tensors=tuple(plain(t) for t in g.tensors), target=g.target.model_copy(update={"norm_eps_of": {}}))


NAIVE: dict[str, Change] = {
    "no gain fix": with_axis("gain", unweighted),
    "no eps fix": lambda g: with_target(norm_eps=g.source.norm_eps)(g),
    "readers repeated, not shared": with_axis("read", unweighted),
    "1/r not folded into the last norm": scale_of("final_norm.weight", 1.0),
    "no √(fan_in'/fan_in)": with_tensors(lambda t: replace(t, scale=1.0) if t.name.endswith("q.weight") or ".up." in t.name else t),
    "tiled across groups": lambda g: with_axis("query", lambda a: tiled(a, 6, 4))(with_axis("heads", lambda a: tiled(a, 6, 4))(g)),
    "slopes of 8 heads": with_target(alibi_slopes=None),
    "pairs appended": appended,
    "keys without √(k'/k)": with_axis("key", unweighted),
    "plain frequencies": with_target(rope_exponents=None),
    "query gain not ÷ √r": with_axis("query_norm", unweighted),
    "random new query rows": with_axis("query", fresh_beyond),
    "α of the new depth": of_the_scheme,
    "λ, β of the new depth": of_the_scheme,
    "√(1−τ) on the inserted": of_the_scheme,
    "norms as they are": without_chain,
    "a router that has learned": with_tensors(started_router),
    "cube roots on three matrices": cube_root(2),
    "down as it is": scale_of("down.weight", 1.0),
    "scale √n of the new n": lambda g: with_target(tokenformer=g.target.tokenformer.model_copy(update={"scale": None}))(g),  # type: ignore[union-attr]
    "new keys at random": with_axis("new_keys", fresh_beyond),
    "θ changed with it": with_target(rope_theta=5e5),
}


def rows() -> list[Row]:
    """The matrix, as matrix.yaml has it."""
    table = read_yaml(Path(__file__).parent / "matrix.yaml")
    found = []
    for given in table["rows"]:
        families = {given["family"]: given.get("model", {})} if "family" in given else table["families"]
        for family, changes in families.items():
            if family in given.get("except", ()):
                continue
            naive = given.get("naive", ())
            names = naive.get(family, ()) if isinstance(naive, dict) else naive
            options = {**given.get("options", {})}
            if "split" in options:
                options["split"] = tuple(map(float, options["split"]))
            model, sizes = toy(**changes), Sizes(**given["sizes"])
            found.append(Row(given["axis"], family, model, sizes, GrowthOptions(**options), {n: NAIVE[n] for n in names}))
    return found


def result(row: Row) -> dict[str, Any]:
    """Δ of a row and of its naive variants."""
    state = random_state(row.model)
    growth = plan_growth(row.model, SEQ, row.sizes, row.options)
    found = measure(growth, state)
    wrong = {name: measure(change(growth), state)["logits_max"] for name, change in row.wrong.items()}
    return {"axis": row.axis, "family": row.family, "delta": found["logits_max"], "lossy": bool(growth.lossy), "std": found["logits_std"],
            "loss_change": found.get("loss_change"), "wrong": wrong}  # fmt: skip


def markdown(results: list[dict[str, Any]]) -> str:
    """The table in docs/growth.md."""
    lines = ["| axis | family | Δ logit, fp64 | naive variants |", "|---|---|---|---|"]
    for r in results:
        delta = "0" if r["delta"] == 0 else f"{r['delta']:.0e}" if r["delta"] < 1e-6 else f"**{r['delta']:.2g}**"
        wrong = "; ".join(f"{name} {value:.2g}" for name, value in r["wrong"].items())
        lines.append(f"| {r['axis']} | {r['family']} | {delta}{' lossy' if r['lossy'] else ''} | {wrong} |")
    return "\n".join(lines)


def main() -> None:
    results = [result(row) for row in rows()]
    path = Path(__file__).parent / "results" / "exactness.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(results) + "\n")
    print(markdown(results))
    worst = max(r["delta"] for r in results if not r["lossy"])
    if worst > 1e-10:
        raise UsageError(f"a row that should be exact moves logits by {worst:.1e}")


if __name__ == "__main__":
    main()
