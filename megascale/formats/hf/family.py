"""How a Hugging Face family is described: our equivalents of its config keys, the modules that hold our weights, and what many share.

A key of a config.json is mapped (`keys`), must have one of a few values (`fixed`), or does not affect the forward pass (keys.py). Any other
key is refused by name: a model that is read half is another model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megascale.config.activations import ACTIVATIONS
from megascale.config.schema import Model


@dataclass(frozen=True)
class Key:
    """A key of theirs and ours (`moe.top_k` is inside model.moe). `default`: transformers' value if absent. `values`: theirs → ours.
    `also`: another name that some versions of transformers write. `power`: ours is theirs to that power. `neutral`: theirs if ours is not
    set. `per`: theirs counts in units of this other key of theirs.
    """

    theirs: str
    ours: str
    default: Any = None
    values: Mapping[Any, Any] | None = None
    also: str | None = None
    power: float | None = None
    neutral: Any = None
    per: str | None = None


@dataclass(frozen=True)
class ModuleMap:
    """Their module, below a layer, that holds one of ours; `{expert}` if each expert has its own.

    transposed  weights are [in, out]
    part        ours is the part-th of equal parts of theirs along the output
    fused       theirs holds ours and these modules of ours one after the other along the output, in this order
    by_head     theirs holds these modules of ours head by head: their rows for head 0, those for head 1, …; heads: the key of our model
                that counts these heads
    taps        theirs has a dimension of one element before the last
    paired      outputs of theirs alternate between these two modules of ours
    swapped     halves of its inputs are the other way round
    bank        theirs stacks the matrices of all experts, as ours does
    untied      its second place in models with an untied head; if both are stored, this one counts
    gated       its place in models with a gated feed-forward
    direct      its place in models whose queries are made from the stream itself, not from a latent
    leaves      what follows theirs for one of our leaves, if not a point and the leaf's name
    """

    theirs: str
    transposed: bool = False
    part: int = 0
    fused: tuple[str, ...] = ()
    by_head: tuple[str, ...] = ()
    heads: str = "num_heads"
    taps: bool = False
    paired: tuple[str, ...] = ()
    swapped: bool = False
    bank: bool = False
    untied: str | None = None
    gated: str | None = None
    direct: str | None = None
    leaves: Mapping[str, str] = field(default_factory=dict)

    def stem(self, model: Model) -> str:
        """Its place in this model."""
        if self.gated is not None and model.gated:
            return self.gated
        without = self.direct is not None and model.latent is not None and model.latent.query_rank is None
        return self.direct if without and self.direct is not None else self.theirs

    def named(self, stem: str, leaf: str) -> str:
        return f"{stem}{self.leaves.get(leaf, f'.{leaf}')}"


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    ours    our keys with fixed values for the family; `width_factor`: the embedded tokens are multiplied by √hidden_size
    layer   the prefix of a layer's modules; `inner`: our names → modules in it; `outer`: modules outside layers
    encoder, encoder_inner  the same for the layers of its encoder
    theta   rope_theta if absent
    window  whether a `sliding_window` applies to every layer: always, never, if use_sliding_window is set (asked), or where layer_types
            says so (by_layer); linear: never, and layer_types says which layers have linear attention
    full_every     under by_layer and linear every n-th layer attends to everything if there are no layer_types
    linear         our keys of layers with linear attention, beside the sizes in `keys`; linear_inner: their modules, where they differ
    inert     keys that change nothing in what can be read
    partial   a part of each head may rotate (partial_rotary_factor); `share` if absent
    rope      how positions are said: `truncate`, whether YaRN may leave its range of channels unrounded; `mscale`, DeepSeek's factors on
              amplitude and scores; `nested`, whether layer types have their own
    scaled    its rope_scaling if absent
    spelled   names of rotary keys that are its own
    dense_first    the key that counts the dense layers before those with experts
    branch    the key of a factor on every branch
    same      keys that repeat another one
    quantized    the kinds of quantization_config that are undone on reading
    ahead     our modules of multi-token prediction beside their blocks, which are stored as further layers; ahead_copies: modules there
              that hold a copy of one of our tables
    sliding_theta  under by_layer the rope_theta of the other layers if absent; their positions are never stretched by rope_scaling
    length    the key of the longest sequence, `default_length` if absent
    copies    modules that hold another copy of the embedding
    segments  the table of segment vectors: the first is added to every position; exports write zeros, since ours has none
    unused    prefixes of tensors that do not affect logits: they are skipped, with a note
    also      other architectures: with more than the language model, or under an old name
    """

    model_type: str
    architecture: str
    ours: Mapping[str, Any]
    keys: tuple[Key, ...]
    fixed: Mapping[str, tuple[Any, ...]]
    layer: str
    inner: Mapping[str, ModuleMap]
    outer: Mapping[str, ModuleMap]
    prefix: str = "model."
    theta: float | None = 10000.0
    window: str = "never"
    default_window: int | None = None
    full_every: int = 1
    sliding_theta: float | None = None
    width_factor: bool = False
    partial: bool = False
    share: float = 1.0
    rope: tuple[str, ...] = ()
    scaled: Mapping[str, Any] = field(default_factory=dict)
    spelled: Mapping[str, str] = field(default_factory=dict)
    linear: Mapping[str, Any] = field(default_factory=dict)
    linear_inner: Mapping[str, ModuleMap] = field(default_factory=dict)
    dense_first: str | None = None
    branch: str | None = None
    same: Mapping[str, str] = field(default_factory=dict)
    quantized: tuple[str, ...] = ()
    ahead: Mapping[str, ModuleMap] = field(default_factory=dict)
    ahead_copies: Mapping[str, str] = field(default_factory=dict)
    inert: tuple[str, ...] = ()
    length: str = "max_position_embeddings"
    default_length: int | None = None
    copies: tuple[str, ...] = ()
    encoder: str = ""
    encoder_inner: Mapping[str, ModuleMap] = field(default_factory=dict)
    segments: str | None = None
    unused: tuple[str, ...] = ()
    also: tuple[str, ...] = ()


