"""An optimizer in host memory for a model on a device: gradients are copied down, new weights back up (ZeRO-Offload, arXiv 2101.06840)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megascale.parallel.model import Weight

if TYPE_CHECKING:
    from megascale.optim.optimizer import Optimizer

HOST = torch.device("cpu")


class Mirror:
    """Copies of the weights' local parts in host memory, for an optimizer to work on."""

    def __init__(self, weights: list[Weight]) -> None:
        self.pairs = [(w, Weight(w.name, nn.Parameter(_like(w.local)), w.placement, w.replicas)) for w in weights if w.local.numel() > 0]
        self.fresh = True  # the weights were drawn or loaded after the last copy

    @property
    def weights(self) -> list[Weight]:
        return [host for _, host in self.pairs]

    @torch.no_grad()
    def bring(self) -> None:
        """Copies gradients to the host, and the first time also the weights. Waits, since the host computes next."""
        for w, host in self.pairs:
            grad = w.local_grad
            if grad is None:
                host.parameter.grad = None
                continue
            if host.parameter.grad is None:
                host.parameter.grad = _like(grad)
            host.parameter.grad.copy_(grad, non_blocking=True)
            if self.fresh:
                host.local.copy_(w.local, non_blocking=True)
        self.fresh = False
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()

    @torch.no_grad()
    def take_back(self) -> None:
        """Copies new weights to the device, queued before the next forward."""
        for w, host in self.pairs:
            w.local.copy_(host.local, non_blocking=True)


class OnHost:
    """`inner` works on host tensors: the weights themselves if offloaded, else `mirror`'s copies."""

    def __init__(self, inner: Optimizer, mirror: Mirror | None) -> None:
        self.inner, self.mirror = inner, mirror

    def step(self, lr: float, factor: Tensor, finite: Tensor) -> None:
        if self.mirror is not None:
            self.mirror.bring()
        self.inner.step(lr, factor.to(HOST), finite.to(HOST))
        if self.mirror is not None:
            self.mirror.take_back()

    def state(self) -> dict[str, dict[str, Tensor]]:
        return self.inner.state()


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.device.type == "cuda")
