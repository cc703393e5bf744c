"""Ranks that were started with different configs or different data never train together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from megascale.comm.agreement import differences, unlike
from megascale.config.load import build_config
from megascale.train.start.alike import shared_values
from tests.ranks import run_ranks
from tests.runs import make_tokens, run, settings


def test_what_differs_is_told_of_both() -> None:
    """Catches a message without one of the two values, and one that lists hundreds of keys."""
    first, other = {"a": 1, "b": [1, 2], "c": None}, {"a": 1, "b": [2], "d": True}
    found = differences(first, other)
    assert found == {"b": ([1, 2], [2]), "d": (None, True)}
    assert unlike(found, "rank 1 on n2", "rank 0 on n1") == "rank 1 on n2 has b [2], d True and rank 0 on n1 has b [1, 2], d nothing"
    many = unlike({f"k{i}": (0, 1) for i in range(50)}, "one", "another")
    assert "46 more keys differ" in many and len(many) < 200


def test_what_a_node_may_have_of_its_own(tmp_path: Path) -> None:
    """Catches nodes refused for their number of cores or for a copy of the data on a disk of their own, and a key that is not compared."""

    def of(**changes: Any) -> dict[str, Any]:
        return shared_values(build_config(settings(tmp_path, **changes)))

    assert of() == of(run__threads=7, data__train="/local/elsewhere/tokens", parallel__offload_dir="/nvme")
    for changes in ({"optim__lr": 1.0}, {"run__dir": "x"}, {"data__train": "other"}, {"data__train": [{"path": "tokens", "weight": 2.0}]}):
        assert of() != of(**changes), changes


def of_rank_1(values: dict[str, Any], *changes: dict[str, Any]) -> list[tuple[int, str]]:
    """What each of `changes`, made on rank 1 alone, comes to."""
    found = []
    for change in changes:
        mine = {name: {**section, **(change.get(name, {}) if dist.get_rank() else {})} for name, section in values.items()}
        found.append(run({**mine, **({"grow": change["grow"]} if "grow" in change and dist.get_rank() else {})}))
    return found


def test_ranks_of_different_configs_do_not_train(tmp_path: Path) -> None:
    """Catches a rank whose own learning rate, seed or length enters the weights of all: exit code 0, and a curve that is nobody's."""
    make_tokens(tmp_path / "tokens")
    values = settings(tmp_path)
    make_tokens(tmp_path / "copy" / "tokens")
    make_tokens(tmp_path / "other" / "tokens", 61)
    changes = {"optim": {"lr": 0.1}}, {"run": {"seed": 2}}, {"train": {"steps": 8, "global_batch_size": 8}}
    data = {"data": {"train": str(tmp_path / "other" / "tokens")}}
    told = run_ranks(2, of_rank_1, values, *changes, data, {"data": {"train": str(tmp_path / "copy" / "tokens")}})
    for rank in told:
        assert [code for code, _ in rank] == [2, 2, 2, 2, 0]
        words = "has optim.lr 0.1 and rank 0 on", "has run.seed 2 and", "train.global_batch_size 8, train.steps 8 and"
        for (_, message), said in zip(rank, words):
            assert message.startswith("rank 1 on ") and said in message and "the same config file" in message
        _, message = rank[3]
        assert "has data.train[tokens].bin " in message and "bytes, " in message and "copy the same data" in message
    assert told[0] == told[1]
