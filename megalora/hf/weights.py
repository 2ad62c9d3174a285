"""Which part of which Hugging Face tensor each part of a Megatron parameter is.

One description serves both ways: loading copies every piece in, saving copies it out. Nothing here
needs Megatron or process groups.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megalora.hf.families import family_of, model_shape
from megalora.hf.shape import ModelShape

# Name in a Megatron layer -> name in a Hugging Face layer, for tensors that every rank holds whole.
# TransformerEngine keeps a norm in the linear that follows it, under another name.
REPLICATED = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "mlp.router.weight": "mlp.gate.weight",
}
# SequentialMLP has a module for each local expert, TransformerEngine's grouped linear a parameter.
_EXPERT_NAMES = (
    re.compile(r"mlp\.experts\.local_experts\.(\d+)\.linear_(fc1|fc2)\.weight"),
    re.compile(r"mlp\.experts\.linear_(fc1|fc2)\.weight(\d+)"),
)
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class Shard:
    """Which of how many equal parts of a dimension a rank holds."""

    index: int = 0
    count: int = 1

    def of(self, size: int, what: str) -> tuple[int, int]:
        """Return the first and one past the last index of this part of `size`."""
        if size % self.count:
            raise ValueError(f"{what} {size} is not divisible by {self.count} ranks")
        part = size // self.count
        return self.index * part, (self.index + 1) * part


@dataclass(frozen=True, slots=True)
class Placement:
    """This rank's parts: of dense linears, of experts' linears, and of the experts."""

    tp: Shard
    expert_tp: Shard
    ep: Shard


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows first:first + count of a parameter are rows hf_first and on of a Hugging Face tensor.

    columns: of the Hugging Face tensor; None means all.
    """

    name: str
    first: int
    count: int
    hf_first: int
    columns: tuple[int, int] | None = None


