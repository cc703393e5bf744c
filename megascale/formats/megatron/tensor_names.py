"""Tensor maps between our weights and a GPT model of megatron-core, whole or split over tensor and pipeline ranks.

Rows of linear_qkv are grouped by KV head: its queries, its key, its value. A gated linear_fc1 has the gate's rows first. Embedding and head
have padding rows at the end, so that ranks hold equal parts. Experts are separate modules (sequential) or numbered weights of one
(grouped), and an additional dimension in distributed checkpoints.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megascale.config.attentions import attentions
from megascale.config.norms import norms
from megascale.config.positions import positions
from megascale.config.residuals import residuals
from megascale.config.routers import routers
from megascale.config.schema import Model, Moe
from megascale.config.stages import has_experts
from megascale.config.support import shown
from megascale.errors import UsageError
from megascale.formats.shapes import MODEL
from megascale.formats.tensor_maps import Sizes, TensorMap

# Norms are fused into the following product with Transformer Engine, and separate modules without it; before experts always separate, but a
# distributed checkpoint from a model without it (dist_local) names them as if fused.
FUSED = {"attention_norm": "self_attention.linear_qkv.layer_norm_", "ffn_norm": "mlp.linear_fc1.layer_norm_"}
NORMS = {
    "te": {**FUSED, "sparse": "pre_mlp_layernorm."},
    "local": {"attention_norm": "input_layernorm.", "ffn_norm": "pre_mlp_layernorm.", "sparse": "pre_mlp_layernorm."},
    "dist_local": {**FUSED, "sparse": FUSED["ffn_norm"]},
}
EXPERT = {"sequential": "mlp.experts.local_experts.{expert}.{product}.weight", "grouped": "mlp.experts.{product}.weight{expert}"}
OF_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")
TIED_COPY = "output_layer.weight"  # copy of the embedding on the last of several pipeline ranks


@dataclass(frozen=True)
class Cut:
    """The ranks over which a model is split; `spec`: kind of norm modules; `rows` of the padded vocabulary over all ranks; `experts`:
    sequential or grouped.
    """

    tp: int
    pp: int
    spec: str
    rows: int
    experts: str = "sequential"


def rank_name(tp: int, pp: int, cut: Cut) -> str:
    """A rank's folder."""
    return f"mp_rank_{tp:02d}" if cut.pp == 1 else f"mp_rank_{tp:02d}_{pp:03d}"


