"""The axes of the mesh, a row each: what the ranks of an axis hold, as far as others must know it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple


class AxisRow(NamedTuple):
    """One axis.

    name          the key of `parallel`, and the axis of the mesh
    words         in reports
    other_data    its ranks train on other samples
    other_layers  its ranks hold other layers
    whole_loss    each of its ranks computes the whole loss of its micro-batch, where the ranks of others have parts of it that add up
    """

    name: str
    words: str
    other_data: bool = False
    other_layers: bool = False
    whole_loss: bool = False


# Slowest link first: neighbouring ranks share the axis that talks most.
AXES = (
    AxisRow("pp", "pipeline", other_layers=True),
    AxisRow("dp_replicate", "replicated data", other_data=True),
    AxisRow("dp_shard", "sharded data", other_data=True),
    AxisRow("cp", "context"),
    AxisRow("tp", "tensor", whole_loss=True),
)
NAMES = tuple(axis.name for axis in AXES)
# The same ranks as experts see them: those of one stage and replica in another order, `ep` running faster than `edp`. Where experts are cut
# like the dense weights, both have size one and nothing is different.
EXPERT_AXES = ("edp", "ep")


def data_parts(sizes: Mapping[str, int]) -> int:
    """How many different parts a global batch is cut into."""
    return math.prod(sizes[axis.name] for axis in AXES if axis.other_data)


def data_part(sizes: Mapping[str, int], place: Mapping[str, int]) -> int:
    """Which of these parts the rank at `place` has; the last axis runs fastest."""
    part = 0
    for axis in AXES:
        if axis.other_data:
            part = part * sizes[axis.name] + place[axis.name]
    return part
