"""Tiny real Hugging Face models, adapters for them, and the merged reference made without PEFT."""

import copy
import dataclasses
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megalora.hf.factors import LoRAFactors

os.environ["HF_HUB_OFFLINE"] = "1"

import transformers
from peft import LoraConfig, PeftModel, get_peft_model

HIDDEN, MOE_FFN, FFN, VOCAB, LAYERS, HEADS, GROUPS, HEAD_DIM = 32, 24, 40, 66, 2, 4, 2, 16
# Attention through latents has others.
_OF_HEADS = ("head_dim", "num_key_value_heads")
NUM_EXPERTS = 16  # at least 11, so that sorting "10" before "2" shows; 2 * MOE_FFN != HIDDEN
TOPK = 2
FAMILIES = (
    "llama",
    "mistral",
    "phi3",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "glm4_moe",
    "glm4_moe_lite",
    "deepseek_v3",
    "nemotron_h",
    "gpt_oss",
    "qwen3_next",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen2_5_vl",
    "qwen3_vl",
    "mistral3",
)
# Of the part for images, which stays as it is.
_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "num_position_embeddings": 16,
}
_PIXTRAL = {
    "model_type": "pixtral",
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "head_dim": 8,
    "image_size": 16,
    "patch_size": 4,
}
# Of gated delta nets: two value heads for each key head.
_DELTA = {
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
    # Two of 16 tokens' frequencies.
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.25},
}
# Of eight frequencies three are kept, two are mixed and three divided.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 8.0,
    "truncate": False,
    "original_max_position_embeddings": 8,
    "beta_fast": 1.0,
    "beta_slow": 0.1,
}
_ROUTERS = ("mlp.gate.weight", "mixer.gate.weight", "mlp.router.weight")
_COMMON = {
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
    "initializer_range": 0.1,
}


