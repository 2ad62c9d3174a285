"""Nemotron-H, Nemotron Nano 2 and Nemotron 3, which are one kind of model."""

from collections.abc import Mapping

from megalora.model.family import Experts, Family, Names, Rate

SHARED = "mixer.shared_experts."
# A layer has one norm, before whatever is in it.
LAYER: Mapping[str, tuple[str, ...]] = {
    "norm": ("norm",),
    "input_layernorm": ("norm",),
    "pre_mlp_layernorm": ("norm",),
    "mixer.in_proj": ("mixer.in_proj",),
    "mixer.conv1d": ("mixer.conv1d",),
    "mixer.A_log": ("mixer.A_log",),
    "mixer.D": ("mixer.D",),
    "mixer.dt_bias": ("mixer.dt_bias",),
    "mixer.norm": ("mixer.norm",),
    "mixer.out_proj": ("mixer.out_proj",),
    "self_attention.linear_qkv": ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"),
    "self_attention.linear_proj": ("mixer.o_proj",),
    "mlp.linear_fc1": ("mixer.up_proj",),
    "mlp.linear_fc2": ("mixer.down_proj",),
    "mlp.router": ("mixer.gate",),
    "mlp.experts.linear_fc1": ("mixer.experts.{}.up_proj",),
    "mlp.experts.linear_fc2": ("mixer.experts.{}.down_proj",),
    "mlp.shared_experts.linear_fc1": (SHARED + "up_proj",),
    "mlp.shared_experts.linear_fc2": (SHARED + "down_proj",),
    "mlp.fc1_latent_proj": ("mixer.fc1_latent_proj",),
    "mlp.fc2_latent_proj": ("mixer.fc2_latent_proj",),
}

FAMILIES = (
    Family(
        model_type="nemotron_h",
        architecture="NemotronHForCausalLM",
        rate=Rate("nemotron"),
        names=Names(
            embedding="model.embeddings",
            final_norm="model.norm_f",
            modules=LAYER,
            stacked={
                "mixer.experts.up_proj": "mlp.experts.linear_fc1",
                "mixer.experts.down_proj": "mlp.experts.linear_fc2",
            },
            language="backbone.",
            written="backbone.",
            beside=("mtp.",),
            experts_by_parameters=True,
        ),
        megatron={
            "position_embedding_type": "none",
            "normalization": "RMSNorm",
            "swiglu": False,
            "squared_relu": True,
            "add_bias_linear": False,
        },
        hybrid=True,
        epsilon_field="layer_norm_epsilon",
        experts=Experts(
            count=("n_routed_experts", "num_local_experts"),
            shared_size="moe_shared_expert_intermediate_size",
            in_all_layers=True,
            sigmoid=True,
        ),
        defaults={
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 4096,
            "layer_norm_epsilon": 1e-5,
            "mamba_num_heads": 128,
            "mamba_head_dim": 64,
            "n_groups": 8,
            "ssm_state_size": 128,
            "n_routed_experts": 8,
            "moe_intermediate_size": 7688,
            "moe_shared_expert_intermediate_size": 7688,
            "num_experts_per_tok": 2,
            "routed_scaling_factor": 1.0,
        },
        # Megatron's layers of Mamba-2 have the first two in their code; transformers ties nothing,
        # whatever is said.
        refused={
            "conv_kernel": 4,
            "layer_norm_epsilon": 1e-5,
            "use_conv_bias": True,
            "use_bias": False,
            "mlp_bias": False,
            "attention_bias": False,
            "mlp_hidden_act": "relu2",
            "mamba_hidden_act": "silu",
            "tie_word_embeddings": False,
        },
    ),
)
