"""Which fields of an adapter_config.json mean something here, and which cannot be represented.

PEFT reads an empty list, an empty object, null and false as no use of a field, and so does this.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from megalora.printable import printable

# Fields of LoraConfig that change the update's formula or the base, and what they stand for.
REFUSED = {
    "use_dora": "DoRA's magnitudes",
    "use_qalora": "QALoRA's pooled inputs",
    "use_bdlora": "BD-LoRA's block-diagonal factors",
    "lora_bias": "a bias of lora_B",
    "trainable_token_indices": "trained tokens of the embedding",
    "layer_replication": "layers that the base does not have",
    "alora_invocation_tokens": "aLoRA, which is off before its invocation tokens",
    "arrow_config": "Arrow's routing between adapters",
    "kasa_config": "KaSA, which changes the base",
    "enable_lora": "merged linears of PEFT 0.2",
}
# Fields that only matter in training, that the tensors themselves answer, or that are read.
HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "merge_weights",
    "modules_to_save", "monteclora_config", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "target_parameters",
    "task_type", "use_rslora", "velora_config",
}  # fmt: skip
# Starts that leave the base as it is; all others take theirs out of it, or are not known.
_STARTS = ("gaussian", "eva", "orthogonal", "mica")
_MERGE = "merge it with PEFT (merge_and_unload), and give the result as the base"


def check_type(config: Mapping[str, Any]) -> None:
    """Raise ValueError where a configuration is not that of a LoRA by PEFT, naming what it is."""
    kind = config.get("peft_type")
    if kind == "LORA":
        return
    if "fine_tune_type" in config or "lora_parameters" in config:
        raise ValueError(
            "adapter_config is MLX's, without peft_type: its factors are transposed and have other "
            "names: fuse it with mlx_lm.fuse, and give the result as the base"
        )
    if kind is None:
        raise ValueError(
            "adapter_config peft_type is None: must be 'LORA', as PEFT's save_pretrained writes it"
        )
    raise ValueError(
        f"adapter_config peft_type is {kind!r:.100}: must be 'LORA': convert the adapter with "
        f"PEFT's save_as_lora, or {_MERGE}"
    )


def check_fields(config: Mapping[str, Any]) -> None:
    """Raise ValueError, by name, for whatever plain LoRA factors cannot represent.

    Of fields that are not known, those are refused that look like a switch of another variant:
    `use_...`, `..._config`, with `lora` in their name, or true. The others are named and ignored.
    """
    used = [f"{name} ({means})" for name, means in REFUSED.items() if config.get(name)]
    unknown = [
        name for name, value in config.items() if value and name not in HARMLESS | REFUSED.keys()
    ]
    switches = [name for name in unknown if _is_switch(name, config[name])]
    used += [f"{name} (not known here)" for name in switches]
    if used:
        raise ValueError(
            f"adapter_config uses {', '.join(used)}, which plain LoRA factors cannot represent: "
            f"convert the adapter to plain LoRA, or {_MERGE}"
        )
    _check_start(config.get("init_lora_weights"))
    for name in unknown:
        shown = printable(name, 100)
        warnings.warn(f"adapter_config has the unknown field {shown}, ignored", stacklevel=4)


def _is_switch(name: str, value: object) -> bool:
    return value is True or "lora" in name or name.startswith("use_") or name.endswith("_config")


def _check_start(start: object) -> None:
    """Raise ValueError for a start that took its values out of the base, or may have."""
    if not start or not isinstance(start, str) or start.lower() in _STARTS:
        return
    raise ValueError(
        f"adapter_config init_lora_weights is {start!r:.100}, a start that changes the base or is "
        "not known here, so that the factors are not for the base as it was: save the adapter with "
        "PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), which makes plain "
        f"LoRA of PiSSA, OLoRA, CorDA and LoRA-GA, or {_MERGE}"
    )
