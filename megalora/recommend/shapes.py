"""The sizes of a model, read from Hugging Face, from Megatron's arguments or from a preset."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from megalora.recommend.presets import PRESETS
from megalora.recommend.sources import hf_sizes, megatron_sizes, read_hf_config
from megalora.targets import ModelFacts

Group = Literal["attention", "mlp", "experts", "router", "unembedding"]


@dataclass(frozen=True, slots=True)
class Linear:
    """A base weight [out_features, in_features] under its global Megatron name.

    num_experts: experts that have such a weight, 0 for a dense linear.
    uses: how many of these weights a token passes through.
    """

    name: str
    group: Group
    layer: int
    in_features: int
    out_features: int
    num_experts: int = 0
    uses: int = 1

    @property
    def parameters(self) -> int:
        """Count the weight's elements, over all experts."""
        return max(1, self.num_experts) * self.in_features * self.out_features


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder, in Megatron's words.

    family: `llama`, `qwen`, ...; empty where it is unknown.
    vocab_size: rows of the unembedding, padded where the source says so.
    dense_layers: layers, from 0, that have a plain MLP in a model with experts.
    tied: the unembedding's weight is the embedding's.
    """

    name: str
    family: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    ffn_hidden_size: int
    vocab_size: int
    num_experts: int = 0
    moe_router_topk: int = 1
    moe_ffn_hidden_size: int = 0
    shared_expert_size: int = 0
    dense_layers: tuple[int, ...] = ()
    gated: bool = True
    tied: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    shared_expert_gate: bool = False
    attention_output_gate: bool = False

    @classmethod
    def from_name(cls, name: str, *, family: str = "") -> Self:
        """Read a folder with config.json, or return a preset; `family` overrides theirs."""
        known = cls.from_hf_config(name) if Path(name).exists() else cls.from_preset(name)
        return replace(known, family=family) if family else known

    @classmethod
    def from_preset(cls, name: str) -> Self:
        """Return a well-known model's sizes; ValueError lists the names where it is unknown."""
        if name not in PRESETS:
            raise ValueError(
                f"model {name!r} is neither a folder with config.json nor a preset: "
                f"use a folder or one of {', '.join(PRESETS)}"
            )
        return cls.from_hf_config(PRESETS[name], name=name)

    @classmethod
    def from_hf_config(
        cls, source: str | Path | Mapping[str, Any], *, name: str | None = None
    ) -> Self:
        """Read a config.json, its folder, or its content.

        Raises ValueError for an architecture whose linears are not described here.
        """
        config, label = read_hf_config(source)
        return cls(name=name or label, **hf_sizes(config))

    @classmethod
    def from_megatron_args(
        cls, args: Any, *, family: str = "", name: str = "Megatron flags"
    ) -> Self:
        """Read Megatron's parsed arguments, or the same flags parsed by `megalora recommend`.

        family: the learning rate rule's family; where it is empty and the sizes are a preset's,
        the preset's. Raises ValueError for MLA, MTP, hybrid and linear-attention models.
        """
        shape = cls(name=name, family=family, **megatron_sizes(args))
        return shape if family else _as_preset(shape)

    @property
    def facts(self) -> ModelFacts:
        """Return the sizes that decide the form of adapters."""
        return ModelFacts(
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups,
            kv_channels=self.kv_channels,
            gated_linear_unit=self.gated,
            attention_output_gate=self.attention_output_gate,
            moe_router_topk=self.moe_router_topk,
            num_moe_experts=self.num_experts,
        )

    def is_moe(self, layer: int) -> bool:
        """Say whether a layer, from 0, has experts."""
        return self.num_experts > 0 and layer not in self.dense_layers

    def linears(self) -> Iterator[Linear]:
        """Yield every linear in the order of the forward pass, the unembedding last."""
        for layer in range(self.num_layers):
            yield from self._attention(layer)
            yield from self._experts(layer) if self.is_moe(layer) else self._mlp(layer)
        hidden, last = self.hidden_size, self.num_layers - 1
        yield Linear("output_layer", "unembedding", last, hidden, self.vocab_size)

    @property
    def base_parameters(self) -> int:
        """Count the parameters of the base; biases other than q, k, v's are left out."""
        total = sum(linear.parameters for linear in self.linears())
        total += self.hidden_size * (0 if self.tied else self.vocab_size)
        return total + self.hidden_size + sum(map(self.layer_extras, range(self.num_layers)))

    def layer_extras(self, layer: int) -> int:
        """Count a layer's norms, q, k, v biases and shared expert gate: replicated, and small."""
        norms = 2 * self.hidden_size + (2 * self.kv_channels if self.qk_norm else 0)
        bias = self._qkv_size if self.qkv_bias else 0
        gate = self.hidden_size if self.shared_expert_gate and self.is_moe(layer) else 0
        return norms + bias + gate

    @property
    def _qkv_size(self) -> int:
        query_size = self.num_attention_heads * self.kv_channels
        gates = 2 if self.attention_output_gate else 1
        return gates * query_size + 2 * self.num_query_groups * self.kv_channels

    def _attention(self, layer: int) -> Iterator[Linear]:
        prefix, hidden = f"decoder.layers.{layer}.self_attention.", self.hidden_size
        query_size = self.num_attention_heads * self.kv_channels
        yield Linear(prefix + "linear_qkv", "attention", layer, hidden, self._qkv_size)
        yield Linear(prefix + "linear_proj", "attention", layer, query_size, hidden)

    def _mlp(self, layer: int) -> Iterator[Linear]:
        yield from self._pair(f"decoder.layers.{layer}.mlp.", "mlp", layer, self.ffn_hidden_size)

    def _experts(self, layer: int) -> Iterator[Linear]:
        prefix, hidden = f"decoder.layers.{layer}.mlp.", self.hidden_size
        yield Linear(prefix + "router", "router", layer, hidden, self.num_experts)
        yield from self._pair(
            prefix + "experts.",
            "experts",
            layer,
            self.moe_ffn_hidden_size,
            num_experts=self.num_experts,
            uses=self.moe_router_topk,
        )
        if self.shared_expert_size:
            yield from self._pair(prefix + "shared_experts.", "mlp", layer, self.shared_expert_size)

    def _pair(
        self,
        prefix: str,
        group: Group,
        layer: int,
        ffn: int,
        *,
        num_experts: int = 0,
        uses: int = 1,
    ) -> Iterator[Linear]:
        hidden, width = self.hidden_size, ffn * (2 if self.gated else 1)
        yield Linear(prefix + "linear_fc1", group, layer, hidden, width, num_experts, uses)
        yield Linear(prefix + "linear_fc2", group, layer, ffn, hidden, num_experts, uses)


def _as_preset[T: ModelShape](shape: T) -> T:
    """Return the shape with the family of the preset that has the same sizes, if there is one.

    The vocabulary is left out of the comparison: Megatron pads it.
    """
    sizes = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    sizes += ("moe_ffn_hidden_size", "num_experts") if shape.num_experts else ("ffn_hidden_size",)
    for name in PRESETS:
        preset = ModelShape.from_preset(name)
        if all(getattr(shape, size) == getattr(preset, size) for size in sizes):
            return replace(shape, family=preset.family, name=name)
    return shape
