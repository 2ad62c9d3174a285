"""Adapters as megalora and others write them, for the readers of servers."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megalora.hf.factors import LoRAFactors
from megalora.hf.peft import write_adapter
from megalora.hf.servers import SERVERS
from megalora.hf.servers.outline import outline_of_directory
from megalora.hf.servers.verdict import Verdict
from megalora.model.families import names_of
from megalora.model.served import ServedModel

HIDDEN, ROWS, LAYERS, EXPERTS, FFN = 16, 40, 2, 12, 8
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
}
# What config.json calls the experts, and has of shared ones.
EXPERTS_OF = {
    "qwen3_moe": {"num_experts": EXPERTS},
    "qwen3_vl_moe": {"num_experts": EXPERTS},
    "mixtral": {"num_local_experts": EXPERTS},
    "gpt_oss": {"num_local_experts": EXPERTS},
    **{
        family: {"num_experts": EXPERTS, "shared_expert_intermediate_size": 3 * FFN}
        for family in ("qwen2_moe", "qwen3_next", "qwen3_5_moe")
    },
    "glm4_moe": {"n_routed_experts": EXPERTS, "n_shared_experts": 3, "first_k_dense_replace": 1},
}
SHARED = dict.fromkeys(("qwen2_moe", "qwen3_next", "qwen3_5_moe"), ("shared_expert", 3 * FFN))
SHARED["glm4_moe"] = ("shared_experts", 3 * FFN)
# What the first layer has in place of attention, and what servers' classes fuse it to.
_APART = {"in_proj_qkv": (16, 40), "in_proj_z": (16, 16)}
DELTA = {"qwen3_next": {"in_proj_qkvz": (16, 56)}, "qwen3_5": _APART, "qwen3_5_moe": _APART}
OF_DELTA = ("in_proj_qkvz", "in_proj_ba", "out_proj")


def config_of(family: str) -> SimpleNamespace:
    """Return a configuration as transformers has it."""
    experts = EXPERTS_OF.get(family)
    moe = {**experts, "moe_intermediate_size": FFN} if experts else {}
    return SimpleNamespace(
        model_type=family,
        architectures=[FAMILIES[family]],
        hidden_size=HIDDEN,
        intermediate_size=2 * FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        vocab_size=ROWS,
        **moe,
    )


def experts_of(config: Any, layer: int) -> int:
    """Return the number of experts of a layer, by whatever name; 0 where it is dense."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    number = next(filter(None, (getattr(config, name, 0) for name in names)), 0)
    return number if layer >= getattr(config, "first_k_dense_replace", 0) else 0


def shared_of(config: Any) -> str:
    """Return what the shared experts of a layer are called; empty where it has none."""
    return SHARED.get(config.model_type, ("", 0))[0]


def factors_of(family: str, ranks: tuple[int, int], *, head: bool) -> dict[str, LoRAFactors]:
    """Return adapters of all modules; ranks: of the experts, and of everything else.

    Experts share what shared-outer ones share.
    """
    attention = {"q_proj": (16, 16), "k_proj": (16, 8), "v_proj": (16, 8), "o_proj": (16, 16)}
    wide, narrow = mlp(2 * FFN), mlp(FFN)
    if family == "phi3":
        attention = {"qkv_proj": (16, 32), "o_proj": (16, 16)}
        wide = {"gate_up_proj": (HIDDEN, 4 * FFN), "down_proj": (2 * FFN, HIDDEN)}
    found: dict[str, LoRAFactors] = {}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        if is_delta_net(family, layer):
            own = {**DELTA[family], "out_proj": (16, 16)}
            found |= {f"{prefix}.linear_attn.{n}": made(ranks[1], s) for n, s in own.items()}
        else:
            found |= {f"{prefix}.self_attn.{n}": made(ranks[1], s) for n, s in attention.items()}
        if not experts_of(config_of(family), layer):
            found |= {f"{prefix}.mlp.{n}": made(ranks[1], s) for n, s in wide.items()}
            continue
        if family in SHARED:
            name, ffn = SHARED[family]
            found |= {f"{prefix}.mlp.{name}.{n}": made(ranks[1], s) for n, s in mlp(ffn).items()}
        place = "block_sparse_moe" if family == "mixtral" else "mlp"
        for part, size in zip(names_of(family).projections, narrow.values(), strict=True):
            first = made(ranks[0], size)
            for expert in range(EXPERTS):
                new = made(ranks[0], size)
                outer = "lora_B" if size == narrow["down_proj"] else "lora_A"
                one = dataclasses.replace(new, **{outer: getattr(first, outer)})
                found[f"{prefix}.{place}.experts.{expert}.{part}"] = one
    return found | ({"lm_head": made(ranks[1], (HIDDEN, ROWS))} if head else {})


def is_delta_net(family: str, layer: int) -> bool:
    """Say whether a layer is a gated delta net."""
    return family in DELTA and layer == 0


def mlp(ffn: int) -> dict[str, tuple[int, int]]:
    return {"gate_proj": (HIDDEN, ffn), "up_proj": (HIDDEN, ffn), "down_proj": (ffn, HIDDEN)}


def made(rank: int, size: tuple[int, int]) -> LoRAFactors:
    return LoRAFactors(torch.randn(rank, size[0]), torch.randn(size[1], rank), 2.0)


def written(place: Path, factors: dict[str, LoRAFactors], format: Any, family: str) -> Path:
    count = EXPERTS if family in EXPERTS_OF else None
    directory, names = place / "adapter", names_of(family)
    options = {"format": format, "names": names, "num_experts": count}
    options["delta_layers"] = [0] if family in DELTA else []
    write_adapter(directory, factors, base_model_name="b", **options)
    return directory


def verdict(server: str, directory: Path, config: SimpleNamespace) -> Verdict:
    model = ServedModel.of(vars(config))
    return SERVERS[server].judge(outline_of_directory(directory), model)


def rewrite(directory: Path, **fields: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# What others leave out of, or put into, an adapter: names that are dropped, and added.
TENSORS = {
    "nothing": ("^$", None),
    "k": (r"k_proj", None),
    "q": (r"q_proj", None),
    "v": (r"v_proj", None),
    "up": (r"up_proj", None),
    "gate": (r"gate_proj", None),
    "down": (r"down_proj", None),
    "one expert": (r"experts\.3\.", None),
    "down of one expert": (r"experts\.3\.(down_proj|w2)", None),
    "a magnitude": ("^$", "model.layers.0.self_attn.q_proj.lora_magnitude_vector"),
    "a whole layer": ("^$", "model.layers.0.input_layernorm.weight"),
    "an embedding's copy": ("^$", "model.embed_tokens.base_layer.weight"),
}


def change_tensors(directory: Path, change: str) -> None:
    """Drop and add tensors, and name in target_modules what is left."""
    dropped, added = TENSORS[change]
    path = directory / "adapter_model.safetensors"
    tensors = {n: t for n, t in load_file(path).items() if not re.search(dropped, n)}
    leaves = {name.split(".lora_")[0].rpartition(".")[2] for name in tensors}
    if added:
        tensors[f"base_model.model.{added}"] = torch.ones(2)
    save_file(tensors, path)
    rewrite(directory, target_modules=sorted(leaves))
