"""LoRA for NVIDIA Megatron: adapters in every parallel layout, exchanged with Hugging Face."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from megalora.arguments import add_lora_args, lora_config_from_args
from megalora.config import LoRAConfig

if TYPE_CHECKING:
    from megalora.adapters.merge import merge, unmerge
    from megalora.builder import apply_lora, lora_hook, set_enabled

__version__ = "0.2.0"

__all__ = [
    "LoRAConfig",
    "add_lora_args",
    "apply_lora",
    "lora_config_from_args",
    "lora_hook",
    "merge",
    "set_enabled",
    "unmerge",
]

# Loaded on first use: `megalora.cpu.install` has to run before megatron is imported.
# NOTE: no name may be that of a module here, which would take the function's place once imported.
_LAZY = {
    "apply_lora": "builder",
    "lora_hook": "builder",
    "set_enabled": "builder",
    "merge": "adapters.merge",
    "unmerge": "adapters.merge",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'megalora' has no attribute {name!r}")
    return getattr(import_module(f"megalora.{_LAZY[name]}"), name)