class Weights:
    """The pieces of every parameter of a model, from its configuration."""

    def __init__(self, config: Mapping[str, Any], placement: Placement) -> None:
        self.shape: ModelShape = model_shape(config)
        self.placement = placement
        self.family = family_of(config)

    def pieces(self, name: str, layer: int | None, num_rows: int) -> list[Piece]:
        """Return the pieces of a local parameter of num_rows rows.

        name: in its model chunk, such as `decoder.layers.0.mlp.linear_fc1.weight`.
        layer: its global layer number from 0, None outside of layers.
        Rows without a piece are padding of the vocabulary.
        """
        shape = self.shape
        if name == "embedding.word_embeddings.weight":
            return self._vocabulary("model.embed_tokens.weight", num_rows)
        if name == "output_layer.weight":
            tied = shape.tied_embeddings
            hf_name = "model.embed_tokens.weight" if tied else "lm_head.weight"
            return self._vocabulary(hf_name, num_rows)
        if name == "decoder.final_layernorm.weight":
            return [Piece("model.norm.weight", 0, shape.hidden_size, 0)]
        found = _LAYER.fullmatch(name)
        pieces = self._in_layer(found.group(2), layer) if found and layer is not None else None
        if pieces is None:
            raise ValueError(
                f"Megatron parameter {name} has no counterpart in {self.family.architecture}: the "
                "model was built with other options than its config.json asks for"
            )
        return pieces

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every tensor that a complete checkpoint has."""
        shape = self.shape
        table = (shape.vocab_size, shape.hidden_size)
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table}
        found["model.norm.weight"] = (shape.hidden_size,)
        if not shape.tied_embeddings:
            found["lm_head.weight"] = table
        for layer in range(shape.num_layers):
            for name, size in self._layer_shapes(layer):
                found[f"model.layers.{layer}.{name}"] = size
        return found

    def _layer_shapes(self, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        shape, h, d = self.shape, self.shape.hidden_size, self.shape.kv_channels
        rows = {"q": shape.num_attention_heads * d} | dict.fromkeys(
            "kv", shape.num_query_groups * d
        )
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{norm}.weight", (h,)
        for projection, size in rows.items():
            yield f"self_attn.{projection}_proj.weight", (size, h)
            if self.family.qkv_bias:
                yield f"self_attn.{projection}_proj.bias", (size,)
        yield "self_attn.o_proj.weight", (h, rows["q"])
        if self.family.qk_norm:
            yield from ((f"self_attn.{p}_norm.weight", (d,)) for p in "qk")
        prefixes, ffn = ["mlp"], shape.ffn_hidden_size
        if layer in self.shape.moe_layers:
            yield "mlp.gate.weight", (shape.num_moe_experts, h)
            prefixes = [f"mlp.experts.{e}" for e in range(shape.num_moe_experts)]
            ffn = shape.moe_ffn_hidden_size
        for prefix in prefixes:
            yield from ((f"{prefix}.{p}_proj.weight", (ffn, h)) for p in ("gate", "up"))
            yield f"{prefix}.down_proj.weight", (h, ffn)

    def _in_layer(self, name: str, layer: int) -> list[Piece] | None:
        prefix, shape, tp = f"model.layers.{layer}.", self.shape, self.placement.tp
        if name in REPLICATED:
            hf_name = REPLICATED[name]
            rows = shape.hidden_size
            if "_norm.weight" in hf_name:
                rows = shape.kv_channels
            if hf_name == "mlp.gate.weight":
                rows = shape.num_moe_experts
            return [Piece(prefix + hf_name, 0, rows, 0)]
        if name in ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"):
            return self._qkv(prefix + "self_attn.", name.rpartition(".")[2])
        if name == "self_attention.linear_proj.weight":
            width = shape.num_attention_heads * shape.kv_channels
            return self._row(prefix + "self_attn.o_proj.weight", width, tp)
        if name == "mlp.linear_fc1.weight":
            return self._gated(prefix + "mlp.", shape.ffn_hidden_size, tp)
        if name == "mlp.linear_fc2.weight":
            return self._row(prefix + "mlp.down_proj.weight", shape.ffn_hidden_size, tp)
        return self._expert(prefix, name)

    def _expert(self, prefix: str, name: str) -> list[Piece] | None:
        sequential, grouped = (pattern.fullmatch(name) for pattern in _EXPERT_NAMES)
        if sequential:
            local, linear = int(sequential.group(1)), sequential.group(2)
        elif grouped:
            local, linear = int(grouped.group(2)), grouped.group(1)
        else:
            return None
        first, _ = self.placement.ep.of(self.shape.num_moe_experts, "num_experts")
        own, tp = f"{prefix}mlp.experts.{first + local}.", self.placement.expert_tp
        ffn = self.shape.moe_ffn_hidden_size
        if linear == "fc1":
            return self._gated(own, ffn, tp)
        return self._row(own + "down_proj.weight", ffn, tp)

    def _vocabulary(self, hf_name: str, num_rows: int) -> list[Piece]:
        size, tp = self.shape.vocab_size, self.placement.tp
        if num_rows * tp.count < size:
            raise ValueError(
                f"the model's vocabulary has {num_rows * tp.count} rows, config.json says {size}: "
                f"build it with --vocab-size {size}"
            )
        first = tp.index * num_rows
        count = min(num_rows, size - first)
        return [Piece(hf_name, 0, count, first)] if count > 0 else []

    def _row(self, hf_name: str, width: int, shard: Shard) -> list[Piece]:
        columns = shard.of(width, hf_name)
        return [Piece(hf_name, 0, self.shape.hidden_size, 0, columns)]

    def _gated(self, prefix: str, ffn: int, shard: Shard) -> list[Piece]:
        """A rank holds [gate_k; up_k], not a slice of [gate; up]."""
        first, last = shard.of(ffn, "ffn_hidden_size")
        count = last - first
        return [
            Piece(prefix + "gate_proj.weight", 0, count, first),
            Piece(prefix + "up_proj.weight", count, count, first),
        ]

    def _qkv(self, prefix: str, kind: str) -> list[Piece]:
        """Cut a rank's rows of the fused linear at the borders of q, k and v of every group.

        A rank may hold a part of a group only, where there are fewer groups than ranks.
        """
        first, last = self.placement.tp.of(self.shape.qkv_rows, "linear_qkv rows")
        d, queries = self.shape.kv_channels, self.shape.heads_per_group * self.shape.kv_channels
        pieces: list[Piece] = []
        row = 0
        for group in range(self.shape.num_query_groups):
            for projection, size, hf_row in (
                ("q", queries, group * queries),
                ("k", d, group * d),
                ("v", d, group * d),
            ):
                begin, end = max(row, first), min(row + size, last)
                if begin < end:
                    name = f"{prefix}{projection}_proj.{kind}"
                    pieces.append(Piece(name, begin - first, end - begin, hf_row + begin - row))
                row += size
        return pieces
