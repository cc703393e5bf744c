"""What a start says about the kernels of attention, without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megascale.config.load import build_config
from megascale.train.attention_kernels import attention_kernels
from tests.layouts import tiny

SINK, CAP = {"attention_sink": "learned"}, {"attention_softcap": 2.0}


@pytest.mark.parametrize(
    ("model", "others", "on_cpu", "on_gpu"),
    [
        ({}, {}, "blocks of torch products", "cuDNN"),
        ({}, {"parallel": {"cp": 2}}, "torch's flash kernel", "cuDNN"),
        (SINK, {}, "torch's flash kernel", "cuDNN"),
        (CAP, {}, "tiles in plain torch", "FlexAttention"),
        (SINK | {"head_dim": 12}, {}, "torch's flash kernel", "FlexAttention"),
        ({}, {"train": {"packing": "documents"}}, "tiles in plain torch", "FlexAttention"),
        (
            {"kinds": {"a": SINK, "b": CAP}, "pattern": ["a", "b"]},
            {},
            "torch's flash kernel and tiles in plain torch",
            "cuDNN and FlexAttention",
        ),
        (SINK | {"position": "relative"}, {}, "torch with whole scores", "torch with whole scores"),
    ],
)
def test_the_start_names_the_kernels(model: Any, others: Any, on_cpu: str, on_gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a start that announces a kernel which these layers do not take."""
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91501)
    values = {
        "model": {**tiny(**{"head_dim": 8} | model).model_dump(mode="json")},
        "data": {"train": "x"},
        "precision": {"compute": "bf16"},
    }
    values |= {"train": {"steps": 1, **others.get("train", {})}, "parallel": others.get("parallel", {})}
    found = [attention_kernels(build_config(values), torch.device(device)) for device in ("cpu", "cuda")]
    assert found == [on_cpu, on_gpu]
