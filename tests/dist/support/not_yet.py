"""Families without a row: transformers' models with and without what Megatron lacks."""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.support.hf_models import (
    FFN,
    GROUPS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LAYERS,
    MOE_FFN,
    NUM_EXPERTS,
    VOCAB,
    transformers,
)

Tensors = dict[str, Tensor]
Fields = Mapping[str, Any]
# Fields of the configuration that are as in Megatron, or what changes a model so.
Removal = Fields | Callable[[nn.Module], None]

EPS = 1e-6
COMMON = {
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "pad_token_id": 0,
    "rms_norm_eps": EPS,
}
ROPE = {"rope_type": "default", "rope_theta": 100.0}
# Sigmoid scores without groups, of a family that has a row.
GLM_EXPERTS = {
    "n_routed_experts": NUM_EXPERTS,
    "moe_intermediate_size": MOE_FFN,
    "n_shared_experts": 0,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "num_nextn_predict_layers": 0,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A family without a row.

    architecture: transformers' class; fields: of its configuration, beside `COMMON`.
    parts: all that Megatron lacks, each with what takes it out.
    prepare: changes what is in Megatron and in no row.
    row: the family that the rest is one of; config: fields of its config.json, beside `COMMON`;
        tensors: what gives the weights its names.
    built: options of Megatron's configuration beside that row's; activation: in place of silu.
    """

    architecture: str
    fields: Fields
    parts: Mapping[str, Removal]
    row: str
    prepare: Callable[[nn.Module], object] = nn.Module.eval
    config: Fields = field(default_factory=dict)
    tensors: Callable[[Tensors], Tensors] = dict
    built: Fields = field(default_factory=dict)
    activation: Callable[[Tensor], Tensor] = nn.functional.silu

    def model(self, part: str = "") -> nn.Module:
        """Return a tiny model with one of the parts that Megatron lacks, or with none."""
        out = [removal for name, removal in self.parts.items() if name != part]
        fields = {**COMMON, **self.fields}
        for removal in out:
            fields |= {} if callable(removal) else removal
        kind = getattr(transformers, self.architecture)
        model = kind(kind.config_class(**fields, attn_implementation="eager")).eval()
        self.prepare(model)
        draw(model)
        for removal in out:
            if callable(removal):
                removal(model)
        return model

    def write(self) -> Path:
        """Write what Megatron has as a directory of the family that has a row."""
        model, directory = self.model(), Path(tempfile.mkdtemp(prefix="megalora-"))
        tensors = self.tensors(dict(model.state_dict()))
        save_file(
            {name: tensor.clone().contiguous() for name, tensor in tensors.items()},
            directory / "model.safetensors",
        )
        own = {"model_type": self.row, "rms_norm_eps": EPS, "rope_theta": ROPE["rope_theta"]}
        config = {**COMMON, **own, **self.config}
        (directory / "config.json").write_text(json.dumps(config))
        return directory


@torch.no_grad()
def draw(model: nn.Module) -> None:
    """Give a model the same values whatever parts it has."""
    for number, (_, param) in enumerate(model.named_parameters()):
        values = torch.randn(param.shape, generator=torch.Generator().manual_seed(number))
        param.add_(0.2 * values) if param.dim() == 1 else param.copy_(0.15 * values)


def identities(*names: str) -> Callable[[nn.Module], None]:
    """Return what takes modules of each layer out."""

    def remove(model: nn.Module) -> None:
        for layer in model.model.layers:
            for name in names:
                place, _, last = name.rpartition(".")
                setattr(layer.get_submodule(place), last, nn.Identity())

    return remove


def renamed(*pairs: tuple[str, str], norms: float = 0.0) -> Callable[[Tensors], Tensors]:
    """Return what renames parts of tensors' names; norms: added to their weights."""

    def rename(tensors: Tensors) -> Tensors:
        found: Tensors = {}
        for name, tensor in tensors.items():
            plus = norms if "norm" in name else 0.0
            for old, new in pairs:
                name = name.replace(old, new)
            found[name] = tensor + plus
        return found

    return rename


def norms_in_front(model: nn.Module) -> None:
    """Let the norms behind attention and MLP be in front of them."""

    def forward(layer: nn.Module, hidden_states: Tensor, **rest: Any) -> Tensor:
        normed = layer.post_attention_layernorm(hidden_states)
        middle = hidden_states + layer.self_attn(hidden_states=normed, **rest)[0]
        return middle + layer.mlp(layer.post_feedforward_layernorm(middle))

    for layer in model.model.layers:
        layer.forward = partial(forward, layer)


def one_after_the_other(model: nn.Module) -> None:
    """Let attention and then the MLP be added, each behind the same norm."""

    def forward(layer: nn.Module, hidden_states: Tensor, **rest: Any) -> Tensor:
        normed = layer.input_layernorm(hidden_states)
        middle = hidden_states + layer.self_attn(hidden_states=normed, **rest)[0]
        return middle + layer.mlp(layer.input_layernorm(middle))

    for layer in model.model.layers:
        layer.forward = partial(forward, layer)


def unscaled(model: nn.Module) -> None:
    """Let all be added to the residual as it is."""
    for layer in model.model.layers:
        layer.residual_multiplier = 1.0
