"""Rules about mixtures of experts and MoEUT. Those about their axes are in axes.py."""

from __future__ import annotations

from megascale.config.rules.rule import Rule, changed
from megascale.config.schema import Moe
from megascale.config.stages import has_experts

EXPERT_RULES: tuple[Rule, ...] = (
    Rule(
        "moe_top_k",
        ("model.moe.top_k", "model.moe.num_experts"),
        lambda c, n: c.model.moe is not None and c.model.moe.top_k > c.model.moe.num_experts,
        "top_k is larger than num_experts",
        "choose a smaller top_k or more experts",
    ),
    Rule(
        "moe_groups",
        ("model.moe.groups", "model.moe.top_groups", "model.moe.num_experts"),
        lambda c, n: c.model.moe is not None and not _groups_fit(c.model.moe),
        "a token chooses experts from its top_groups best of several equal groups",
        "set groups and top_groups together, groups to a divisor of num_experts and top_groups to at most groups",
    ),
    Rule(
        "moe_top_groups",
        ("model.moe.top_k", "model.moe.top_groups", "model.moe.groups", "model.moe.num_experts"),
        lambda c, n: c.model.moe is not None and _groups_fit(c.model.moe) and _too_few_in_groups(c.model.moe),
        "top_k is larger than the number of experts in top_groups groups",
        "choose a smaller top_k, more top_groups or fewer groups",
    ),
    Rule(
        "moe_renormalize",
        ("model.moe.renormalize", "model.moe.router"),
        lambda c, n: c.model.moe is not None and c.model.moe.renormalize is not None and c.model.moe.router_row.divides is None,
        "this router does not say what its gates are before and after a division by their sum",
        "leave renormalize out, or use a router such as topk_softmax",
    ),
    Rule(
        "moe_shared_gate",
        ("model.moe.shared_gate", "model.moe.num_shared"),
        lambda c, n: c.model.moe is not None and c.model.moe.shared_gate and not c.model.moe.num_shared,
        "shared_gate multiplies the output of shared experts, and there are none",
        "set num_shared to 1 or more, or shared_gate to false",
    ),
    Rule(
        "moe_balance_over",
        ("model.moe.balance_over", "model.moe.balance", "model.moeut"),
        lambda c, n: (
            c.model.moe is not None and c.model.moe.balance_over == "batch" and (c.model.moe.balance != "loss" or c.model.moeut is not None)
        ),
        "only the balance loss can count the load of the global batch (router biases always do), and MoEUT's layers meet a batch several "
        "times",
        "set balance_over to sequence, or balance to loss in a model without moeut",
    ),
    Rule(
        "moe_sequence_loss",
        ("model.moe.sequence_loss", "model.moe.balance"),
        lambda c, n: c.model.moe is not None and c.model.moe.sequence_loss > 0 and c.model.moe.balance != "bias",
        "sequence_loss stands beside router biases; the weight of other balance losses is aux_loss",
        "set balance to bias, or use aux_loss",
    ),
    Rule(
        "moe_bias",
        ("model.moe", "model.bias"),
        lambda c, n: c.model.moe is not None and c.model.bias,
        "model.bias does not reach experts, whose biases are moe.expert_bias and moe.router_bias",
        "set model.bias to false, and attention_bias, expert_bias and router_bias as the model has them",
    ),
    Rule(
        "moe_sublayer",
        ("model.moe", "model.residual", "model.linear"),
        lambda c, n: c.model.moe is not None and (c.model.residual_row.inner_norms or c.model.linear != "dense"),
        "experts have neither inner norms nor quantized products",
        "use another residual scheme than subln and linear dense, or remove model.moe",
    ),
    Rule(
        "moe_every",
        ("model.moe.every", "model.num_layers"),
        lambda c, n: c.model.has_experts and not any(has_experts(c.model, i) for i in range(c.model.longest_stack)),
        "every n-th layer of the model has experts, if its kind has any, and so no layer would have some",
        "choose a smaller every or another pattern, or remove model.moe",
        whole=True,
    ),
    Rule(
        "moeut_groups",
        ("model.moeut.group_size", "model.num_layers"),
        lambda c, n: c.model.moeut is not None and c.model.num_layers % c.model.moeut.group_size != 0,
        "num_layers must be a multiple of group_size, because whole groups repeat",
        "choose a group_size that divides num_layers",
    ),
    Rule(
        "moeut_top_k",
        ("model.moeut.attention_top_k", "model.moeut.attention_experts"),
        lambda c, n: c.model.moeut is not None and c.model.moeut.attention_top_k > c.model.moeut.attention_experts,
        "attention_top_k is larger than attention_experts",
        "choose a smaller attention_top_k or more attention_experts",
    ),
    Rule(
        "moeut_layers",
        ("model.moeut", "model.moe"),
        lambda c, n: c.model.moeut is not None and (c.model.moe is None or c.model.moe.every > 1),
        "every layer of MoEUT has experts in its feed-forward sublayer",
        "set model.moe with every 1",
    ),
    Rule(
        "moeut_block",
        ("model.moeut", "model.family", "model.norm", "model.residual", "model.num_kv_heads", "model.num_heads", "model.qk_norm"),
        lambda c, n: (
            c.model.moeut is not None
            and (
                c.model.family != "decoder"
                or changed(c.model, "residual", "qk_norm")
                or not c.model.norm_row.plain
                or c.model.num_kv_heads != c.model.num_heads
            )
        ),
        "MoEUT is a decoder with a fixed block: its own norms, and one KV head per query head",
        "set family to decoder, norm to rmsnorm or layernorm, residual to pre and qk_norm to false, and leave num_kv_heads out",
    ),
    Rule(
        "moeut_scores",
        ("model.moeut", "model.position", "model.attention", "model.attention_scale", "model.attention_bias"),
        lambda c, n: (
            c.model.moeut is not None
            and (c.model.position_row.distances or changed(c.model, "attention", "attention_scale", "attention_bias"))
        ),
        "MoEUT has its own attention, without biases and with scores divided by √head_dim",
        "use another position and leave attention, attention_scale and attention_bias out",
    ),
    Rule(
        "moeut_axes",
        ("model.moeut", "parallel.pp", "parallel.accumulation"),
        lambda c, n: c.model.moeut is not None and (c.parallel.pp > 1 or c.parallel.accumulation == "layered"),
        "the layers of a group repeat through the whole depth: every pipeline stage would hold, gather and reduce all of them, and "
        "layered accumulation would gather them once per repeat",
        "use the data axes, tp, cp and ep, with accumulation depth_first",
    ),
)


def _groups_fit(moe: Moe) -> bool:
    if moe.groups is None or moe.top_groups is None:
        return moe.groups is moe.top_groups
    return moe.num_experts % moe.groups == 0 and moe.top_groups <= moe.groups


def _too_few_in_groups(moe: Moe) -> bool:
    return moe.groups is not None and moe.top_groups is not None and moe.top_k > moe.top_groups * (moe.num_experts // moe.groups)
