"""Multi-token prediction: against a loop over tokens, and on every product of axes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megascale.config.schema import Parallel
from megascale.model.ahead import targets_ahead
from megascale.model.decoder import Decoder
from megascale.train.build import build_engine
from megascale.train.engines.engine import backward
from tests.layouts import CPU, Case, build, fake_batch, tiny, whole
from tests.test_layouts import assert_equal

MODEL = tiny(mtp_depth=2, num_kv_heads=4)
TIED = tiny(
    mtp_depth=1,
    tie_embeddings=True,
    position="learned",
    dropout=0.2,
    embedding_norm=True,
    moe={"num_experts": 4, "top_k": 2, "ffn_size": 16},
    kinds={"near": {"sliding_window": 5}, "far": {}},
    pattern=["near", "far"],
)
LAYOUTS: dict[str, tuple[int, Parallel]] = {
    "zero3": (2, Parallel(dp_shard=2, recompute="full")),
    "ddp": (2, Parallel(engine="ddp")),
    "tp": (2, Parallel(tp=2)),
    "tp sequence x pp": (4, Parallel(tp=2, tp_sequence=True, pp=2)),
    "ring x pp": (4, Parallel(cp=2, pp=2, recompute="selective")),
    "ulysses x ep": (2, Parallel(cp=2, cp_method="ulysses", ep=2)),
    "zbv": (2, Parallel(pp=2, pp_schedule="zbv")),
    "layered": (2, Parallel(accumulation="layered")),
}


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_axis_equals_one_process(layout: str) -> None:
    """Catches an embedding that the last stage reads and does not give its gradient back, tokens that are shifted within a rank's part of
    a sequence, and losses that a schedule drops.
    """
    ranks, parallel = LAYOUTS[layout]
    model = TIED if layout in ("tp sequence x pp", "ring x pp", "ulysses x ep", "layered") else MODEL
    assert_equal(Case(model, parallel, packed=True, steps=2), ranks)


def test_against_a_loop_over_tokens() -> None:
    """Catches a module that sees or predicts a token too early or too late, predictions across documents, and a weight that is not the
    mean over depths.
    """
    case = Case(MODEL, packed=True, batch=2, micro_batch=2)
    built = build(case, 1)
    model = built.model
    assert isinstance(model, Decoder)
    batch = fake_batch(case, [0, 1])
    assert batch.documents is not None and batch.positions is not None
    streams: list[Any] = []
    hook = model.final_norm.register_forward_hook(lambda m, args, out: streams.append(out))  # type: ignore[union-attr]
    scale = 1.0 / batch.valid
    modules, model.mtp = model.mtp, torch.nn.ModuleDict()  # their losses would ride on this one's gradient
    main = model(batch.tokens, batch.targets, batch.documents, batch.positions, scale=scale)
    hook.remove()
    model.mtp = modules
    mask_of = lambda m: model.attention_mask(m, batch.documents, 12, CPU)  # noqa: E731
    (context,) = model.contexts(range(2, 3), batch.tokens, mask_of, batch.positions, None, None)
    table, head = model.embedding.weight, model.head.weight
    losses, stream = [], streams[0]
    for depth in (1, 2):
        ahead: Any = model.mtp[str(depth - 1)]
        rows = []
        for b in range(2):
            for i in range(12):
                token = batch.tokens[b, i + depth] if i + depth < 12 else torch.tensor(0)
                both = torch.cat((ahead.hidden_norm(stream[b, i]), ahead.token_norm(table[token])))
                rows.append(ahead.join.weight @ both)
        stream = ahead.block(torch.stack(rows).view(2, 12, -1), context)
        total = torch.zeros((), dtype=torch.float64)
        for b in range(2):
            for i in range(12 - depth):
                target = int(batch.targets[b, i + depth])
                if target >= 0 and batch.documents[b, i] == batch.documents[b, i + depth]:
                    total = total - F.log_softmax(ahead.norm(stream[b, i]) @ head.T, -1)[target]
        losses.append(total * scale)
    expected = torch.autograd.grad(main + MODEL.mtp_weight / 2 * (losses[0] + losses[1]), list(model.parameters()))
    engine = build_engine(built, case.config, CPU)
    loss = backward(engine, [batch], scale, 1e-3)
    got = whole(built, "local_grad")
    for (name, _), grad in zip(model.named_parameters(), expected):
        torch.testing.assert_close(got[name], grad, rtol=1e-10, atol=1e-14, msg=name)
    assert torch.isclose(loss[0].double(), main.detach().double(), rtol=1e-12)  # what is reported is the next token's alone
    told = [m.metrics.read(m.metrics.flush())["loss"] for m in model.mtp.values()]  # type: ignore[operator, union-attr]
    counts = [int(((targets_ahead(batch.targets, batch.documents, k)) >= 0).sum()) for k in (1, 2)]
    assert told == pytest.approx([float(x.detach()) * batch.valid / n for x, n in zip(losses, counts)], rel=1e-12)
