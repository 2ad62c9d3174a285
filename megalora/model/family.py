"""What a row of the table of families says."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

# Of a decoder layer as transformers writes it: Llama's names, and those that others added.
DECODER: Mapping[str, tuple[str, ...]] = {
    "input_layernorm": ("input_layernorm",),
    "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.q_layernorm": ("self_attn.q_norm",),
    "self_attention.k_layernorm": ("self_attn.k_norm",),
    "self_attention.linear_proj": ("self_attn.o_proj",),
    "pre_mlp_layernorm": ("post_attention_layernorm",),
    "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2": ("mlp.down_proj",),
    "mlp.router": ("mlp.gate",),
    "mlp.experts.linear_fc1": ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"),
    "mlp.experts.linear_fc2": ("mlp.experts.{}.down_proj",),
    "mlp.shared_experts.linear_fc1": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    "mlp.shared_experts.linear_fc2": ("mlp.shared_experts.down_proj",),
    # Of a layer behind the decoder's that predicts one token more.
    "enorm": ("enorm",),
    "hnorm": ("hnorm",),
    "eh_proj": ("eh_proj",),
    "final_layernorm": ("shared_head.norm",),
}
# Only a layer that predicts one token more has it.
PREDICTING = ".eh_proj.weight"
# transformers 5 may store all experts of a layer in one tensor [E, rows, columns].
STACKED: Mapping[str, str] = {
    "mlp.experts.gate_up_proj": "mlp.experts.linear_fc1",
    "mlp.experts.down_proj": "mlp.experts.linear_fc2",
}


# The other way to attend: keys and values, and perhaps queries, pass through a few numbers, their
# latent (DeepSeek-V2). A model has either the fused down projection or the two that it fuses.
LATENT_ATTENTION: Mapping[str, tuple[str, ...]] = {
    "self_attention.linear_q_proj": ("self_attn.q_proj",),
    "self_attention.linear_q_down_proj": ("self_attn.q_a_proj",),
    "self_attention.q_layernorm": ("self_attn.q_a_layernorm",),
    "self_attention.linear_q_up_proj": ("self_attn.q_b_proj",),
    "self_attention.linear_kv_down_proj": ("self_attn.kv_a_proj_with_mqa",),
    "self_attention.kv_layernorm": ("self_attn.kv_a_layernorm",),
    "self_attention.linear_kv_up_proj": ("self_attn.kv_b_proj",),
    "self_attention.linear_qkv_down_proj": ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
}
_HEADS = tuple(f"self_attention.{name}" for name in ("linear_qkv", "q_layernorm", "k_layernorm"))
LATENT_DECODER: Mapping[str, tuple[str, ...]] = {
    **{module: names for module, names in DECODER.items() if module not in _HEADS},
    **LATENT_ATTENTION,
}
# The last parts of the names of an expert's gate, up and down.
type Projections = tuple[str, str, str]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _renamed(name: str, parts: Iterable[tuple[str, str]]) -> str:
    """Return a module's name with the part that is there, if any, replaced."""
    whole = f"{name}."
    for old, new in parts:
        whole = whole.replace(f".{old}.", f".{new}.")
    return whole[:-1]


def without_numbers(name: str) -> tuple[str, list[int]]:
    """Return a module's name with `{}` for each number in it, and these numbers."""
    return _NUMBER.sub("{}", name), [int(number) for number in _NUMBER.findall(name)]


# By identity, so that what is derived from names can be kept for them.
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Names:
    """Hugging Face's names of a model's modules, without `.weight`.

    layer: what the names of a layer's modules start with, `{}` being the layer's number.
    modules: Megatron module of a layer -> the Hugging Face modules whose rows it stacks, in order,
        `{}` being an expert's number. linear_qkv stacks them once for each query group.
    stacked: tensor of all experts of a layer -> the Megatron module whose modules it stacks.
    copies: of the embedding and the unembedding, in a layer that predicts one token more.
    loaded_as: part of modules' names -> what transformers' class has in its place.
    experts_by_parameters: PEFT finds experts by their parameters alone, not by their projections.
    """

    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    unembedding: str = "lm_head"
    layer: str = "model.layers.{}."
    modules: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: DECODER)
    stacked: Mapping[str, str] = field(default_factory=lambda: STACKED)
    copies: tuple[str, str] = ("embed_tokens", "shared_head.head")
    loaded_as: Mapping[str, str] = field(default_factory=dict)
    experts_by_parameters: bool = False

    @property
    def projections(self) -> Projections:
        """Return the last parts of the names of an expert's gate, up and down."""
        gate, up = self.modules["mlp.experts.linear_fc1"]
        [down] = self.modules["mlp.experts.linear_fc2"]
        return _last(gate), _last(up), _last(down)

    def as_loaded(self, name: str) -> str:
        """Return the whole name that transformers' class has for one in files."""
        return _renamed(name, self.loaded_as.items())

    def as_stored(self, name: str) -> str:
        """Return the whole name that files have for one in transformers' class, or in files."""
        return _renamed(name, ((loaded, stored) for stored, loaded in self.loaded_as.items()))

    def in_layer(self, module: str) -> tuple[str, ...]:
        """Return the whole names for a Megatron module, `{}` for the layer and for the expert."""
        return tuple(self.layer + name for name in self.modules[module])


