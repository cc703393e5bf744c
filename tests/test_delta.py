"""Linear attention by the gated delta rule: against a loop over tokens, on every axis, and from its state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.graphs import coverage
from megascale.config.load import build_config
from megascale.config.schema import Model, Optim, Parallel
from megascale.config.stages import estimated_costs
from megascale.config.support import check
from megascale.errors import UsageError
from megascale.generation.cache import CacheLayer, RememberingState, remembering
from megascale.generation.run import Sampling, generate
from megascale.measure.compute import flops_per_token
from megascale.model.attention_delta import GatedDelta, ages
from megascale.model.families import build_part
from megascale.model.layers import Linear
from megascale.model.ops import delta_kernel
from megascale.model.ops.attention_tiles import AttentionMask
from megascale.model.ops.delta_kernel import choose_rule
from megascale.model.ops.delta_rule import Fold, delta_rule, scan, scan_back
from megascale.model.shape import shape_of
from megascale.model.spec import specs_of
from tests.layouts import CPU, Case, build, tiny, train
from tests.ranks import run_ranks
from tests.test_layouts import assert_same, single

SIZES: dict[str, Any] = {"key_heads": 2, "value_heads": 4, "key_dim": 6, "value_dim": 5, "conv_size": 4}
DELTA: dict[str, Any] = {"attention": "gated_delta", "delta": SIZES}
HYBRID = tiny(num_layers=4, kinds={"linear": DELTA, "full": {}}, pattern=["linear", "full"])
OTHER = tiny(num_layers=2, norm="layernorm", bias=True, tie_embeddings=True, position="learned", dropout=0.2, **DELTA)
WIDE = OTHER.model_copy(update={"delta": OTHER.delta.model_copy(update={"key_heads": 4, "conv_size": 1})})  # type: ignore[union-attr]
LAYOUTS: list[tuple[Model, Parallel]] = [
    (HYBRID, Parallel(tp=2)),
    (OTHER, Parallel(tp=2, tp_sequence=True, recompute="selective")),
    (OTHER, Parallel(cp=2, recompute="full")),
    (HYBRID, Parallel(cp=2, cp_method="ulysses", accumulation="layered")),
    (HYBRID, Parallel(pp=2, pp_schedule="zbv", recompute="selective")),
]
MORE: list[tuple[Model, Parallel]] = [
    (HYBRID, Parallel(cp=2)),
    (HYBRID, Parallel(dp_shard=2, recompute="nested")),
    (OTHER, Parallel(engine="ddp")),
]
PRODUCTS: list[tuple[Model, Parallel]] = [
    (HYBRID, Parallel(cp=2, tp=2, tp_sequence=True)),
    (HYBRID, Parallel(cp=4)),
    (WIDE, Parallel(cp=4)),
    (HYBRID, Parallel(cp=4, cp_ulysses=2, recompute="selective")),
    (HYBRID, Parallel(cp=2, cp_pieces=3, pp=2)),
    (WIDE, Parallel(tp=2, cp=2, cp_method="ulysses")),
    (HYBRID, Parallel(tp=2, pp=2, pp_schedule="interleaved_1f1b")),
    (HYBRID, Parallel(cp=2, dp_shard=2, accumulation="layered", recompute="full")),
]


def all_of(cases: list[Case]) -> list[dict[str, Any]]:
    return [train(case) for case in cases]


def assert_all_equal(layouts: list[tuple[Model, Parallel]], ranks: int, **changes: Any) -> None:
    # AdamW divides an entry by its own size and so makes rounding of small ones large; the second step's norm would show it at 3e-12.
    steady = Optim(lr=1e-3, eps=1e-3)
    cases = [Case(model, parallel, optim=steady, packed=True, steps=2, **changes) for model, parallel in layouts]
    for case, got in zip(cases, run_ranks(ranks, all_of, cases, timeout=400.0)[0]):
        assert_same(got, single(case), case)


@pytest.mark.dist
@pytest.mark.parametrize("layouts", [LAYOUTS, pytest.param(MORE, marks=pytest.mark.slow)], ids=["some", "more"])
def test_every_axis_equals_one_process(layouts: list[tuple[Model, Parallel]]) -> None:
    """Catches a state that is not passed to the next piece, a convolution that begins anew on a rank, heads cut apart from their keys, and
    a gradient of taps, decays or the norm that is not summed.
    """
    assert_all_equal(layouts, 2)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("seq_len", [16, 130])
def test_products_of_axes_equal_one_process(seq_len: int) -> None:
    """Catches maps of pieces that are applied out of order, pieces shorter than the convolution, and chunks beyond the first."""
    layouts = PRODUCTS if seq_len == 16 else [(m, p) for m, p in PRODUCTS if m is HYBRID]
    assert_all_equal(layouts, 4, seq_len=seq_len, batch=4)


def looped(w: dict[str, Tensor], sizes: Any, x: Tensor, documents: list[int]) -> Tensor:
    """The layer's result for tokens x [s, d], token by token and head by head."""
    n, h, e, f, taps = sizes.key_heads, sizes.value_heads, sizes.key_dim, sizes.value_dim, sizes.conv_size
    state = torch.zeros(h, e, f, dtype=x.dtype)
    raw: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
    rows = []
    for t, token in enumerate(x):
        now = {}
        for name, seen in raw.items():
            seen.append(w[f"{name}.weight"] @ token)
            mixed = torch.zeros_like(seen[t])
            for back in range(min(taps, t + 1)):
                if documents[t - back] == documents[t]:
                    mixed = mixed + w[f"{name}_conv.weight"][:, taps - 1 - back] * seen[t - back]
            now[name] = mixed * torch.sigmoid(mixed)
        if t and documents[t] != documents[t - 1]:
            state = torch.zeros_like(state)
        gate, heads, new = w["z.weight"] @ token, [], []
        for i in range(h):
            j = i // (h // n)
            q, k = (now[name][e * j : e * j + e] for name in "qk")
            q, k = (y / (y @ y + 1e-6).sqrt() for y in (q, k))
            step = torch.nn.functional.softplus(w["a.weight"][i] @ token + w["dt_bias"][i])
            kept = state[i] * torch.exp(-torch.exp(w["A_log"][i]) * step)
            found = (kept * k[:, None]).sum(0)
            rate = torch.sigmoid(w["b.weight"][i] @ token)
            kept = kept + k[:, None] * (rate * (now["v"][f * i : f * i + f] - found))
            new.append(kept)
            y = (kept * q[:, None]).sum(0) / e**0.5
            z = gate[f * i : f * i + f]
            heads.append(y / (y.square().mean() + 1e-5).sqrt() * w["norm.weight"] * z * torch.sigmoid(z))
        state = torch.stack(new)
        rows.append(w["o.weight"] @ torch.cat(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("seq_len", [9, 75])
def test_against_a_loop_over_tokens(seq_len: int) -> None:
    """Catches a decay of the wrong token, a system solved without its decays, a head with another's key, taps in reverse, a state or a
    convolution that crosses documents, and a wrong gradient of any weight.
    """
    attention = build(Case(tiny(**DELTA), seq_len=seq_len), 1).model.get_submodule("blocks.0.attention")
    assert isinstance(attention, GatedDelta)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, seq_len, 24, dtype=torch.float64, generator=generator, requires_grad=True)
    documents = (torch.rand(2, seq_len, generator=generator) < 0.1).cumsum(1)
    w: dict[str, Tensor] = dict(attention.named_parameters())
    for seen in (documents, None):
        y = attention(x, None, None if seen is None else AttentionMask(documents=seen))
        whole = torch.zeros_like(documents) if seen is None else seen
        expected = torch.stack([looped(w, attention_sizes(), row, docs.tolist()) for row, docs in zip(x, whole)])
        assert (y - expected).abs().max() < 1e-12
        d_y = torch.randn(y.shape, dtype=y.dtype, generator=generator)
        inputs = [x, *w.values()]
        for name, got, want in zip(["x", *w], torch.autograd.grad(y, inputs, d_y), torch.autograd.grad(expected, inputs, d_y)):
            assert (got - want).abs().max() < 1e-12 * want.abs().max().clamp(min=1), name


def attention_sizes() -> Any:
    return tiny(**DELTA).delta


def test_strong_and_absent_decay() -> None:
    """Catches decays that are divided by, which overflow, and a state that grows where nothing is forgotten."""
    generator = torch.Generator().manual_seed(1)
    k = torch.nn.functional.normalize(torch.randn(1, 1, 2, 8, generator=generator), dim=-1).expand(1, 200, 2, 8)  # the same key again
    v = torch.randn(1, 200, 4, 3, generator=generator)
    for decay, rate in ((-200.0, 0.5), (0.0, 1.0)):
        g, beta = torch.full((1, 200, 4), decay), torch.full((1, 200, 4), rate)
        y = delta_rule(k, k, v, g, beta, None)
        assert (y - rate * v).abs().max() < 1e-5  # all before is forgotten, or replaced


def test_ages_count_from_each_document() -> None:
    """Catches equal numbers of documents that are not neighbours, which are two documents."""
    assert ages(torch.tensor([[4, 4, 1, 4, 4, 4]])).tolist() == [[0, 1, 0, 0, 1, 2]]


@pytest.mark.parametrize("model", [HYBRID, tiny(**DELTA)])
def test_generation_from_the_state(model: Model) -> None:
    """Catches a state that padding changes, a convolution without the tokens before it, and a cache that grows with the text."""
    built = build(Case(model, seq_len=40), 1)
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [5]]
    found = generate(built, prompts, Sampling(most=8))
    built.train(False)
    for prompt, new in zip(prompts, found):
        whole = built.model(torch.tensor([[*prompt, *new]]))
        for i, token in enumerate(new):
            assert int(whole[0, len(prompt) - 1 + i, : model.vocab_size].argmax()) == token
    place = CacheLayer(torch.empty(1, 0, dtype=torch.int64), 16)
    tokens = torch.arange(30)[None] % 7
    attention = built.model.get_submodule("blocks.0.attention")
    with torch.no_grad(), remembering(built.model, place, lambda _: None):
        parts = []
        for part in tokens.split([5, 1, 1, 23], 1):
            place.add(torch.arange(place.positions.shape[1], place.positions.shape[1] + part.shape[1])[None])
            parts.append(built.model(part, positions=place.positions[:, -part.shape[1] :]).detach())
        kept = attention.attend
        assert isinstance(kept, RememberingState) and kept.state is not None and kept.tail is not None
        row = model.at_layer(0).attention_row
        assert kept.state.numel() + kept.tail.numel() == row.state(model.at_layer(0), 4) and row.cached is not None
    torch.testing.assert_close(torch.cat(parts, 1), built.model(tokens).detach(), rtol=0, atol=1e-12)