def _exchanged(rows: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a table's rows that megatron-core has."""
    return tuple(name for name, row in rows.items() if row.megatron)


def check_model(model: Model, cut: Cut) -> None:
    """Raises UsageError for a model that megatron-core's GPT model does not support, or that cannot be split so."""
    wanted: dict[str, tuple[Any, ...]] = {
        "family": ("decoder",), "residual": _exchanged(residuals()), "attention": _exchanged(attentions()),
        "linear": ("dense",), "norm": _exchanged(norms()),
        "moeut": (None,), "position": _exchanged(positions()), "qk_norm": (False, True), "attention_scale": (None,), "head_scale": (None,),
        "layer_coefficients": (None,), "norm_eps_of": ({},), "rope_exponents": (None,), "ffn_sizes": (None,), "vocab_enabled": (None,),
        "kinds": ({},), "mtp_depth": (0,), "attention_bias": (None,), "rope_fraction": (1.0,), "rope_interleaved": (False,),
        "embedding_factor": (None,), "attention_sink": (None,), "attention_softcap": (None,), "attention_gate": (None,),
        "logit_softcap": (None,),
    }  # fmt: skip
    for key, allowed in wanted.items():
        value = getattr(model, key)
        if value not in allowed:
            said = " or ".join("none" if v == {} else str(v) for v in allowed)
            raise UsageError(f"model.{key} is {shown(value)!r}, but megatron-core's GPT model needs {said}: use Hugging Face's format")
    if model.bias != model.norm_row.bias:
        raise UsageError(
            f"model.norm is {model.norm} and model.bias is {model.bias}, but megatron-core's LayerNorm has a bias and its RMSNorm none: "
            "exchange models with both or neither"
        )
    if model.moe is not None and not model.moe.router_row.megatron:
        known = ", ".join(_exchanged(routers()))
        raise UsageError(f"model.moe.router is {model.moe.router}, but megatron-core has the weights of {known}: use one of them")
    for key in ("router_bias", "expert_bias", "shared_gate", "balance_over") if model.moe is not None else ():
        value = getattr(model.moe, key)
        if value != Moe.model_fields[key].default:
            raise UsageError(f"model.moe.{key} is {value!r}, but Megatron's format has no such tensor here: use Hugging Face's format")
    sizes = {"num_kv_heads": model.num_kv_heads}
    if model.moe is not None:
        sizes["moe.ffn_size"] = model.moe.ffn_size or 0
    if model.moe is None or model.moe.every > 1:
        sizes["ffn_size"] = model.ffn_size
    for key, size in sizes.items():
        if size % cut.tp:
            raise UsageError(f"model.{key} is {size} but the weights are split over {cut.tp} tensor ranks: choose a divisor")
    if model.num_layers % cut.pp:
        raise UsageError(f"model.num_layers is {model.num_layers} but the weights are split over {cut.pp} pipeline ranks: choose a divisor")


def rank_links(model: Model, seq_len: int, cut: Cut) -> tuple[list[TensorMap], list[TensorMap]]:
    """Maps to the tensors of all ranks, named `mp_rank_…/name`; and maps of the copies on further ranks."""
    links: list[TensorMap] = []
    copies: list[TensorMap] = []
    per_stage = model.num_layers // cut.pp
    d = model.hidden_size

    def everywhere(ours: str, shape: Sizes, theirs: str, pp: int) -> None:
        for tp in range(cut.tp):
            link = TensorMap(
                MODEL + ours, (0,) * len(shape), shape, f"{rank_name(tp, pp, cut)}/{theirs}", (0,) * len(shape), tuple(range(len(shape)))
            )
            (copies if tp else links).append(link)

    def table(ours: str, theirs: str, pp: int, into: list[TensorMap]) -> None:
        assert model.vocab_size is not None
        part = cut.rows // cut.tp
        for tp in range(cut.tp):
            rows = min(part, model.vocab_size - tp * part)
            if rows > 0:
                into.append(TensorMap(MODEL + ours, (tp * part, 0), (rows, d), f"{rank_name(tp, pp, cut)}/{theirs}", (0, 0), (0, 1)))

    table("embedding.weight", "embedding.word_embeddings.weight", 0, links)
    if model.position_row.table:
        everywhere("position.weight", (seq_len, d), "embedding.position_embeddings.weight", 0)
    leaves = ("weight", "bias") if model.bias else ("weight",)
    for layer in range(model.num_layers):
        pp, at, sparse = layer // per_stage, f"decoder.layers.{layer % per_stage}.", has_experts(model, layer)
        for leaf in leaves:
            for ours, theirs in (("attention_norm", "attention_norm"), ("ffn_norm", "sparse" if sparse else "ffn_norm")):
                everywhere(f"blocks.{layer}.{ours}.{leaf}", (d,), f"{at}{NORMS[cut.spec][theirs]}{leaf}", pp)
            for tp in range(cut.tp):
                rank = rank_name(tp, pp, cut)
                for link in [*_products(model, cut, tp, leaf, sparse), *(_experts(model, cut, tp) if sparse else [])]:
                    links.append(replace(link, ours=f"{MODEL}blocks.{layer}.{link.ours}", theirs=f"{rank}/{at}{link.theirs}"))
        if sparse and model.moe is not None:
            everywhere(f"blocks.{layer}.ffn.router.weight", (model.moe.num_experts, d), f"{at}mlp.router.weight", pp)
            if model.moe.balance == "bias":
                everywhere(f"blocks.{layer}.ffn.router.bias", (model.moe.num_experts,), f"{at}mlp.router.expert_bias", pp)
        if model.qk_norm:
            for n in "qk":
                for leaf in leaves:
                    name = f"{at}self_attention.{n}_layernorm.{leaf}"
                    everywhere(f"blocks.{layer}.attention.{n}_norm.{leaf}", (model.head_dim,), name, pp)
        if model.bias:
            everywhere(f"blocks.{layer}.attention.o.bias", (d,), f"{at}self_attention.linear_proj.bias", pp)
            everywhere(f"blocks.{layer}.ffn.down.bias", (d,), f"{at}mlp.linear_fc2.bias", pp)
    last = cut.pp - 1
    for leaf in leaves:
        everywhere(f"final_norm.{leaf}", (d,), f"decoder.final_layernorm.{leaf}", last)
    if not model.tie_embeddings:
        table("head.weight", "output_layer.weight", last, links)
    elif cut.pp > 1:
        table("embedding.weight", TIED_COPY, last, copies)
    return links, copies


def _experts(model: Model, cut: Cut, tp: int) -> list[TensorMap]:
    """The experts of one layer on one tensor rank, including shared ones. Names are relative to the layer."""
    assert model.moe is not None and model.moe.ffn_size is not None
    d, n = model.hidden_size, model.moe.ffn_size // cut.tp
    parts = (("gate", 0), ("up", n)) if model.gated else (("up", 0),)
    found: list[TensorMap] = []
    for e in range(model.moe.num_experts):
        first, second = (EXPERT[cut.experts].format(expert=e, product=p) for p in ("linear_fc1", "linear_fc2"))
        for part, to in parts:
            found.append(TensorMap(f"ffn.experts.{part}.weight", (e, tp * n, 0), (1, n, d), first, (to, 0), (None, 0, 1)))
        found.append(TensorMap("ffn.experts.down.weight", (e, 0, tp * n), (1, d, n), second, (0, 0), (None, 0, 1)))
    if model.moe.num_shared:
        wide = n * model.moe.num_shared
        for part, to in parts:
            at = to * model.moe.num_shared
            found.append(
                TensorMap(f"ffn.shared.{part}.weight", (tp * wide, 0), (wide, d), "mlp.shared_experts.linear_fc1.weight", (at, 0), (0, 1))
            )
        found.append(TensorMap("ffn.shared.down.weight", (0, tp * wide), (d, wide), "mlp.shared_experts.linear_fc2.weight", (0, 0), (0, 1)))
    return found


def _products(model: Model, cut: Cut, tp: int, leaf: str, sparse: bool) -> list[TensorMap]:
    """The products of one layer on one tensor rank, split along rows; if `leaf` is weight also the output products, split along columns.
    Names are relative to the layer. `sparse`: experts replace the feed-forward.
    """
    d, e, f = model.hidden_size, model.head_dim, model.ffn_size // cut.tp
    group, kv = model.num_heads // model.num_kv_heads, model.num_kv_heads // cut.tp
    found: list[TensorMap] = []

    def rows(ours: str, first: int, count: int, theirs: str, to: int) -> None:
        wide = leaf == "weight"
        size = (count, d) if wide else (count,)
        rest = (0,) if wide else ()
        found.append(TensorMap(f"{ours}.{leaf}", (first, *rest), size, f"{theirs}.{leaf}", (to, *rest), (0, 1) if wide else (0,)))

    for j in range(kv):
        g, to = tp * kv + j, j * (group + 2) * e
        rows("attention.q", g * group * e, group * e, "self_attention.linear_qkv", to)
        rows("attention.k", g * e, e, "self_attention.linear_qkv", to + group * e)
        rows("attention.v", g * e, e, "self_attention.linear_qkv", to + (group + 1) * e)
    gated = model.gated
    if gated and not sparse:
        rows("ffn.gate", tp * f, f, "mlp.linear_fc1", 0)
    if not sparse:
        rows("ffn.up", tp * f, f, "mlp.linear_fc1", f if gated else 0)
    if leaf == "weight":
        wide = model.num_heads * e // cut.tp
        found.append(TensorMap("attention.o.weight", (0, tp * wide), (d, wide), "self_attention.linear_proj.weight", (0, 0), (0, 1)))
        if not sparse:
            found.append(TensorMap("ffn.down.weight", (0, tp * f), (d, f), "mlp.linear_fc2.weight", (0, 0), (0, 1)))
    return found


def stacked(link: TensorMap, layered: bool) -> TensorMap:
    """A map to a single rank → to the tensor of a distributed checkpoint, which stacks all experts of a layer, and if `layered` all layers
    of a kind.
    """
    name = link.theirs.partition("/")[2]
    if not name.startswith("decoder.layers."):
        return replace(link, theirs=name)
    number, _, inner = name.removeprefix("decoder.layers.").partition(".")
    front = [int(number)] if layered else []
    expert = OF_EXPERT.fullmatch(inner)
    if expert is not None:
        inner, front = f"mlp.experts.experts.{expert[2]}", [*front, int(expert[1])]
    axes = tuple(None if a is None else a + len(front) for a in link.axes)
    return replace(link, theirs=f"decoder.layers.{'' if layered else number + '.'}{inner}", to=(*front, *link.to), axes=axes)


def empty_states(model: Model) -> list[str]:
    """Objects that megatron-core requires besides the weights of a distributed checkpoint, one per layer and product: FP8 state."""
    found, n, layered = [], model.num_layers, homogeneous(model)
    for layer in range(n):
        names = ["self_attention.linear_qkv", "self_attention.linear_proj"]
        experts = 0
        if not has_experts(model, layer) or model.moe is None:
            names += ["mlp.linear_fc1", "mlp.linear_fc2"]
        else:
            experts = model.moe.num_experts
            names += ["mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2"] if model.moe.num_shared else []
        prefix = "decoder.layers." if layered else f"decoder.layers.{layer}."
        found += [f"{prefix}{name}._extra_state/shard_{f'{layer}_{n}' if layered else '0_1'}" for name in names]
        for e, product in itertools.product(range(experts), ("linear_fc1", "linear_fc2")):
            at = f"{layer}.{e}_{n}.{experts}" if layered else f"{e}_{experts}"
            found.append(f"{prefix}mlp.experts.experts.{product}._extra_state/shard_{at}")
    return found


def homogeneous(model: Model) -> bool:
    """Whether all layers have the same tensors, so that a distributed checkpoint stacks them."""
    return model.moe is None or model.moe.every == 1
