"""Each family without a row that was tried, with the parts of it that Megatron lacks."""

from functools import partial

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests.dist.support.not_yet import (
    EPS,
    GLM_EXPERTS,
    ROPE,
    Case,
    Tensors,
    identities,
    norms_in_front,
    one_after_the_other,
    renamed,
    unscaled,
)
from tests.support.hf_models import FFN, HEAD_DIM, HIDDEN, LAYERS, MOE_FFN, NUM_EXPERTS


def with_rms_norms(model: nn.Module) -> None:
    """Put Llama's norms in the place of LayerNorms without bias."""
    for place in [model.model, *model.model.layers]:
        name = "norm" if place is model.model else "input_layernorm"
        setattr(place, name, LlamaRMSNorm(HIDDEN, EPS))


def scaled_layers(model: nn.Module, factor: float) -> None:
    """Multiply what each layer gives."""
    for layer in model.model.layers:
        layer.layer_scalar.fill_(factor)


def of_gemma4(tensors: Tensors) -> Tensors:
    """Leave the layers' factors out, which are 1."""
    found = renamed(("pre_feedforward_layernorm", "post_attention_layernorm"))(tensors)
    return {name: tensor for name, tensor in found.items() if not name.endswith("layer_scalar")}


def of_cohere(tensors: Tensors) -> Tensors:
    """Give each layer its one norm twice."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        if "input_layernorm" in name:
            found[name.replace("input_layernorm", "post_attention_layernorm")] = tensor
    return found


def of_glm4(tensors: Tensors) -> Tensors:
    """Give gate and up a tensor each."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if "gate_up_proj" in name:
            halves = zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True)
            found |= {name.replace("gate_up_proj", part): half for part, half in halves}
        else:
            found[name] = tensor
    return found


def of_llama4(tensors: Tensors) -> Tensors:
    """Transpose the experts, and give the router a bias of nothing."""
    pairs = (
        ("feed_forward", "mlp"),
        ("mlp.router", "mlp.gate"),
        ("shared_expert.", "shared_experts."),
    )
    found = renamed(*pairs)(tensors)
    for name in list(found):
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found[name] = found[name].mT
        if name.endswith("mlp.gate.weight"):
            bias = name.replace("weight", "e_score_correction_bias")
            found[bias] = torch.zeros(NUM_EXPERTS)
    return found


