"""Which part of which Hugging Face tensor each part of a Megatron parameter is.

One description serves both ways: loading copies every piece in, saving copies it out. Nothing here
needs Megatron or process groups.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from megalora.hf import cuts
from megalora.hf.cuts import Block, Piece, Placement, Shard
from megalora.hf.layer_sizes import BARE, has_bias, layer_sizes, tensor_name
from megalora.model.config_json import mapped_family, model_shape, stored_predictions
from megalora.model.facts import delta_parts, mamba_parts
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
    "mixer.in_proj.layer_norm_weight": "norm.weight",
    # Megatron has the convolution's as parameters of the layer.
    "mixer.conv1d_weight": "mixer.conv1d.weight",
    "mixer.conv1d_bias": "mixer.conv1d.bias",
    "self_attention.in_proj.layer_norm_weight": "input_layernorm.weight",
}
# DeepSeek-V3's bias of the choice of experts, a buffer of Megatron's router.
EXPERT_BIAS = "e_score_correction_bias"
# SequentialMLP has a module for each local expert, TransformerEngine's grouped linear a parameter.
_EXPERT_NAMES = (
    re.compile(
        r"mlp\.experts\.local_experts\.(?P<expert>\d+)\.(?P<linear>linear_fc[12])\."
        r"(?P<kind>weight|bias)"
    ),
    re.compile(r"mlp\.experts\.(?P<linear>linear_fc[12])\.(?P<kind>weight|bias)(?P<expert>\d+)"),
)
# Split along their input; all other linears are along their output.
_ROW_PARALLEL = ("linear_proj", "linear_fc2", "out_proj")
# Of Mamba-2's tensors whose rows are those of its in_proj's parts: which parts.
_MAMBA_PARTS = {"mixer.in_proj": ("z", "x", "B", "C", "dt"), "mixer.conv1d": ("x", "B", "C")}
# Norms whose factors Hugging Face's tensors are, where Megatron's are 1 + weight.
_AROUND_ONE = ("self_attention.out_norm",)
_IN_PROJ, _CONVOLUTION = "self_attention.in_proj", "self_attention.conv1d"
_OF_DELTA_NET = (_IN_PROJ, _CONVOLUTION)
# Fuses what another build of the same model has apart.
_OTHERWISE_BUILT = ("self_attention.linear_qkv_down_proj",)
# Every rank has all of them.
_WHOLE = (
    "mlp.router",
    "mlp.shared_experts.gate",
    "mlp.fc1_latent_proj",
    "mlp.fc2_latent_proj",
)
_FINAL_NORMS = ("decoder.final_layernorm.weight", "decoder.final_norm.weight")
_LAYER = re.compile(r"(?:decoder\.layers\.\d+|mtp\.layers\.\d+(?:\.mtp_model_layer)?)\.(.+)")


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
        layers = range(self.shape.num_layers)
        self._layers = [layer_sizes(self.shape, self.names, layer) for layer in layers]
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
            return self._table(names.embedding, num_rows)
        if name == "output_layer.weight":
            tied = self.shape.tied_embeddings
            return self._table(names.embedding if tied else names.unembedding, num_rows)
        if name in _FINAL_NORMS:
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

    def _layer_shapes(self, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        for module, sizes in self._layers[layer].items():
            if module in _OTHERWISE_BUILT:
                continue
            count = self.shape.num_moe_experts if ".experts." in module else 1
            for expert in range(count):
                for name, size in zip(self._hf_names(module, layer, expert), sizes, strict=True):
                    yield tensor_name(name), size
                    if module == "mlp.router" and self.has_expert_bias:
                        yield f"{name}.{EXPERT_BIAS}", size[:1]
                    if has_bias(module, self.shape):
                        yield f"{name}.bias", size[:1]

    def _hf_names(self, module: str, layer: int, expert: int = 0) -> list[str]:
        return [name.format(layer, expert) for name in self.names.in_layer(module)]

    def _in_layer(self, name: str, layer: int, num_rows: int) -> list[Piece] | None:
        found = next(filter(None, (pattern.fullmatch(name) for pattern in _EXPERT_NAMES)), None)
        if found:
            module, local = f"mlp.experts.{found['linear']}", int(found["expert"])
            return self._expert(module, found["kind"], local, layer)
        if name == "mlp.router.expert_bias" and self.has_expert_bias:
            router, size = self._hf_names("mlp.router", layer)[0], self.shape.num_moe_experts
            return [Piece(f"{router}.{EXPERT_BIAS}", 0, size, 0)]
        name = _NORMS_IN_LINEARS.get(name, name)
        module, _, kind = name.rpartition(".")
        if kind in BARE:
            module, kind = name, "weight"
        if kind not in self._kinds(module) or ".experts." in module:
            return None
        if (sizes := self._layers[layer].get(module)) is None:
            return None
        hf_names = [tensor_name(hf_name, kind) for hf_name in self._hf_names(module, layer)]
        if module.endswith("linear_qkv"):
            blocks = cuts.query_groups(hf_names, self.shape)
            return cuts.by_period(blocks, self.placement.tp, "linear_qkv rows")
        if parts := _MAMBA_PARTS.get(module):
            blocks = cuts.consecutive(hf_names[0], [mamba_parts(self.shape)[p] for p in parts])
            return cuts.by_blocks(blocks, self.placement.tp)
        if module in _OF_DELTA_NET:
            return self._delta_net(module, hf_names)
        is_norm = len(sizes[0]) == 1 and not module.endswith((*BARE, "mixer.norm"))
        if is_norm or module in _WHOLE:
            return [Piece(hf_names[0], 0, sizes[0][0], 0, more=float(module in _AROUND_ONE))]
        if module == "mlp.linear_fc1" and self.names.parts_of(self.names.modules[module][0])[1:]:
            half = sizes[0][0] // 2
            blocks = cuts.consecutive(hf_names[0], (half, half))
            return cuts.by_blocks(blocks, self.placement.tp)
        # TransformerEngine's down projections are whole on every rank.
        is_whole = num_rows == sum(rows for rows, *_ in sizes) and module.endswith("down_proj")
        return _linear(module, hf_names, sizes, Shard() if is_whole else self.placement.tp)

    def _delta_net(self, module: str, hf_names: list[str]) -> list[Piece]:
        """Cut what stacks a delta net's parts, whose heads ranks share out."""
        rows, what = delta_parts(self.shape), f"rows of {module}"
        if module == _IN_PROJ:
            parts = cuts.delta_blocks(hf_names, self.names, self.shape)
            return cuts.by_parts(parts, self.placement.tp, what)
        convolved = [rows[part] for part in ("query", "key", "value")]
        return cuts.by_blocks(cuts.consecutive(hf_names[0], convolved), self.placement.tp)

    def _kinds(self, module: str) -> tuple[str, ...]:
        return ("weight", "bias") if has_bias(module, self.shape) else ("weight",)

    def _expert(self, module: str, kind: str, local: int, layer: int) -> list[Piece] | None:
        sizes = self._layers[layer].get(module)
        if sizes is None or kind not in self._kinds(module):
            return None
        first, _ = self.placement.ep.of(self.shape.num_moe_experts, "num_experts")
        hf_names = self._hf_names(module, layer, first + local)
        hf_names = [tensor_name(hf_name, kind) for hf_name in hf_names]
        return _linear(module, hf_names, sizes, self.placement.expert_tp)

    def _table(self, module: str, num_rows: int) -> list[Piece]:
        size = self.shape.vocab_size
        return cuts.of_vocabulary(f"{module}.weight", size, num_rows, self.placement.tp)


def _linear(
    module: str, hf_names: list[str], sizes: tuple[tuple[int, ...], ...], shard: Shard
) -> list[Piece]:
    """Cut a linear along its input where it reads what ranks share out, else along its output.

    The bias of the former is whole on every rank.
    """
    if not module.endswith(_ROW_PARALLEL):
        named = zip(hf_names, sizes, strict=True)
        return cuts.by_blocks([Block(name, rows) for name, (rows, *_) in named], shard)
    if hf_names[0].endswith(".bias"):
        return [Piece(hf_names[0], 0, sizes[0][0], 0)]
    return cuts.along_input(hf_names[0], sizes[0], shard)
