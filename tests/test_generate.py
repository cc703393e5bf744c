"""Generation: the cache changes nothing, ranks change nothing, and transformers says the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megascale.comm.mesh import build_mesh
from megascale.commands.generate import app
from megascale.config.layout import axis_sizes
from megascale.config.schema import Model, Parallel
from megascale.errors import UsageError
from megascale.formats.hf.model import read_hf
from megascale.formats.load import load_model
from megascale.generation import cache
from megascale.generation.open import ends_of
from megascale.generation.run import Sampling, generate
from megascale.generation.sample import choose
from megascale.parallel.model import ParallelModel
from tests.formats.models import DECODERS, MIXTURES, PLAIN, save
from tests.layouts import CPU, Case, build, tiny
from tests.ranks import run_ranks

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9, 3], [2]]
MODELS: dict[str, Model] = {
    "llama": tiny(num_kv_heads=1),
    "alibi": tiny(position="alibi", residual="post", num_kv_heads=2),
    "xpos": tiny(position="xpos", qk_norm=True),
    "window": tiny(sliding_window=4, residual="res_post", qk_norm="width"),
    "learned": tiny(position="learned", norm="layernorm", bias=True, ffn="gelu_tanh", tie_embeddings=True, num_kv_heads=4),
    "experts": tiny(
        ffn="swiglu_clamped",
        moe={
            "num_experts": 8,
            "num_shared": 1,
            "router": "sigmoid",
            "balance": "bias",
            "groups": 4,
            "top_groups": 2,
            "routed_scale": 1.5,
            "shared_gate": True,
            "expert_bias": True,
            "router_bias": True,
        },
    ),
    "repeated": tiny(num_layers=4, num_kv_heads=4, moe={"num_experts": 4}, moeut={"group_size": 2, "attention_experts": 4}),
    "deepnorm": tiny(residual="deepnorm"),
    "relative": tiny(position="relative", relative_buckets=6, relative_distance=7, attention_scale=0.7, num_kv_heads=2),
}


def plainly(model: ParallelModel, prompt: list[int], most: int) -> tuple[list[int], list[torch.Tensor]]:
    """Greedy without a cache and without a batch, the whole text again for every token: tokens and the logits they were chosen by."""
    text, logits = list(prompt), []
    for _ in range(most):
        logits.append(model.module(torch.tensor([text]))[0, -1])
        text.append(int(logits[-1].argmax()))
    return text[len(prompt) :], logits


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n == "repeated" else ()) for n in MODELS])
def test_cache_and_batch_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches padding that is seen, positions that count it, a window or slope that forgets what was cached, a place that queries and keys
    of different passes do not agree on, a repeat that reads another's rows, and a cache that outgrows its room.
    """
    seen: list[torch.Tensor] = []

    def watched(logits: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(logits)
        return choose(logits, *rest)

    monkeypatch.setattr("megascale.generation.run.choose", watched)
    case = Case(MODELS[name], seq_len=320 if name == "learned" else 12)
    most = 12 if name != "llama" else 270
    with torch.no_grad():
        model = build(case, 1)
        model.train(False)
        want = [plainly(model, p, 12) for p in PROMPTS]
        got = generate(model, PROMPTS, Sampling(most))
    assert [tokens[:12] for tokens in got] == [tokens for tokens, _ in want] and {len(tokens) for tokens in got} == {most}
    for step, logits in enumerate(seen[:12]):
        torch.testing.assert_close(logits, torch.stack([said[step] for _, said in want]), rtol=1e-9, atol=1e-12)


def cut(name: str) -> list[list[int]]:
    parallel = Parallel(tp=dist.get_world_size(), dp_shard=1)
    model = build(Case(MODELS[name], parallel, seq_len=64), dist.get_world_size())
    model.train(False)
    return generate(model, PROMPTS, Sampling(8)) + generate(model, PROMPTS, Sampling(8, 1.0, 0.9, seed=5))


@pytest.mark.dist
@pytest.mark.parametrize(("name", "ranks"), [("llama", 2), ("llama", 4), ("alibi", 2), ("window", 2), ("experts", 2), ("relative", 2)])
def test_tensor_ranks_change_nothing(name: str, ranks: int) -> None:
    """Catches a vocabulary that is not put together, padding rows that are chosen, and ranks that draw for themselves."""
    alone = build(Case(MODELS[name], seq_len=64), 1)
    alone.train(False)
    want = generate(alone, PROMPTS, Sampling(8)) + generate(alone, PROMPTS, Sampling(8, 1.0, 0.9, seed=5))
    assert all(got == want for got in run_ranks(ranks, cut, name))


@pytest.mark.parametrize("family", [*DECODERS, "granite", "gpt_neox", *MIXTURES])
def test_greedy_is_transformers_greedy(family: str, tmp_path: Path) -> None:
    """Catches any difference that grows token by token: 24 tokens of 4 prompts, padded on the left by both."""
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'megascale[hf]'")
    theirs = save(family, {**PLAIN[family], "initializer_range": 0.3, "pad_token_id": 0}, tmp_path / "hf")
    length = max(map(len, PROMPTS))
    tokens = torch.tensor([[0] * (length - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in PROMPTS])
    out = theirs.generate(tokens, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=3, pad_token_id=0)[
        :, length:
    ].tolist()
    want = [row[: row.index(3) + 1] if 3 in row else row for row in out]
    foreign = read_hf(tmp_path / "hf")
    mesh = build_mesh(axis_sizes(Parallel(dp_shard=1), 1), "cpu")
    model = load_model(foreign.model, foreign.seq_len, foreign.produce, mesh, Parallel(), CPU, torch.float32)
    assert generate(model, PROMPTS, Sampling(24, ends=frozenset({3}))) == want


def test_ends_are_read_as_transformers_writes_them() -> None:
    """Catches a chat model that never ends: its generation config has several tokens that do."""
    assert ends_of({"eos_token_id": 3}) == {3} and ends_of({"eos_token_id": [3, 5]}) == {3, 5} and ends_of({}) == set()
    model = build(Case(MODELS["llama"], seq_len=64), 1)
    model.train(False)
    free = generate(model, PROMPTS, Sampling(8))
    ends = frozenset({free[0][2], free[1][0]})
    for told, tokens in zip(generate(model, PROMPTS, Sampling(8, ends=ends)), free):
        first = next((i + 1 for i, t in enumerate(tokens) if t in ends), 8)
        assert told == tokens[:first]


def test_drawing() -> None:
    """Catches top-p that cuts a token too early or too late, and a temperature on the wrong side: frequencies of 40000 draws."""
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, -9.0]]).log_softmax(-1)
    many = logits.expand(40000, -1)
    for temperature, top_p, kept in ((1.0, 1.0, 5), (0.5, 1.0, 5), (1.0, 0.7, 2), (1.0, 0.6, 1), (2.0, 0.9, 4)):
        p = torch.softmax(logits[0].double() / temperature, -1)
        assert top_p == 1.0 or p[: kept - 1].sum() < top_p <= p[:kept].sum()
        p = torch.where(torch.arange(5) < kept, p, 0)
        p = p / p.sum()
        drawn = choose(many, temperature, top_p, torch.Generator().manual_seed(1)).bincount(minlength=5) / 40000
        assert (drawn - p).abs().max() < 0.01, (temperature, top_p)
    assert choose(logits, 0.0, 1.0, torch.Generator()).tolist() == [0]


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([[1], []], "prompt 2 has no tokens"),
        ([[37]], "prompt 1 holds token 37, and the model knows 37"),
        ([[1] * 9], "the model has 12 learned"),
    ],
)
def test_prompts_that_cannot_be(prompts: list[list[int]], words: str) -> None:
    """Catches an index error where a sentence is due."""
    model = build(Case(MODELS["learned"], seq_len=12), 1)
    with pytest.raises(UsageError, match=words):
        generate(model, prompts, Sampling(8))


