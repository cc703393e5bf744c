"""Models over grids: equal to one process under every method and product, with the bytes of their formulas, and plans that are cheapest."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.sequence.everywhere import ulysses_everywhere
from megascale.comm.mesh import build_mesh
from megascale.config.dsp import describe_plan, plan_cuts
from megascale.config.layout import axis_sizes
from megascale.config.schema import Model, Parallel
from megascale.model.spacetime import Spacetime, from_lines, to_lines
from megascale.parallel.grid import move
from tests.layouts import CPU, Case, build, fake_batch, tiny
from tests.ranks import run_ranks
from tests.test_layouts import assert_equal

pytestmark = pytest.mark.dist


def grid(shape: tuple[int, ...], objective: str = "masked", patch: tuple[int, ...] | None = None, text: int = 0, **changes: Any) -> Model:
    fields = {"shape": shape, "patch": patch or (1,) * len(shape), "channels": 2, "objective": objective}
    fields |= {"text_len": text, "text_vocab_size": 11} if text else {}
    return tiny(**{"family": "spacetime", "spacetime": fields, "vocab_size": None, "num_layers": 4, "num_kv_heads": 2, **changes})


MODELS: dict[str, Model] = {
    "video": grid((5, 7), patch=(1, 1)),
    "forecast": grid((6, 5, 8), "next_step", patch=(1, 1, 2), position="learned", dropout=0.1, num_layers=5),
    "told": grid((5, 6), "next_step", text=4, dropout=0.1, num_kv_heads=1, qk_norm=True),
    "volume": grid((4, 6, 5), bias=True, norm="layernorm", qk_norm=True, num_kv_heads=1),
}
LAYOUTS: dict[str, tuple[int, Parallel]] = {
    "dsp": (3, Parallel(cp=3, cp_method="dsp")),
    "ulysses": (2, Parallel(cp=2, cp_method="ulysses")),
    "ring": (3, Parallel(cp=3)),
    "tp": (2, Parallel(tp=2)),
    "dsp x tp x recompute": (4, Parallel(cp=2, cp_method="dsp", tp=2, recompute="full")),
    "dsp x zero3": (4, Parallel(cp=2, cp_method="dsp", dp_shard=2)),
    "dsp x 1f1b": (4, Parallel(cp=2, cp_method="dsp", pp=2)),
    "dsp x layered": (4, Parallel(cp=2, cp_method="dsp", dp_shard=2, accumulation="layered")),
    "ring x zbv x ddp": (4, Parallel(cp=2, pp=2, pp_schedule="zbv", engine="ddp")),
    "ulysses x hsdp x selective": (4, Parallel(cp=2, cp_method="ulysses", dp_replicate=2, dp_shard=1, recompute="selective")),
}


def case_of(model: Model, parallel: Parallel, **changes: Any) -> Case:
    assert model.spacetime is not None
    return Case(model, parallel, seq_len=model.spacetime.tokens, **{"steps": 2, **changes})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_every_layout_equals_one_process(model: str, layout: str) -> None:
    """Catches coordinates, dropout keys and hidden patches taken from a token's place on its rank, a switch that mixes up dimensions, and
    lengths that do not divide.
    """
    ranks, parallel = LAYOUTS[layout]
    assert_equal(case_of(MODELS[model], parallel), ranks)


def test_tensor_parallel_with_the_grid_cut_in_order() -> None:
    """Catches patches embedded before they are cut: with tp_sequence each rank has its part of the flat grid."""
    for model in (grid((4, 6), dropout=0.1), grid((4, 3, 4), "next_step", patch=(2, 1, 1), position="learned")):
        assert_equal(case_of(model, Parallel(tp=2, tp_sequence=True)), 2)


def test_batches_that_do_not_divide() -> None:
    """Catches an empty place whose zeros count as a prediction."""
    assert_equal(case_of(MODELS["forecast"], Parallel(cp=2, cp_method="dsp", dp_shard=2), batch=5), 4)


# The model itself


def plain_lines(x: torch.Tensor, dim: int) -> list[torch.Tensor]:
    """Every line of [S₁ … S_K] along `dim`, one by one."""
    others = [range(n) for i, n in enumerate(x.shape) if i != dim]
    return [x[(*at[:dim], slice(None), *at[dim:])] for at in itertools.product(*others)]


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_lines_are_the_tokens_that_differ_in_one_coordinate(dim: int) -> None:
    """Catches attention over a neighbour in memory in place of a neighbour on the grid."""
    shape = (2, 3, 4)
    x = torch.arange(2 * 5 * 24 * 1.0).view(2, 5, 24, 1)
    lines = to_lines(x, shape, dim)
    assert lines.shape == (2 * 24 // shape[dim], 5, shape[dim], 1)
    expected = [line for b in range(2) for line in plain_lines(x[b, 3, :, 0].view(shape), dim)]
    assert torch.equal(lines[:, 3, :, 0], torch.stack(expected))
    assert torch.equal(from_lines(lines, shape, dim), x)


def predictions(model: Model, change: tuple[int, ...]) -> torch.Tensor:
    """How far each predicted patch moves, [S₁ … S_K], when the field at `change` does."""
    made = build(case_of(model, Parallel()), 1).model
    assert isinstance(made, Spacetime) and model.spacetime is not None
    fields = fake_batch(case_of(model, Parallel()), [0]).tokens
    other = fields.clone()
    other[(0, *change)] += 1.0
    with torch.no_grad():
        moved = (made(fields) - made(other)).abs().sum(-1)
    return moved.view(model.spacetime.grid)


def test_the_future_is_not_seen() -> None:
    """Catches a forecast that knows its answer; space is seen from everywhere, and so is time where nothing is forecast."""
    moved = predictions(grid((5, 4), "next_step"), (3, 1))
    assert (moved[:3] == 0).all() and (moved[3:] > 0).all()
    assert (predictions(grid((5, 4)), (3, 1)) > 0).all()


def test_what_is_hidden_is_hidden() -> None:
    """Catches a mask token that is put in after the patch has been read, and a loss over patches that were shown."""
    model = grid((4, 4))
    case = case_of(model, Parallel())
    made, batch = build(case, 1).model, fake_batch(case, [3])
    where = int(batch.targets[0].argmax())
    other = batch.tokens.clone()
    other[0, where // 4, where % 4] += 1.0
    first, second = made(batch.tokens, batch.targets), made(other, batch.targets)
    predicted = made.embed(other, batch.targets)
    assert torch.equal(made.embed(batch.tokens, batch.targets), predicted) and first != second
    shown = batch.tokens.clone()
    shown[0, int(batch.targets[0].argmin()) // 4, int(batch.targets[0].argmin()) % 4] *= 2
    assert not torch.equal(made.embed(shown, batch.targets), predicted)


def test_the_text_is_seen_and_its_end_is_not() -> None:
    """Catches blocks that never look at the text, and padding behind its end that they look at."""
    model = grid((4, 3), "next_step", text=4)
    case = case_of(model, Parallel())
    made, batch = build(case, 1).model, fake_batch(case, [0])
    assert batch.source is not None and batch.source[0].tolist()[3:] == [-1]
    first = made(batch.tokens, source=batch.source)
    words = batch.source.clone()
    words[0, 2] = (words[0, 2] + 1) % 11
    assert ((made(batch.tokens, source=words) - first).abs() > 0).all()
    torch.testing.assert_close(made(batch.tokens, source=batch.source[:, :3]), first)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(made(batch.tokens, source=batch.source.flip(1).sort(descending=True).values), first)


def text_bytes() -> list[int]:
    """What dsp sends over its axis in a step, without and with a text."""
    sent = []
    for text in (0, 6):
        case = case_of(grid((6, 6), text=text), Parallel(cp=2, cp_method="dsp", engine="ddp"), batch=1, steps=1)
        made, b = build(case, 2), fake_batch(case, [0])
        made.mesh.traffic.take()
        made.model(**b.inputs()).backward()
        sent.append(made.mesh.traffic.take()[0]["cp"])
    return sent


def test_a_text_costs_dsp_nothing() -> None:
    """Catches a text that is switched with the stream: all ranks have it whole."""
    for without, with_text in run_ranks(2, text_bytes):
        assert without == with_text > 0


# Plans


def brute_force(attended: list[int], lengths: list[int], ranks: int, costs: list[float]) -> float | None:
    found = []
    for plan in itertools.product(range(len(lengths)), repeat=len(attended)):
        if all(cut != over and lengths[cut] >= ranks for cut, over in zip(plan, attended)):
            found.append(sum(c for c, a, b in zip(costs[1:], plan, plan[1:]) if a != b))
    return min(found) if found else None


@given(st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_plans_are_the_cheapest(data: st.DataObject) -> None:
    """Catches a greedy choice: every plan of up to seven layers and four dimensions is tried."""
    k = data.draw(st.integers(2, 4))
    layers = data.draw(st.integers(1, 7 if k < 4 else 5))
    attended = data.draw(st.lists(st.integers(0, k - 1), min_size=layers, max_size=layers))
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=k, max_size=k))
    costs = [float(c) for c in data.draw(st.lists(st.integers(0, 5), min_size=layers, max_size=layers))]
    ranks = data.draw(st.integers(2, 4))
    plan, least = plan_cuts(attended, lengths, ranks, costs), brute_force(attended, lengths, ranks, costs)
    assert (plan is None) == (least is None)
    if plan is not None:
        assert all(cut != over and lengths[cut] >= ranks for cut, over in zip(plan, attended))
        assert sum(c for c, a, b in zip(costs[1:], plan, plan[1:]) if a != b) == least


def test_three_dimensions_need_a_switch_every_second_layer() -> None:
    """Catches a switch before every layer, which is what following the attended dimension around would cost."""
    attended = [i % 3 for i in range(12)]
    plan = plan_cuts(attended, [8, 8, 8], 4)
    assert plan is not None and sum(a != b for a, b in itertools.pairwise(plan)) == 5
    assert describe_plan([0, 1, 0], [1, 0, 1]) == "0:1 | 1:0 | 0:1"
    assert plan_cuts([0, 1], [8, 9, 8], 4) == [2, 2], "parts of equal length come first where the cost is the same"


# The four transitions


def transitions() -> list[tuple[int, int, int]]:
    """Bytes of each transition, forward and backward, checked against the whole tensor."""
    n = dist.get_world_size()
    axis = build_mesh(axis_sizes(Parallel(cp=n), n), CPU.type)["cp"]
    shape, b, d = (4 * n, 2 * n + 1), 2, 3
    whole = torch.randn(b, shape[0] * shape[1], d, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    weight = torch.randn(whole.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    result = []
    for source, target in ((0, 0), (None, 1), (0, 1), (1, 0), (1, None)):
        x = move(whole, axis, shape, None, source).clone().requires_grad_()
        axis.traffic.take()
        y = move(x, axis, shape, source, target)
        forward = axis.traffic.take()[0].get("cp", 0)
        assert torch.equal(y, move(whole, axis, shape, None, target))
        (y * move(weight, axis, shape, None, target)).sum().backward()
        assert x.grad is not None and torch.equal(x.grad, move(weight, axis, shape, None, source))
        result.append((forward, axis.traffic.take()[0].get("cp", 0), whole.nbytes))
    return result


@pytest.mark.parametrize("n", [2, 3])
def test_transitions_send_what_the_table_says(n: int) -> None:
    """Catches padding, a backward that is not the reverse, and a slice that is sent."""
    found = run_ranks(n, transitions)
    odd, sent = 2 * n + 1, [sum(rank[i][0] for rank in found) for i in range(5)]
    back = [sum(rank[i][1] for rank in found) for i in range(5)]
    m = found[0][0][2]
    assert (sent[0], sent[1], back[0]) == (0, 0, 0) and odd % n
    # Over all ranks together, whatever the parts: an all-to-all leaves 1/N at home, a gather sends everything to all others.
    assert sent[2] == sent[3] == back[2] == back[3] and abs(sent[2] / (m * (n - 1) / n) - 1) < 1 / odd
    assert sent[4] == back[1] == m * (n - 1) and back[4] == 0


# Bytes of the methods


def sent_by(method: str, n: int, layers: int) -> dict[str, int]:
    """Bytes that this rank sends in a training step on a grid of 24 × 24, heads = KV heads."""
    parallel = {
        "tensor": Parallel(tp=n, tp_sequence=True, engine="ddp"),
        "everywhere": Parallel(cp=n, cp_method="ulysses", engine="ddp"),
    }.get(method) or Parallel(cp=n, cp_method=method, engine="ddp")  # type: ignore[arg-type]
    model = grid((24, 24), num_layers=layers, num_heads=24, num_kv_heads=24, hidden_size=48, ffn_size=48)
    case = case_of(model, parallel, batch=1, steps=1, keep_tensors=False)
    made = build(case, n)
    if method == "everywhere":
        assert isinstance(made.model, Spacetime)
        ulysses_everywhere(made.model, made.mesh["cp"])
    b = fake_batch(case, [0])
    made.mesh.traffic.take()
    loss = made.model(b.tokens, b.targets, b.documents, b.positions, b.samples)
    forward = made.mesh.traffic.take()[0]
    loss.backward()
    backward = made.mesh.traffic.take()[0]
    axis = "tp" if method == "tensor" else "cp"
    return {"forward": forward.get(axis, 0), "backward": backward.get(axis, 0)}


METHODS = ("dsp", "ulysses", "everywhere", "ring", "tensor")


def per_pair(n: int) -> dict[str, dict[str, int]]:
    """What a further pair of layers, one along each dimension, sends: four layers less two."""
    more, less = ({m: sent_by(m, n, layers) for m in METHODS} for layers in (4, 2))
    return {m: {way: more[m][way] - less[m][way] for way in ("forward", "backward")} for m in METHODS}


@pytest.mark.parametrize("n", [2, 3, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_methods_send_what_the_table_says(n: int) -> None:
    """Catches a padded, doubled or forgotten exchange in any method: bytes of a spatial and a temporal layer together, each way."""
    m = 24 * 24 * 48 * 8
    forward = {
        "dsp": 2 * m * (n - 1) // n**2,
        "ulysses": 4 * m * (n - 1) // n**2,
        "everywhere": 8 * m * (n - 1) // n**2,
        "ring": 2 * m * (n - 1) // n,
        "tensor": 8 * m * (n - 1) // n,
    }
    for found in run_ranks(n, per_pair, n, timeout=120):
        assert {k: v["forward"] for k, v in found.items()} == forward
        assert {k: v["backward"] for k, v in found.items()} == {**forward, "ring": 2 * forward["ring"]}
