"""What else than a PEFT LoRA is brought as an adapter, by its tensors' names and by its files."""

import os
import re
from pathlib import Path

from megalora.checkpoint.layout import TRACKER
from megalora.hf.factors import summarise
from megalora.model.stored import ADAPTER, MODEL
from megalora.printable import printable

CONFIG_NAME = "adapter_config.json"
_MERGE = "merge it with PEFT (merge_and_unload), and give the result as the base"
_BRIDGE = "export it by Megatron-Bridge (AutoBridge.export_adapter_ckpt), which writes PEFT's form"
_SAVE = "save it again, by PEFT's save_pretrained"
_FUSE = "fuse it with mlx_lm.fuse, and give the result as the base"
_GATHER = (
    "it has every rank's part: gather them (DeepSpeed's zero_to_fp32.py, accelerate merge-weights, "
    "or stage3_gather_16bit_weights_on_model_save in training), and save by PEFT's save_pretrained"
)
_TUNE = "save it by torchtune with its Hugging Face checkpointer, which writes PEFT's form"

# Of a tensor's key: whose it is, and what to do.
_TENSORS: tuple[tuple[str, str, str], ...] = (
    (r"lora_magnitude_vector", "DoRA's magnitudes", _MERGE),
    (r"lora_embedding_[AB]", "an adapter of an embedding, which Megatron's has not", _MERGE),
    (r"token_adapter|trainable_tokens", "trained tokens of the embedding", _MERGE),
    (r"lora_[AB](\.[^.]+)?\.bias$", "a bias of lora_B (lora_bias)", _MERGE),
    (r"lora_diag", "KaSA's", _MERGE),
    (r"lora_E|ranknum", "AdaLoRA's", _MERGE),
    (r"hada_w\d", "LoHa's", _MERGE),
    (r"lokr_w\d", "LoKr's", _MERGE),
    (r"vera_lambda|vera_[AB]", "VeRA's", _MERGE),
    (r"ia3_l", "IA3's", _MERGE),
    (r"[bh]?oft_[RbS]|boft_", "OFT's", _MERGE),
    (r"prompt_embeddings|prompt_encoder", "a trained prompt", "it is no update of weights"),
    (
        r"(^|\.)lora_(unet|te\d?)_|\.lora_(down|up)\.weight$|\.alpha$",
        "those of kohya-ss and ComfyUI (lora_down, lora_up, alpha)",
        "convert it to PEFT's names first",
    ),
    (r"\.lora_[ab]$", "MLX's (lora_a, lora_b)", _FUSE),
    (r"\.lora_[ab]\.weight$", "torchtune's (lora_a, lora_b)", _TUNE),
    (r"adapter\.linear_(in|out)|\.adapter\.", "Megatron-Bridge's or NeMo's", _BRIDGE),
    (r"linear_(qkv|proj|fc[12])_lora\.", "megalora's own checkpoint's", "give its directory"),
    (
        r"\.(absmax|quant_map|nested_\w+|quant_state\.\w+|SCB|weight_format|qweight|qzeros|scales)$",
        "a quantized base's, saved along",
        _SAVE,
    ),
)  # fmt: skip
_CAUSES = [(re.compile(pattern), whose, advice) for pattern, whose, advice in _TENSORS]


def cause_of(key: str) -> str:
    """Say whose tensor it is by its key, and what to do; empty where that is not known."""
    for pattern, whose, advice in _CAUSES:
        if pattern.search(key):
            return f"{printable(key, 200)} is {whose}: {advice}"
    return ""


def refuse_foreign(directory: str | os.PathLike[str], *, checkpoints: bool = False) -> None:
    """Raise ValueError for what is no adapter here, saying what it is and what to do.

    What is not known is left to its reader. checkpoints: whether Megatron's are read too.
    """
    path = Path(directory)
    if not os.path.lexists(path):
        raise ValueError(f"{path} does not exist: give the directory of an adapter, downloaded")
    said = _of_file(path) if path.is_file() else _of_directory(path, checkpoints=checkpoints)
    if said:
        raise ValueError(f"{path} {said}")