def said(capsys: pytest.CaptureFixture[str], *args: object) -> list[dict[str, Any]]:
    """What the tool prints, run in this process."""
    assert app([*map(str, args), "--json", "--max-new-tokens", "9", "--ignore-end"], standalone_mode=False) in (None, 0)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


@pytest.mark.dist
def test_the_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a run whose tokenizer is not found, a difference between formats or ranks, and wrong use that is no sentence."""
    from megascale.data.tokenizer import load_tokenizer, train_sentencepiece
    from megascale.formats.convert import ConvertOptions, megascale_to_hf
    from tests.runs import make_tokens, run, settings

    train_sentencepiece(["abc cab bac " * 20], 264, tmp_path / "tokens.model")
    make_tokens(tmp_path / "tokens")
    assert run(settings(tmp_path, model__vocab_size=266, precision__compute="fp32")) == (0, "done")
    lines = said(capsys, tmp_path / "run", "--prompt", "cab c", "--prompt", "b")
    assert [line["prompt"] for line in lines] == ["cab c", "b"] and all(len(line["tokens"]) == 9 for line in lines)
    assert lines[0]["text"] == load_tokenizer(tmp_path / "tokens.model").decode(lines[0]["tokens"])
    megascale_to_hf(tmp_path / "run", tmp_path / "hf", ConvertOptions())
    assert said(capsys, tmp_path / "hf", "--prompt", "cab c", "--prompt", "b") == lines
    app([str(tmp_path / "run"), "--tokens", "1,2,3,4", "--max-new-tokens", "13"], standalone_mode=False)
    assert "has 4 tokens and up to 13 more are wanted, but the model was trained on 16" in capsys.readouterr().err
    app([str(tmp_path / "run"), "--tokens", "1,2,3,4", "--max-new-tokens", "12"], standalone_mode=False)
    assert "notice" not in capsys.readouterr().err
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "tools/generate.py", str(tmp_path / "run")]
    rest = ["--prompt", "cab c", "--prompt", "b", "--json", "--max-new-tokens", "9", "--ignore-end"]
    other = subprocess.run([*start, *rest], capture_output=True, text=True)
    assert other.returncode == 0, other.stderr
    assert [json.loads(line) for line in other.stdout.splitlines() if line.startswith("{")] == lines
    for args, words in (
        ((), "there is no prompt"),
        (("--prompt", "x", "--tokens", "10"), "the number of new tokens is --max-new-tokens"),
        (("--prompt", ""), "prompt 1 has no tokens"),
        (("--tokens", "1,a"), "--tokens is '1,a'"),
        (("--tokens", "1", "--top-p", "0"), "--top-p is 0"),
        (("--tokens", "1", "--dtype", "int3"), "--dtype is int3"),
        (("--tokens", "999"), "holds token 999"),
        (("--prompt", "caf\udce9"), "prompt 1 is not UTF-8"),
    ):
        with pytest.raises(UsageError) as error:
            said(capsys, tmp_path / "run", *args)
        assert words in str(error.value) and "notice" not in capsys.readouterr().err
    other_one = tmp_path / "other.model"
    train_sentencepiece(["xyz zyx yxz " * 20], 264, other_one)
    for given, warned in ((other_one, True), (tmp_path / "tokens.model", False)):
        app([str(tmp_path / "run"), "--prompt", "b", "--tokenizer", str(given), "--max-new-tokens", "2"], standalone_mode=False)
        err = capsys.readouterr().err
        assert (str(given) in err and str(tmp_path / "tokens.model") in err) == warned and ("warning: " in err) == warned


def attends(model: ParallelModel) -> list[Any]:
    return [m.attend for m in model.model.modules() if hasattr(m, "attend")]


@pytest.mark.parametrize("name", ["xpos", "learned"])
def test_the_model_is_as_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an attention that keeps its cache, so that the next evaluation raises, and a model that is left in evaluation or with a head
    for one token: behind a generation that ends, and behind one that breaks off on its way.
    """
    model = build(Case(MODELS[name], seq_len=32), 1)
    model.train(True)
    text = torch.tensor([[1, 2, 3, 4, 5, 6]])

    def loss() -> float:
        with torch.no_grad():
            return float(model.module(text, text))

    before, attend = loss(), attends(model)
    generate(model, PROMPTS, Sampling(4))

    def fail(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("megascale.generation.run.choose", fail)
    with pytest.raises(KeyboardInterrupt):
        generate(model, PROMPTS, Sampling(4))
    assert loss() == before and attends(model) == attend and all(m.training for m in model.model.modules())


def test_long_prompts_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a part that does not see the parts before it, and a mask of a whole long prompt: memory is that of one part."""
    shapes: list[tuple[int, ...]] = []
    for name in ("llama", "alibi", "window"):
        model = build(Case(MODELS[name], seq_len=64), 1)
        whole = generate(model, PROMPTS, Sampling(6))
        with monkeypatch.context() as patch:
            patch.setattr("megascale.generation.cache.MASKED", 4 * 9 * 2)
            real = cache.Remembering._mask

            def watched(self: Any, dtype: torch.dtype, real: Any = real) -> torch.Tensor:
                shapes.append(tuple((mask := real(self, dtype)).shape))
                return mask

            patch.setattr(cache.Remembering, "_mask", watched)
            assert generate(model, PROMPTS, Sampling(6)) == whole
    assert max(s[2] for s in shapes) == 2


def test_what_no_memory_holds_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a machine that is killed, or an allocator's traceback, where the room is known not to be there."""
    model = build(Case(MODELS["llama"], seq_len=64), 1)
    monkeypatch.setattr("megascale.generation.run.free_memory", lambda device: 1000.0)
    with pytest.raises(UsageError, match=r"keys and values of 4 prompts of 9 tokens and 2 new ones take .* but 1.00 kB are free"):
        generate(model, PROMPTS, Sampling(2))
    monkeypatch.undo()
    with pytest.raises(UsageError, match=r"1 prompts of 1 tokens and 100000000000 new ones take .* --max-new-tokens"):
        generate(model, [[1]], Sampling(10**11))


def test_seeds_beyond_any_generator_are_refused() -> None:
    """Catches torch's ValueError for a seed of 23 digits."""
    model = build(Case(MODELS["llama"], seq_len=64), 1)
    with pytest.raises(UsageError, match="--seed is 12345678901234567890123: give a number from"):
        generate(model, [[1]], Sampling(2, seed=12345678901234567890123))
    assert generate(model, [[1]], Sampling(2, 1.0, seed=-(1 << 63))) and generate(model, [[1]], Sampling(2, 1.0, seed=(1 << 64) - 1))
