"""Tiny real Hugging Face models with a layer that predicts one token more, as files have them."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.modeling_layers import MtpModel

from tests.support import hf_models

LAYER = f"model.layers.{hf_models.LAYERS}."
FILE = "model.safetensors"


def predicting(family: str) -> tuple[torch.nn.Module, MtpModel]:
    """Return a model and the layer behind it, with values everywhere."""
    model = hf_models.hf_model(family)
    layer = MtpModel(model, 1)
    with torch.no_grad():
        for name, tensor in layer.layers.state_dict().items():
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(torch.rand(tensor.shape) * 0.3)
            elif tensor.dim() == 1:
                tensor.add_(torch.randn_like(tensor) * 0.3)
            else:
                torch.nn.init.normal_(tensor, std=0.2)
    return model, layer.float().eval()


def add_prediction(directory: Path, model: torch.nn.Module, layer: MtpModel) -> None:
    """Write the layer into a directory that the model was saved to, with copies of its tables."""
    tensors = load_file(directory / FILE)
    for name, tensor in layer.layers[0].state_dict().items():
        stored = name.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm", 1)
        is_norm = name.startswith("mtp_block.post_")
        tensors[LAYER + (name.removeprefix("mtp_block.") if is_norm else stored)] = tensor
    tensors[LAYER + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[LAYER + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file({n: t.contiguous() for n, t in tensors.items()}, directory / FILE, {"format": "pt"})


@torch.no_grad()
def predicted(model: torch.nn.Module, layer: MtpModel, ids: Tensor = hf_models.IDS) -> Tensor:
    """Return what the layer makes of each token but the last, normed: [b, s - 1, h]."""
    hidden = model.model(ids).last_hidden_state[:, :-1]
    positions = torch.arange(1, ids.shape[1])[None]
    return layer.forward_layer(0, hidden, positions, None, input_ids=ids[:, 1:])
