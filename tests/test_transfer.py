"""Rates that carry over to other widths and depths: the rules, and coordinate checks."""

from __future__ import annotations

from typing import Any

import pytest

from megascale.config.load import build_config
from megascale.config.schema import Config, Optim, Parallel, Transfer
from megascale.errors import UsageError
from megascale.optim.rates import rate_of
from tests.coordinates import moved
from tests.layouts import Case, build, tiny
from tests.test_layouts import assert_equal

BOTH = Transfer(width="mup", depth="completep")


def config(**model: Any) -> Config:
    case = Case(tiny(**model), optim=Optim(lr=0.01, transfer=BOTH, base_width=24, base_depth=2))
    return build_config(case.config.plain())


def test_rules_by_role() -> None:
    """Catches a role with another's rate, decay, epsilon, start or factor (μP, table 8; CompleteP, table 1 with α = 1)."""
    base, large = config(), config(hidden_size=96, num_heads=16, num_kv_heads=8, ffn_size=128, num_layers=6)
    assert large.model.head_scale == 0.25 and set(large.model.layer_coefficients or ()) == {(1.0, 1 / 3)}
    assert base.model.head_scale == 1.0 and set(base.model.layer_coefficients or ()) == {(1.0, 1.0)}
    then, now = ({w.name: w.placement.spec for w in build(Case(c.model), 1).weights} for c in (base, large))
    for name, spec in then.items():
        hidden = spec.role in ("query", "key", "value", "attention_out", "up", "gate", "down")
        assert now[name].std == pytest.approx(spec.std * (0.5 if hidden else 1.0)), name
        rates = [rate_of(s, c.optim, c.model, name) for s, c in ((spec, base), (now[name], large))]
        assert rates[1].factor == pytest.approx(rates[0].factor * (0.25 if hidden else 1.0)), name
        assert rates[1].factor * rates[1].decay == pytest.approx(rates[0].factor * rates[0].decay), name
        assert rates[1].eps == pytest.approx(0.25 * (1 / 3 if name.startswith("blocks.") else 1.0)), name
        assert rates[0] == rate_of(spec, Optim(lr=0.01), base.model, name), "the base is as without"


def test_a_model_that_says_otherwise_is_refused() -> None:
    """Catches a factor that the user set and that the transfer replaces in silence; a resolved config reads as itself."""
    resolved = config(num_layers=6)
    assert build_config(resolved.plain()) == resolved
    values = resolved.plain()
    values["model"]["head_scale"] = 0.5
    with pytest.raises(UsageError, match=r"model.head_scale is 0.5, but optim.transfer makes it 1.0: leave model.head_scale out"):
        build_config(values)


def case(width: int, depth: int, transfer: Transfer | None, steps: int = 4) -> Case:
    sizes = {"hidden_size": width, "num_heads": width // 16, "num_kv_heads": width // 16, "ffn_size": 2 * width}
    model = tiny(**sizes, num_layers=depth, init_std=0.03)
    base = {} if transfer is None else {"base_width": transfer.width and 64, "base_depth": transfer.depth and 4}
    optim = Optim(lr=1e-3, weight_decay=0.0, transfer=transfer, **base)
    plain = Case(model, optim=optim, precision="fp32", steps=steps, clip=0.0)
    return Case(plain.config.model, optim=optim, precision="fp32", steps=steps, clip=0.0)


def growth(small: tuple[int, int], large: tuple[int, int], transfer: Transfer | None, where: str) -> float:
    """How much further the same steps move the larger model's activations."""
    near, far = (moved(case(*sizes, transfer))[where] for sizes in (small, large))
    return far / near


@pytest.mark.parametrize(
    ("large", "transfer", "drifts"),
    [
        ((256, 4), Transfer(width="mup"), 4.0),
        ((64, 16), Transfer(depth="completep"), 1.4),
        pytest.param((1024, 4), Transfer(width="mup"), 30.0, marks=pytest.mark.slow),
        pytest.param((64, 64), Transfer(depth="completep"), 6.0, marks=pytest.mark.slow),
    ],
)
def test_activations_move_as_far_at_any_size(large: tuple[int, int], transfer: Transfer, drifts: float) -> None:
    """Catches a missing rule: with the transfer a few steps move the stream as far at any width or depth, and without it further."""
    assert 0.65 < growth((64, 4), large, transfer, "last") < 1.25
    assert growth((64, 4), large, None, "last") > drifts


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("parallel", [Parallel(pp=2), Parallel(tp=2), Parallel(dp_shard=2, accumulation="layered")])
def test_transfer_equals_one_process(parallel: Parallel) -> None:
    """Catches a stage that takes its own layers for the model's."""
    large = config(num_layers=4, hidden_size=48)
    assert_equal(Case(large.model, parallel, large.optim), 2)