def repeated(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float) -> tuple[Tensor, None]:
    """Stands for flash-linear-attention: as many keys as values, no documents, a graph node of its own."""
    assert q.shape == k.shape == (*v.shape[:3], q.shape[3]) and scale == 1.0
    return Alone.apply(q, k, v, g, beta), None  # type: ignore[no-untyped-call]


class Alone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return scan(inputs, None, Fold.of([inputs[0].shape[1]]))[0]  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        inputs = ctx.saved_tensors
        return scan_back(inputs, None, Fold.of([inputs[0].shape[1]]), grads[0], [None])


def test_the_fused_kernel_is_taken_by_symbol(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a kernel that runs through a document's end, gradients of shared keys that are not summed, and a silent choice."""
    cuda, bf16 = torch.device("cuda"), torch.bfloat16
    for wanted, key_dim, compute, device, words in (
        ("auto", 128, bf16, CPU, "run on CUDA, not on cpu"),
        ("torch", 128, bf16, cuda, "run.kernels asks for it"),
        ("auto", 512, bf16, cuda, "at most 256 channels"),
        ("auto", 128, torch.float32, cuda, "take bf16"),
        ("auto", 128, bf16, cuda, "pip install flash-linear-attention"),
    ):
        rule, why = choose_rule(wanted, key_dim, compute, device)
        assert rule is delta_rule and words in why
    monkeypatch.setattr(delta_kernel, "kernel", lambda: repeated)
    assert choose_rule("auto", 128, bf16, cuda)[0] is delta_kernel.fused_rule
    generator = torch.Generator().manual_seed(0)
    q, k, v, g, beta = (torch.rand(*shape, dtype=torch.float64, generator=generator) for shape in (*[(2, 20, 2, 4)] * 3, *[(2, 20, 4)] * 2))
    v = torch.cat((v, -v), 2)
    q, k, v, g, beta = inputs = [x.requires_grad_() for x in (q / 2, k / 2, v, -g, beta)]
    age = ages((torch.rand(2, 20, generator=generator) < 0.2).cumsum(1))
    for seen in (None, age):
        found = [rule(q, k, v, g, beta, seen) for rule in (delta_rule, delta_kernel.fused_rule)]
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)
        grads = [torch.autograd.grad(y.square().sum(), inputs) for y in found]
        for got, want in zip(grads[1], grads[0]):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


