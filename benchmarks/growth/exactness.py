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

from megascale.config.schema import Model
from megascale.errors import UsageError
from megascale.expand.apply import Read, element_block
from megascale.expand.axes import FRESH, AxisMap
from megascale.expand.options import Options, Sizes
from megascale.expand.plan import Growth, TensorPlan, plan_growth
from megascale.expand.stack import specs
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
    matrix = 1.0 if model.residual == "mus" else 0.2
    for name, spec in specs(model, seq_len).items():
        drawn = torch.randn(spec.shape, generator=generator, dtype=torch.float64)
        if spec.role == "coefficient":
            state[name] = torch.full(spec.shape, spec.mean, dtype=torch.float64)
        elif spec.role in ("norm", "scale"):
            state[name] = spec.mean + 0.3 * drawn
        elif spec.role == "head" and model.residual == "mus":
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
    options: Options = Options()
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
    """Old rotary pairs first, new ones behind, at the plain frequencies of the larger head."""
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


def rows() -> list[Row]:
    """The matrix."""
    off, loud = Options(lossless="off"), Options(symmetry="snr:10", split=(3.0, 1.0))
    no_gain = with_axis("gain", unweighted)
    unshared = with_axis("read", unweighted)
    families: dict[str, dict[str, Any]] = {
        "pre, RMSNorm": {},
        "pre, RMSNorm, ε 0.1": {"norm_eps": 0.1},
        "pre, LayerNorm, bias": {"norm": "layernorm", "bias": True},
        "pre, DyT": {"norm": "dyt"},
        "tied": {"tie_embeddings": True},
        "QK-norm": {"qk_norm": True},
        "QK-norm over all heads": {"qk_norm": "width"},
        "post, RMSNorm": {"residual": "post"},
        "res-post-norm": {"residual": "res_post"},
        "DeepNorm, LayerNorm, bias": {"residual": "deepnorm", "norm": "layernorm", "bias": True},
        "DeepNorm, RMSNorm, tied": {"residual": "deepnorm", "tie_embeddings": True},
        "BranchNorm, RMSNorm": {"residual": "branchnorm", "branchnorm_period": 10},
        "DeepScaleLM, tied": {"residual": "deepscale", "tie_embeddings": True},
        "DeepScaleLM post, RMSNorm": {"residual": "deepscale_post"},
        "SubLN": {"residual": "subln"},
        "LayerScale, LayerNorm, bias": {"residual": "layerscale", "norm": "layernorm", "bias": True},
        "parallel block": {"residual": "parallel"},
        "μS": {"residual": "mus", "init_std": 0.02},
        "μS, LayerNorm, tied": {"residual": "mus", "norm": "layernorm", "tie_embeddings": True, "init_std": 0.02},
        "experts": {"moe": MOE},
        "encoder, learned positions": {"family": "encoder", "position": "learned"},
        "ALiBi": {"position": "alibi"},
        "XPos": {"position": "xpos"},
    }
    found: list[Row] = []
    for ratio, width in ((1.25, 30), (1.5, 36), (2, 48), (2.5, 60)):
        for name, changes in families.items():
            after_mean = changes.get("norm") == "layernorm" and changes.get("residual") in ("deepnorm", "mus")
            wrong: dict[str, Change] = {}
            if name == "pre, RMSNorm" and ratio != 2:
                wrong = {"no gain fix": no_gain}
            if name == "pre, RMSNorm, ε 0.1" and ratio != 2:
                wrong = {"no eps fix": with_target(norm_eps=0.1)}
            if name == "pre, RMSNorm" and ratio == 2:
                wrong = {"readers repeated, not shared": unshared}
            if name == "tied" and ratio == 2:
                wrong = {"1/r not folded into the last norm": scale_of("final_norm.weight", 1.0)}
            if name == "μS":
                wrong = {
                    "no √(fan_in'/fan_in)": with_tensors(
                        lambda t: replace(t, scale=1.0) if t.name.endswith("q.weight") or ".up." in t.name else t
                    )
                }
            if after_mean and ratio != 2:
                continue  # impossible, below
            found.append(Row(f"width ×{ratio:g}", name, toy(**changes), Sizes(hidden_size=width), wrong=wrong))
    for name, changes in (
        ("DeepNorm, LayerNorm", {"residual": "deepnorm", "norm": "layernorm"}),
        ("μS, LayerNorm", {"residual": "mus", "norm": "layernorm"}),
    ):
        found.append(Row("width ×1.25", name, toy(**changes), Sizes(hidden_size=30), off))
    found += [
        Row(
            "width ×1.25, zero", "pre, LayerNorm, bias", toy(norm="layernorm", bias=True), Sizes(hidden_size=30), replace(off, width="zero")
        ),
        Row("width ×1.25, average", "pre, RMSNorm", toy(), Sizes(hidden_size=30), replace(off, width="average")),
        Row(
            "width ×1.25, average",
            "pre, LayerNorm, bias",
            toy(norm="layernorm", bias=True),
            Sizes(hidden_size=30),
            Options(width="average"),
        ),
        Row("width ×2, noise 10 dB, shares 3:1", "pre, LayerNorm, bias", toy(norm="layernorm", bias=True), Sizes(hidden_size=48), loud),
        Row(
            "query heads 4 → 8",
            "GQA",
            toy(),
            Sizes(num_heads=8),
            wrong={
                "tiled across groups": lambda g: with_axis("query", lambda a: tiled(a, 6, 4))(
                    with_axis("heads", lambda a: tiled(a, 6, 4))(g)
                ),
            },
        ),
        Row("KV groups 2 → 4", "GQA", toy(), Sizes(num_heads=8, num_kv_heads=4)),
        Row("KV heads 2 → 4, query heads fixed", "GQA", toy(), Sizes(num_kv_heads=4)),
        Row("heads ×2", "QK-norm over all heads", toy(qk_norm="width"), Sizes(num_heads=8, num_kv_heads=4)),
        Row("new heads", "GQA", toy(), Sizes(num_heads=8, num_kv_heads=4), Options(heads="zero")),
        Row("heads 4 → 6 × 3 KV", "GQA", toy(), Sizes(num_heads=6, num_kv_heads=3)),
        Row(
            "heads ×2",
            "ALiBi",
            toy(position="alibi"),
            Sizes(num_heads=8, num_kv_heads=4),
            wrong={"slopes of 8 heads": with_target(alibi_slopes=None)},
        ),
        Row("heads ×2", "SubLN", toy(residual="subln"), Sizes(num_heads=8, num_kv_heads=4)),
        Row(
            "head size 6 → 12",
            "RoPE",
            toy(),
            Sizes(head_dim=12),
            wrong={
                "pairs appended": appended,
                "keys without √(k'/k)": with_axis("key", unweighted),
            },
        ),
        Row("head size 6 → 8", "RoPE", toy(), Sizes(head_dim=8), wrong={"plain frequencies": with_target(rope_exponents=None)}),
        Row("head size 6 → 8", "XPos", toy(position="xpos"), Sizes(head_dim=8)),
        Row("head size 6 → 9", "learned positions", toy(position="learned"), Sizes(head_dim=9)),
        Row(
            "head size 6 → 12",
            "QK-norm",
            toy(qk_norm=True),
            Sizes(head_dim=12),
            wrong={"query gain not ÷ √r": with_axis("query_norm", unweighted)},
        ),
        Row(
            "head size 6 → 8",
            "QK-norm (born dead)",
            toy(qk_norm=True),
            Sizes(head_dim=8),
            wrong={"random new query rows": with_axis("query", fresh_beyond)},
        ),
        Row("FFN 32 → 40", "SwiGLU", toy(), Sizes(ffn_size=40)),
        Row("FFN 32 → 64", "GELU, bias", toy(ffn="gelu", bias=True), Sizes(ffn_size=64), loud),
        Row("FFN 32 → 48", "GELU, tanh form", toy(ffn="gelu_tanh"), Sizes(ffn_size=48)),
        Row("FFN 32 → 48, new", "ReLU", toy(ffn="relu"), Sizes(ffn_size=48), Options(ffn="zero")),
        Row("FFN 32 → 48, new", "SubLN", toy(residual="subln"), Sizes(ffn_size=48), Options(ffn="zero")),
    ]
    for name, changes in families.items():
        if changes.get("norm") == "dyt" and changes.get("residual"):
            continue
        wrong = {}
        if name.startswith("DeepNorm, LayerNorm"):
            wrong = {"α of the new depth": of_the_scheme, "norms as they are": without_chain}
        if name == "DeepScaleLM, tied":
            wrong = {"λ, β of the new depth": of_the_scheme}
        if name == "μS":
            wrong = {"√(1−τ) on the inserted": of_the_scheme}
        found.append(Row("depth 2 → 4", name, toy(**changes), Sizes(num_layers=4), wrong=wrong))
        if changes.get("residual") not in ("mus", "res_post"):
            found.append(Row("depth 2 → 4, cancelling", name, toy(**changes), Sizes(num_layers=4), Options(depth="cancel")))
    for method, layers in (("stack", 4), ("dus", 4), ("interleave", 4), ("inject", 3)):
        found.append(Row(f"depth 2 → {layers}, {method}", "pre, RMSNorm", toy(), Sizes(num_layers=layers), Options(depth=method)))
    for router in ("topk_softmax", "sigmoid", "xmoe", "softmax_topk", "sigma"):
        wrong = {"a router that has learned": with_tensors(started_router)} if router in ("softmax_topk", "sigma") else {}
        found.append(Row("dense → 4 experts", router, toy(), Sizes(experts=4), Options(router=router), wrong))
    found += [
        Row(
            "dense → 4 × 2 finer experts",
            "topk_softmax",
            toy(),
            Sizes(experts=4, granularity=2, top_k=1),
            wrong={
                "cube roots on three matrices": cube_root(2),
                "down as it is": scale_of("down.weight", 1.0),
            },
        ),
        Row("finer experts ×4", "topk_softmax", toy(moe=MOE), Sizes(granularity=4)),
    ]
    for router in ("topk_softmax", "sigmoid", "softmax_topk", "sigma", "xmoe"):
        found.append(Row("experts 4 → 8, k 2 → 4", router, toy(moe={**MOE, "router": router}), Sizes(experts=8)))
    found += [
        Row("experts 4 → 8, k fixed", "topk_softmax", toy(moe=MOE), Sizes(experts=8, top_k=2), off),
        Row("TokenFormer 16 → 24 tokens", "pre, RMSNorm", toy(linear="tokenformer", tokenformer={"tokens": 16}), Sizes(tokenformer_size=24),
            wrong={"scale √n of the new n": lambda g: with_target(tokenformer=g.target.tokenformer.model_copy(update={"scale": None}))(g),  # type: ignore[union-attr]
                   "new keys at random": with_axis("new_keys", fresh_beyond)}),
        Row("width ×1.25, depth 2 → 4, FFN 32 → 40", "TokenFormer, LayerNorm",
            toy(linear="tokenformer", tokenformer={"tokens": 16}, norm="layernorm", bias=True),
            Sizes(30, ffn_size=40, num_layers=4, tokenformer_size=20)),
        Row("expert width 16 → 24", "experts", toy(moe=MOE), Sizes(expert_ffn_size=24)),
        Row("vocabulary 37 → 50", "pre, RMSNorm", toy(), Sizes(vocab_size=50)),
        Row("context 16 → 32", "RoPE", toy(), Sizes(seq_len=32), wrong={"θ changed with it": with_target(rope_theta=5e5)}),
        Row("context 16 → 32", "learned positions", toy(position="learned"), Sizes(seq_len=32)),
        Row("everything at once", "GQA", toy(), Sizes(30, 8, 4, 8, 48, None, 5, vocab_size=50, seq_len=32)),
        Row("everything at once", "DeepNorm, LayerNorm, bias", toy(residual="deepnorm", norm="layernorm", bias=True),
            Sizes(72, 8, 4, 12, 80, None, 5, vocab_size=50, seq_len=32), replace(loud, depth="cancel")),
    ]  # fmt: skip
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
    """The table as it stands in docs/growth.md."""
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