def _of_file(path: Path) -> str:
    if path.name in (CONFIG_NAME, f"{ADAPTER}.safetensors"):
        return f"is a file of an adapter: give its directory, {path.parent}"
    kinds = {
        ".nemo": f"is NeMo's archive: {_BRIDGE}",
        ".gguf": f"is a GGUF file: give the adapter that it was made of, or {_MERGE}",
        ".safetensors": f"is one file: give a directory with {CONFIG_NAME}, as PEFT writes it",
    }
    pickle = "is a pickle, which can run code and is never loaded: " + _SAVE
    return kinds.get(path.suffix, pickle if path.suffix in _PICKLES else "")


_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Files that say whose a directory is, most telling first.
_MARKS: tuple[tuple[str, str], ...] = (
    ("adapters.safetensors", f"is MLX's adapter: {_FUSE}"),
    ("pytorch_lora_weights.safetensors", "is diffusers' LoRA, which is no language model's"),
    ("run_config.yaml", f"is Megatron-Bridge's checkpoint: {_BRIDGE}"),
    ("iter_*/run_config.yaml", f"is Megatron-Bridge's checkpoint: {_BRIDGE}"),
    ("context/*.yaml", f"is NeMo's checkpoint: {_BRIDGE}"),
    ("model_weights/.metadata", f"is NeMo's checkpoint: {_BRIDGE}"),
    ("zero_to_fp32.py", f"is DeepSpeed's checkpoint: {_GATHER}"),
    ("global_step*", f"is DeepSpeed's checkpoint: {_GATHER}"),
    ("pytorch_model_fsdp_*", f"is FSDP's sharded checkpoint: {_GATHER}"),
    ("adapter_[0-9]*.pt", f"is torchtune's checkpoint: {_TUNE}"),
)


def _of_directory(path: Path, *, checkpoints: bool) -> str:
    if os.path.lexists(path / CONFIG_NAME):
        return _of_adapter(path)
    if (mark := _mark(path)) or (path / TRACKER).exists():
        own = "is a checkpoint of Megatron: write it as PEFT's by megalora export first"
        return mark or ("" if checkpoints else own)
    inside = [
        str(found.parent.relative_to(path))
        for places in ("*", "snapshots/*")
        for found in path.glob(f"{places}/{CONFIG_NAME}")
    ]
    if inside:
        return f"is no adapter, but has some in it: give one of {_listed(inside)}"
    if any(path.glob(f"{ADAPTER}*")):
        return f"has an adapter's tensors, but no {CONFIG_NAME}: copy that file too"
    if (path / "config.json").exists() and any(path.glob(f"{MODEL}*.safetensors*")):
        return "is a whole model, no adapter: give it as --hf-model"
    return ""


def _of_adapter(path: Path) -> str:
    """Return what is wrong where there is a configuration, but not its tensors."""
    if any(path.glob(f"{ADAPTER}*.safetensors*")):
        return ""
    if os.path.lexists(path / f"{ADAPTER}.bin"):
        return (
            f"has {ADAPTER}.bin, a pickle, which can run code and is never loaded: convert it to "
            "safetensors: load it with PEFT, and write it by save_pretrained"
        )
    if any(path.glob(f"{MODEL}*.safetensors*")):
        return (
            f"has {MODEL}.safetensors instead of {ADAPTER}.safetensors: where that is a merged "
            f"model give it as --hf-model, else {_SAVE}"
        )
    return _mark(path)


def _mark(path: Path) -> str:
    return next((said for pattern, said in _MARKS if any(path.glob(pattern))), "")


def _listed(names: list[str]) -> str:
    def by_number(name: str) -> list[int | str]:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

    return summarise([printable(name, 100) for name in sorted(names, key=by_number)])