DEFAULT_NAMES = Names()


@dataclass(frozen=True, slots=True)
class Rate:
    """A family of the learning rate rule; exponent: None where the rule was not fitted to it."""

    name: str
    exponent: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """config.json's fields of a mixture of experts, where families differ.

    count: the first of these that is there. size: FFN size of an expert.
    shared_size: FFN size of a shared expert; shared_count: number of shared experts, which are one
        of so many times `size`. Empty where there is none.
    shared_gate: a sigmoid of the hidden state weighs a shared expert's output.
    dense_first: number of layers before the first that has experts; empty where a step and a list
        say which have some.
    kinds: list that says of each layer whether it is "dense" or "sparse", before `dense_first`.
    in_all_layers: no field says which, all have.
    always_normalised: the weights of the chosen experts sum to one; else norm_topk_prob says.
    sigmoid: experts have sigmoid scores and are chosen, perhaps in groups, with a bias
        (DeepSeek-V3); else a softmax of all.
    """

    count: tuple[str, ...] = ("num_experts", "num_local_experts")
    size: str = "moe_intermediate_size"
    shared_size: str = ""
    shared_count: str = ""
    shared_gate: bool = False
    dense_first: str = ""
    kinds: str = ""
    in_all_layers: bool = False
    always_normalised: bool = False
    sigmoid: bool = False


# As DeepSeek-V3's config.json has them, and those that follow it.
SIGMOID_EXPERTS = Experts(
    count=("n_routed_experts", "num_local_experts"),
    shared_count="n_shared_experts",
    dense_first="first_k_dense_replace",
    sigmoid=True,
)

# Arguments of Megatron that decide the computation beside sizes: attention with rotary embeddings,
# RMSNorm, a gated MLP.
LLAMA_LIKE: Mapping[str, str | bool] = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What the models of one `model_type` of config.json have.

    architecture: transformers' class.
    rate: the family of the learning rate rule.
    names: of the weights.
    megatron: arguments of Megatron beside those that follow from the sizes.
    qkv_bias: q, k and v have a bias; qkv_bias_field: of config.json, which says otherwise.
    qk_norm: q and k are normalised per head; qk_norm_field: of config.json, which says otherwise.
    partial_rotary: partial_rotary_factor may say that only a part of a head's features is rotated.
    latent: attention is multi-latent.
    rope_scalings: kinds of scaled rotary embeddings that Megatron has for it.
    prediction_field: of config.json: number of layers that predict one token more each, behind the
        decoder's in the files (multi-token prediction). Empty where there are none.
    window_field: of config.json: the tokens that one attends to, itself and those before it; null
        for all before it. Empty where all do.
    experts: None where all MLPs are dense.
    tied: whether embeddings are tied where config.json does not say.
    defaults: transformers' numbers for fields that config.json has not (null is another thing).
    refused: fields that would change the computation, with the value that is supported.
    """

    model_type: str
    architecture: str
    rate: Rate
    names: Names = DEFAULT_NAMES
    megatron: Mapping[str, str | bool] = field(default_factory=lambda: LLAMA_LIKE)
    qkv_bias: bool = False
    qkv_bias_field: str = ""
    qk_norm: bool = False
    qk_norm_field: str = ""
    partial_rotary: bool = False
    latent: bool = False
    rope_scalings: tuple[str, ...] = ("llama3",)
    prediction_field: str = ""
    window_field: str = ""
    experts: Experts | None = None
    tied: bool = False
    defaults: Mapping[str, float] = field(default_factory=dict)
    refused: Mapping[str, object] = field(default_factory=dict)
