"""An embedding tied to the head if the first and the last stage are different modules, possibly on different ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megascale.comm.mesh import Axis
from megascale.parallel.model import ParallelModel, Weight


class TiedEmbedding:
    """The first stage owns the weight. The last one has a copy, `tied_copy`, that receives the owner's value before a step and sends its
    gradient after. Does nothing if embedding and head are not tied.
    """

    def __init__(self, model: ParallelModel) -> None:
        self.tied_copy = model.tied_copy
        self.axis: Axis = model.mesh["pp"]
        self.owner: Weight | None = next((w for w in model.weights if w.name == model.model.shared_weight), None)

    @torch.no_grad()
    def broadcast_value(self) -> None:
        owner, tied_copy = self.owner, self.tied_copy
        if owner is not None and tied_copy is not None:
            tied_copy.local.copy_(owner.local)
        elif owner is not None:
            self._send(owner.local, self.axis.size - 1)
        elif tied_copy is not None:
            self._receive(tied_copy.local, 0)

    @torch.no_grad()
    def reduce_grad(self) -> None:
        owner, tied_copy = self.owner, self.tied_copy
        extra = None if tied_copy is None else tied_copy.local_grad
        if owner is not None:
            grad = owner.local_grad
            assert grad is not None
            if extra is None:
                extra = torch.empty_like(grad)
                self._receive(extra, self.axis.size - 1)
            grad += extra
        elif extra is not None:
            self._send(extra, 0)
        if tied_copy is not None:
            tied_copy.parameter.grad = None

    def _send(self, x: Tensor, to: int) -> None:
        assert self.axis.group is not None
        self.axis.traffic.add("tied", "send", x.nbytes)
        dist.send(x.contiguous(), dist.get_global_rank(self.axis.group, to), group=self.axis.group)

    def _receive(self, x: Tensor, source: int) -> None:
        assert self.axis.group is not None
        dist.recv(x, dist.get_global_rank(self.axis.group, source), group=self.axis.group)
        torch.autograd.graph.increment_version(x)  # a message does not count as a change by itself
