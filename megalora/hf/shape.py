"""The sizes of a model that decide how its Megatron tensors and its files correspond."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self


def refuse_hybrid(pattern: str | None) -> None:
    """Raise ValueError for a hybrid model, of whose Hugging Face families none is known here."""
    if pattern:
        raise ValueError(
            f"hybrid_layer_pattern is {pattern!r}: hybrid models have no Hugging Face family here; "
            "keep the adapter as --save's checkpoint, or write W + c B A by --save-merged"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a model, all of them global.

    vocab_size: rows of the Hugging Face embedding, without Megatron's padding; 0 where unknown.
    ffn_hidden_size: of a dense MLP; moe_ffn_hidden_size: of one expert.
    num_moe_experts: 0 for a dense model. moe_layer_freq: 1 for experts in all layers, or as
        Megatron takes it: every so many layers, or 0 or 1 for each layer.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int = 0
    ffn_hidden_size: int = 0
    num_moe_experts: int = 0
    moe_router_topk: int = 1
    moe_ffn_hidden_size: int = 0
    moe_layer_freq: int | Sequence[int] = 1
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} is {value!r}: must be an integer >= 1")
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by "
                f"num_query_groups {self.num_query_groups}: the configuration is broken"
            )

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key and value head."""
        return self.num_attention_heads // self.num_query_groups

    @property
    def qkv_rows(self) -> int:
        """Rows of the fused linear_qkv."""
        return self.num_query_groups * (self.heads_per_group + 2) * self.kv_channels

    @property
    def moe_layers(self) -> list[int]:
        """Numbers of the layers that have experts."""
        layers, frequency = range(self.num_layers), self.moe_layer_freq
        if not self.num_moe_experts:
            return []
        if isinstance(frequency, int):
            return [layer for layer in layers if layer % frequency == 0]
        return [layer for layer in layers if frequency[layer]]

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Take the fields that a mapping has, such as the facts stored in a checkpoint."""
        known = {field.name for field in fields(cls)}
        try:
            return cls(**{k: v for k, v in values.items() if k in known and v is not None})
        except TypeError as error:
            raise ValueError(f"model facts are incomplete: {error}") from None