GRAPHS: dict[str, dict[str, Any]] = {"fsdp": {}, "ulysses": {"cp": 2, "cp_method": "ulysses"}, "tp": {"tp": 2, "recompute": "selective"}}


@pytest.mark.dist
@pytest.mark.parametrize("rows", [{"ring": {"cp": 2}}, pytest.param(GRAPHS, marks=pytest.mark.slow)], ids=["ring", "others"])
def test_blocks_are_one_graph_a_kind(rows: dict[str, dict[str, Any]]) -> None:
    """Catches a scan, an exchange of states or a convolution that breaks the graph of its block."""
    cases = {n: Case(HYBRID, Parallel(compile=True, **row), precision="fp32", seq_len=32, packed=n == "ring") for n, row in rows.items()}
    for name, found in run_ranks(2, coverage, cases, 2, timeout=400)[0].items():
        assert (found.breaks, found.eager_products) == (0, 0), (name, found.reasons)
        assert found.graphs <= 4, name  # two kinds, the first layer's input in another order, the loss


def test_costs_and_parameters_of_qwen3_next() -> None:
    """Catches weights, FLOPs, cached bytes or FP8 widths that are counted as if tokens met in pairs."""
    sizes = {"key_heads": 16, "value_heads": 32, "key_dim": 128, "value_dim": 128, "conv_size": 4}
    model = tiny(num_layers=1, hidden_size=2048, num_heads=16, num_kv_heads=2, head_dim=256, attention="gated_delta", delta=sizes)
    row, specs = model.attention_row, specs_of(build_part(model, shape_of(Case(model).config)))
    own = {n.removeprefix("blocks.0.attention."): s for n, s in specs.items() if n.startswith("blocks.0.attention.")}
    products = 2048 * (2 * 2048 + 2 * 4096) + 2048 * 64 + 4096 * 2048  # in_proj_qkvz, in_proj_ba, out_proj
    assert sum(s.numel for s in own.values()) == products + 8192 * 4 + 2 * 32 + 128
    assert row.weights(model) == products + 8192 * 4
    assert row.state(model, 16) == 32 * 128 * 128 + 3 * 8192 and row.state(model, 8) == row.state(model, 16) / 2
    assert row.cached is not None and row.cached(model, 16) == 0 and row.widths is not None and row.widths(model, 4) == (512, 1024)
    flops = [flops_per_token(model, specs, length) for length in (128, 4096)]
    assert flops[0] == flops[1]
    weights = sum(s.numel for n, s in specs.items() if n != "embedding.weight")
    assert flops[0] == 6 * weights + 3 * 6 * 32 * 128 * 128
    assert estimated_costs(model, 128)[0] == estimated_costs(model, 4096)[0]
    assert {n for n, s in own.items() if not s.decays} == {
        "A_log",
        "dt_bias",
        "norm.weight",
        "q_conv.weight",
        "k_conv.weight",
        "v_conv.weight",
    }


