"""The sizes of a model, which exchange, recommendations and launches need."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

# Far above every model that is known: what lies above would be worked through without an end.
MAX_SIZES: Mapping[str, int] = {
    "num_layers": 4096,
    "mtp_num_layers": 4096,
    "hidden_size": 2**20,
    "num_attention_heads": 2**16,
    "num_query_groups": 2**16,
    "kv_channels": 2**16,
    "q_lora_rank": 2**16,
    "kv_lora_rank": 2**16,
    "qk_head_dim": 2**16,
    "qk_pos_emb_head_dim": 2**16,
    "v_head_dim": 2**16,
    "vocab_size": 2**26,
    "ffn_hidden_size": 2**24,
    "num_moe_experts": 2**16,
    "moe_router_topk": 2**16,
    "moe_ffn_hidden_size": 2**24,
    "moe_shared_expert_intermediate_size": 2**24,
    "moe_latent_size": 2**20,
    "mamba_num_heads": 2**16,
    "mamba_head_dim": 2**16,
    "mamba_num_groups": 2**16,
    "mamba_state_dim": 2**16,
    "max_position_embeddings": 2**40,
    "linear_conv_kernel_dim": 2**16,
    "linear_key_head_dim": 2**16,
    "linear_value_head_dim": 2**16,
    "linear_num_key_heads": 2**16,
    "linear_num_value_heads": 2**16,
}
# Of a gated delta net, as Megatron's TransformerConfig names them.
DELTA_SIZES = (
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
)
# Of layers of Mamba-2.
MAMBA_SIZES = ("mamba_num_heads", "mamba_head_dim", "mamba_num_groups", "mamba_state_dim")


def head_size(hidden_size: int, num_attention_heads: int) -> int:
    """Return the size of a head where nothing says it; ValueError where it is not whole."""
    if hidden_size % num_attention_heads:
        raise ValueError(
            f"hidden_size {hidden_size} is not divisible by num_attention_heads "
            f"{num_attention_heads}, and no size of a head is given: the configuration is broken"
        )
    return hidden_size // num_attention_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder, all of them global, named as in Megatron's TransformerConfig.

    vocab_size: rows of the unembedding, padded where the source says so; 0 where unknown.
    ffn_hidden_size: of a dense MLP; moe_ffn_hidden_size: of one expert.
    multi_latent_attention: keys and values pass through kv_lora_rank numbers, queries through
        q_lora_rank (0 where they do not). A head has qk_head_dim features without a position,
        qk_pos_emb_head_dim with one, and v_head_dim of values; kv_channels says nothing then.
    mla_down_proj_fusion: both are projected to their latents by one linear, as only
        TransformerEngine's layers may.
    add_bias_linear: all linears have a bias, those of experts and routers too.
    softmax_type: `learnable` where each head may look at a number of its own beside the keys.
    num_moe_experts: 0 for a dense model. moe_layer_freq: 1 for experts in all layers, or as
        Megatron takes it: every so many layers, or 0 or 1 for each layer.
    linear_attention_freq: 0 where all layers attend; every so many layers attends and those between
        are gated delta nets, or 1 for each layer that is one and 0 for one that attends. A delta
        net has linear_num_key_heads of linear_key_head_dim features each for queries and keys,
        linear_num_value_heads of linear_value_head_dim for values, and convolves each feature over
        linear_conv_kernel_dim tokens; all 0 in a model without any.
    mtp_num_layers: layers behind the decoder's that predict one token more each.
    moe_latent_size: experts read and write so many numbers, to which the hidden state is projected;
        0 where they read it itself.
    hybrid_layer_pattern: kind of each layer where it has one alone, as Megatron's HybridModel has
        it: M for Mamba-2, * for attention, - for an MLP, E for experts. Empty where each layer has
        attention, then an MLP or experts. mamba_*: sizes of the layers of Mamba-2; all 0 in a model
        without any, and their number of heads Megatron's own where it is 0.
    tied_embeddings: the unembedding's weight is the embedding's.
    family: of the learning rate rule, `llama`, `qwen`, ...; empty where it is unknown.
    name: for people. model_type: Hugging Face's, the model's row in the table of families; empty
        where it is unknown. unmapped: why no Hugging Face weights can be exchanged; empty where
        they can, or where config.json is unknown.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int = 0
    ffn_hidden_size: int = 0
    multi_latent_attention: bool = False
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_head_dim: int = 0
    qk_pos_emb_head_dim: int = 0
    v_head_dim: int = 0
    mla_down_proj_fusion: bool = False
    num_moe_experts: int = 0
    moe_router_topk: int = 1
    moe_ffn_hidden_size: int = 0
    moe_layer_freq: int | Sequence[int] = 1
    moe_shared_expert_intermediate_size: int = 0
    moe_shared_expert_gate: bool = False
    moe_latent_size: int = 0
    hybrid_layer_pattern: str = ""
    mamba_num_heads: int = 0
    mamba_head_dim: int = 0
    mamba_num_groups: int = 0
    mamba_state_dim: int = 0
    gated_linear_unit: bool = True
    attention_output_gate: bool = False
    qk_layernorm: bool = False
    add_qkv_bias: bool = False
    add_bias_linear: bool = False
    softmax_type: str = "vanilla"
    linear_attention_freq: int | Sequence[int] = 0
    linear_conv_kernel_dim: int = 0
    linear_key_head_dim: int = 0
    linear_value_head_dim: int = 0
    linear_num_key_heads: int = 0
    linear_num_value_heads: int = 0
    mtp_num_layers: int = 0
    tied_embeddings: bool = False
    family: str = ""
    name: str = field(default="", compare=False)
    model_type: str = field(default="", compare=False)
    unmapped: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        sizes = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups")
        for name in (*sizes, "kv_channels"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} is {value!r}: must be an integer >= 1")
        self._check_more()
        for name, limit in MAX_SIZES.items():
            if getattr(self, name, 0) > limit:
                raise ValueError(f"{name} is {getattr(self, name)}: must be {limit:,} at most")
        self._check_layers()
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by "
                f"num_query_groups {self.num_query_groups}: the configuration is broken"
            )
        if 0 < self.num_moe_experts < self.moe_router_topk:
            raise ValueError(
                f"moe_router_topk {self.moe_router_topk} exceeds num_moe_experts "
                f"{self.num_moe_experts}: the configuration is broken"
            )
        self._check_delta_nets()

    def _check_more(self) -> None:
        names = ("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
        for name in names if self.multi_latent_attention else ():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}: must be an integer >= 1")
        for name in ("q_lora_rank", "mtp_num_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}: must be an integer >= 0")

    def _check_layers(self) -> None:
        pattern = self.hybrid_layer_pattern
        if pattern and len(pattern) != self.num_layers:
            raise ValueError(
                f"hybrid_layer_pattern {pattern!r:.200} has {len(pattern)} layers, num_layers is "
                f"{self.num_layers}: the configuration is broken"
            )
        if "M" not in pattern:
            # One form of each model: Megatron's defaults have sizes for Mamba-2 everywhere.
            for name in MAMBA_SIZES:
                object.__setattr__(self, name, 0)
        elif not self.mamba_num_heads:
            heads = 2 * self.hidden_size // (self.mamba_head_dim or 1)
            object.__setattr__(self, "mamba_num_heads", heads)
        groups = self.mamba_num_groups
        if groups and self.mamba_num_heads % groups:
            raise ValueError(
                f"mamba_num_heads {self.mamba_num_heads} is not divisible by mamba_num_groups "
                f"{groups}: the configuration is broken"
            )

    def _check_delta_nets(self) -> None:
        frequency = self.linear_attention_freq
        if not isinstance(frequency, int) and len(frequency) != self.num_layers:
            raise ValueError(
                f"linear_attention_freq has {len(frequency)} entries for {self.num_layers} layers: "
                "give one for each"
            )
        if not any(self.delta_net_pattern):
            # One form of each model: Megatron's defaults have sizes for delta nets everywhere.
            for name in ("linear_attention_freq", *DELTA_SIZES):
                object.__setattr__(self, name, 0)
            return
        for name in DELTA_SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}: must be an integer >= 1")
        if self.linear_num_value_heads % self.linear_num_key_heads:
            raise ValueError(
                f"linear_num_value_heads {self.linear_num_value_heads} is not divisible by "
                f"linear_num_key_heads {self.linear_num_key_heads}: the configuration is broken"
            )

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key and value head."""
        return self.num_attention_heads // self.num_query_groups

    @property
    def query_size(self) -> int:
        """Features of all query heads, which linear_proj reads."""
        return self.num_attention_heads * self.kv_channels

    @property
    def latent_rows(self) -> tuple[int, int]:
        """Rows of the down projections: of queries, and of keys and values with a position's."""
        return self.q_lora_rank, self.kv_lora_rank + self.qk_pos_emb_head_dim

    @property
    def qkv_rows(self) -> int:
        """Rows of the fused linear_qkv, an output gate's included."""
        gates = 2 if self.attention_output_gate else 1
        return gates * self.query_size + 2 * self.num_query_groups * self.kv_channels

    def kind(self, layer: int) -> str:
        """Return the kind of a layer, numbered from 0; empty where it has several in one."""
        return self.hybrid_layer_pattern[layer] if self.hybrid_layer_pattern else ""

    @property
    def delta_net_pattern(self) -> list[int]:
        """Say of each layer whether it is a gated delta net: 0 or 1."""
        return [int(self.is_delta_net(layer)) for layer in range(self.num_layers)]

    def is_delta_net(self, layer: int) -> bool:
        """Say whether a layer, numbered from 0, is a gated delta net and does not attend."""
        frequency = self.linear_attention_freq
        if isinstance(frequency, int):
            return frequency > 0 and (layer + 1) % frequency != 0
        return bool(frequency[layer])

    @property
    def delta_key_size(self) -> int:
        """Features of a delta net's queries, and of its keys."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def delta_value_size(self) -> int:
        """Features of a delta net's values, and of its output gate z."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def delta_layers(self) -> list[int]:
        """Numbers of the layers that are gated delta nets."""
        return [layer for layer, is_one in enumerate(self.delta_net_pattern) if is_one]

    @property
    def moe_pattern(self) -> list[int]:
        """Say of each layer whether it has experts: 0 or 1."""
        return [int(self.has_experts(layer)) for layer in range(self.num_layers)]

    def has_experts(self, layer: int) -> bool:
        """Say whether a layer, numbered from 0, has experts."""
        frequency = self.moe_layer_freq
        if not self.num_moe_experts:
            return False
        if self.hybrid_layer_pattern:
            return self.kind(layer) == "E"
        return layer % frequency == 0 if isinstance(frequency, int) else bool(frequency[layer])

    @property
    def moe_layers(self) -> list[int]:
        """Numbers of the layers that have experts."""
        return [layer for layer, moe in enumerate(self.moe_pattern) if moe]

    @property
    def dense_layers(self) -> list[int]:
        """Numbers of the layers that have a plain MLP beside others that have experts."""
        pattern = self.moe_pattern if self.num_moe_experts else []
        return [n for n, moe in enumerate(pattern) if not moe and self.kind(n) in ("", "-")]

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Take the fields that a mapping has: a TransformerConfig's, or a checkpoint's facts."""
        known = {field.name for field in fields(cls)}
        if values.get("experimental_attention_variant", "gated_delta_net") != "gated_delta_net":
            known.discard("linear_attention_freq")
        try:
            return cls(**{k: v for k, v in values.items() if k in known and v is not None})
        except TypeError as error:
            raise ValueError(f"model facts are incomplete: {error}") from None
