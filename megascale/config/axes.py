"""The axes of the mesh, one row each: what the ranks of an axis hold, as far as other code needs to know."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple


class AxisRow(NamedTuple):
    """One axis.

    name          the key of `parallel`, and the axis of the mesh
    words         its name in reports
    other_data    its ranks train on different samples
    other_layers  its ranks hold different layers
    whole_loss    each of its ranks computes the whole loss of its micro-batch; the ranks of other axes compute parts that add up
    """

    name: str
    words: str
    other_data: bool = False
    other_layers: bool = False
    whole_loss: bool = False


# Slowest link first: neighbouring ranks share the axis that communicates most.
AXES = (
    AxisRow("pp", "pipeline", other_layers=True),
    AxisRow("dp_replicate", "replicated data", other_data=True),
    AxisRow("dp_shard", "sharded data", other_data=True),
    AxisRow("cp", "context"),
    AxisRow("tp", "tensor", whole_loss=True),
)
NAMES = tuple(axis.name for axis in AXES)
# The same ranks in the order that experts use: those of one stage and replica, with `ep` running faster than `edp`. Both have size one
# where experts are sharded like the dense weights.
EXPERT_AXES = ("edp", "ep")


def data_parts(sizes: Mapping[str, int]) -> int:
    """Number of different parts that a global batch is split into."""
    return math.prod(sizes[axis.name] for axis in AXES if axis.other_data)


def data_part(sizes: Mapping[str, int], place: Mapping[str, int]) -> int:
    """The index of the part that the rank at `place` has; the last axis runs fastest."""
    part = 0
    for axis in AXES:
        if axis.other_data:
            part = part * sizes[axis.name] + place[axis.name]
    return part
