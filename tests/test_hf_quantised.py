"""Bases whose weights are quantised: read where they are FP8 with block scales, else named."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megalora.model.config_json import read_config
from tests.support.fp8 import FP8, change, fp8_config, in_fp8
from tests.support.fuzzing import command
from tests.support.honest import LLAMA, write_base, write_peft

NUMBERS = pytest.mark.bad_input("a number that is not one")
Tensors = dict[str, Tensor]
BLOCK = (4, 8)
Q = "model.layers.0.self_attn.q_proj"


def codes(dtype: torch.dtype, *ends: str, weight: str = "weight") -> Callable[[Tensors], Tensors]:
    """Return what stores each projection as codes, with other tensors beside it."""

    def write(tensors: Tensors) -> Tensors:
        found: Tensors = {}
        for name, tensor in tensors.items():
            module = name.removesuffix(".weight")
            if not module.endswith("_proj"):
                found[name] = tensor
                continue
            found[f"{module}.{weight}"] = torch.ones(tensor.shape).to(dtype)
            found |= {f"{module}.{end}": torch.ones(2) for end in ends}
        return found

    return write


# What config.json says, what the tensors are; and what each of them alone is named by.
FORMS: dict[str, tuple[dict[str, object], Callable[[Tensors], Tensors], str]] = {
    "bitsandbytes, 4 bits": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        codes(torch.uint8, "weight.absmax", "weight.quant_map"),
        "bitsandbytes",
    ),
    "bitsandbytes, 8 bits": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        codes(torch.int8, "SCB", "weight_format"),
        "bitsandbytes",
    ),
    "compressed-tensors, int8": (
        {"quant_method": "compressed-tensors", "format": "int-quantized"},
        codes(torch.int8, "weight_scale"),
        "compressed-tensors",
    ),
    "compressed-tensors, w4a16": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        codes(torch.int32, "weight_scale", "weight_shape", weight="weight_packed"),
        "compressed-tensors",
    ),
    "GPTQ": (
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        codes(torch.int32, "qzeros", "scales", "g_idx", weight="qweight"),
        "GPTQ",
    ),
    "AWQ": (
        {"quant_method": "awq", "bits": 4},
        codes(torch.int32, "qzeros", "scales", weight="qweight"),
        "AWQ",
    ),
    "FP8 per tensor": (
        {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"},
        codes(FP8, "weight_scale", "input_scale"),
        "compressed-tensors or ModelOpt",
    ),
    "FP8 of fbgemm": (
        {"quant_method": "fbgemm_fp8"},
        codes(FP8, "weight_scale"),
        "compressed-tensors or ModelOpt",
    ),
    "ModelOpt": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        codes(torch.uint8, "weight_scale", "weight_scale_2", "input_scale"),
        "ModelOpt",
    ),
    "HQQ": ({"quant_method": "hqq"}, codes(torch.uint8, "scale", weight="W_q"), "HQQ"),
    "MXFP4": (
        {"quant_method": "mxfp4"},
        codes(torch.uint8, "weight_scales", weight="weight_blocks"),
        "MXFP4",
    ),
    "MLX": ({"bits": 4, "group_size": 64}, codes(torch.uint32, "scales", "biases"), "MLX"),
    "anything": ({"quant_method": "new"}, codes(torch.int16), "as I16, codes of numbers"),
    "nothing but a cast": ({"quant_method": "fp8_e5m2"}, codes(FP8), "as F8_E4M3, codes"),
}


def base_of(place: Path, form: str, field: str) -> Path:
    says, tensors, _ = FORMS[form]
    base = write_base(place / "base", LLAMA)
    return change(base, tensors, **({field: says} if field else {}))


@NUMBERS
@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_base_is_named_by_its_config(form: str, tmp_path: Path) -> None:
    says = FORMS[form][0]
    fields = ("quantization_config", "compression_config", "quantization")
    base = base_of(tmp_path, form, field := fields[len(form) % 3])
    named = f" of quant_method '{says['quant_method']}'" if "quant_method" in says else ""
    with pytest.raises(ValueError, match=rf"config\.json has {field}{named}, .*unquantised base"):
        read_config(base)
    # It is read by its sizes alone.
    command("recommend", "--model", base, "--rank", 2)


@NUMBERS
@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_base_is_named_by_its_tensors(form: str, tmp_path: Path) -> None:
    base, adapter = base_of(tmp_path, form, ""), write_peft(tmp_path / "adapter")
    merge = ["merge", adapter, "--hf-model", base, "--output", tmp_path / "never"]
    for words in (["flags", "--hf-model", base], merge):
        with pytest.raises(ValueError, match=rf"{base} has .*{FORMS[form][2]}.*unquantised base"):
            command(*words)
    assert not (tmp_path / "never").exists()


def test_what_is_not_quantised_is_read(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", LLAMA)
    for nothing in (None, {}):
        assert read_config(change(base, quantization_config=nothing))["vocab_size"] == 10
    # Of plain weights beside such a config.json transformers multiplies nothing.
    assert read_config(change(base, quantization_config=fp8_config(BLOCK)))["vocab_size"] == 10


def fp8_base(place: Path) -> Path:
    base = write_base(place / "base", LLAMA)
    return change(base, in_fp8(BLOCK), quantization_config=fp8_config(BLOCK))


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


@NUMBERS
@pytest.mark.parametrize(
    ("tensors", "fields", "sentence"),
    [
        (without(f"{Q}.weight_scale_inv"), {}, f"{Q}.weight as F8_E4M3 without {Q}.weight_scale_"),
        (without(f"{Q}.weight"), {}, f"{Q}.weight_scale_inv and not what it scales"),
        (dict, {"quantization_config": None}, "no quantization_config, .* download config.json"),
        (dict, {"quantization_config": fp8_config((8, 8))}, r"\[2, 2\]: blocks of \[8, 8\] have"),
        (dict, {"quantization_config": fp8_config((0, 8))}, "weight_block_size is .0, 8.: must be"),
        (dict, {"quantization_config": fp8_config((True, 8))}, "weight_block_size is .True, 8."),
        (
            lambda tensors: {
                **tensors,
                f"{Q}.weight_scale_inv": tensors[f"{Q}.weight_scale_inv"].to(torch.uint8),
            },
            {},
            f"{Q}.weight_scale_inv as U8: .*unquantised",
        ),
        (codes(torch.int8, "weight_scale_inv"), {}, "_proj.weight as I8, with scales"),
        (codes(torch.bfloat16, "weight_scale_inv"), {}, "_proj.weight as BF16, with scales"),
    ],
    ids=range(9),
)
def test_fp8_that_does_not_fit_its_scales_is_refused(
    tensors: Callable[[Tensors], Tensors], fields: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    base = fp8_base(tmp_path)
    assert read_config(base)["vocab_size"] == 10
    with pytest.raises(ValueError, match=sentence):
        read_config(change(base, tensors, **fields))


def test_blocks_that_config_json_leaves_out_are_128_wide(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", LLAMA)
    change(base, in_fp8((128, 128)), quantization_config={"quant_method": "fp8"})
    adapter = write_peft(tmp_path / "adapter")
    command("merge", adapter, "--hf-model", base, "--output", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
