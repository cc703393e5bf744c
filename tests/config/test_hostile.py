"""Configs and overrides that nobody should write: each is used or refused in one sentence, soon and in little memory."""

from __future__ import annotations

import copy
import os
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from megascale.config.bounds import FILE_BYTES
from megascale.config.load import apply_overrides, build_config, flatten, known_keys, load_config, parse_yaml, read_yaml
from megascale.config.spans import longest_window
from megascale.config.support import check
from megascale.errors import UsageError
from tests.config.test_config import BASE, config

ROOT = Path(__file__).resolve().parents[2]
EVERY = [key for key in known_keys() if "." in key]
# Ten aliases of ten aliases …: 10⁸ values in 300 bytes.
BOMB = "\n".join(f"{name}: &{name} [{', '.join([f'*{chr(ord(name) - 1)}' if name > 'a' else 'x'] * 10)}]" for name in "abcdefgh")
HOSTILE_YAML = {
    "bomb": (BOMB, "more than 100,000 values"),
    "merged bomb": (BOMB + "\nm: {<<: [" + ", ".join(["*h"] * 9) + "]}", "more than 100,000 values"),
    "cycle": ("data: &a {train: *a}", "contains itself"),
    "cycle of lists": ("data: &a [*a]", "contains itself"),
    "deep lists": ("a: " + "[" * 500 + "]" * 500, "nested more than 64 deep"),
    "10,000 levels": ("a: " + "{b: " * 10_000, "nested more than 64 deep"),
    "deep by aliases": ("a0: &a0 {x: 1}\n" + "\n".join(f"a{i}: &a{i} {{x: *a{i - 1}}}" for i in range(1, 90)), "nested more than 64 deep"),
    "no such bool": ("run: {wandb: !!bool maybe}", "not valid YAML 1.2"),
    "long number": ("run: {seed: " + "9" * 5000 + "}", "not valid YAML 1.2"),
    "object": ("run: !!python/object/apply:os.system [touch PWNED]", "not valid YAML 1.2"),
    "no such day": ("run: {name: 2001-99-99}", "not valid YAML 1.2"),
    "key twice": ("run: {name: a, name: b}", "not valid YAML 1.2"),
    "two documents": ("a: 1\n---\nb: 2", "not valid YAML 1.2"),
    "unknown tag": ("a: !x 1", "not valid YAML 1.2"),
    "NUL": ("a: \0", "not valid YAML 1.2"),
    "a list": ("[1]", "holds a list, not sections"),
    "nothing": ("", "holds a NoneType, not sections"),
    "NUL in a path": ('sources: [{path: "a\\0b"}]', "sources.path is .*control characters"),
}


@pytest.mark.parametrize("name", HOSTILE_YAML)
def test_hostile_files(tmp_path: Path, name: str) -> None:
    """Catches tracebacks, endless expansion and executed tags; a sentence names the file."""
    text, words = HOSTILE_YAML[name]
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UsageError, match=words) as error:
        load_config(tmp_path / "c.yaml")
    assert str(tmp_path / "c.yaml") in str(error.value) and len(str(error.value)) < 2000


