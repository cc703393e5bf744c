"""The mathematics of one process against plain references."""

from __future__ import annotations

import ast
import io
import math
import re
import tokenize
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megascale.comm.piece import Piece
from megascale.config.schema import Optim, RopeScaling
from megascale.model import loss
from megascale.model.decoder import Decoder
from megascale.model.init import initialize
from megascale.model.position import alibi_slopes, inverse_frequencies, pair_exponents, rotary, rotate
from megascale.model.shape import Shape
from megascale.model.spec import ParamSpec, specs_of
from megascale.optim.learning_rate import learning_rate, schedule_note
from megascale.optim.muon import JORDAN, orthogonalize
from tests.layouts import Case, build, fake_batch, tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize("chunk", [7, 1 << 25])
def test_cross_entropy_in_chunks(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Catches a lost chunk, a target that should not count, padding columns that take probability, wrong gradients, and what comes
    back from behind the loss being lost, or applied twice where a loss is differentiated twice.
    """
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", chunk * 13)
    torch.manual_seed(0)
    x, w = torch.randn(20, 6, dtype=torch.float64, requires_grad=True), torch.randn(13, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (20,))
    targets[::3] = -1
    bias = torch.randn(13, dtype=torch.float64, requires_grad=True)
    for b in (None, bias):
        x.grad = w.grad = None
        got = loss.cross_entropy_sum(x, w, targets, 0.25, 0, 11, None, bias=b)
        (3 * got).backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # told, not wrong
            got.backward()
        inputs = [t.detach().requires_grad_() for t in (x, w, bias)]
        logits = inputs[0] @ inputs[1][:11].t() + (0 if b is None else inputs[2][:11])
        want = 0.25 * F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
        (3 * want).backward()
        torch.testing.assert_close(got, want.detach())
        for ours, plain in zip((x, w) if b is None else (x, w, bias), inputs):
            torch.testing.assert_close(ours.grad, plain.grad)


def test_a_gradient_of_one_is_not_multiplied() -> None:
    """Catches a pass over the head's gradient that only multiplies by one, and one that is left out where it is needed."""
    case = Case(tiny(), precision="bf16")
    found: dict[bool, float] = {}
    for marked in (True, False):
        model = build(case, 1)
        y = model.module(**fake_batch(case, [1, 2]).inputs(), scale=0.5)
        with Multiplications() as mode:
            y.backward(loss.one_for(y) if marked else 2 * torch.ones_like(y))
        head = next(w.local_grad for w in model.weights if w.name == "head.weight")
        assert head is not None
        found[marked] = float(head.abs().sum())
        assert bool(mode.shapes.count((37, 24))) is not marked
    assert found[False] == pytest.approx(2 * found[True], rel=1e-2)


class Multiplications(TorchDispatchMode):
    """Shapes of tensors that are multiplied in place."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mul_.Tensor:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def test_decoder_against_a_plain_loop() -> None:
    """Catches a misplaced norm, mask, rotation or gain: Llama's forward pass written out in full."""
    case = Case(tiny(num_layers=2))
    model = build(case, 1)
    p = {w.name: w.local for w in model.weights}
    batch = fake_batch(case, [1, 2])
    got = model.module(batch.tokens)
    x = p["embedding.weight"][batch.tokens]
    b, s, e = 2, case.seq_len, 6
    freq = 10000.0 ** (-torch.arange(0, e, 2, dtype=torch.float64) / e)

    def rms(v: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return v / (v.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * g

    def turn(v: torch.Tensor) -> torch.Tensor:
        out = v.clone()
        for n in range(s):
            for i in range(e // 2):
                c, t = math.cos(n * freq[i]), math.sin(n * freq[i])
                out[:, n, :, i] = v[:, n, :, i] * c - v[:, n, :, i + e // 2] * t
                out[:, n, :, i + e // 2] = v[:, n, :, i + e // 2] * c + v[:, n, :, i] * t
        return out

    for layer in range(2):
        w = {k.removeprefix(f"blocks.{layer}."): v for k, v in p.items()}
        h = rms(x, w["attention_norm.weight"])
        q = turn((h @ w["attention.q.weight"].t()).view(b, s, 4, e))
        k = turn((h @ w["attention.k.weight"].t()).view(b, s, 2, e))
        v = (h @ w["attention.v.weight"].t()).view(b, s, 2, e)
        y = torch.zeros(b, s, 4, e, dtype=torch.float64)
        for head in range(4):
            for n in range(s):
                score = (q[:, n, None, head] * k[:, : n + 1, head // 2]).sum(-1) / math.sqrt(e)
                y[:, n, head] = (score.softmax(-1).unsqueeze(-1) * v[:, : n + 1, head // 2]).sum(1)
        x = x + y.flatten(2) @ w["attention.o.weight"].t()
        h = rms(x, w["ffn_norm.weight"])
        up, gate = h @ w["ffn.up.weight"].t(), h @ w["ffn.gate.weight"].t()
        x = x + (gate * gate.sigmoid() * up) @ w["ffn.down.weight"].t()
    want = rms(x, p["final_norm.weight"]) @ p["head.weight"].t()
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_the_start_does_not_depend_on_how_a_tensor_is_cut() -> None:
    """Catches a draw that follows the rank's order instead of the element's place, across tile borders."""
    spec = ParamSpec((600, 2100), "up", 0, std=0.5)
    whole = torch.empty(spec.shape)
    initialize(Piece(spec.shape, (0, 0), whole), "w", spec, 3)
    for top, left, rows, columns in ((0, 0, 600, 700), (255, 1000, 3, 100), (599, 0, 1, 2100), (10, 2099, 500, 1)):
        part = torch.empty(rows, columns, dtype=torch.float64)
        initialize(Piece(spec.shape, (top, left), part), "w", spec, 3)
        assert torch.equal(part.float(), whole[top : top + rows, left : left + columns])
    assert abs(whole.std().item() / 0.5 - 1) < 0.01 and abs(whole.mean().item()) < 0.002
    for name, seed in (("v", 3), ("w", 4)):
        other = torch.empty(spec.shape)
        initialize(Piece(spec.shape, (0, 0), other), name, spec, seed)
        assert not torch.equal(other, whole)


def test_building_costs_nothing() -> None:
    """Catches a module that allocates: 405B parameters on the meta device."""
    from megascale.config.load import load_config

    cfg = load_config("configs/llama-405b.yaml").model
    model = Decoder(cfg, Shape(8192, torch.bfloat16, torch.bfloat16))
    assert all(p.is_meta for p in model.parameters())
    assert abs(sum(s.numel for s in specs_of(model).values()) / 405.85e9 - 1) < 0.001


def test_rope_scaling_is_llama_3s() -> None:
    """Catches interpolation in the wrong direction: short waves stay, long ones stretch by the factor, those between are blended."""
    exponents = pair_exponents(128, None, CPU)
    plain = inverse_frequencies(exponents, 500000.0, None)
    scaled = inverse_frequencies(exponents, 500000.0, RopeScaling(factor=8))
    ratio = plain / scaled
    assert ratio[0] == 1 and ratio[-1] == 8 and (ratio[1:] >= ratio[:-1] - 1e-12).all()


def test_xpos_depends_on_distance_only() -> None:
    """Catches decays that do not cancel between query and key."""
    exponents = pair_exponents(8, None, CPU)
    freq = inverse_frequencies(exponents, 100.0, None)
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 1, 8, dtype=torch.float64)

    def score(i: int, j: int) -> float:
        r = rotary(torch.arange(20)[None], freq, torch.float64, (exponents, 10))
        turned = rotate(q, r.q_cos[:, :, i : i + 1], r.q_sin[:, :, i : i + 1])
        return float((turned * rotate(k, r.k_cos[:, :, j : j + 1], r.k_sin[:, :, j : j + 1])).sum())

    assert score(5, 3) == pytest.approx(score(15, 13), abs=1e-12)
    assert score(5, 3) != pytest.approx(score(5, 4), abs=1e-3)


def test_alibi_slopes() -> None:
    """Catches slopes in the wrong order."""
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(6)[:4] == [2.0 ** (-2 * i) for i in range(1, 5)] and len(alibi_slopes(6)) == 6


def test_learning_rates() -> None:
    """Catches off-by-one warm-ups and decays that miss their end."""
    cosine = Optim(lr=1.0, warmup_steps=10, decay="cosine", min_lr_ratio=0.1)
    assert [learning_rate(cosine, s, 110) for s in (1, 5, 10, 60, 110, 200)] == pytest.approx([0.1, 0.5, 1.0, 0.55, 0.1, 0.1])
    wsd = Optim(lr=1.0, decay="wsd", decay_steps=20, min_lr_ratio=0.0)
    assert [learning_rate(wsd, s, 100) for s in (1, 80, 90, 100)] == pytest.approx([1, 1, 0.5, 0])
    linear = Optim(lr=2.0, decay="linear", decay_steps=50, min_lr_ratio=0.5)
    assert [learning_rate(linear, s, 100) for s in (25, 50, 80)] == pytest.approx([1.5, 1, 1])
    assert learning_rate(Optim(lr=1.0, decay="constant"), 99, 100) == 1


def test_schedules_that_fit_badly_are_told() -> None:
    """Catches a run that never reaches its rate, or drops it where the warm-up ends, without a word."""
    short = schedule_note(Optim(lr=1.0, warmup_steps=30), 3)
    assert short is not None and "warmup_steps is 30 and the run has 3 steps" in short and "a rate of 1.00e-01" in short
    assert schedule_note(Optim(warmup_steps=30), 30) is not None and schedule_note(Optim(warmup_steps=30), 31) is None
    dropping = schedule_note(Optim(warmup_steps=95, decay="wsd"), 100)
    assert dropping is not None and "begins at step 90, within the warm-up" in dropping
    assert schedule_note(Optim(warmup_steps=90, decay="wsd"), 100) is None and schedule_note(Optim(decay="constant"), 1) is None


def test_muon_is_torchs() -> None:
    """Catches another momentum, step size or iteration than torch.optim.Muon's; theirs works in bf16, hence the bound."""
    torch.manual_seed(0)
    for shape in ((12, 20), (20, 12)):
        weight, grads = torch.randn(shape), [torch.randn(shape) for _ in range(3)]
        theirs = torch.nn.Parameter(weight.clone())
        optimizer = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
        ours, momentum = weight.clone(), torch.zeros(shape)
        for g in grads:
            theirs.grad = g.clone()
            optimizer.step()
            momentum = torch.lerp(momentum, g, 0.1)
            update = orthogonalize(torch.lerp(g, momentum, 0.9), JORDAN * 5)
            ours = ours * (1 - 0.1 * 0.1) - 0.1 * 0.2 * max(shape) ** 0.5 * update
        assert (ours - theirs).abs().max() < 0.03 * (ours - weight).abs().max()


def test_compiled_blocks_equal_eager_ones() -> None:
    """Catches a graph that is specialized on the first layer's weights; fp32 fusion rounds differently."""
    from dataclasses import replace

    from megascale.config.schema import Parallel

    case = Case(tiny(), precision="fp32")
    outcomes = []
    for compiled in (False, True):
        model = build(replace(case, parallel=Parallel(compile=compiled)), 1)
        batch = fake_batch(case, [1])
        value = model.module(batch.tokens, batch.targets)
        value.backward()
        outcomes.append((value.item(), model.weights[1].local_grad.clone()))  # type: ignore[union-attr]
    assert outcomes[0][0] == pytest.approx(outcomes[1][0], rel=1e-5)
    torch.testing.assert_close(outcomes[0][1], outcomes[1][1], atol=1e-4, rtol=1e-4)


# Rooms in the order in which they may import one another: a room imports from its own rank or from lower ones.
ORDER = (
    {"errors", "files", "handles", "limits", "plugins", "rows", "screen", "sizes", "splitmix", "version"},
    {"config"},
    {"launch"},
    {"cli", "comm", "data", "precision"},
    {"model"},
    {"measure", "parallel"},
    {"planning"},
    {"schedule", "optim", "checkpoint"},
    {"formats"},
    {"analysis", "evaluation", "expand", "train", "trace", "report", "generation"},
    {"api", "chaos", "verify"},
    {"commands"},
)


def test_imports_go_one_way() -> None:
    """Catches a room that reaches up; config and launch import no torch, so that a login node starts them at once."""
    rank = {room: i for i, rooms in enumerate(ORDER) for room in rooms}
    for path in Path("megascale").rglob("*.py"):
        room = path.relative_to("megascale").parts[0].removesuffix(".py")
        if room.startswith("__"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                if name.startswith("megascale."):
                    assert rank[name.split(".")[1]] <= rank[room], f"{path} imports {name}"
                assert not (room in ("config", "launch") and name.split(".")[0] == "torch"), f"{path} imports torch"


FAMILIES = {"Decoder", "EncoderDecoder", "Spacetime", "Block", "RepeatedBlock", "Family", "Unit"}


def test_passes_know_no_family() -> None:
    """Catches a pass that asks which model or block it has before it, or for a weight by its name: the next family would slip through."""
    found = []
    for path in Path("megascale/parallel").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "issubclass"):
                found += [(path.name, n.id) for n in ast.walk(node) if isinstance(n, ast.Name) and n.id in FAMILIES]
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
                named = re.match(r"(blocks|encoder|embedding|position|head|final_norm|mlm)\.|.*[a-z]\.(weight|bias)$", node.value)
                found += [(path.name, node.value)] if named else []
    assert not found


def test_docstrings_name_what_there_is() -> None:
    """Catches a docstring that still names an argument, attribute or class by what it was called before a renaming."""
    known, told = {"no_dist"}, []  # no_dist: torch's
    for folder in ("megascale", "tests", "tools", "launchers", "benchmarks"):
        for path in Path(folder).rglob("*.py"):
            for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
                if token.type == tokenize.NAME:
                    known.add(token.string)
                elif token.type == tokenize.STRING and len(token.string) < 80:
                    known.update(re.findall(r"\w+", token.string))
                if folder == "megascale" and token.type in (tokenize.STRING, tokenize.COMMENT) and token.string.startswith(('"""', "#")):
                    told += [(str(path), token.start[0], word) for word in re.findall(r"`([A-Za-z_]\w*)`", token.string)]
    assert told and not [place for place in told if place[2] not in known]


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Catches a circle between modules, imports inside functions and for type checkers included."""
    modules = {".".join(path.with_suffix("").parts): ast.parse(path.read_text()) for path in Path("megascale").rglob("*.py")}
    arrows: dict[str, set[str]] = {}
    for name, tree in modules.items():
        imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module]
        arrows[name] = {m for n in imports for m in (n.module or "", *(f"{n.module}.{a.name}" for a in n.names)) if m in modules}
    assert sum(map(len, arrows.values())) > len(modules)
    while arrows:
        leaves = {name for name, goals in arrows.items() if not goals & arrows.keys()}
        assert leaves, f"a circle is among {sorted(arrows)}"
        arrows = {name: goals for name, goals in arrows.items() if name not in leaves}
