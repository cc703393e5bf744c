"""FP8 for models that are not unit-scaled: scales measured at every product, by torchao (extra); the baseline for static scales."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import Any, Literal

from torch import Tensor

from megascale.errors import UsageError

Recipe = Literal["tensorwise", "rowwise"]


def check_torchao() -> None:
    """Raises UsageError if the package is missing."""
    if importlib.util.find_spec("torchao") is None:
        raise UsageError("precision.fp8 is dynamic but the package torchao is missing: pip install torchao, or use precision.fp8 false")


@lru_cache(maxsize=4)
def linear_config(recipe: Recipe, on_cuda: bool) -> Any:
    """torchao's settings. Without CUDA its products are computed in higher precision from rounded factors."""
    from dataclasses import replace

    from torchao.float8 import Float8LinearConfig

    return replace(Float8LinearConfig.from_recipe_name(recipe), emulate=not on_cuda)


def dynamic_linear(x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
    """x [..., in] · weight [out, in]ᵀ → [..., out], both factors and the gradient scaled by their largest values, per tensor or per row."""
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
    from torchao.float8.float8_training_tensor import LinearMMConfig, ScaledMMConfig

    config = linear_config(recipe, x.is_cuda)
    products = LinearMMConfig(
        *(
            ScaledMMConfig(config.emulate, gemm.use_fast_accum, False, config.pad_inner_dim)
            for gemm in (config.gemm_config_output, config.gemm_config_grad_input, config.gemm_config_grad_weight)
        )
    )
    return matmul_with_hp_or_float8_args.apply(x, weight.to(x.dtype).t(), products, config)  # type: ignore[no-any-return]
