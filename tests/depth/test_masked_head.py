"""BERT's ends, a norm behind the embedding and a head of more than a table, on every layout."""

from __future__ import annotations

from typing import Any

import pytest

from megascale.config.schema import Parallel
from megascale.errors import UsageError
from megascale.expand.options import GrowthOptions, Sizes
from megascale.expand.plan import plan_growth
from megascale.expand.smaller import Smaller, smaller_model
from tests.layouts import Case, tiny
from tests.test_layouts import assert_equal

BERT: dict[str, Any] = {
    "family": "encoder",
    "norm": "layernorm",
    "residual": "post",
    "position": "learned",
    "ffn": "gelu",
    "bias": True,
    "num_kv_heads": 4,
    "embedding_norm": True,
    "mlm_head": True,
}
LAYOUTS: dict[str, tuple[int, Parallel, dict[str, Any]]] = {
    "tp": (2, Parallel(tp=2), {"tie_embeddings": True}),
    "tp sequence x zero3 x recompute": (4, Parallel(tp=2, tp_sequence=True, dp_shard=2, recompute="full"), {}),
    "pipeline, tied": (2, Parallel(pp=2, pp_schedule="zbv"), {"tie_embeddings": True, "num_layers": 4}),
    "layered": (2, Parallel(dp_shard=2, accumulation="layered"), {"tie_embeddings": True}),
    "layered, dyt": (2, Parallel(dp_shard=2, accumulation="layered"), {"norm": "dyt", "residual": "pre"}),
    "cp": (2, Parallel(cp=2), {"ffn": "swiglu", "norm": "rmsnorm", "bias": False}),
}


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_ends_of_bert_equal_one_process(layout: str) -> None:
    """Catches a bias whose rows are not cut as the table's are or that padding takes part in, a norm on another stage than its embedding,
    a dense layer whose gradient is a share where tokens are cut, and a weight gradient that is put off and never made.
    """
    ranks, parallel, changes = LAYOUTS[layout]
    assert_equal(Case(tiny(**{**BERT, **changes}), parallel, packed=layout == "tp"), ranks)


@pytest.mark.parametrize("key", ["embedding_norm", "mlm_head"])
def test_other_sizes_are_refused(key: str) -> None:
    """Catches a growth that copies ends whose dimensions it does not know."""
    model = tiny(**{key: True})
    with pytest.raises(UsageError, match=f"model.{key} is set"):
        plan_growth(model, 12, Sizes(hidden_size=48), GrowthOptions())
    with pytest.raises(UsageError, match=f"model.{key} is set"):
        smaller_model(model, Smaller(num_layers=1))
