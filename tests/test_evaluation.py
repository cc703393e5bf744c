"""Evaluations: files, lm-eval's numbers, every layout, and a run that reports them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from megascale.data.indexed import TokenWriter
from megascale.data.tokenizer import Tokenizer, load_tokenizer
from megascale.errors import UsageError
from megascale.evaluation.files import read_items
from megascale.evaluation.requests import Request, following, windows
from megascale.evaluation.score import Scorer
from megascale.evaluation.tasks import exact, open_task, run_task, verdict
from megascale.report.page import page
from megascale.report.read import read_run
from megascale.schedule.accumulate import Accumulation
from tests.layouts import CPU, Case, build, tiny
from tests.ranks import run_ranks
from tests.runs import rows, run, settings

pytestmark = pytest.mark.dist

VOCAB = 288
WORDS = [f"word{i} follows word{i * 7 % 50}." for i in range(100)]
LINES: dict[str, list[dict[str, Any]]] = {
    "choice": [
        {"context": "word3 follows", "choices": [" word21.", " word4", " nothing at all"], "answer": 0},
        {"context": "", "choices": ["word", "xyz"], "answer": 1},
        {"context": "word5 follows word35. " * 4, "choices": ["word", "follows"], "answer": 0},
    ],
    "bits": [{"text": " ".join(WORDS[:9])}, {"text": "a"}],
    "exact": [{"prompt": "word3 ", "answer": "follows"}, {"prompt": "word", "answer": "é", "stop": ["\n", "."]}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files with their tokenizer, and a file of each kind."""
    path = tmp_path_factory.mktemp("evaluation")
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet))
    made.save(str(path / "tokens.tokenizer.json"))
    tokenizer = load_tokenizer(path / "tokens.tokenizer.json")
    with TokenWriter(path / "tokens", np.uint16) as writer:
        for ids in tokenizer.encode_batch(WORDS):
            writer.add(np.append(ids, tokenizer.eos_id))
    for kind, lines in LINES.items():
        (path / f"{kind}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder / "tokens.tokenizer.json")


def values(data: Path, place: Path, **changes: Any) -> dict[str, Any]:
    """A run of 3 steps that evaluates every kind, at step 2 or at the end."""
    found = settings(place, model__vocab_size=VOCAB, train__steps=3, train__global_batch_size=4, train__seq_len=16, **changes)
    entries = [{"name": kind, "path": str(data / f"{kind}.jsonl"), "kind": kind, "every": 2 if kind == "bits" else 0} for kind in LINES]
    return {**found, "data": {"train": str(data / "tokens")}, "evaluate": entries}


LAYOUTS: list[dict[str, Any]] = [
    {"tp": 2, "tp_sequence": True},
    {"pp": 2, "dp_shard": 1, "pp_schedule": "1f1b"},
    {"cp": 2, "cp_method": "ring"},
    {"dp_shard": 2, "accumulation": "layered"},
]
MORE: list[dict[str, Any]] = [
    {"cp": 2, "cp_method": "ulysses"},
    {"engine": "ddp", "dp_shard": 1, "dp_replicate": 2},
    {"dp_shard": 2, "compile": True},
]


def all_runs(found: Sequence[dict[str, Any]]) -> list[tuple[int, str]]:
    return [run(v) for v in found]


def told(place: Path) -> dict[int, dict[str, dict[str, float]]]:
    return {r["step"]: r["evaluate"] for r in rows(place) if "evaluate" in r}


@pytest.mark.parametrize("layouts", [LAYOUTS, pytest.param(MORE, marks=pytest.mark.slow)])
def test_a_run_reports_the_same_on_every_layout(layouts: list[dict[str, Any]], folder: Path, tmp_path: Path) -> None:
    """Catches targets that are counted twice or on no rank, documents that see each other in a row, a stage or a ring that pairs losses
    with other groups, a row of a batch that some data rank leaves out, and an evaluation that changes the curve.
    """
    alone = tmp_path / "alone"
    alone.mkdir()
    assert run(values(folder, alone)) == (0, "done")
    want = told(alone)
    assert {step: list(found) for step, found in want.items()} == {2: ["bits"], 3: list(LINES)}
    places = [tmp_path / str(i) for i in range(len(layouts))]
    given = [values(folder, p, **{f"parallel__{k}": v for k, v in layout.items()}) for p, layout in zip(places, layouts)]
    ends = run_ranks(2, all_runs, given)
    assert all(code == 0 for codes in ends for code, _ in codes), ends[0]
    plain = {**values(folder, tmp_path / "plain"), "evaluate": []}
    assert run(plain) == (0, "done")
    assert [r["loss"] for r in rows(tmp_path / "plain")] == [r["loss"] for r in rows(alone)]
    html = page([read_run(alone / "run")], "a run")
    assert "<h2>Evaluations</h2>" in html and "exact exact_match over steps" in html
    for place in places:
        found = told(place)
        assert found.keys() == want.keys()
        for step, results in want.items():
            for name, numbers in results.items():
                for key, number in numbers.items():
                    assert abs(found[step][name][key] - number) <= 1e-12 * abs(number), (place, name, key)


def plainly(model: Any, request: Request) -> tuple[float, bool]:
    """The log-likelihood of a request by itself, from logits."""
    inputs, targets = request.cut(64)
    said = torch.log_softmax(model.module(torch.tensor([inputs]))[0, -len(targets) :].double(), -1)
    wanted = torch.tensor(targets)
    return float(said.gather(1, wanted[:, None]).sum()), bool((said.argmax(1) == wanted).all())


def scorer(model: Any, length: int, packed: bool, batch: int = 3) -> Scorer:
    return Scorer(model, Accumulation(model).evaluate, CPU, length, batch, batch, packed)


@pytest.mark.parametrize("packed", [True, False])
def test_scores_do_not_depend_on_the_batch(packed: bool, tokenizer: Tokenizer, folder: Path) -> None:
    """Catches padding and neighbours that are seen, positions that go on, targets one place off, and results in another order."""
    model = build(Case(tiny(vocab_size=VOCAB), seq_len=64), 1)
    model.train(False)
    tasks = [open_task("a", kind, folder / f"{kind}.jsonl", tokenizer, 64, VOCAB) for kind in ("choice", "bits")]
    asked = [r for task in tasks for some in task.requests for r in some]
    with torch.no_grad():
        want = [plainly(model, r) for r in asked]
        best = [int(model.module(torch.tensor([r.context]))[0, -1].argmax()) for r in asked]
    got = scorer(model, 64, packed).scores(asked)
    assert [g.greedy for g in got] == [greedy for _, greedy in want]
    torch.testing.assert_close([g.log_likelihood for g in got], [x for x, _ in want], rtol=1e-12, atol=1e-12)
    assert scorer(model, 64, packed).next_tokens([r.context for r in asked]) == best
    sure = [Request(r.context, [token]) for r, token in zip(asked, best)]
    assert all(s.greedy for s in scorer(model, 64, packed, 2).scores(sure))
    with torch.no_grad():
        second = [int(model.module(torch.tensor([r.context]))[0, -1].topk(2).indices[1]) for r in asked]
    nearly = [Request(r.context, [token]) for r, token in zip(asked, second)]
    assert not any(s.greedy for s in scorer(model, 64, packed, 2).scores(nearly))


def test_rolling_windows_are_lm_evals() -> None:
    """Catches a token that is scored twice or never, and a last window with another context than lm-eval gives it."""
    assert list(windows([1, 2, 3, 4, 5, 6, 7], 9, 3)) == [
        Request([9], [1, 2, 3]),
        Request([3], [4, 5, 6]),
        Request([4, 5, 6], [7]),
    ]
    assert list(windows([1, 2], 9, 4)) == [Request([9], [1, 2])] and list(windows([], 9, 4)) == []
    assert Request([1, 2, 3], [4, 5]).cut(3) == ([2, 3, 4], [4, 5]) and Request([1], [2, 3, 4]).cut(2) == ([2, 3], [3, 4])


def test_a_prompt_is_cut_as_lm_eval_cuts_it(tokenizer: Tokenizer) -> None:
    """Catches spaces that stay with the context, where words do not begin, and an empty context without a token before it."""
    request = following(tokenizer, "word3 follows ", "word21.")
    assert request.context == tokenizer.encode_prompt("word3 follows")
    assert tokenizer.decode(request.wanted) == " word21."
    assert following(tokenizer, "", "word").context == [tokenizer.eos_id]


class Says:
    """A scorer whose model continues every text in the same words."""

    def __init__(self, tokens: Sequence[int], begin: int) -> None:
        self.tokens, self.begin, self.passes = tokens, begin, 0

    def next_tokens(self, texts: Sequence[Sequence[int]]) -> list[int]:
        self.passes += 1
        return [self.tokens[len(t) - self.begin] for t in texts]


@pytest.mark.parametrize(
    ("said", "answer", "stop", "right"),
    [
        (" follows\nmore", "follows", None, True),
        (" follows more\n", "follows", None, False),
        (" follows. more", "follows", ["."], True),
        ("é\n", "é", None, True),
        ("\nfollows", "follows", None, False),
        ("follows", "follows", None, True),  # the end of the document follows
        (" " * 99, "follows", None, False),
    ],
)
def test_exact_match(said: str, answer: str, stop: list[str] | None, right: bool, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Catches a stop text that is part of the answer, half a character that ends a match, and a text that never ends."""
    item = {"prompt": "word", "answer": answer, **({} if stop is None else {"stop": stop})}
    (tmp_path / "f.jsonl").write_text(json.dumps(item))
    task = open_task("a", "exact", tmp_path / "f.jsonl", tokenizer, 64, VOCAB)
    tokens = [*tokenizer.encode_batch([said])[0].tolist(), tokenizer.eos_id]
    fake: Any = Says(tokens, len(task.requests[0][0].context))
    assert exact(task, fake) == {"exact_match": float(right)}
    assert fake.passes <= len(tokens)
    assert verdict(item, [tokenizer.eos_id], tokenizer) is False


def test_results_of_a_model_that_knows_nothing(folder: Path, tokenizer: Tokenizer) -> None:
    """Catches bits that are nats, characters for bytes, and the unnormalized choice reported as the normalized one."""
    model = build(Case(tiny(vocab_size=VOCAB, init_std=1e-9), seq_len=64), 1)
    model.train(False)
    task = open_task("a", "bits", folder / "bits.jsonl", tokenizer, 64, VOCAB)
    tokens = sum(len(r.wanted) for some in task.requests for r in some)
    size = sum(len(item["text"]) for item in LINES["bits"])
    assert run_task(task, scorer(model, 64, True))["bits_per_byte"] == pytest.approx(tokens * math.log2(VOCAB) / size, rel=1e-6)
    choices = open_task("a", "choice", folder / "choice.jsonl", tokenizer, 64, VOCAB)
    lengths = [[len(r.wanted) for r in some] for some in choices.requests]  # all tokens are equally likely: the shortest text wins
    shortest = [some.index(min(some)) == item["answer"] for some, item in zip(lengths, LINES["choice"])]
    per_character = [[n / len(c) for n, c in zip(some, item["choices"])] for some, item in zip(lengths, LINES["choice"])]
    normed = [some.index(min(some)) == item["answer"] for some, item in zip(per_character, LINES["choice"])]
    assert run_task(choices, scorer(model, 64, True)) == {"accuracy": sum(shortest) / 3, "accuracy_norm": sum(normed) / 3}


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("bits", '{"text": "a"}\n{"txt": "b"}', "line 2 has no key text"),
        ("bits", '{"text": "a"}\n\n{"text": ', "line 3 is not JSON"),
        ("bits", "[1]", "line 1 is no JSON object"),
        ("bits", "\n", "has no line"),
        ("bits", '{"text": ""}', "not empty"),
        ("bits", '{"text": "\\ud800"}', "surrogate"),
        ("choice", '{"context": "a", "choices": ["b", "c"], "answer": 2}', "answer 2 and 2 choices"),
        ("choice", '{"context": "a", "choices": ["b"], "answer": 0}', "two or more"),
        ("choice", '{"context": "a", "choices": ["b", "c"], "answer": true}', "number of the right choice"),
        ("exact", '{"prompt": "a", "answer": "b", "stop": "c"}', "list of texts"),
    ],
)
def test_bad_files(kind: str, text: str, words: str, tmp_path: Path) -> None:
    """Catches a mistake that is found hours later, or without its file and line."""
    path = tmp_path / "f.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=words) as error:
        read_items(path, kind)
    assert str(path) in str(error.value)
    with pytest.raises(UsageError, match="cannot be read"):
        read_items(tmp_path / "none", kind)


def test_a_bad_file_ends_a_run_before_it_begins(folder: Path, tmp_path: Path) -> None:
    """Catches an evaluation that is opened at its first step, after the run's folder was made."""
    wrong = values(folder, tmp_path)
    wrong["evaluate"][0]["path"] = str(tmp_path / "none.jsonl")
    code, message = run(wrong)
    assert code == 2 and "none.jsonl" in message and not (tmp_path / "run" / "metrics.jsonl").exists()


def exported(folder: Path, place: Path) -> Path:
    """A run's checkpoint as a Hugging Face folder beside it."""
    from megascale.commands.convert import app

    settings_of = {**values(folder, place), "evaluate": []}
    assert run(settings_of) == (0, "done")
    words = [str(place / "run"), str(place / "hf"), "--from", "megascale", "--to", "hf"]
    assert app(words, standalone_mode=False) in (None, 0)
    return place / "hf"


def test_the_command_scores_as_transformers_does(folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Catches a checkpoint and its export that differ, another tokenizer's tokens, and windows or cuts that are not lm-eval's: its HFLM is
    written here again over transformers, text by text.
    """
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'megascale[hf]'")
    from megascale.commands.evaluate import app

    hf = exported(folder, tmp_path)
    flags = [word for kind in LINES for word in (f"--{kind}", str(folder / f"{kind}.jsonl"))]
    found = []
    for place in (tmp_path / "run", hf):
        assert app([str(place), *flags, "--json", str(tmp_path / "out.json"), "--dtype", "fp64"], standalone_mode=False) in (None, 0)
        found.append(json.loads((tmp_path / "out.json").read_text()))
    for name, numbers in found[0].items():
        assert numbers == pytest.approx(found[1][name], rel=1e-6), name
    model, theirs = transformers.AutoModelForCausalLM.from_pretrained(hf), transformers.AutoTokenizer.from_pretrained(hf)
    model, length = model.double(), model.config.max_position_embeddings

    def score(context: list[int], wanted: list[int]) -> float:
        inputs = torch.tensor([(context + wanted)[-(length + 1) :][:-1]])
        with torch.no_grad():
            said = torch.log_softmax(model(inputs).logits[0], -1)[-len(wanted) :]
        return float(said.gather(1, torch.tensor(wanted[-length:])[:, None]).sum())

    total = 0.0
    for item in LINES["bits"]:
        tokens = theirs.encode(item["text"])
        total += score([theirs.eos_token_id], tokens[:length])
        for begin in range(length, len(tokens), length):
            end = min(begin + length, len(tokens))
            total += score(tokens[end - length - 1 : begin], tokens[begin:end])
    size = sum(len(item["text"].encode()) for item in LINES["bits"])
    assert found[0]["bits"]["bits_per_byte"] == pytest.approx(-total / math.log(2) / size, rel=1e-6)
    right = 0
    for item in LINES["choice"]:
        context = theirs.encode(item["context"].rstrip())  # spaces at its end belong to the choice
        pairs = [theirs.encode(item["context"] + c)[len(context) :] for c in item["choices"]]
        scores = [score(context or [theirs.eos_token_id], wanted) for wanted in pairs]
        right += scores.index(max(scores)) == item["answer"]
    assert found[0]["choice"]["accuracy"] == right / len(LINES["choice"])


def test_lm_eval_itself(folder: Path, tmp_path: Path) -> None:
    """Catches log-likelihoods that are not lm-eval's own on the exported folder."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'megascale[evaluation]'")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from megascale.evaluation.harness import harness

    hf = exported(folder, tmp_path)
    theirs = HFLM(pretrained=str(hf), device="cpu", dtype="float64", batch_size=2)

    def asked(kind: str, *args: Any) -> Any:
        return Instance(request_type=kind, doc={}, arguments=args, idx=0)  # type: ignore[arg-type]

    pairs = [asked("loglikelihood", item["context"], c) for item in LINES["choice"] for c in item["choices"]]
    texts = [asked("loglikelihood_rolling", item["text"]) for item in LINES["bits"]]
    until = {"until": ["."], "max_gen_toks": 6, "do_sample": False}
    prompts = [asked("generate_until", item["prompt"], until) for item in LINES["exact"]]
    for place in (tmp_path / "run", hf):
        with harness(place, dtype="fp64") as ours:
            for (mine, greedy), (want, their_greedy) in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
                assert abs(mine - want) <= 1e-5 and greedy == their_greedy
            for mine, want in zip(ours.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts), strict=True):
                assert abs(mine - want) <= 1e-5
            assert ours.generate_until(prompts) == theirs.generate_until(prompts)
