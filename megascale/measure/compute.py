"""How fast is a rank: measured or known peak, and the FLOPs that a token costs."""

from __future__ import annotations

import time

import torch

from megascale.config.schema import Model
from megascale.config.stages import pair_costs
from megascale.model.spec import ParamSpec

# Dense bf16 peaks from the vendors' data sheets, FLOP/s. SXM parts where several exist.
KNOWN_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of this rank at its best: the data sheet for known GPUs in bf16, else a measured product."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for key, peak in KNOWN_PEAKS.items():
            if key in name:
                return peak
    return gemm_rate(device, dtype)


def gemm_rate(device: torch.device, dtype: torch.dtype, size: int = 2048, repeats: int = 3) -> float:
    """FLOP/s of the fastest of `repeats` square products after one warm-up."""
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for i in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, b)
        _wait(device)
        if i > 0:
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def flops_per_token(cfg: Model, specs: dict[str, ParamSpec], seq_len: int, source_len: int = 0) -> float:
    """Training FLOPs of one token: 6 for each weight in a product and use, 12·L·h·e·s for attention (PaLM, arXiv 2204.02311, appendix B).

    An input embedding that is not also the head takes part in no product. Attention is counted in full although causal masks skip half,
    as the field does; on a grid s is the length along the dimension that a layer attends over. Of an encoder–decoder a token is one of the
    target, which bears its share of the source: three times what both stacks cost forward.
    """
    assert cfg.head_dim is not None
    if cfg.encoder_layers is not None:
        encoder, decoder, head = pair_costs(cfg, seq_len, source_len)
        return 3 * (cfg.encoder_layers * encoder + cfg.num_layers * decoder + head) / seq_len
    if cfg.spacetime is not None:
        fields, text = cfg.spacetime, cfg.spacetime.text_len or 0
        met = sum(fields.grid[cfg.attended(i)] + text for i in range(cfg.num_layers))
        products: float = sum(s.numel for s in specs.values() if s.role != "position")
        if text:
            # Texts are looked up, and their keys and values made once for all patches of a sample.
            assert cfg.num_kv_heads is not None and fields.text_vocab_size is not None
            told = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * cfg.hidden_size
            products -= fields.text_vocab_size * cfg.hidden_size + told * (1 - text / fields.tokens)
        return 6 * products + 12 * cfg.num_heads * cfg.head_dim * met
    lookup = {"position", "relative"} if cfg.tie_embeddings else {"position", "relative", "embedding"}
    weights = sum(s.numel * s.uses for s in specs.values() if s.role not in lookup)
    return 6 * weights + 12 * cfg.num_layers * cfg.num_heads * cfg.head_dim * seq_len


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
