"""A rank's imports before its first step, and that its shortcuts change no bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from megascale.comm.graphs import outside_graphs
from megascale.config.load import to_yaml
from megascale.config.schema import Optim
from megascale.optim.optimizers import AdamW
from megascale.optim.rates import Rate
from tests.runs import make_tokens, settings

ROOT = Path(__file__).resolve().parents[1]
FIRST_STEP = """
import os, sys
from megascale.commands import train
assert "torch" not in sys.modules
from megascale.train.trainer import Trainer
def step(self, *args):
    slow = ["torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.distributed.checkpoint", "torch.distributed.pipelining"]
    slow += ["sympy", "matplotlib", "pyarrow", "transformers", "torch.utils.tensorboard", "megascale.expand.grow"]
    print([name for name in slow if name in sys.modules], flush=True)
    os._exit(0)
Trainer.train_step = step
train.run(sys.argv[1], [])
"""


def test_nothing_slow_before_the_first_step(tmp_path: Path) -> None:
    """Catches an import that every rank, restart and test pays for: the compiler and DTensor alone cost as much as the rest of torch."""
    make_tokens(tmp_path / "tokens")
    (tmp_path / "config.yaml").write_text(to_yaml(settings(tmp_path)))
    command = [sys.executable, "-c", FIRST_STEP, str(tmp_path / "config.yaml")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr


def test_adamw_is_torchs() -> None:
    """Catches an update that is not the bits of torch's class: other rates of groups, a gradient that is absent, a step that is skipped."""
    cfg, random = Optim(lr=0.01, betas=(0.9, 0.97), eps=0.01), torch.Generator().manual_seed(3)
    rates = {"a": Rate(1.0, 0.1, 1.0), "b": Rate(0.5, 0.0, 2.0), "c": Rate(1.0, 0.1, 1.0)}
    ours = {n: torch.randn(5, 7, generator=random) for n in rates}
    theirs = {n: x.clone() for n, x in ours.items()}
    weights: list[Any] = [SimpleNamespace(name=n, local=x, local_grad=None) for n, x in ours.items()]
    groups = [
        {"params": [theirs[n] for n in names], "factor": rates[names[0]].factor, "weight_decay": decay, "eps": cfg.eps * eps}
        for names, decay, eps in ((["a", "c"], 0.1, 1.0), (["b"], 0.0, 2.0))
    ]
    torchs: Any = torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, fused=True)
    mine = AdamW(weights, cfg, rates, cast(Any, None))  # of its elementwise rule no mesh is asked
    for step in range(4):
        for w in weights:
            absent = step == 1 and w.name == "c"
            w.local_grad = None if absent else torch.randn(5, 7, generator=random)
            theirs[w.name].grad = None if absent else w.local_grad.clone()
        finite, lr = torch.tensor(step != 2), 0.01 * (step + 1)
        for group in torchs.param_groups:
            group["lr"] = lr * group["factor"]
        torchs.found_inf, torchs.grad_scale = (~finite).to(torch.float32), None
        torchs.step()
        mine.step(lr, torch.tensor(1.0), finite)
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert mine.state()["step"] == {"a": 3.0, "b": 3.0, "c": 2.0}


def test_outside_graphs() -> None:
    """Catches an exchange that the compiler takes into a graph, and one that it cannot call."""
    traced: list[bool] = []

    @outside_graphs
    def exchange(x: torch.Tensor) -> torch.Tensor:
        traced.append(torch.compiler.is_compiling())
        return x + len(traced) * 0

    from megascale.model.ops.compiled import compile_static

    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = compile_static(lambda x: exchange(x * 2) * 3, backend=backend)
    for _ in range(2):
        assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 6.0))
    assert traced == [False, False] and len(graphs) == 2, "one graph before the exchange and one behind it"