def test_what_is_no_file(tmp_path: Path) -> None:
    """Catches a start that waits for a pipe for ever, reads a device without end, or dies on what only looks like a path."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "large.yaml").write_text("a: b\n" + "#" * FILE_BYTES)
    (tmp_path / "latin.yaml").write_bytes(b"run: {name: caf\xe9}")
    cases: list[tuple[Any, str]] = [
        (pipe, "a pipe, a socket or a device"),
        ("/dev/zero", "a pipe, a socket or a device"),
        (tmp_path, "is a folder"),
        (tmp_path / "large.yaml", "more than 524,288 bytes"),
        (tmp_path / "latin.yaml", "cannot be read"),
        ("a\0b", "control characters"),
        ("caf\udce9", "not valid text"),
        ("x" * 300, "more than 255 bytes"),
        ("x/" * 3000, "a path may have at most 4,095"),
        ("nowhere/c.yaml", "there is no config file"),
    ]
    for path, words in cases:
        with pytest.raises(UsageError, match=words):
            load_config(path)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ('run.dir="a\\nb"', r"run.dir is 'a\\nb': line ends"),
        ('run.dir="a\\0b"', "control characters"),
        ('run.dir="a\\u2028b"', "control characters"),
        ('run.dir="\\ud800"', "not valid text"),
        ("run.dir=caf\udce9", "not valid text"),
        ("data.train=" + "x" * 300, "data.train is .* more than 255 bytes"),
        ("data.train=[" + "ab/" * 2000 + "]", "data.train is .* a path may have at most 4,095"),
        ("checkpoint.init_from=" + "é" * 128, "more than 255 bytes"),
        ("run.name=..", "run.name: '..' is not a folder name"),
        ("run.name=.", "run.name: '.' is not a folder name"),
        ("run.name=a/b", "run.name: 'a/b' is not a folder name"),
        ("run.seed=" + "9" * 30, "run.seed is a number of 100 bits"),
        ("run.seed=0x" + "f" * 9000, "run.seed is a number of 36000 bits"),
        ("model.num_layers=" + "9" * 6000, "model.num_layers is a number of 6,000 digits"),
        ("run.seed=-1", "run.seed is -1: it should be greater than or equal to 0"),
        ("run.threads=1000000", "run.threads is 1000000: it should be less than or equal to 1024"),
        ("run.collective_timeout=1e300", "run.collective_timeout is 1e[+]300: it should be less"),
        ("optim.lr=.inf", "optim.lr is inf: a finite number"),
        ("optim.lr=1e400", "optim.lr is inf: a finite number"),
        ("optim.betas=[.nan, 0.9]", "optim.betas is nan"),
        ("model.num_layers=10000000", "model.num_layers is 10000000: it should be less than or equal to 10000"),
        ("model.hidden_size=4294967296", "model.hidden_size is 4294967296: it should be less than or equal to 2147483647"),
        ("train.steps=1000000000000000000", "train.steps is .* less than or equal to 2147483647"),
        ("parallel.tp=10000000", "parallel.tp is 10000000"),
        ("train.steps=2001-01-01", "train.steps is a date"),
        ("run.name=!!binary YQ==", "run.name is a bytes"),
        ("model={1: 2}", "write section.key=value"),
        ("run.allow_change={1: 2}", "run.allow_change has the key '1', a int"),
        ("data.train=&a [*a]", "data.train cannot be used: a YAML alias contains itself"),
        ("data.train=" + "[" * 10_000, "data.train cannot be used: lists and mappings are nested"),
        (".".join("a" * 10_000) + "=1", "nested more than 64 deep"),
        ("run.name.x=1", "cannot set run.name.x: name is 'base'"),
        ("optim.multipliers={? [a] : {lr: 1}}", "keys are words"),
    ],
)
def test_hostile_values(override: str, words: str) -> None:
    """Catches values that are used before anybody looked at them; the sentence names the key and stays short."""
    with pytest.raises(UsageError, match=words) as error:
        build_config(apply_overrides({**BASE, "run": {"name": "base"}}, [override]))
    assert len(str(error.value)) < 1000


def test_many_mistakes_are_few_lines() -> None:
    """Catches a message of a million lines, and the hour that it takes to find a near spelling for each."""
    with pytest.raises(UsageError) as error:
        build_config({**BASE, **{f"unknown{i}": i for i in range(20_000)}})
    assert "and 19,980 more" in str(error.value)


def test_bounds_leave_room() -> None:
    """Catches bounds that refuse what people have: aliases and merges in moderation, long mixtures, large seeds, deep models."""
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": [{"x": 1}, {"x": 1}]}
    found = config(
        "run.seed=9007199254740993",
        "model.num_layers=10000",
        "train.tokens=15000000000000",
        "train.steps=null",
        "data.train=[" + ", ".join(f"{{path: /data/Ünïcode name/{i}, weight: {i + 1}}}" for i in range(3000)) + "]",
    )
    assert len(found.data.train) == 3000 and check(found, 1) == check(found, 1)


def test_the_longest_window_is_found_at_once() -> None:
    """Catches a search token by token, which a source of 2³¹ places keeps busy for hours, and a window that is not the longest."""
    assert [longest_window(n, 0.15, 3.0) for n in (1, 2)] == [None, None]
    window = longest_window(512, 0.15, 3.0)
    assert window is not None and (window.tokens, window.target) == (568, 114)
    large = longest_window(2**31 - 1, 0.15, 3.0)
    assert large is not None and large.source == 2**31 - 1


NUMBERS = (0, -1, 1, 2, 3, 2**31 - 1, 2**31, 2**63, 10**18, 10**5000, 0.5, -0.0, 1e-320, 1e308, float("inf"), float("nan"), True)
WORDS = ("", " ", "\0", "\n", "..", "/", "\ud800", "x" * 5000, "$(touch PWNED)", "null", "1e400", "İ", "auto")
HOSTILE: tuple[Any, ...] = (
    *NUMBERS,
    *WORDS,
    None,
    [],
    {},
    [[]],
    {"": 1},
    {1: 2},
    {"a": {"b": 1}},
    [1, "a", None],
    b"x",
    {1, 2},
    [10**30] * 50,
)


def test_fuzzed_configs() -> None:
    """Catches any other exception than a sentence, from reading to the support table, for shipped configs with hostile values in them."""
    dice = random.Random(30)
    shipped = [read_yaml(path) for path in sorted((ROOT / "configs").glob("*.yaml"))]
    used = longest = 0
    for _ in range(600):
        values = apply_overrides(dice.choice(shipped), [])
        for _ in range(dice.choice((1, 1, 2, 3))):
            damage(values, dice)
        try:
            check(build_config(values), dice.choice((1, 2, 8, 4096)))
            used += 1
        except UsageError as error:
            longest = max(longest, len(str(error)))
    assert longest < 20_000
    assert used > 20, "the damage is so large that nothing behind the first look is reached"


def damage(values: dict[str, Any], dice: random.Random) -> None:
    """Another value in one place of a config, or in a place that it does not have."""
    keys = [key for key in flatten(values) if "." in key]
    key = dice.choice([*keys, *dice.choices(EVERY, k=3)])
    node = values
    *path, last = key.split(".")
    for part in path:
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    node[last] = copy.deepcopy(dice.choice(HOSTILE))


def test_fuzzed_text(tmp_path: Path) -> None:
    """Catches a reader that dies on half a file, swapped bytes, and overrides of any letters."""
    dice, file = random.Random(31), tmp_path / "c.yaml"
    whole = (ROOT / "configs" / "quickstart.yaml").read_bytes()
    letters = b"[]{}&*!|>%@`'\",:#-?\\ \n\t\0\xff\xc3"
    for _ in range(150):
        text = bytearray(whole)
        for _ in range(dice.randint(1, 4)):
            at = dice.randrange(len(text))
            text[at : at + dice.choice((0, 1, 5))] = bytes(dice.choices(letters, k=dice.randint(1, 4)))
        file.write_bytes(text[: dice.choice((len(text), dice.randrange(len(text))))])
        override = f"{dice.choice(EVERY)}=" + bytes(dice.choices(letters, k=dice.randint(1, 9))).decode("latin-1")
        with suppress(UsageError):
            check(load_config(file, [override]), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml"]
