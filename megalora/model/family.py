"""What a row of the table of families says."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megalora.model.decoder_names import DECODER, STACKED

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_MODEL = "model."

# The last parts of the names of an expert's projections: gate, up and down, or up and down.
type Projections = tuple[str, ...]


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
    stacked: tensor of all experts of a layer -> the Megatron module whose modules it stacks, that
        of linear_fc1 first.
    interleaved: tensors of all experts are [experts, in, out], and of their gate and up the
        features alternate, also in biases [experts, out].
    copies: of the embedding and the unembedding, in a layer that predicts one token more.
    loaded_as: part of modules' names -> what transformers' class has in its place.
    experts_by_parameters: PEFT finds experts by their parameters alone, not by their projections.
    joined: module of a layer -> Megatron's names of the parts of its rows, where it has these;
        several have an adapter of their own each there.
    joined_by_head: the parts' rows alternate for each key head, and are not one after the other.
    language: what files may have for `model.`, as that of a part of a multimodal one. written,
        adapted: what files that are written have for it, and adapters of the class.
    beside: what the names of tensors start with that are no part of the language model, and stay
        as they are.
    """

    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    unembedding: str = "lm_head"
    layer: str = "model.layers.{}."
    modules: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: DECODER)
    stacked: Mapping[str, str] = field(default_factory=lambda: STACKED)
    interleaved: bool = False
    copies: tuple[str, str] = ("embed_tokens", "shared_head.head")
    loaded_as: Mapping[str, str] = field(default_factory=dict)
    experts_by_parameters: bool = False
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    joined_by_head: bool = False
    language: str = ""
    written: str = "model."
    adapted: str = "model."
    beside: tuple[str, ...] = ()

    @property
    def projections(self) -> Projections:
        """Return the last parts of the names of an expert's projections, its down one last."""
        linears = ("mlp.experts.linear_fc1", "mlp.experts.linear_fc2")
        return tuple(_last(name) for linear in linears for name in self.modules[linear])

    @property
    def parameters(self) -> tuple[str, str]:
        """Return the last parts of the names of the two tensors of a layer's experts."""
        first, second = self.stacked
        return _last(first), _last(second)

    def as_loaded(self, name: str) -> str:
        """Return the whole name that transformers' class has for one in files."""
        return _renamed(name, self.loaded_as.items())

    def as_stored(self, name: str) -> str:
        """Return the whole name that files of the language model alone have, whoever named it."""
        renamed = ((loaded, stored) for stored, loaded in self.loaded_as.items())
        return _renamed(self.as_alone(name), renamed)

    def as_alone(self, name: str) -> str:
        """Return the whole name that the language model alone has for one of a multimodal model."""
        if self.language and name.startswith(self.language):
            return f"{_MODEL}{name.removeprefix(self.language)}"
        # What transformers 4 had for the whole language model, its unembedding too.
        return name.removeprefix("language_model.") if self.language else name

    def as_adapted(self, name: str) -> str:
        """Return the whole name that adapters have for one of `as_stored`."""
        is_part = name.startswith(_MODEL)
        return f"{self.adapted}{name.removeprefix(_MODEL)}" if is_part else name

    def is_beside(self, name: str) -> bool:
        """Say whether a tensor is no part of the language model."""
        return name.startswith(self.beside)

    def in_files(self, name: str) -> str:
        """Return the whole name that files that are written have for one of `as_stored`."""
        return self.written + name.removeprefix(_MODEL) if name.startswith(_MODEL) else name

    def in_layer(self, module: str) -> tuple[str, ...]:
        """Return the whole names for a Megatron module, `{}` for the layer and for the expert."""
        return tuple(self.layer + name for name in self.modules[module])

    def parts_in_layer(self, module: str) -> tuple[str, ...]:
        """Return `in_layer`, with the parts of joined modules in place of them."""
        return tuple(
            f"{self.layer}{name}.{part}" if len(parts) > 1 else f"{self.layer}{name}"
            for name in self.modules[module]
            for parts in [self.parts_of(name)]
            for part in parts
        )

    def parts_of(self, name: str) -> tuple[str, ...]:
        """Return Megatron's names of the parts of a module of a layer, one where it says none."""
        return self.joined.get(name, ("",))


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
    hybrid: each layer is of one kind alone, which config.json lists (`model.layer_kinds`).
    epsilon_field: of config.json: what norms add to a mean of squares.
    delta_net: layer_types says which layers are gated delta nets.
    text_type: model_type of its language model alone, which text_config of config.json describes;
        empty where there is no other part.
    rope_scalings: kinds of scaled rotary embeddings that Megatron has for it.
    prediction_field: of config.json: number of layers that predict one token more each, behind the
        decoder's in the files (multi-token prediction). Empty where there are none.
    window_field: of config.json: the tokens that one attends to, itself and those before it; null
        for all before it. Empty where all do.
    window_in_some: layer_types says which layers have that window; where it says nothing, every
        second does, from the first on.
    softmax_offsets: each head may look at a number of its own beside the keys.
    bias: all linears, routers' included, have one.
    clamp_field: of config.json: at which gate and up of an expert are clamped. Empty where not.
    experts: None where all MLPs are dense.
    tied: whether embeddings are tied where config.json does not say.
    defaults: transformers' values for fields that config.json has not (null is another thing).
    refused: fields that would change the computation, with the value that is supported.
    """

    model_type: str
    architecture: str
    rate: Rate
    names: Names = DEFAULT_NAMES
    megatron: Mapping[str, str | bool | float] = field(default_factory=lambda: LLAMA_LIKE)
    qkv_bias: bool = False
    qkv_bias_field: str = ""
    qk_norm: bool = False
    qk_norm_field: str = ""
    partial_rotary: bool = False
    latent: bool = False
    hybrid: bool = False
    epsilon_field: str = "rms_norm_eps"
    delta_net: bool = False
    text_type: str = ""
    rope_scalings: tuple[str, ...] = ("llama3",)
    prediction_field: str = ""
    window_field: str = ""
    window_in_some: bool = False
    softmax_offsets: bool = False
    bias: bool = False
    clamp_field: str = ""
    experts: Experts | None = None
    tied: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, object] = field(default_factory=dict)

    @property
    def output_gate(self) -> bool:
        """Say whether a gate of its own weighs what each head of attention returns."""
        return bool(self.megatron.get("attention_output_gate"))
