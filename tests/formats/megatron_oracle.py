"""megatron-core itself, on CPUs under torchrun: builds a GPT model, loads or saves it, and says its logits.

Run as a program, since it starts processes of its own to write. FOLDER/told.json says what to do:
values, tp, pp, and one of load (a folder of ranks), load_dist (a distributed checkpoint) and nothing; save (names of formats).
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist


def main(folder: Path) -> None:
    told = json.loads((folder / "told.json").read_text())
    # It asks for CUDA where it needs a device or an order; there is none.
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self: self  # type: ignore[method-assign,assignment]
    dist.init_process_group("gloo")
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.transformer.moe import moe_utils

    tensor_parallel.get_cuda_rng_tracker = lambda: SimpleNamespace(fork=nullcontext)  # of dropout, which is off
    moe_utils.te_general_gemm = None  # 0.16.1 looks at it where there is no Transformer Engine to import it from
    parallel_state.initialize_model_parallel(told["tp"], told["pp"])
    model = build(told["values"], parallel_state).eval()
    tp, pp = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    rank = f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if told["pp"] > 1 else "")
    if "load" in told:
        state = torch.load(Path(told["load"]) / rank / "model_optim_rng.pt", weights_only=True)["model"]
        held = {n for n, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
        assert held == state.keys(), held ^ state.keys()
        model.load_state_dict(state, strict=False)  # its _extra_state is of FP8
    elif "load_dist" in told:
        model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), told["load_dist"]), strict=False)
    else:
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.3 * torch.randn_like(parameter))
    if told["pp"] == 1:
        tokens = torch.tensor(told["tokens"])
        length = tokens.shape[1]
        mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
        with torch.no_grad():
            logits = model(tokens, torch.arange(length).expand_as(tokens), mask)
        if dist.get_rank() == 0:
            torch.save(logits, folder / "logits.pt")
    if "ranks" in told["save"]:
        path = folder / "iter_0000007" / rank / "model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        state = dict(model.state_dict_for_save_checkpoint())
        torch.save({"model": state, "checkpoint_version": 3.0, "iteration": 7, "args": Arguments()}, path)
        (folder / "latest_checkpointed_iteration.txt").write_text("7")
    if "dist" in told["save"]:
        (folder / "dist").mkdir(exist_ok=True)
        dist_checkpointing.save(model.sharded_state_dict(), str(folder / "dist"))
    dist.barrier()
    dist.destroy_process_group()


class Arguments:
    """Content of a Megatron checkpoint besides weights: an object of a class that a reader does not have."""

    def __init__(self) -> None:
        self.lr, self.path = 1e-3, Path("/somewhere")


def build(values: dict[str, Any], parallel_state: Any) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    gated, norm = values["gated"], values["norm"]
    config = TransformerConfig(
        num_layers=values["layers"],
        hidden_size=values["hidden"],
        num_attention_heads=values["heads"],
        num_query_groups=values["kv_heads"],
        kv_channels=values["head_dim"],
        ffn_hidden_size=values["ffn"],
        use_cpu_initialization=True,
        normalization=norm,
        gated_linear_unit=gated,
        activation_func=torch.nn.functional.silu if gated else torch.nn.functional.gelu,
        add_bias_linear=norm == "LayerNorm",
        qk_layernorm=values["qk_norm"],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        pipeline_dtype=torch.float32,
        layernorm_epsilon=1e-5,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        **mixture(values["moe"]),
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(
            None if values["moe"] is None else values["moe"]["num_experts"], False, values["qk_norm"], normalization=norm
        ),
        vocab_size=values["rows"],
        max_sequence_length=values["length"],
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=False,
        share_embeddings_and_output_weights=values["tied"],
        position_embedding_type="rope" if values["rope"] else "learned_absolute",
        rotary_base=10000,
    )


def mixture(moe: dict[str, Any] | None) -> dict[str, Any]:
    """A config's settings for experts."""
    if moe is None:
        return {}
    return {
        "num_moe_experts": moe["num_experts"],
        "moe_router_topk": moe["top_k"],
        "moe_ffn_hidden_size": moe["ffn_size"],
        "moe_shared_expert_intermediate_size": moe["num_shared"] * moe["ffn_size"] or None,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
    }


if __name__ == "__main__":
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    main(Path(sys.argv[1]))
