"""What Megatron's static inference does not do, or does with another model than is trained."""

from collections.abc import Sequence
from typing import Protocol


class Config(Protocol):
    """Megatron's configuration of a model."""

    multi_latent_attention: bool
    apply_rope_fusion: bool


# Field of the configuration, what it has to be, and why.
REQUIRED: tuple[tuple[str, object, str], ...] = (
    ("virtual_pipeline_model_parallel_size", None, "its pipeline has one stage on a rank"),
    ("context_parallel_size", 1, "its cache holds whole sequences"),
    ("experimental_attention_variant", None, "its cache holds keys and values alone"),
    ("window_size", None, "it decodes without a mask, past a window too"),
    ("cache_mla_latents", False, "its static cache holds keys and values"),
    ("flash_decode", False, "the rotary table of flash decoding would be kept for training"),
    ("fused_single_qkv_rope", False, "the fused operation takes no cache"),
    ("inference_fuse_tp_communication", False, "its fused layers pass adapters by"),
    ("cuda_graph_impl", "none", "graphs hold the lengths of training"),
    ("tp_comm_overlap", False, "its buffers need sequence parallelism, which decoding is without"),
    ("cpu_offloading", False, "it is for activations of training"),
    ("fine_grained_activation_offloading", False, "it is for activations of training"),
    ("fp8", None, "one token at a time has no size that FP8 takes"),
    ("fp4", None, "one token at a time has no size that FP4 takes"),
    ("moe_expert_capacity_factor", None, "which tokens are dropped would depend on the batch"),
    ("moe_input_jitter_eps", None, "its noise is in inference too"),
    ("moe_router_force_load_balancing", False, "its experts are chosen at random"),
)
# Attention, latent attention, MLPs, experts; between stages; before layers that predict more.
_LAYERS = "*+-E|/"
POSITIONS = ("rope", "yarn", "learned_absolute", "none")


def check_supported(
    config: Config, *, num_chunks: int, position_embedding_type: str, hybrid_layer_pattern: str
) -> None:
    """Raise ValueError that names the flag, where rollouts by Megatron cannot do what it says."""
    if num_chunks != 1:
        raise ValueError(
            f"a rank has {num_chunks} model chunks: rollouts by Megatron have one stage on a rank; "
            "leave out --num-layers-per-virtual-pipeline-stage and its like"
        )
    for field, required, why in REQUIRED:
        value = getattr(config, field, required)
        if value != required and not _is_same_as_none(value, required):
            raise ValueError(
                f"{field} is {value}: rollouts by Megatron cannot have it, {why}; "
                f"set it to {required}, or roll out by a server"
            )
    others = sorted(set(hybrid_layer_pattern) - set(_LAYERS))
    if others:
        raise ValueError(
            f"hybrid_layer_pattern is {hybrid_layer_pattern!r}, with layers {' '.join(others)}: "
            "rollouts by Megatron decode attention (* +), MLPs (-) and experts (E); of Mamba it "
            "takes the batch for a sequence; roll out by a server"
        )
    if config.multi_latent_attention and config.apply_rope_fusion:
        raise ValueError(
            "apply_rope_fusion is True with multi_latent_attention: Megatron's inference has no "
            "fused form of it; set --no-rope-fusion"
        )
    if position_embedding_type not in POSITIONS:
        raise ValueError(
            f"position_embedding_type is {position_embedding_type}: rollouts by Megatron have "
            f"{', '.join(POSITIONS)}; roll out by a server"
        )


def _is_same_as_none(value: object, required: object) -> bool:
    return required is None and not value


def check_request(
    prompts: Sequence[Sequence[int]], max_tokens: int, vocab_size: int, max_sequence_length: int
) -> None:
    """Raise ValueError for a prompt that cannot be answered."""
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {index} is empty: give it a token at least, such as BOS")
        if len(prompt) + max_tokens > max_sequence_length:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens, with max_tokens {max_tokens} more than "
                f"max_sequence_length {max_sequence_length}: shorten it, or lower max_tokens"
            )
        wrong = next((token for token in prompt if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise ValueError(
                f"prompt {index} has token {wrong}, outside of the vocabulary of {vocab_size}: "
                "use the tokenizer of the model"
            )
