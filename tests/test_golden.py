"""The golden run: what every variant computed when its numbers were written down. A refactoring leaves them as they are.

`python -m tests.test_golden` writes the file anew, for a change that is meant to move numbers; say why in the commit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megascale.config.schema import Delta, Matformer, Moe, Moeut, Optim, Spacetime, Tokenformer
from tests.layouts import Case, tiny, train

FILE = Path(__file__).parent / "golden" / "losses.json"
# Relative. Weights are drawn in fp32, whose logarithms and cosines another processor rounds otherwise (3.5e-8 of a loss); three steps
# of Adam make up to 2.3e-6 of it. On one processor a refactoring leaves every bit: write the file anew and compare.
BOUND = 1e-5

EXPERTS: dict[str, Any] = {"num_experts": 4, "top_k": 2, "ffn_size": 16}
SCHEMES = ("post", "res_post", "deepnorm", "branchnorm", "deepscale", "deepscale_post", "subln", "layerscale", "parallel")
CASES: dict[str, Case] = {
    "pre": Case(tiny()),
    **{scheme: Case(tiny(residual=scheme, branchnorm_period=2 if scheme == "branchnorm" else None)) for scheme in SCHEMES},
    "unit scaling": Case(tiny(residual="mus", mus_tau=0.3, num_kv_heads=4)),
    "layernorm": Case(tiny(norm="layernorm", bias=True, ffn="gelu", position="learned", tie_embeddings=True)),
    "dyt": Case(tiny(norm="dyt", ffn="relu", position="alibi", sliding_window=5)),
    "xpos": Case(tiny(position="xpos", qk_norm=True, dropout=0.2), packed=True),
    "relative": Case(tiny(position="relative", relative_buckets=6, relative_distance=7, ffn="geglu_tanh", qk_norm="width")),
    "bitlinear": Case(tiny(linear="bitlinear")),
    "tokenformer": Case(tiny(linear="tokenformer", tokenformer=Tokenformer(tokens=8))),
    "matformer": Case(tiny(matformer=Matformer(sizes=(8, 16), train="sum"))),
    **{router: Case(tiny(moe=Moe(**EXPERTS, router=router))) for router in ("topk_softmax", "softmax_topk", "sigmoid", "sigma", "xmoe")},
    "bias balance": Case(tiny(moe=Moe(**EXPERTS, balance="bias", num_shared=1, capacity_factor=1.0))),
    "grouped experts": Case(
        tiny(moe=Moe(**EXPERTS, router="sigmoid", balance="bias", sequence_loss=0.1, groups=2, top_groups=1, routed_scale=2.5))
    ),
    "clamped experts": Case(
        tiny(
            ffn="swiglu_clamped",
            moe=Moe(**EXPERTS, expert_bias=True, router_bias=True, num_shared=1, shared_gate=True, balance_over="batch"),
        )
    ),
    "moeut": Case(tiny(num_kv_heads=4, moe=Moe(**EXPERTS, router="sigma", balance="entropy"), moeut=Moeut(attention_experts=4))),
    "encoder": Case(tiny(family="encoder", position="learned", embedding_norm=True, mlm_head=True, ffn="gelu_tanh")),
    "encoder decoder": Case(tiny(family="encoder_decoder", encoder_layers=1)),
    "spacetime": Case(
        tiny(family="spacetime", vocab_size=None, spacetime=Spacetime(shape=(4, 4), patch=(1, 2), channels=2), num_kv_heads=4), seq_len=8
    ),
    "lion": Case(tiny(), optim=Optim(name="lion", lr=1e-4)),
    "muon": Case(tiny(), optim=Optim(name="muon", lr=1e-3)),
    "schedule_free": Case(tiny(), optim=Optim(name="schedule_free", lr=1e-3, decay="constant")),
    "gated delta": Case(tiny(attention="gated_delta", delta=Delta(key_heads=2, value_heads=4, key_dim=6, value_dim=5)), packed=True),
}


def outcome(name: str) -> dict[str, list[float]]:
    """Losses and gradient norms of three steps."""
    found = train(CASES[name])
    return {key: found[key] for key in ("loss", "norm")}


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_as_they_were(name: str) -> None:
    """Catches a refactoring that moves a number of any variant, also where every layout moves alike."""
    golden = json.loads(FILE.read_text())
    assert golden.keys() == CASES.keys()
    for key, values in outcome(name).items():
        assert values == pytest.approx(golden[name][key], rel=BOUND)


if __name__ == "__main__":
    FILE.write_text(json.dumps({name: outcome(name) for name in CASES}, indent=1) + "\n")
