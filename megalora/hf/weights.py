"""Which part of which Hugging Face tensor each part of a Megatron parameter is.

One description serves both ways: loading copies every piece in, saving copies it out. Nothing here
needs Megatron or process groups.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megalora.hf.attention_sizes import Sizes, attention_sizes
from megalora.model.config_json import mapped_family, model_shape, stored_predictions
from megalora.model.families import names_of
from megalora.model.family import without_numbers
from megalora.model.shape import ModelShape

# TransformerEngine keeps a norm in the linear that follows it, under another name.
_NORMS_IN_LINEARS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mlp.shared_experts.gate_weight": "mlp.shared_experts.gate.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
    "self_attention.linear_qkv_down_proj.layer_norm_weight": "input_layernorm.weight",
}
# DeepSeek-V3's bias of the choice of experts, a buffer of Megatron's router.
EXPERT_BIAS = "e_score_correction_bias"
# SequentialMLP has a module for each local expert, TransformerEngine's grouped linear a parameter.
_EXPERT_NAMES = (
    re.compile(r"mlp\.experts\.local_experts\.(?P<expert>\d+)\.(?P<linear>linear_fc[12])\.weight"),
    re.compile(r"mlp\.experts\.(?P<linear>linear_fc[12])\.weight(?P<expert>\d+)"),
)
# Split along their input; all other linears are along their output.
_ROW_PARALLEL = ("linear_proj", "linear_fc2")
# Fuses what another build of the same model has apart.
_OTHERWISE_BUILT = ("self_attention.linear_qkv_down_proj",)
# Every rank has all of them.
_WHOLE = ("mlp.router", "mlp.shared_experts.gate")
_LAYER = re.compile(r"(?:decoder\.layers\.\d+|mtp\.layers\.\d+(?:\.mtp_model_layer)?)\.(.+)")


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
    """The pieces of every parameter of a model, from its configuration.

    num_predictions: layers that the model has behind its decoder's (`mtp_num_layers`).
    """

    def __init__(
        self, config: Mapping[str, Any], placement: Placement, *, num_predictions: int = 0
    ) -> None:
        self.family = mapped_family(config)
        self.names = names_of(self.family.model_type)
        self.shape: ModelShape = model_shape(config)
        self.has_expert_bias = self.family.experts is not None and self.family.experts.sigmoid
        self.placement = placement
        dense, moe = self._sizes(is_moe=False), self._sizes(is_moe=True)
        self._layers = [moe if is_moe else dense for is_moe in self.shape.moe_pattern]
        self._num_stored = self.shape.num_layers + stored_predictions(config)
        h = self.shape.hidden_size
        prediction = dict.fromkeys(("enorm", "hnorm", "final_layernorm"), ((h,),))
        self._layers += [
            {**self._layers[-1], **prediction, "eh_proj": ((h, 2 * h),)}
        ] * num_predictions

    @property
    def num_layers(self) -> int:
        """Number of layers that the model was built with, those behind the decoder's included."""
        return len(self._layers)

    def pieces(self, name: str, layer: int | None, num_rows: int) -> list[Piece]:
        """Return the pieces of a local parameter of num_rows rows.

        name: in its model chunk, such as `decoder.layers.0.mlp.linear_fc1.weight`.
        layer: its global layer number from 0, None outside of layers; those that predict one token
            more are counted on behind the decoder's.
        Rows without a piece are padding of the vocabulary.
        """
        names = self.names
        if name == "embedding.word_embeddings.weight":
            return self._vocabulary(names.embedding, num_rows)
        if name == "output_layer.weight":
            tied = self.shape.tied_embeddings
            return self._vocabulary(names.embedding if tied else names.unembedding, num_rows)
        if name == "decoder.final_layernorm.weight":
            return [Piece(f"{names.final_norm}.weight", 0, self.shape.hidden_size, 0)]
        found = _LAYER.fullmatch(name)
        pieces = self._in_layer(found[1], layer, num_rows) if found and layer is not None else None
        if pieces is None:
            raise ValueError(
                f"Megatron parameter {name} has no counterpart in {self.family.architecture}: the "
                "model was built with other options than its config.json asks for"
            )
        return pieces

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every tensor that a complete checkpoint has."""
        shape, names = self.shape, self.names
        table = (shape.vocab_size, shape.hidden_size)
        found: dict[str, tuple[int, ...]] = {names.embedding: table}
        found[names.final_norm] = (shape.hidden_size,)
        if not shape.tied_embeddings:
            found[names.unembedding] = table
        found = {f"{name}.weight": size for name, size in found.items()}
        for layer in range(self.num_layers):
            found |= dict(self._layer_shapes(layer))
        return found

    def may_be_stored(self, name: str) -> bool:
        """Say whether a tensor that is not expected is of a layer that predicts one token more.

        Of one that the model was built without, or a copy there.
        """
        pattern, numbers = without_numbers(name)
        if not pattern.startswith(self.names.layer):
            return False
        return self.num_layers <= numbers[0] < self._num_stored or name in self.copies()

    def copies(self) -> dict[str, str]:
        """Return, by name, of which tensor each is a copy in a layer that predicts a token more."""
        names = self.names
        originals = (names.embedding, names.unembedding)
        if self.shape.tied_embeddings:
            originals = (names.embedding, names.embedding)
        return {
            f"{names.layer.format(layer)}{copy}.weight": f"{original}.weight"
            for layer in range(self.shape.num_layers, self.num_layers)
            for copy, original in zip(names.copies, originals, strict=True)
        }

    def _sizes(self, *, is_moe: bool) -> Sizes:
        """Return, by Megatron's module of a layer, the shapes of the weights that it stacks."""
        shape, h = self.shape, self.shape.hidden_size
        sizes: Sizes = dict.fromkeys(("input_layernorm", "pre_mlp_layernorm"), ((h,),))
        sizes |= {f"self_attention.{name}": size for name, size in attention_sizes(shape).items()}
        mlp, ffn = "mlp", shape.ffn_hidden_size
        if is_moe:
            mlp, ffn = "mlp.experts", shape.moe_ffn_hidden_size
            sizes["mlp.router"] = ((shape.num_moe_experts, h),)
            if shared := shape.moe_shared_expert_intermediate_size:
                sizes["mlp.shared_experts.linear_fc1"] = ((shared, h), (shared, h))
                sizes["mlp.shared_experts.linear_fc2"] = ((h, shared),)
            if shape.moe_shared_expert_gate:
                sizes["mlp.shared_experts.gate"] = ((1, h),)
        return {
            **sizes,
            f"{mlp}.linear_fc1": ((ffn, h), (ffn, h)),
            f"{mlp}.linear_fc2": ((h, ffn),),
        }

    def _layer_shapes(self, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        for module, sizes in self._layers[layer].items():
            if module in _OTHERWISE_BUILT:
                continue
            count = self.shape.num_moe_experts if ".experts." in module else 1
            for expert in range(count):
                for name, size in zip(self._hf_names(module, layer, expert), sizes, strict=True):
                    yield f"{name}.weight", size
                    if module == "mlp.router" and self.has_expert_bias:
                        yield f"{name}.{EXPERT_BIAS}", size[:1]
                    if module.endswith("linear_qkv") and self.shape.add_qkv_bias:
                        yield f"{name}.bias", size[:1]

    def _hf_names(self, module: str, layer: int, expert: int = 0) -> list[str]:
        return [name.format(layer, expert) for name in self.names.in_layer(module)]

    def _in_layer(self, name: str, layer: int, num_rows: int) -> list[Piece] | None:
        found = next(filter(None, (pattern.fullmatch(name) for pattern in _EXPERT_NAMES)), None)
        if found:
            return self._expert(f"mlp.experts.{found['linear']}", int(found["expert"]), layer)
        module, _, kind = _NORMS_IN_LINEARS.get(name, name).rpartition(".")
        if name == "mlp.router.expert_bias" and self.has_expert_bias:
            router, size = self._hf_names(module, layer)[0], self.shape.num_moe_experts
            return [Piece(f"{router}.{EXPERT_BIAS}", 0, size, 0)]
        biased = module.endswith("linear_qkv") and self.shape.add_qkv_bias
        kinds = ("weight", "bias") if biased else ("weight",)
        sizes = self._layers[layer].get(module)
        if sizes is None or ".experts." in module or kind not in kinds:
            return None
        hf_names = [f"{hf_name}.{kind}" for hf_name in self._hf_names(module, layer)]
        if module.endswith("linear_qkv"):
            return self._qkv(hf_names)
        if len(sizes[0]) == 1 or module in _WHOLE:
            return [Piece(hf_names[0], 0, sizes[0][0], 0)]
        # TransformerEngine's down projections are whole on every rank.
        is_whole = num_rows == sum(rows for rows, *_ in sizes) and module.endswith("down_proj")
        return self._linear(module, hf_names, sizes, Shard() if is_whole else self.placement.tp)

    def _expert(self, module: str, local: int, layer: int) -> list[Piece] | None:
        sizes = self._layers[layer].get(module)
        if sizes is None:
            return None
        first, _ = self.placement.ep.of(self.shape.num_moe_experts, "num_experts")
        hf_names = [f"{name}.weight" for name in self._hf_names(module, layer, first + local)]
        return self._linear(module, hf_names, sizes, self.placement.expert_tp)

    def _linear(
        self, module: str, hf_names: list[str], sizes: tuple[tuple[int, ...], ...], shard: Shard
    ) -> list[Piece]:
        """Cut a linear along its input where it reads what ranks share out, else along its output.

        Of one that fuses several a rank holds a part of each, as [gate_k; up_k], and not a slice of
        the whole.
        """
        if module.endswith(_ROW_PARALLEL):
            columns = shard.of(sizes[0][1], hf_names[0])
            return [Piece(hf_names[0], 0, sizes[0][0], 0, columns)]
        pieces: list[Piece] = []
        row = 0
        for name, (rows, *_) in zip(hf_names, sizes, strict=True):
            first, last = shard.of(rows, f"rows of {name}")
            pieces.append(Piece(name, row, last - first, first))
            row += last - first
        return pieces

    def _vocabulary(self, hf_name: str, num_rows: int) -> list[Piece]:
        size, tp = self.shape.vocab_size, self.placement.tp
        if num_rows * tp.count < size:
            raise ValueError(
                f"the model's vocabulary has {num_rows * tp.count} rows, config.json says {size}: "
                f"build it with --vocab-size {size}"
            )
        first = tp.index * num_rows
        count = min(num_rows, size - first)
        return [Piece(f"{hf_name}.weight", 0, count, first)] if count > 0 else []

    def _qkv(self, hf_names: list[str]) -> list[Piece]:
        """Cut a rank's rows of the fused linear at the borders of q, k and v of every group.

        A rank may hold a part of a group only, where there are fewer groups than ranks.
        """
        first, last = self.placement.tp.of(self.shape.qkv_rows, "linear_qkv rows")
        d, queries = self.shape.kv_channels, self.shape.heads_per_group * self.shape.kv_channels
        pieces: list[Piece] = []
        row = 0
        for group in range(self.shape.num_query_groups):
            for name, size in zip(hf_names, (queries, d, d), strict=True):
                begin, end = max(row, first), min(row + size, last)
                if begin < end:
                    hf_row = group * size + begin - row
                    pieces.append(Piece(name, begin - first, end - begin, hf_row))
                row += size
        return pieces
