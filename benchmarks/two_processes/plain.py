"""The same decoder in plain PyTorch, with torch's own engines used as their tutorials do: what ours is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from megascale.config.schema import Model


class Block(nn.Module):
    def __init__(self, d: int, f: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.n1, self.n2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(d, f, bias=False), nn.Linear(f, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.n1(x)
        q, k, v = (part(h).unflatten(2, (-1, self.head_dim)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(turn(q, cos, sin), turn(k, cos, sin), v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.n2(x))))


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Plain(nn.Module):
    def __init__(self, cfg: Model) -> None:
        super().__init__()
        assert cfg.vocab_size
        self.head_dim = cfg.head_dim
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.blocks = nn.ModuleList(Block(cfg.hidden_size, cfg.ffn_size, cfg.head_dim) for _ in range(cfg.num_layers))
        self.norm, self.head = nn.RMSNorm(cfg.hidden_size), nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        freq = 10000.0 ** -(torch.arange(0, self.head_dim, 2) / self.head_dim)
        angle = torch.arange(tokens.shape[1])[:, None] * freq
        for block in self.blocks:
            x = block(x, angle.cos(), angle.sin())
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def wrap(model: Plain, axis: str) -> nn.Module:
    """`axis`: none, ddp, fsdp2 or tp over all ranks."""
    if axis == "none":
        return model
    if axis == "ddp":
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    if axis == "tp":
        plan = {n: ColwiseParallel() for n in ("q", "k", "v", "up")} | {n: RowwiseParallel() for n in ("o", "down")}
        for block in model.blocks:
            parallelize_module(block, mesh, plan)  # type: ignore[arg-type]
        return model
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model
