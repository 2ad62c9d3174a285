"""Sizes of well-known models, as their Hugging Face config.json files give them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from megalora.model.config_json import load_config, model_shape
from megalora.model.loaded import is_read, quantisation, with_own_head
from megalora.model.mxfp4 import as_plain
from megalora.model.shape import ModelShape
from megalora.model.stored import check_stored_sizes, stored_files


def _llama(
    layers: int, hidden: int, ffn: int, heads: int, *, head_dim: int = 128, tied: bool = False
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
        "vocab_size": 128256,
        "tie_word_embeddings": tied,
    }


def _qwen3(
    layers: int, hidden: int, ffn: int, heads: int, *, groups: int = 8, tied: bool = False
) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": tied,
    }


def _qwen3_moe(
    layers: int, hidden: int, ffn: int, heads: int, *, expert_ffn: int
) -> dict[str, Any]:
    return {
        **_qwen3(layers, hidden, ffn, heads, groups=4),
        "model_type": "qwen3_moe",
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": expert_ffn,
    }


def _glm4_moe(
    layers: int, hidden: int, ffn: int, experts: int, *, expert_ffn: int, dense: int, norm: bool
) -> dict[str, Any]:
    return {
        "model_type": "glm4_moe",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": True,
        "use_qk_norm": norm,
        "vocab_size": 151552,
        "tie_word_embeddings": False,
        "n_routed_experts": experts,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": expert_ffn,
        "n_shared_experts": 1,
        "first_k_dense_replace": dense,
    }


def _deepseek_v3(
    *, heads: int, vocab: int, experts: int, dense: int, model_type: str = "deepseek_v3"
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "num_hidden_layers": 61,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "n_routed_experts": experts,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "n_shared_experts": 1,
        "first_k_dense_replace": dense,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _llama(16, 2048, 8192, 32, head_dim=64, tied=True),
    "llama-3.2-3b": _llama(28, 3072, 8192, 24, tied=True),
    "llama-3.1-8b": _llama(32, 4096, 14336, 32),
    "llama-3.1-70b": _llama(80, 8192, 28672, 64),
    "llama-3.1-405b": _llama(126, 16384, 53248, 128),
    "qwen3-0.6b": _qwen3(28, 1024, 3072, 16, tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 6144, 16, tied=True),
    "qwen3-4b": _qwen3(36, 2560, 9728, 32, tied=True),
    "qwen3-8b": _qwen3(36, 4096, 12288, 32),
    "qwen3-14b": _qwen3(40, 5120, 17408, 40),
    "qwen3-32b": _qwen3(64, 5120, 25600, 64),
    "qwen3-30b-a3b": _qwen3_moe(48, 2048, 6144, 32, expert_ffn=768),
    "qwen3-235b-a22b": _qwen3_moe(94, 4096, 12288, 64, expert_ffn=1536),
    "deepseek-v3": _deepseek_v3(heads=128, vocab=129280, experts=256, dense=3),
    "kimi-k2": _deepseek_v3(heads=64, vocab=163840, experts=384, dense=1, model_type="kimi_k2"),
    "glm-4.5": _glm4_moe(92, 5120, 12288, 160, expert_ffn=1536, dense=3, norm=True),
    "glm-4.5-air": _glm4_moe(46, 4096, 10944, 128, expert_ffn=1408, dense=1, norm=False),
}


def preset_shape(name: str) -> ModelShape:
    """Return a well-known model's sizes; ValueError lists the names where it is unknown."""
    if name not in PRESETS:
        raise ValueError(
            f"model {name!r} is neither a folder with config.json nor a preset: "
            f"use a folder or one of {', '.join(PRESETS)}"
        )
    return model_shape(PRESETS[name], name=name)


def named_shape(name: str, *, family: str = "") -> ModelShape:
    """Read a folder with config.json, or return a preset; `family` overrides the rule's."""
    path = Path(name)
    folder = path.parent if path.is_file() else path
    if path.exists():
        files = stored_files(folder)
        config = with_own_head(load_config(path), files)
        found = model_shape(config, name=folder.name)
        # Quantised tensors may be packed to other sizes.
        if files is not None and (not quantisation(config) or is_read(config)):
            check_stored_sizes(found, as_plain(files))
    else:
        found = preset_shape(name)
    return replace(found, family=family) if family else found


def as_preset(shape: ModelShape) -> ModelShape:
    """Return the shape with the family of the preset that has the same sizes, if there is one.

    The vocabulary is left out of the comparison: Megatron pads it.
    """
    sizes = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    sizes += ("multi_latent_attention", "q_lora_rank", "kv_lora_rank")
    sizes += ("qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
    sizes += (
        ("moe_ffn_hidden_size", "num_moe_experts")
        if shape.num_moe_experts
        else ("ffn_hidden_size",)
    )
    for preset in map(preset_shape, PRESETS):
        if all(getattr(shape, size) == getattr(preset, size) for size in sizes):
            return replace(shape, family=preset.family, name=preset.name)
    return shape
