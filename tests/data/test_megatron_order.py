"""Samples in Megatron's order: against megatron-core itself where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from megascale.data.dataset import Corpus
from megascale.data.indexed import TokenWriter
from megascale.data.megatron_order import MegatronMixture, blend
from megascale.errors import UsageError
from tests.runs import losses, make_tokens, rows, run, settings

needs_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None,
    reason="megatron-core is not installed: pip install 'megascale[megatron]'",
)


def write(prefix: Path, documents: int, seed: int) -> Corpus:
    random = np.random.default_rng(seed)
    with TokenWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            writer.add(random.integers(0, 100, random.integers(1, 60)))
    return Corpus(str(prefix), 1.0, prefix.name)


@needs_megatron
@pytest.mark.timeout(180)
@pytest.mark.parametrize("samples", [7, 30, 90, 170, 181, 400])
@pytest.mark.parametrize("part", ["all", "train"])
def test_one_source_is_in_gpt_datasets_order(samples: int, part: str, tmp_path: Path) -> None:
    """Catches an epoch too few, a last epoch that is shuffled with the others or not, and a window one token off."""
    source = write(tmp_path / "a", 50, 0)
    compare([source], samples, part, tmp_path)


@needs_megatron
@pytest.mark.timeout(180)
def test_blends_are_in_blended_datasets_order(tmp_path: Path) -> None:
    """Catches weights that are not normalized, ties that go the other way, and a source drawn for another number of samples."""
    sources = [write(tmp_path / n, 30 + 20 * i, i) for i, n in enumerate("abc")]
    weighted = [Corpus(s.path, w, s.name) for s, w in zip(sources, (0.3, 1.1, 0.6))]
    compare(weighted, 300, "all", tmp_path)


def compare(sources: list[Corpus], samples: int, part: str, folder: Path) -> None:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class Words:
        """As much of a tokenizer as a dataset asks for."""

        eod, pad, vocab_size, unique_identifiers = 99, -1, 100, {"class": "Words"}

    weights = [s.weight for s in sources] if len(sources) > 1 else None
    config = GPTDatasetConfig(
        random_seed=11,
        sequence_length=16,
        blend=([s.path for s in sources], weights),
        split="1,0,0" if part == "all" else "0.9,0.1,0",
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=Words(),
        mid_level_dataset_surplus=0.005,
    )
    theirs = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0 if part == "all" else 1, 0], lambda: True, config).build()[0]
    ours = MegatronMixture(sources, 16, 11, 100, part, 0.1 if part == "train" else 0.0, samples)
    for n in range(samples):
        tokens, _ = ours.sample(n)
        assert np.array_equal(tokens[:-1], theirs[n]["tokens"].numpy()) and np.array_equal(tokens[1:], theirs[n]["labels"].numpy()), n


def test_blends_follow_weights() -> None:
    """Catches a source that falls behind by a whole sample, and samples of a source that are left out or come twice."""
    weights = [0.5, 0.2, 0.3]
    which, index = blend(weights, 1000)
    for source, weight in enumerate(weights):
        assert np.array_equal(index[which == source], np.arange((which == source).sum()))
        assert (np.abs(np.cumsum(which == source) - weight * np.arange(1, 1001)) <= 1.5).all()


def test_runs_take_it(tmp_path: Path) -> None:
    """Catches an order that is not the run's own, a validation set that shares documents with it, and a run beyond its order."""
    make_tokens(tmp_path / "tokens")
    values = settings(tmp_path, data__order="megatron", data__valid_fraction=0.2, train__eval_every=3, train__eval_steps=1)
    assert run(values) == (0, "done")
    assert rows(tmp_path)[-1]["valid_loss"]
    other = settings(tmp_path / "b", data__train=str(tmp_path / "tokens"), data__valid_fraction=0.2)
    assert run(other) == (0, "done") and losses(tmp_path / "b")[0] != losses(tmp_path)[0]
    source = Corpus(str(tmp_path / "tokens"), 1.0, "t")
    train = MegatronMixture([source], 16, 1, 40, "train", 0.2, 24)
    with pytest.raises(UsageError, match="the order drawn for 24"):
        train.sample(24)
    with pytest.raises(UsageError, match="needs 5001"):
        MegatronMixture([source], 5000, 1, 40, "all", 0.0, 24)
    held = MegatronMixture([source], 16, 1, 40, "valid", 0.2, 24)
    assert not set(train.streams[0].documents.tolist()) & set(held.streams[0].documents.tolist())
