"""A grown checkpoint as a function of (name, offset, shape): weights, and the optimizer's moments by the same plan with β and β²."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from megascale.checkpoint.index import DTYPES, Index
from megascale.checkpoint.shards import read_slice
from megascale.checkpoint.streaming import Target
from megascale.config.schema.averages import MASS, is_average
from megascale.errors import UsageError
from megascale.expand.apply import element_block
from megascale.expand.plan import Growth
from megascale.expand.stack import unlearned
from megascale.expand.state import counts, powers, state_plan
from megascale.expand.tensors import TensorPlan
from megascale.model.spec import MATRICES


@dataclass(frozen=True)
class GrownTensors:
    """Picklable, so that any number of processes can make the same rectangles. `dtype` of the weights; None: as stored.

    optimizer  fate of its state: transform, reset or drop
    kept_by    the optimizer that kept the state, by its row's name
    """

    growth: Growth
    index: Index
    optimizer: str = "drop"
    dtype: torch.dtype | None = None
    kept_by: str = "adamw"

    @cached_property
    def plans(self) -> dict[str, TensorPlan]:
        return {t.name: t for t in self.growth.tensors}

    @cached_property
    def powers(self) -> dict[str, int | None]:
        return powers(self.kept_by)

    @cached_property
    def counts(self) -> dict[str, torch.dtype]:
        return counts(self.kept_by)

    @cached_property
    def moments(self) -> dict[int, tuple[Growth, dict[str, TensorPlan]]]:
        """Growth plans of the moments, by power of β."""
        found = {}
        for power in sorted({power for power in self.powers.values() if power}):
            growth = state_plan(self.growth, power)
            found[power] = (growth, {t.name: t for t in growth.tensors})
        return found

    def __call__(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        kind, _, rest = name.partition(".")
        if kind == "model":
            plan = self.plans[rest]
            return element_block(self.growth, plan, self.shapes("model."), partial(self.read, "model."), self.dtype_of(plan), offset, shape)
        key, _, weight = rest.partition(".")
        if self.optimizer == "reset":
            return torch.zeros(shape, dtype=self.state_dtype(key, weight))
        if is_average(key):
            return self.average(key, weight, offset, shape)
        if key in self.counts:
            plan = self.plans[weight]
            fresh = plan.inserted or plan.source is None
            return torch.zeros((), dtype=self.counts[key]) if fresh else read_slice(self.index, f"optim.{key}.{plan.source}", (), ())
        power = self.powers[key]
        assert power is not None  # check_state_grows
        if power == 0:
            return self.difference(key, weight, offset, shape)
        growth, plans = self.moments[power]
        prefix = f"optim.{key}."
        dtype = self.state_dtype(key, weight)
        return element_block(growth, plans[weight], self.shapes(prefix), partial(self.read, prefix), dtype, offset, shape)

    def average(self, key: str, weight: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """An average of the weights grows as they do. A weight that has none in the source begins its average at the next step."""
        plan, prefix = self.plans[weight], f"optim.{key}."
        if f"{prefix}{plan.source}" not in self.index.tensors:
            return torch.zeros(shape, dtype=self.state_dtype(key, weight))
        if key.endswith(MASS):
            return self.read(prefix, str(plan.source), (), ())
        return element_block(
            self.growth, plan, self.shapes(prefix), partial(self.read, prefix), self.state_dtype(key, weight), offset, shape
        )

    def difference(self, key: str, weight: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """A difference from the weights grows to that of the grown ones. Fresh weights have none."""
        plan, dtype = self.plans[weight], self.state_dtype(key, weight)
        if plan.inserted or plan.source is None:
            return torch.zeros(shape, dtype=dtype)

        def moved(name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
            weights = self.read("model.", name, offset, shape).to(torch.float64)
            stored = f"optim.{key}.{name}"
            return weights + read_slice(self.index, stored, offset, shape) if stored in self.index.tensors else weights

        def plain(name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
            return self.read("model.", name, offset, shape).to(torch.float64)

        shapes = self.shapes("model.")
        to, at = (element_block(self.growth, plan, shapes, read, torch.float64, offset, shape) for read in (moved, plain))
        return (to - at).to(dtype)

    def read(self, prefix: str, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        return read_slice(self.index, prefix + name, offset, shape)

    def shapes(self, prefix: str) -> dict[str, tuple[int, ...]]:
        return {n.removeprefix(prefix): t.shape for n, t in self.index.tensors.items() if n.startswith(prefix)}

    @cached_property
    def storage(self) -> torch.dtype:
        """The dtype of most of the source's weights."""
        kinds = [t.dtype for n, t in self.index.tensors.items() if n.startswith("model.")]
        return DTYPES[max(set(kinds), key=kinds.count)]

    def dtype_of(self, plan: TensorPlan) -> torch.dtype:
        """The dtype of the source's tensor; new tensors take the model's, with at least fp32 for coefficients and router biases."""
        if self.dtype is not None:
            return self.dtype
        entry = self.index.tensors.get(f"model.{plan.source}") if plan.source else None
        if entry is not None:
            return DTYPES[entry.dtype]
        return torch.promote_types(self.storage, torch.float32) if plan.spec.role in ("coefficient", "bias") else self.storage

    def state_dtype(self, key: str, weight: str) -> torch.dtype:
        if key in self.counts:
            return self.counts[key]
        source = self.plans[weight].source
        entry = self.index.tensors.get(f"optim.{key}.{source}")
        if entry is None:  # a new weight: like the others
            entry = next(t for n, t in self.index.tensors.items() if n.startswith(f"optim.{key}."))
        return DTYPES[entry.dtype]

    def targets(self) -> list[Target]:
        """All tensors to write, in the model's order."""
        found = [Target(f"model.{t.name}", self.dtype_of(t), t.spec.shape) for t in self.growth.tensors]
        if self.optimizer == "drop":
            return found
        for key in self.state_keys():
            for t in self.growth.tensors:
                if self._has_state(key, t):
                    found.append(Target(f"optim.{key}.{t.name}", self.state_dtype(key, t.name), self.state_shape(key, t)))
        return found

    def state_shape(self, key: str, plan: TensorPlan) -> tuple[int, ...]:
        return () if key in self.counts or (is_average(key) and key.endswith(MASS)) else plan.spec.shape

    def state_keys(self) -> list[str]:
        keys = sorted({n.split(".")[1] for n in self.index.tensors if n.startswith("optim.")})
        unknown = [k for k in keys if k not in (*self.powers, *self.counts) and not is_average(k)]
        if unknown or (not keys and (self.powers or self.counts)):
            what = f"holds {unknown[0]}, which is not a state of {self.kept_by}" if unknown else "holds no optimizer state"
            raise UsageError(f"{self.index.folder} {what}: use --optimizer drop")
        return keys

    def _has_state(self, key: str, plan: TensorPlan) -> bool:
        """Whether the optimizer keeps `key` for a weight, as it does for the source's. A new one is a router's: it has what other weights
        besides hidden matrices have, the only distinction that optimizers make.
        """
        if plan.name in self.unlearned:
            return False
        if plan.source is not None and f"model.{plan.source}" in self.index.tensors:
            return f"optim.{key}.{plan.source}" in self.index.tensors
        hidden = plan.spec.role in MATRICES
        return any((t.spec.role in MATRICES) == hidden and f"optim.{key}.{t.source}" in self.index.tensors for t in self.growth.tensors)

    @cached_property
    def unlearned(self) -> frozenset[str]:
        return unlearned(self.growth.target, self.growth.seq_lens[1])

    @cached_property
    def stamp(self) -> str:
        """Identifies the source's content and the plan, so that another growth does not reuse this one's files."""
        digest = hashlib.sha256()
        for name, file in sorted(self.index.files.items()):
            digest.update(f"{name} {file.bytes} {file.crc32}\n".encode())
        for t in self.growth.tensors:
            digest.update(f"{t}\n".encode())
        for name, axis in sorted(self.growth.axes.items()):
            digest.update(name.encode() + axis.source.tobytes() + axis.weight.tobytes())
        digest.update(f"{self.growth.target} {self.growth.seq_lens}".encode())  # in the config but in no tensor
        digest.update(f"{self.growth.symmetry} {self.growth.seed} {self.optimizer} {self.dtype}".encode())
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        return sum(math.prod(t.shape) * t.dtype.itemsize for t in self.targets())