TANH_GELU = partial(nn.functional.gelu, approximate="tanh")
# What gives Gemma its scaled embedding and its scores' scale.
GEMMA = {
    "softmax_scale": 20**-0.5,
    "use_mup": True,
    "mup_base_hidden_size": HIDDEN,
    "mup_embedding_mult": HIDDEN**0.5,
    "mup_attn_scale_power": 0.5,
}
GEMMA_NORMS = identities("post_attention_layernorm", "post_feedforward_layernorm")
BASES = {"sliding_attention": ROPE, "full_attention": {**ROPE, "rope_theta": 10000.0}}
ONE_BASE = {"rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE}}
# Its norms multiply with 1 + weight.
OF_GEMMA = renamed(("pre_feedforward_layernorm", "post_attention_layernorm"), norms=1.0)
IN_FRONT = renamed(
    ("post_attention_layernorm", "input_layernorm"),
    ("post_feedforward_layernorm", "post_attention_layernorm"),
)
WIDE_NORMS = identities("self_attn.q_norm", "self_attn.k_norm")
LLAMA4 = {
    "num_local_experts": NUM_EXPERTS,
    "num_experts_per_tok": 1,
    "intermediate_size": MOE_FFN,
    "intermediate_size_mlp": FFN,
    "interleave_moe_layer_step": 1,
    "no_rope_layers": [1, 0],
    "rope_parameters": ROPE,
}

CASES = {
    "gemma2": Case(
        architecture="Gemma2ForCausalLM",
        fields={
            "sliding_window": 64,
            "query_pre_attn_scalar": 20,
            "rope_parameters": ROPE,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        parts={
            "norms": GEMMA_NORMS,
            "cap of scores": {"attn_logit_softcapping": None},
            "cap of logits": {"final_logit_softcapping": None},
        },
        row="llama",
        tensors=OF_GEMMA,
        built=GEMMA,
        activation=TANH_GELU,
    ),
    "gemma3_text": Case(
        architecture="Gemma3ForCausalLM",
        fields={
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 64,
            "query_pre_attn_scalar": 20,
            "rope_parameters": BASES,
        },
        parts={
            "norms": GEMMA_NORMS,
            "bases": ONE_BASE,
        },
        row="qwen3",
        tensors=OF_GEMMA,
        built=GEMMA,
        activation=TANH_GELU,
    ),
    # Its heads are of one size here, and its keys are not its values.
    "gemma4_text": Case(
        architecture="Gemma4ForCausalLM",
        fields={
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 64,
            "global_head_dim": HEAD_DIM,
            "hidden_size_per_layer_input": 0,
            "rope_parameters": BASES,
            "final_logit_softcapping": 3.0,
        },
        prepare=partial(scaled_layers, factor=0.5),
        parts={
            "norms": GEMMA_NORMS,
            "norms of values": identities("self_attn.v_norm"),
            "factors of layers": partial(scaled_layers, factor=1.0),
            "bases": ONE_BASE,
            "cap of logits": {"final_logit_softcapping": None},
        },
        row="qwen3",
        tensors=of_gemma4,
        built={**GEMMA, "softmax_scale": 1.0},
        activation=TANH_GELU,
    ),
    "glm4": Case(
        architecture="Glm4ForCausalLM",
        fields={
            "attention_bias": True,
            "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
        },
        parts={"norms": identities("post_self_attn_layernorm", "post_mlp_layernorm")},
        row="glm4_moe",
        config={
            **GLM_EXPERTS,
            "first_k_dense_replace": LAYERS,
            "num_experts_per_tok": 1,
            "norm_topk_prob": False,
            "use_qk_norm": False,
            "attention_bias": True,
            "partial_rotary_factor": 0.5,
        },
        tensors=of_glm4,
        built={"rotary_interleaved": True},
    ),
    "olmo2": Case(
        architecture="Olmo2ForCausalLM",
        fields={"rope_parameters": ROPE},
        parts={"norms behind": norms_in_front, "norms of all heads": WIDE_NORMS},
        row="llama",
        tensors=IN_FRONT,
    ),
    "exaone4": Case(
        architecture="Exaone4ForCausalLM",
        fields={
            "rope_parameters": ROPE,
            "layer_types": ["full_attention"] * LAYERS,
            "sliding_window": None,
        },
        parts={"norms behind": norms_in_front},
        row="qwen3",
        tensors=IN_FRONT,
    ),
    "minimax_m2": Case(
        architecture="MiniMaxM2ForCausalLM",
        fields={
            "num_local_experts": NUM_EXPERTS,
            "num_experts_per_tok": 2,
            "intermediate_size": MOE_FFN,
            "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
        },
        parts={"norms of all heads": WIDE_NORMS},
        row="glm4_moe",
        config={
            **GLM_EXPERTS,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "use_qk_norm": False,
            "partial_rotary_factor": 0.5,
        },
        tensors=renamed(("mlp.e_score", "mlp.gate.e_score")),
    ),
    "llama4_text": Case(
        architecture="Llama4ForCausalLM",
        fields={**LLAMA4, "attention_chunk_size": 8, "floor_scale": 4},
        parts={
            "chunks": {"attention_chunk_size": 64},
            "scores by position": {"attn_temperature_tuning": False},
            "norms": {"use_qk_norm": False},
        },
        row="glm4_moe",
        config={
            **GLM_EXPERTS,
            "n_shared_experts": 1,
            "num_experts_per_tok": 1,
            "norm_topk_prob": False,
            "use_qk_norm": False,
            "partial_rotary_factor": 1.0,
        },
        tensors=of_llama4,
        built={
            "rotary_interleaved": True,
            "no_rope_freq": [0, 1],
            "moe_apply_probs_on_input": True,
        },
    ),
    "granite": Case(
        architecture="GraniteForCausalLM",
        fields={
            "rope_parameters": ROPE,
            "residual_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.1,
            "logits_scaling": 4.0,
        },
        parts={"factor of the residual": unscaled},
        row="llama",
        built={
            "softmax_scale": 0.1,
            "use_mup": True,
            "mup_base_hidden_size": HIDDEN,
            "mup_embedding_mult": 3.0,
            "mup_output_mult": 0.25,
            "mup_attn_scale_power": 0.5,
        },
    ),
    "cohere": Case(
        architecture="CohereForCausalLM",
        fields={"rope_parameters": ROPE, "logit_scale": 0.3},
        prepare=with_rms_norms,
        parts={"beside each other": one_after_the_other},
        row="llama",
        tensors=of_cohere,
        built={
            "rotary_interleaved": True,
            "use_mup": True,
            "mup_base_hidden_size": HIDDEN,
            "mup_output_mult": 0.3,
            "mup_attn_scale_power": 0.5,
        },
    ),
}
