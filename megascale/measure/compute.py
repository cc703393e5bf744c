"""The speed of a rank: measured or known peak rate, and FLOPs per token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megascale.config.schema import Model
from megascale.config.stages import keys_met, pair_costs
from megascale.model.layers import linear
from megascale.model.spec import ParamSpec

# Dense bf16 peaks from the vendors' data sheets, FLOP/s. SXM parts where several exist.
KNOWN_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}
LIMIT = 2.0  # most seconds of a measurement that a run makes by itself
SMALLEST = 128  # smallest product that is tried


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s of this rank: the data sheet's for known GPUs in bf16, else measured."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for key, peak in KNOWN_PEAKS.items():
            if key in name:
                return peak
    return gemm_rate(device, dtype)


def gemm_rate(device: torch.device, dtype: torch.dtype, size: int = 2048, repeats: int = 3, seconds: float = LIMIT) -> float:
    """FLOP/s of the model's own product: the fastest of at least `repeats` square ones.

    Sizes double up to `size` while the next one, with eight times the work, fits into the rest of `seconds`. A smaller size gives a
    slightly lower rate. It is repeated for half of the time, since on a busy machine a few products are not representative.
    """
    begun, rate = time.perf_counter(), 0.0
    drawn = torch.Generator(device).manual_seed(0)  # torch's own generator is the program's that trains
    left = lambda: seconds - (time.perf_counter() - begun)  # noqa: E731
    tried, best = min(SMALLEST, size), float("inf")
    while True:
        a, b = (torch.randn(tried, tried, device=device, generator=drawn).to(dtype) for _ in range(2))
        best = min(best, _fastest(a, b, repeats, left))
        rate = max(rate, 2 * tried**3 / best)
        if tried == size:
            return rate
        if 16 * best <= left():  # the next size's warm-up and one product
            tried, best = min(2 * tried, size), float("inf")
        elif left() < max(seconds / 2, 2 * best):
            return rate


def _fastest(a: Tensor, b: Tensor, repeats: int, left: Callable[[], float]) -> float:
    """Seconds of the fastest product after a warm-up; at least one is measured, more while time is `left`."""
    best = float("inf")
    for i in range(repeats + 1):
        _wait(a.device)
        start = time.perf_counter()
        linear(a, b)
        _wait(a.device)
        best = min(best, time.perf_counter() - start) if i > 0 else best
        if i > 0 and left() < best:
            break
    return best


def flops_per_token(cfg: Model, specs: dict[str, ParamSpec], seq_len: int, source_len: int = 0, documents: Sequence[int] = ()) -> float:
    """Training FLOPs of one token: 6 per weight in a product and per use, 12·L·h·e·s for grouped attention (PaLM, arXiv 2204.02311,
    appendix B).

    An input embedding that is not also the head is in no product. s is the number of keys per query (`keys_met`); on a grid the length of
    the dimension that a layer attends over. For an encoder–decoder a token is a target token, which includes its share of the source: three
    times the forward cost of both stacks.
    """
    if cfg.encoder_layers is not None:
        encoder, decoder, head = pair_costs(cfg, seq_len, source_len)
        return 3 * (cfg.encoder_layers * encoder + cfg.num_layers * decoder + head) / seq_len
    if cfg.spacetime is not None:
        pair = cfg.attention_row.pair_flops(cfg)
        fields, text = cfg.spacetime, cfg.spacetime.text_len or 0
        met = sum(fields.grid[cfg.attended(i)] for i in range(cfg.num_layers))
        products: float = sum(s.numel for s in specs.values() if s.role != "position")
        if text:
            # Texts are looked up; their keys and values are computed once for all patches of a sample.
            assert fields.text_vocab_size is not None
            told = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * cfg.hidden_size
            products -= fields.text_vocab_size * cfg.hidden_size + told * (1 - text / fields.tokens)
        return 6 * products + (3 * pair * met + 12 * cfg.num_layers * cfg.num_heads * cfg.head_dim * text)
    lookup = {"position", "relative"} if cfg.tie_embeddings else {"position", "relative", "embedding"}
    weights = sum(s.numel * s.uses for s in specs.values() if s.role not in lookup)
    kinds = [(len(cfg.layers_of(name)), m) for name, m in cfg.variants.items()]
    if cfg.mtp_depth:  # each module has one more block, and passes the head once more
        weights += cfg.mtp_depth * sum(s.numel for s in specs.values() if s.role == ("embedding" if cfg.tie_embeddings else "head"))
        kinds.append((cfg.mtp_depth, cfg.at_layer(cfg.num_layers - 1)))
    between = 0.0
    for layers, own in kinds:
        row = own.attention_row
        between += layers * (row.pair_flops(own) * keys_met(own, seq_len, documents) + row.token_flops(own))
    return 6 * weights + 3 * between


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