def places(**theirs: str) -> dict[str, ModuleMap]:
    return {ours.replace("__", "."): ModuleMap(name) for ours, name in theirs.items()}


def attention(*norms: str) -> dict[str, ModuleMap]:
    found = {f"attention.{n}": ModuleMap(f"self_attn.{n}_proj") for n in "qkvo"}
    return {**found, **{f"attention.{n}": ModuleMap(f"self_attn.{n}") for n in norms}}


PRE = places(attention_norm="input_layernorm", ffn_norm="post_attention_layernorm")
SWIGLU = places(ffn__gate="mlp.gate_proj", ffn__up="mlp.up_proj", ffn__down="mlp.down_proj")
OUTER = places(embedding="model.embed_tokens", final_norm="model.norm", head="lm_head")
LLAMA = {"ffn": "swiglu", "norm": "rmsnorm", "bias": False, "residual": "pre", "position": "rope", "qk_norm": False}
GPT = {"norm": "layernorm", "bias": True, "residual": "pre", "position": "learned", "qk_norm": False}
SIZES = (
    Key("vocab_size", "vocab_size"),
    Key("hidden_size", "hidden_size"),
    Key("num_hidden_layers", "num_layers"),
    Key("num_attention_heads", "num_heads"),
    Key("num_key_value_heads", "num_kv_heads"),
    Key("head_dim", "head_dim"),
    Key("intermediate_size", "ffn_size"),
    Key("initializer_range", "init_std", 0.02),
    Key("tie_word_embeddings", "tie_embeddings", False),
)
EPS6, EPS5 = Key("rms_norm_eps", "norm_eps", 1e-6), Key("rms_norm_eps", "norm_eps", 1e-5)
# Their names of activations → ours.
PLAIN_FFN = {theirs: ours for ours, row in ACTIVATIONS.items() for theirs in row.hf}
T5_FFN = {theirs: ours for ours, row in ACTIVATIONS.items() for theirs in (*row.hf, *row.hf_gated)}
ACT: Mapping[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish")}
NO_BIAS: Mapping[str, tuple[Any, ...]] = {**ACT, "attention_bias": (False,)}
