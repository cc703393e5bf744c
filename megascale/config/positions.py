"""Positions as rows: the facts that models, rules, generation, growth and formats need. A new combination of these facts is just a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megascale.plugins import with_plugins


@dataclass(frozen=True)
class PositionRow:
    """How tokens know their position. Without any of the first four they do not.

    rotates    pairs of a head's channels rotate with the position (model.rope_theta, rope_scaling, rope_exponents)
    decays     and queries and keys are scaled by distance, counted from the middle of the sequence (XPos)
    table      a learned vector per position is added to the embedding: the table limits the sequence length
    slopes     scores fall with distance, by one slope per head (model.alibi_slopes)
    distances  a learned bias per head and distance bucket (model.relative_buckets, relative_distance); not for context parallelism
    one_way    it only encodes how far back a key is: not for encoders, which also attend to later tokens
    grid       it can encode positions along the dimensions of a grid
    grows      models with it can change their sizes
    megatron   models with it can be converted to and from Megatron
    """

    rotates: bool = False
    decays: bool = False
    table: bool = False
    slopes: bool = False
    distances: bool = False
    one_way: bool = False
    grid: bool = False
    grows: bool = False
    megatron: bool = False


POSITIONS: dict[str, PositionRow] = {
    "rope": PositionRow(rotates=True, grid=True, grows=True, megatron=True),
    "alibi": PositionRow(slopes=True, one_way=True, grows=True),
    "learned": PositionRow(table=True, grid=True, grows=True, megatron=True),
    "xpos": PositionRow(rotates=True, decays=True, one_way=True, grows=True),
    "relative": PositionRow(distances=True),
    "none": PositionRow(grows=True),
}


def positions() -> Mapping[str, PositionRow]:
    return with_plugins("positions", POSITIONS, PositionRow)
