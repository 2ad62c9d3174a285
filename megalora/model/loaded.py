"""What transformers makes of a config.json with the tensors beside it; quantised ones by name."""

import re
from collections.abc import Mapping
from typing import Any, NoReturn

from megalora.model.families import names_of
from megalora.model.multimodal import language_config
from megalora.model.mxfp4 import check_mxfp4, is_mxfp4
from megalora.model.stored import TensorFiles

# Where a config.json says how its weights are quantised, newest spelling first.
QUANTISATION = ("quantization_config", "compression_config", "quantization")
SCALE = "_scale_inv"
_FLOATS = ("F64", "F32", "F16", "BF16")
_MXFP4 = "MXFP4"
_WEIGHT = re.compile(r"weight|.+\.(weight|gate_up_proj|down_proj)")
# Tensors that only quantised weights have, and what writes them.
_MARKS = {
    re.compile(r"\.(absmax|quant_map|nested_absmax|SCB|weight_format)$|\.quant_state\."): (
        "bitsandbytes"
    ),
    re.compile(r"\.(qweight|qzeros|g_idx)$"): "GPTQ or AWQ",
    re.compile(r"\.weight_(packed|shape|zero_point|global_scale)$"): "compressed-tensors",
    re.compile(r"_(blocks|scales)$"): _MXFP4,
    re.compile(r"\.(W_q|Wq_packed)$"): "HQQ",
    re.compile(r"\.weight_scale(_2)?$|\.(input|output)_scale$"): "compressed-tensors or ModelOpt",
    re.compile(r"\.(scales|biases)$"): "MLX, GPTQ or AWQ",
    re.compile(r"\.(codebooks?|codes)$"): "AQLM",
}
# Buffers that old checkpoints carry along and every implementation computes itself.
_HARMLESS = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|position_ids|masked_bias"
    r"|(self_attn|attn|attention)\.bias|_extra_state)$"
)


def is_harmless(name: str) -> bool:
    """Say whether a tensor may be left out: transformers has no parameter of this kind of name."""
    return _HARMLESS.search(name) is not None


def quantisation(config: Mapping[str, Any]) -> str:
    """Return the field of a config.json that says how its weights are quantised, or nothing."""
    return next((field for field in QUANTISATION if config.get(field)), "")


def scale_block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the rows and columns that a scale of FP8 weights is of; None for all other weights."""
    given = config.get("quantization_config")
    if not isinstance(given, dict) or given.get("quant_method") != "fp8":
        return None
    # What transformers takes where nothing is said.
    block = given.get("weight_block_size", [128, 128])
    if not isinstance(block, list) or len(block) != 2:
        return None
    rows, columns = block
    if not all(type(size) is int and 0 < size <= 2**16 for size in block):
        raise ValueError(f"config.json weight_block_size is {block!r:.100}: must be two integers")
    return rows, columns


def is_read(config: Mapping[str, Any]) -> bool:
    """Say whether weights that are quantised as a config.json says are read as plain numbers."""
    return scale_block(config) is not None or is_mxfp4(config)


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json of the same model with its weights as plain numbers."""
    return {field: value for field, value in config.items() if field not in QUANTISATION}


def check_readable(config: Mapping[str, Any], files: TensorFiles | None) -> None:
    """Raise ValueError, by what says so, where a model's weights are quantised and not read.

    FP8 with block scales is read, and MXFP4 of gpt-oss. Without files, config.json alone is looked
    at.
    """
    if (field := quantisation(config)) and not is_read(config):
        given = config[field]
        method = given.get("quant_method", "") if isinstance(given, dict) else ""
        named = f" of quant_method {method!r:.50}" if method else ""
        _refuse(f"config.json has {field}{named}, {given!r:.200}")
    if files is not None:
        if is_mxfp4(config):
            check_mxfp4(files)
        _check_tensors(files, scale_block(config), is_mxfp4(config))


def _check_tensors(files: TensorFiles, block: tuple[int, int] | None, is_packed: bool) -> None:
    for mark, who in _MARKS.items():
        if is_packed and who == _MXFP4:
            continue
        if name := next(filter(mark.search, files), None):
            _refuse(f"{files.directory} has {name}, as {who} writes it")
    for name in files:
        is_coded = _WEIGHT.fullmatch(name) and files.dtype(name) not in _FLOATS
        if is_coded or name + SCALE in files:
            _check_scaled(name, files, block)
        elif name.endswith(SCALE) and name.removesuffix(SCALE) not in files:
            raise ValueError(
                f"{files.directory} has {name} and not what it scales: download it again"
            )


def _check_scaled(name: str, files: TensorFiles, block: tuple[int, int] | None) -> None:
    folder, dtype, scaled = files.directory, files.dtype(name), name + SCALE in files
    if not dtype.startswith(("F8_E4M3", "F8_E5M2")) or (not block and not scaled):
        what = "with scales" if scaled else "codes of numbers"
        _refuse(f"{folder} has {name} as {dtype}, {what}")
    if not block:
        raise ValueError(
            f"{folder} has {name} as {dtype} with {name + SCALE}, and config.json no "
            "quantization_config, which says the blocks that it scales: download config.json again"
        )
    if not scaled:
        raise ValueError(
            f"{folder} has {name} as {dtype} without {name + SCALE}: download it again"
        )
    shape, scales = files.shape(name), files.shape(name + SCALE)
    grid = [-(-size // each) for size, each in zip(shape[-2:], block, strict=False)]
    if len(shape) < 2 or scales != (*shape[:-2], *grid) or 0 in shape:
        raise ValueError(
            f"{folder} has {name} {list(shape)} with scales {list(scales)}: blocks of "
            f"{list(block)} have scales {[*shape[:-2], *grid]}"
        )
    if files.dtype(name + SCALE) not in (*_FLOATS, "F8_E8M0"):
        _refuse(f"{folder} has {name + SCALE} as {files.dtype(name + SCALE)}")


def _refuse(what: str) -> NoReturn:
    raise ValueError(
        f"{what}: quantised weights are read as FP8 with block scales, or as gpt-oss' MXFP4, "
        "only: give the unquantised base, in bfloat16, float16 or float32"
    )


def with_own_head(config: Mapping[str, Any], files: TensorFiles | None) -> dict[str, Any]:
    """Return a config.json that is tied where transformers ties: not where the head is another.

    transformers 5 ties two stored tensors only where they are equal, whatever the flag says.
    """
    names = names_of(str(config.get("model_type")))
    pair = f"{names.embedding}.weight", f"{names.unembedding}.weight"
    said = language_config(config).get("tie_word_embeddings") is True
    if not said or files is None:
        return {**config}
    stored = {names.as_alone(name): name for name in files}
    if not all(name in stored for name in pair):
        return {**config}
    one, other = (stored[name] for name in pair)
    return {**config, "tie_word_embeddings": _equal(files, one, other)}


def _equal(headers: TensorFiles, first: str, second: str, *, at_once: int = 1024) -> bool:
    shape = headers.shape(first)
    if shape != headers.shape(second):
        return False
    files = TensorFiles(headers.directory)
    parts = [(slice(row, row + at_once),) for row in range(0, shape[0], at_once)]
    return all(
        files.part(first, part).double().equal(files.part(second, part).double()) for part in parts
    )
