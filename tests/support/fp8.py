"""Bases in FP8 with block scales, by plain torch; nothing here needs transformers."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FP8 = torch.float8_e4m3fn


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """Return all tensors of a directory of one file."""
    return load_file(directory / "model.safetensors")


def change(
    directory: Path,
    tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    **fields: object,
) -> Path:
    """Write a directory anew with other tensors and with fields of config.json set."""
    save_file(tensors(tensors_of(directory)), directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **fields}))
    return directory


def scale_grid(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Return codes times scales in fp32, block after block."""
    plain = weight.float()
    for i, row in enumerate(range(0, weight.shape[0], block[0])):
        for j, column in enumerate(range(0, weight.shape[1], block[1])):
            plain[row : row + block[0], column : column + block[1]] *= scale[i, j].float()
    return plain


def in_fp8(
    block: tuple[int, int], scale_dtype: torch.dtype = torch.float32
) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Return what stores the projections of a model as FP8 with block scales."""

    def write(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, weight in tensors.items():
            if not name.endswith(("_proj.weight", "_proj_with_mqa.weight")):
                found[name] = weight
                continue
            grid = [-(-size // each) for size, each in zip(weight.shape, block, strict=True)]
            scale = torch.empty(grid)
            for i, rows in enumerate(weight.split(block[0])):
                for j, part in enumerate(rows.split(block[1], dim=1)):
                    scale[i, j] = part.abs().max() / 448
            if scale_dtype != torch.float32:
                scale = scale.log2().ceil().exp2()
            ones = torch.ones_like(weight, dtype=torch.float32)
            found[name] = (weight.float() / scale_grid(ones, scale, block)).to(FP8)
            found[f"{name}_scale_inv"] = scale.to(scale_dtype)
        return found

    return write


def out_of_fp8(block: tuple[int, int]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Return what multiplies such projections out, by plain torch."""

    def write(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: scale_grid(weight, tensors[f"{name}_scale_inv"], block)
            if f"{name}_scale_inv" in tensors
            else weight
            for name, weight in tensors.items()
            if not name.endswith("_scale_inv")
        }

    return write


def fp8_config(block: tuple[int, int], **more: object) -> dict[str, object]:
    """Return quantization_config as the published -FP8 models have it."""
    fixed = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    return {**fixed, "weight_block_size": list(block), **more}
