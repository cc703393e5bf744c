"""A stand-in for an H200, for code generation only: what Inductor and Triton ask a driver before they write a kernel.

It changes torch and Triton for good, so install it in a process of its own. It needs torch's CUDA wheel, which runs without a driver.
"""

from __future__ import annotations

import types
from typing import Any

import torch

CAPABILITY = (9, 0)
# An H200's properties, as torch.cuda.get_device_properties gives them.
PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H200", type="cuda", major=9, minor=0, multi_processor_count=132, total_memory=141 << 30, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536, shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472, L2_cache_size=50 << 20, gcnArchName="",
    clock_rate=1980000, memory_clock_rate=3201000, memory_bus_width=6144,
)  # fmt: skip


def missing() -> str | None:
    """Why nothing can be lowered here; None if it can."""
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA: install torch's CUDA wheel (it needs no driver for this)"
    try:
        import triton  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except ImportError:
        return "triton is not installed: it comes with torch's CUDA wheel"
    if torch.cuda.is_available():
        return "there is a GPU here: measure on it (python -m benchmarks.gpu.bringup)"
    return None


def install() -> None:
    """Makes torch believe in one H200."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime import triton_helpers
    from torch.utils import _triton
    from triton.backends.compiler import GPUTarget  # type: ignore[import-not-found,unused-ignore]
    from triton.runtime import driver  # type: ignore[import-not-found,unused-ignore]

    cuda: Any = torch.cuda
    cuda.is_available, cuda.device_count, cuda.current_device = (lambda: True), (lambda: 1), (lambda: 0)
    cuda.get_device_properties, cuda.get_device_capability = (lambda device=None: PROPERTIES), (lambda device=None: CAPABILITY)
    cuda.get_device_name, cuda._lazy_init, cuda.synchronize = (lambda device=None: PROPERTIES.name), (lambda: None), (lambda *_: None)
    cuda._get_device_properties = cuda.get_device_properties  # bound by name before this
    cuda.set_device, cuda._exchange_device, cuda._maybe_exchange_device = (lambda device: None), (lambda index: 0), (lambda index: 0)
    torch._C._cuda_getArchFlags = lambda: "sm_90"  # type: ignore[attr-defined]
    interface: Any = CudaInterface
    interface.Worker.get_device_properties = staticmethod(lambda device=None: PROPERTIES)
    interface.Worker.current_device = interface.current_device = staticmethod(lambda: 0)
    interface.get_compute_capability = staticmethod(lambda device=None: 90)
    interface.is_available, interface.is_triton_capable = staticmethod(lambda: True), staticmethod(lambda device=None: True)
    interface.raise_if_triton_unavailable = staticmethod(lambda device=None: None)
    _triton.has_triton.cache_clear()
    triton_helpers.set_driver_to_gpu = lambda: None
    target = GPUTarget("cuda", 90, 32)
    driver.set_active(
        types.SimpleNamespace(
            get_current_target=lambda: target,
            get_active_torch_device=lambda: torch.device("cuda", 0),
            get_device_interface=lambda: torch.cuda,
            get_current_device=lambda: 0,
            get_current_stream=lambda device=0: 0,
        )
    )