def hf_config(
    family: str, *, tied: bool = False, **changes: object
) -> transformers.PretrainedConfig:
    """Return the configuration of a tiny model."""
    common = {**_COMMON, "tie_word_embeddings": tied}
    if family in ("qwen3_5", "qwen3_5_moe"):
        text = hf_config(f"{family}_text", tied=tied, **changes).to_dict()
        kind = transformers.AutoConfig.for_model(family).__class__
        return kind(text_config=text, vision_config=_VISION, tie_word_embeddings=tied)
    if family in ("qwen2_5_vl", "qwen3_vl", "mistral3"):
        return _vision_language(family, {**common, **changes})
    if family == "llama":
        scaling = {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        long = {"max_position_embeddings": 131072, "rope_parameters": scaling}
        return transformers.LlamaConfig(**{**common, **long, **changes})
    if family == "mistral":
        # Of 16 tokens, so that it decides most of the logits.
        return transformers.MistralConfig(**{**common, "sliding_window": 3, **changes})
    if family == "qwen2":
        return transformers.Qwen2Config(**{**common, "head_dim": HIDDEN // HEADS, **changes})
    if family == "phi3":
        del common["head_dim"]
        return transformers.Phi3Config(
            **{**common, "sliding_window": 3, "pad_token_id": 0, **changes}
        )
    if family == "qwen3":
        return transformers.Qwen3Config(**{**common, **changes})
    if family == "qwen3_5_text":
        return transformers.Qwen3_5TextConfig(**{**common, **_DELTA, **changes})
    return _experts_config(family, {**common, "num_experts_per_tok": TOPK, **changes})


def _vision_language(family: str, fields: dict[str, object]) -> transformers.PretrainedConfig:
    """Return a model of texts and images: features of its embedding turn by rows and columns."""
    rope, scaling = {"rope_type": "default", "rope_theta": 100.0}, fields.get("rope_parameters", {})
    kind = transformers.AutoConfig.for_model(family).__class__
    if family == "mistral3":
        fields["model_type"], vision = "mistral", {**_PIXTRAL, "hidden_size": 16}
    elif family == "qwen3_vl":
        rope |= {"mrope_section": [3, 3, 2], "mrope_interleaved": True}
        vision = {**_VISION, "deepstack_visual_indexes": [0]}
    else:
        rope |= {"mrope_section": [1, 1, 2]}
        fields["head_dim"] = HIDDEN // HEADS
        vision = {**_VISION, "fullatt_block_indexes": [0]}
    text = {**fields, "rope_parameters": {**rope, **scaling}}
    return kind(
        text_config=text, vision_config=vision, tie_word_embeddings=fields["tie_word_embeddings"]
    )


def _experts_config(family: str, fields: dict[str, object]) -> transformers.PretrainedConfig:
    if family == "nemotron_h":
        return _nemotron_h(fields)
    if family == "mixtral":
        experts = {"num_local_experts": NUM_EXPERTS, "intermediate_size": MOE_FFN}
        return transformers.MixtralConfig(**{**fields, **experts})
    if family == "glm4_moe":
        # Groups, of which half are chosen; experts in all layers but the first.
        experts = {"n_routed_experts": NUM_EXPERTS, "num_experts_per_tok": 4}
        groups = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
        kinds = {"attention_bias": True, "use_qk_norm": True, "n_shared_experts": 2}
        own = {"moe_intermediate_size": MOE_FFN, **experts, **groups, **kinds}
        return transformers.Glm4MoeConfig(**{**own, **fields, "num_experts_per_tok": 4})
    if family == "gpt_oss":
        own = {"num_local_experts": NUM_EXPERTS, "swiglu_limit": 0.4, "sliding_window": 3}
        own |= {"rope_parameters": YARN}
        return transformers.GptOssConfig(**{**own, **fields, "intermediate_size": MOE_FFN})
    if family == "deepseek_v3":
        own = _deepseek_v3()
        others = {name: value for name, value in fields.items() if name not in _OF_HEADS}
        return transformers.DeepseekV3Config(**{**own, **others, "num_experts_per_tok": 4})
    if family == "glm4_moe_lite":
        own = {**_deepseek_v3(), "rope_parameters": None, "n_shared_experts": 2}
        others = {name: value for name, value in fields.items() if name not in _OF_HEADS}
        return transformers.Glm4MoeLiteConfig(**{**own, **others, "num_experts_per_tok": 4})
    own = {"moe_intermediate_size": MOE_FFN, "num_experts": NUM_EXPERTS, "norm_topk_prob": True}
    if family in ("qwen3_next", "qwen3_5_moe_text"):
        kind = {"qwen3_next": transformers.Qwen3NextConfig}.get(
            family, transformers.Qwen3_5MoeTextConfig
        )
        return kind(**{**own, **_DELTA, "shared_expert_intermediate_size": 20, **fields})
    if family == "qwen2_moe":
        shared = {"shared_expert_intermediate_size": 20, "head_dim": HIDDEN // HEADS}
        return transformers.Qwen2MoeConfig(**{**own, **fields, **shared})
    return transformers.Qwen3MoeConfig(**{**own, **fields})


def _nemotron_h(fields: dict[str, object]) -> transformers.PretrainedConfig:
    """Return the configuration of a model with each kind of layer, of sizes that all differ."""
    # However many layers there are, that of the kinds says.
    others = {name: value for name, value in fields.items() if name != "num_hidden_layers"}
    own = {
        "hybrid_override_pattern": "ME*-EM",
        "mamba_num_heads": 6,
        "mamba_head_dim": 10,
        "n_groups": 2,
        "ssm_state_size": 12,
        # transformers lets no step be shorter, which neither Megatron nor servers do.
        "time_step_min": 1e-9,
        "n_routed_experts": NUM_EXPERTS,
        "moe_intermediate_size": MOE_FFN,
        "moe_shared_expert_intermediate_size": 28,
        "routed_scaling_factor": 2.5,
    }
    return transformers.NemotronHConfig(**{**own, **others})


def _deepseek_v3() -> dict[str, object]:
    """Return fields by which each part of the model shows, at 16 tokens, in its logits."""
    # Of three frequencies the first is kept, the second mixed and the third divided.
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8,
        "beta_fast": 1.0,
        "beta_slow": 0.1,
        "mscale": 1.0,
        "mscale_all_dim": 0.6,
    }
    latents = {
        "num_key_value_heads": HEADS,
        "q_lora_rank": 20,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 6,
        "v_head_dim": 14,
    }
    experts = {
        "moe_intermediate_size": MOE_FFN,
        "n_routed_experts": NUM_EXPERTS,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
    }
    return {**latents, **experts, "rope_parameters": yarn}


def hf_model(family: str, *, tied: bool = False, **changes: object) -> torch.nn.Module:
    """Return a tiny model with values everywhere, biases and norms included."""
    return hf_model_of(hf_config(family, tied=tied, **changes))


def hf_model_of(config: transformers.PretrainedConfig) -> torch.nn.Module:
    """Return the model of a configuration, with values everywhere."""
    torch.manual_seed(1)
    model = _class_of(config).from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.dim() == 1 or name.endswith("proj_bias"):
                param.add_(torch.randn_like(param) * 0.3)
            if name.endswith(_ROUTERS):
                torch.nn.init.normal_(param, std=0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.rand(buffer.shape) * 0.3)
    return model.float().eval()


def _class_of(config: transformers.PretrainedConfig) -> Any:
    """Return the class of the whole, of a multimodal model too."""
    whole = "vision_config" in config.to_dict()
    return transformers.AutoModelForImageTextToText if whole else transformers.AutoModelForCausalLM


def hf_model_from(directory: str | os.PathLike[str]) -> torch.nn.Module:
    """Load a saved model in fp32; whatever does not fit its configuration is an error."""
    auto = _class_of(transformers.AutoConfig.from_pretrained(str(directory)))
    model, info = auto.from_pretrained(
        str(directory), dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    problems = {what: names for what, names in info.items() if names}
    assert not problems, problems
    # NOTE: in a process with `megalora.cpu` installed, transformers leaves the rotary buffers of a
    # loaded model uninitialised; those of a model made from its configuration are right.
    fresh = auto.from_config(model.config).float()
    fresh.load_state_dict(model.state_dict())
    return fresh.eval()


# What transformers' class calls a module -> what files do.
_STORED = {
    "MixtralForCausalLM": {
        ".mlp.": ".block_sparse_moe.",
        "gate_proj": "w1",
        "up_proj": "w3",
        "down_proj": "w2",
    },
    "Qwen3_5ForConditionalGeneration": {"model.language_model.": "model."},
    "Qwen3_5MoeForConditionalGeneration": {"model.language_model.": "model."},
    "Qwen2_5_VLForConditionalGeneration": {"model.language_model.": "model."},
    "Qwen3VLForConditionalGeneration": {"model.language_model.": "model."},
    "Mistral3ForConditionalGeneration": {"model.language_model.": "model."},
}


def stored(model: torch.nn.Module, name: str) -> str:
    """Return what files call a module."""
    for loaded, other in _STORED.get(type(model).__name__, {}).items():
        name = name.replace(loaded, other)
    return name


def loaded(model: torch.nn.Module, name: str) -> str:
    """Return what transformers' class calls a module, of one expert as others do."""
    for other, name_in_files in _STORED.get(type(model).__name__, {}).items():
        name = name.replace(name_in_files, other)
    return name


# Of a delta net's inputs; those of its gates have adapters only where asked for.
_WIDE = tuple(f"in_proj_{part}.weight" for part in ("qkv", "z", "qkvz"))
_NARROW = tuple(f"in_proj_{part}.weight" for part in ("b", "a", "ba"))


def module_sizes(
    model: torch.nn.Module, *, lm_head: bool = True, routers: bool = False, gates: bool = False
) -> dict[str, tuple[int, int]]:
    """Return (in, out) of everything that can have an adapter, by its name on disk.

    gates: also of a delta net's.
    """
    sizes: dict[str, tuple[int, int]] = {}
    for name, param in model.named_parameters():
        if name.startswith(("model.visual.", "model.vision_tower.", "model.multi_modal")):
            continue
        if name.endswith("experts.gate_up_proj"):
            prefix, (num, out, num_in) = name.rpartition(".")[0], _rows_first(model, param).shape
            for e in range(num):
                sizes[f"{prefix}.{e}.gate_proj"] = sizes[f"{prefix}.{e}.up_proj"] = (
                    num_in,
                    out // 2,
                )
        elif name.endswith(("experts.down_proj", "experts.up_proj")):
            prefix, _, last = name.rpartition(".")
            num, out, num_in = _rows_first(model, param).shape
            sizes |= {f"{prefix}.{e}.{last}": (num_in, out) for e in range(num)}
        elif (
            name.endswith(("_proj.weight", "_proj_with_mqa.weight", *_WIDE))
            or (routers and name.endswith(_ROUTERS))
            or (gates and name.endswith(_NARROW))
        ):
            sizes[name.removesuffix(".weight")] = (param.shape[1], param.shape[0])
    if lm_head:
        sizes["lm_head"] = (HIDDEN, model.config.get_text_config().vocab_size)
    return {stored(model, name): size for name, size in sizes.items()}


def _rows_first(model: torch.nn.Module, experts: Tensor) -> Tensor:
    """Return the tensor of all experts as a view [E, out, in]."""
    return experts.transpose(1, 2) if model.config.model_type == "gpt_oss" else experts


def random_factors(
    model: torch.nn.Module,
    rank_and_scale: dict[str, tuple[int, float]],
    *,
    lm_head: bool = True,
    routers: bool = False,
    gates: bool = False,
) -> dict[str, LoRAFactors]:
    """Return adapters of nonzero A and B; the first key that is part of a name decides its rank."""
    generator = torch.Generator().manual_seed(7)
    factors = {}
    sizes = module_sizes(model, lm_head=lm_head, routers=routers, gates=gates)
    for name, (num_in, num_out) in sizes.items():
        rank, scale = next(value for part, value in rank_and_scale.items() if part in name)
        factors[name] = LoRAFactors(
            torch.randn(rank, num_in, generator=generator) * 0.1,
            torch.randn(num_out, rank, generator=generator) * 0.1,
            scale,
        )
    return factors


@torch.no_grad()
def merged(model: torch.nn.Module, factors: dict[str, LoRAFactors]) -> torch.nn.Module:
    """Return a copy of the model with the updates added to its weights, untied where needed."""
    model = copy.deepcopy(model)
    if "lm_head" in factors and model.config.tie_word_embeddings:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.config.tie_word_embeddings = False
    params = dict(model.named_parameters())
    for name, module in factors.items():
        delta = module.scale * (module.lora_B.double() @ module.lora_A.double())
        name = loaded(model, name)
        if name + ".weight" in params:
            params[name + ".weight"].add_(delta)
            continue
        prefix, expert, projection = name.rsplit(".", 2)
        if f"{prefix}.{projection}" in params:
            _rows_first(model, params[f"{prefix}.{projection}"])[int(expert)].add_(delta)
            continue
        both = _rows_first(model, params[f"{prefix}.gate_up_proj"])[int(expert)]
        alternate = model.config.model_type == "gpt_oss"
        gate, up = (both[::2], both[1::2]) if alternate else both.chunk(2)
        (gate if projection == "gate_proj" else up).add_(delta)
    return model


IDS = torch.arange(64).reshape(4, 16)  # enough tokens to reach every expert


@torch.no_grad()
def logits(model: torch.nn.Module, ids: Tensor = IDS) -> Tensor:
    """Return [b, s, v]."""
    return model(ids).logits


def peft_model(model: torch.nn.Module, directory: str | os.PathLike[str]) -> torch.nn.Module:
    """Load an adapter with PEFT; whatever it leaves unloaded is an error, not a warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(copy.deepcopy(model), str(directory))
        # The only place where unexpected keys can be seen.
        result = loaded.load_adapter(str(directory), "again")
    missing = [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]
    assert not missing, missing
    assert not result.unexpected_keys, result.unexpected_keys
    loaded.set_adapter("default")
    return loaded.eval()


def trained_by_peft(
    model: torch.nn.Module, config: LoraConfig, directory: str | os.PathLike[str]
) -> torch.Tensor:
    """Train two steps with PEFT, save, return the logits."""
    torch.manual_seed(3)
    model = get_peft_model(copy.deepcopy(model), config)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=2e-2)
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(str(directory))
    return logits(model.eval())


def shared_outer(factors: Mapping[str, LoRAFactors]) -> dict[str, LoRAFactors]:
    """Let all experts of a layer have the A of gate and up, and the B of down, of the first."""
    found = dict(factors)
    for name, module in factors.items():
        if ".experts." not in name:
            continue
        prefix, _, projection = name.rsplit(".", 2)
        first = factors[f"{prefix}.0.{projection}"]
        is_down = projection in ("down_proj", "w2")
        one = {"lora_B": first.lora_B} if is_down else {"lora_A": first.lora_A}
        found[name] = dataclasses.replace(module, **one)
    return found
