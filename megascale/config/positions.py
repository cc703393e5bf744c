"""Positions as rows: what models, rules, generation, growth and formats ask of them. A new combination of what is here is a row alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megascale.plugins import with_plugins


@dataclass(frozen=True)
class PositionRow:
    """How tokens know where they stand; without any of the first four they do not.

    rotates    pairs of a head's channels turn by the token's place (model.rope_theta, rope_scaling, rope_exponents)
    decays     and queries and keys are scaled by their distance, counted from the middle of the sequence (XPos)
    table      a learned vector for each place is added to the embedding: no sequence is longer than the table
    slopes     scores fall with the distance, by a slope for each head (model.alibi_slopes)
    distances  a learned bias for each head and bucket of distances (model.relative_buckets, relative_distance); not for context parallelism
    one_way    it tells only how far back a key is: not for encoders, whose tokens also look ahead
    grid       it can tell places along the dimensions of a grid
    grows      sizes of models with it can change
    megatron   weights of models with it are exchanged with Megatron
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
}


def positions() -> Mapping[str, PositionRow]:
    return with_plugins("positions", POSITIONS, PositionRow)