def test_initial_decays() -> None:
    """Catches laws of decay that start like other weights: a head then forgets all or nothing."""
    sizes = {"key_heads": 100, "value_heads": 400, "key_dim": 2, "value_dim": 2}
    model = build(Case(tiny(num_layers=1, attention="gated_delta", delta=sizes)), 1).model
    w = dict(model.get_submodule("blocks.0.attention").named_parameters())
    rate, step = w["A_log"].exp(), torch.nn.functional.softplus(w["dt_bias"])
    assert 0 < rate.min() < 1 and 15 < rate.max() <= 16 and abs(rate.mean() - 8) < 1
    assert 0.001 <= step.min() < 0.0012 and 0.08 < step.max() <= 0.1 and abs(step.log10().mean() + 2) < 0.1


def test_only_matrices_multiply_in_fp8() -> None:
    """Catches numbers of one per head among the products whose widths FP8 must divide."""
    sizes = {"key_heads": 2, "value_heads": 4, "key_dim": 16, "value_dim": 16}
    model = tiny(num_layers=1, hidden_size=32, attention="gated_delta", delta=sizes)
    attention = build(Case(model, precision="fp32", fp8="tensorwise"), 1).model.get_submodule("blocks.0.attention")
    found = {name: m.fp8 for name, m in attention.named_children() if isinstance(m, Linear)}
    assert found == {**dict.fromkeys("qkvzo", "tensorwise"), "a": "false", "b": "false"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"family": "encoder", "kinds": {}, "pattern": (), **DELTA}, "an encoder attends in both directions"),
        ({"kinds": {"linear": {**DELTA, "sliding_window": 8}, "full": {}}}, r"'sliding_window': 8}, 'full': {}}, .*ignore these keys"),
        ({"kinds": {"linear": {**DELTA, "delta": {**SIZES, "key_heads": 3}}, "full": {}}}, "in layers of kind linear"),
        ({"kinds": {"linear": {"attention": "gated_delta"}, "full": {}}}, "gated_delta needs its sizes"),
        ({"delta": SIZES}, "in layers of kind full"),
    ],
)
def test_refusals(changes: dict[str, Any], words: str) -> None:
    """Catches keys that such layers would ignore, and heads without a key."""
    values = {**HYBRID.model_dump(mode="json"), **changes}
    with pytest.raises(UsageError, match=words):
        check(build_config({"model": values, "train": {"steps": 1, "seq_len": 8}, "data": {"train": "x"}}), 1)
