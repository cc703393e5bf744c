"""The lowering benchmark, as far as it runs without torch's CUDA wheel: its graphs, its floor, and what it says where it cannot run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import lower
from benchmarks.gpu.lowering import device
from benchmarks.gpu.lowering.floor import floor_of
from benchmarks.gpu.lowering.registers import KERNEL, resources
from tests.ranks import fresh_process

N = 64 * 64 * 4  # bytes of a matrix


def traced(function: Any, inputs: int) -> torch.fx.Graph:
    from torch.fx.experimental.proxy_tensor import make_fx

    shapes = [torch.zeros(64, 64) for _ in range(inputs)]
    return make_fx(function, tracing_mode="fake")(*shapes).graph


def between(x: Tensor, w: Tensor) -> Tensor:
    """Two products; what lies between them can be one kernel, and what follows can read what that kernel wrote, or do it again."""
    h = (x * 2).sin()
    y = torch.mm(h, w).cos()
    return torch.mm(y, w) + h


def late(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The sine may wait for the product, and then x is read once."""
    return torch.mm(x, w) + x, x.sin()


def test_the_floor_is_what_one_kernel_between_calls_moves() -> None:
    """Catches a floor that counts a value which stays in a kernel, one that a better order of kernels would beat, and views as copies."""
    found = floor_of(traced(between, 2))
    # Read x and write h; read the product and write y; read the product and h, or x, and write the sum.
    assert (found.fused, found.calls, found.casts) == ((2 + 2 + 3) * N, 6 * N, 0)
    assert floor_of(traced(late, 2)).fused == 4 * N
    viewed = floor_of(traced(lambda x, w: torch.mm(x.t(), w).view(-1)[:64].relu(), 2))
    assert (viewed.fused, viewed.calls) == (64 * 4 + N, 3 * N)
    wider = torch.ops.prims.convert_element_type
    cast = floor_of(traced(lambda x, w: torch.mm(wider(x, torch.float64), wider(w, torch.float64)), 2))
    assert cast.casts == cast.fused == 2 * 3 * N


def test_machine_code_is_read() -> None:
    """Catches spilled registers that nobody sees, and kernels that are not found in what Inductor writes."""
    said = "Function k: REG:40 STACK:8 SHARED:32 LOCAL:16 CONSTANT[0]:432 TEXTURE:0 SURFACE:0 SAMPLER:0"
    assert resources(said) == {"registers": 40, "spilled": 24}
    assert KERNEL.findall("a = async_compile.triton('k', '''\nimport x\n''', device_str='cuda')\n") == [("k", "import x\n")]


def test_a_missing_wheel_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Catches a traceback, or results of nothing, where torch has no CUDA."""
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    lower.main(names=None, out=tmp_path / "x.json")
    assert "install torch's CUDA wheel" in capsys.readouterr().out and not list(tmp_path.iterdir())
    assert device.missing() is not None
    assert lower.table({"c": {"0: forward": {"fused_kernels": 7, "calls": 9, "fused_bytes": 3e6, "floor_bytes": 2e6}}}).endswith(
        "| c | forward | 7 | 9 | 3 | 2 | 1.50 |"
    )


def graphs_of(name: str) -> dict[str, Any]:
    """Graph → its floor, of a shipped config made narrow."""
    from benchmarks.gpu.lowering.capture import captured

    config = lower.as_on_gpu(name)
    narrow = {"num_layers": 3, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "ffn_size": 96}
    model = config.model.model_copy(update=narrow)
    config = config.model_copy(update={"model": model, "train": config.train.model_copy(update={"seq_len": 32, "micro_batch_size": 1})})
    return {part: {**vars(floor_of(graph.graph)), "runs": graph.meta["runs"]} for part, graph in captured(config).items()}


def test_graphs_are_those_of_a_run() -> None:
    """Catches a block that is not captured whole, attention taken apart, weights that are cast although FSDP2 would gather them so, and
    launches that are counted once for all layers.
    """
    found = fresh_process(graphs_of, "llama-8b", timeout=200)
    assert set(found) == {"0: forward", "0: inference", "0: backward"}
    tokens, d, f, kv = 32, 64, 96, 32
    products = [(d, d), (kv, d), (kv, d), (d, d), (f, d), (f, d), (d, f)]
    moved = sum(2 * (tokens * i + i * o + tokens * o) for o, i in products)
    attention = 2 * tokens * (2 * d + 2 * kv) + 4 * tokens * 4  # and the log of its sums in fp32
    assert 0 <= found["0: forward"]["calls"] - moved - attention < 64, "some numbers of the generator's state come with attention"
    assert all(part["casts"] == 0 for part in found.values())
    assert [found[part]["runs"] for part in ("0: forward", "0: backward")] == [3, 3]


def kept_and_repeated(recompute: str, budget: float | None) -> tuple[int, int, int]:
    """Of a block: bytes kept for backward, and library calls forward and backward."""
    from benchmarks.gpu.lowering import floor
    from benchmarks.gpu.lowering.capture import captured

    config = lower.as_on_gpu("llama-8b")
    narrow = {"num_layers": 1, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "ffn_size": 96}
    model = config.model.model_copy(update=narrow)
    parallel = config.parallel.model_copy(update={"recompute": recompute, "activation_budget": budget})
    train = config.train.model_copy(update={"seq_len": 128, "micro_batch_size": 1})
    graphs = captured(config.model_copy(update={"model": model, "parallel": parallel, "train": train}))
    forward, backward = graphs["0: forward"].graph, graphs["0: backward"].graph
    (output,) = next(iter(forward.find_nodes(op="output"))).args
    kept = [n for n in output[1:] if isinstance(n, torch.fx.Node) and n.op != "placeholder"]
    first, second = (sum(floor.is_call(n) for n in graph.nodes) for graph in (forward, backward))
    return sum(floor.size(n) for n in kept), first, second


def all_kept() -> list[tuple[int, int, int]]:
    return [kept_and_repeated(*mode) for mode in (("none", None), ("selective", None), ("budget", 0.5), ("budget", 0.0))]


def test_what_is_dear_is_not_computed_twice() -> None:
    """Catches a selective policy that repeats a product or attention, and a budget that the compiler does not hear of."""
    none, selective, half, nothing = fresh_process(all_kept, timeout=300)
    forward, backward = none[1:]
    assert (forward, backward) == (7 + 1, 2 * 7 + 1)
    assert selective[1:] == (forward, backward), "nothing of them is repeated"
    assert nothing[0] == 0 and nothing[2] > backward, "only the block's input is kept"
    assert 0.3 * none[0] <= half[0] <= 0.5 * none[0] and backward <= half[2] < nothing[2]


def test_what_torch_calls_dear_is_kept() -> None:
    """Catches an operator that a newer torch counts among the expensive ones, which selective recomputation would repeat."""
    from torch._functorch.partitioners import get_default_op_list

    from megascale.parallel.recompute import KEPT

    unused = {"convolution", "convolution_backward", "upsample_bilinear2d"}
    dear: set[Any] = {packet for packet in get_default_op_list().compute_intensive_ops if packet.__name__ not in unused}
    assert {packet.default for packet in dear} <= KEPT
