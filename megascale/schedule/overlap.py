"""DualPipeV's pairs: the forward pass of one micro-batch and the backward pass of another, whose exchanges of experts' rows overlap with
each other's computation (DeepSeek-V3, arXiv 2412.19437, section 3.2.1).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.distributed.pipelining.schedules import OVERLAP_F_B, _wait_batch_p2p
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from megascale.comm.mesh import Traffic
from megascale.comm.turns import Turns


def overlap_pairs(engine: Any, traffic: Traffic, device: torch.device) -> None:
    """Makes torch's runtime run pairs in turns."""
    engine.register_custom_function(OVERLAP_F_B, partial(run_pair, traffic=traffic, device=device))


def run_pair(action: Any, context: Any, traffic: Traffic, device: torch.device) -> None:
    """What torch's runtime does for a forward and a backward pass, in turns. It calls this for a pair, once both messages are there or on
    their way. Where modes watch what a thread does (tracing), one pass runs after the other.
    """
    engine, (forward, backward) = context.schedule_ref, action.sub_actions
    stages = {stage.stage_index: stage for stage in engine._stages}
    for kind, received, neighbour in ((forward, engine.fwd_recv_ops, -1), (backward, engine.bwd_recv_ops, 1)):
        key, stage = (kind.stage_index, kind.microbatch_index), stages[kind.stage_index]
        engine._assert_unsharded(stage)
        end = stage.is_first if neighbour < 0 else stage.is_last
        if not end and stage.stage_index + neighbour not in stages:
            _wait_batch_p2p(received.pop(key))
    passes = partial(_forward, engine, stages, forward, context), partial(_backward, engine, stages, backward)
    if _get_current_dispatch_mode_stack():
        for one in passes:
            one()
        return
    turns = Turns()
    traffic.started = turns.pass_on
    try:
        turns.run(*passes, device)
    finally:
        traffic.started = None


def _forward(engine: Any, stages: dict[int, Any], action: Any, context: Any) -> None:
    stage, i = stages[action.stage_index], action.microbatch_index
    output = stage.forward_one_chunk(i, context.arg_mbs[i], context.kwarg_mbs[i])
    engine._maybe_compute_loss(stage, output, context.target_mbs, i)
    if stage.stage_index + 1 in stages:
        stages[stage.stage_index + 1].set_local_fwd_input(output, i)


def _backward(engine: Any, stages: dict[int, Any], action: Any) -> None:
    stage, i = stages[action.stage_index], action.microbatch_index
    loss = engine._maybe_get_loss(stage, i) if stage.is_last else None
    engine.backward_counter[stage.stage_index] += 1
    last = engine.backward_counter[stage.stage_index] == engine._n_microbatches
    stage.backward_one_chunk(i, loss=loss, full_backward=True, last_backward=last)
    if stage.stage_index - 1 in stages:
        stages[stage.stage_index - 1].set_local_bwd_input(stage.get_local_bwd_output(i), i)
