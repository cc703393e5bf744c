"""FLOPs of a step: attention counts the keys that queries meet."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import pytest

from megascale.config.load import build_config
from megascale.config.schema import Model
from megascale.data.indexed import TokenFile
from megascale.data.samples import document_lengths, open_data
from megascale.measure.compute import flops_per_token, keys_met
from megascale.model.ops.attention_tiles import visible_pairs
from tests.layouts import Case, build, tiny
from tests.runs import make_tokens, settings

S = 24


@pytest.mark.parametrize("window", [None, 1, 5, S - 1, S, 100])
@pytest.mark.parametrize("documents", [(), (S,), (7, 17, 1, 23)])
def test_keys_are_those_that_masks_leave(window: int | None, documents: tuple[int, ...]) -> None:
    """Catches an MFU over 100 % from keys outside the window or of other documents; a plain causal sequence counts in full, by custom."""
    cfg = tiny(sliding_window=window)
    if not documents and (window or S) >= S:
        assert keys_met(cfg, S) == S
        return
    parts = documents or (S,)
    places = [[range(end - length, end)] for end, length in zip(accumulate(parts), parts)]
    pairs = sum(visible_pairs(own, own, True, window) for own in places)
    assert keys_met(cfg, S, documents) == pytest.approx(pairs / sum(parts))


def test_encoders_meet_all_keys_of_a_document() -> None:
    """Catches half of an encoder's attention left out."""
    assert keys_met(tiny(family="encoder"), S, (6, 18)) == pytest.approx((36 + 324) / 24)


def test_the_formula_with_and_without_a_window() -> None:
    """Catches a window that changes products or that is not counted, and another count of plain models than ever."""

    def flops(cfg: Model) -> float:
        specs = {w.name: w.placement.spec for w in build(Case(cfg, precision="fp32", seq_len=S), 1).weights}
        return flops_per_token(cfg, specs, S)

    plain, windowed = tiny(), tiny(sliding_window=4)
    heads = plain.num_layers * plain.num_heads * (plain.head_dim or 0)
    products = plain.num_layers * (24 * 24 * 2 + 24 * 12 * 2 + 3 * 24 * 32) + 24 * 37 + (2 * plain.num_layers + 1) * 24
    assert flops(plain) == 6 * products + 12 * heads * S
    assert flops(plain) - flops(windowed) == pytest.approx(12 * heads * (S - (4 * S - 6) / S))


def test_documents_are_those_of_the_data(tmp_path: Path) -> None:
    """Catches lengths of another cut than samples have: documents end at a sample's end, too."""
    make_tokens(tmp_path / "tokens")
    values = settings(tmp_path, train__packing="documents")
    config = build_config(values)
    lengths = document_lengths(config, open_data(config)[0], 8)
    assert sum(lengths) == 8 * 16 and min(lengths) >= 1 and max(lengths) <= 16
    assert len(TokenFile(tmp_path / "tokens")) == 60 and len(lengths) > 8
    assert not document_lengths(build_config(settings(tmp_path)), open_data(config)[0])
