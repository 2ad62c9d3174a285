"""The mixture of experts of a config.json in Megatron's words, both ways."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megalora.model.family import Experts
from megalora.model.fields import kinds_of_layers, real_number, switch, whole_number

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

# transformers scores a group of experts by the sum of its two best, Megatron by its topk / groups.
_BEST_OF_GROUP = 2
_KINDS = ("dense", "sparse")


def expert_sizes(config: Mapping[str, Any], experts: Experts) -> dict[str, Any]:
    """Return the fields of `ModelShape` that say which experts a model has."""
    size = whole_number(config, experts.size, size="moe_ffn_hidden_size")
    return {
        "num_moe_experts": whole_number(config, *experts.count, size="num_moe_experts"),
        "moe_router_topk": whole_number(config, "num_experts_per_tok", size="moe_router_topk"),
        "moe_ffn_hidden_size": size,
        "moe_layer_freq": _layer_freq(config, experts),
        **_shared(config, experts, size),
    }


def router_args(config: Mapping[str, Any], experts: Experts) -> dict[str, Any]:
    """Return Megatron's arguments of a router.

    Raises ValueError, by field and value, for one that Megatron has not.
    """
    free = {
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
    }
    if experts.sigmoid:
        return {**_sigmoid_args(config), **free}
    normalised = switch(config, "norm_topk_prob", default=False) or experts.always_normalised
    # Normalising the top k of a softmax over all is the softmax over the top k.
    return {"moe_router_pre_softmax": not normalised, **free}


def router_problem(config: Mapping[str, Any], experts: Experts) -> str:
    """Say why Megatron cannot have a configuration's router; empty where it can."""
    try:
        router_args(config, experts)
    except ValueError as error:
        return str(error)
    return ""


def expert_fields(built: "TransformerConfig", experts: Experts) -> dict[str, Any]:
    """Return the fields of a config.json for the experts of a Megatron model."""
    frequency = built.moe_layer_freq
    pattern = frequency if isinstance(frequency, list) else []
    fields: dict[str, Any] = {
        experts.count[0]: built.num_moe_experts,
        "num_experts_per_tok": built.moe_router_topk,
        experts.size: built.moe_ffn_hidden_size,
    }
    if experts.kinds:
        layers = pattern or [1] * built.num_layers
        fields[experts.kinds] = [_KINDS[moe] for moe in layers]
    elif experts.dense_first:
        fields[experts.dense_first] = pattern.index(1) if 1 in pattern else len(pattern)
    elif not experts.in_all_layers:
        fields["decoder_sparse_step"] = frequency if isinstance(frequency, int) else 1
        fields["mlp_only_layers"] = [layer for layer, moe in enumerate(pattern) if not moe]
    shared = built.moe_shared_expert_intermediate_size or 0
    if experts.shared_count:
        fields[experts.shared_count] = shared // (built.moe_ffn_hidden_size or 1)
    elif experts.shared_size:
        fields[experts.shared_size] = shared
    return {**fields, **_router_fields(built, experts)}


def _sigmoid_args(config: Mapping[str, Any]) -> dict[str, Any]:
    topk = whole_number(config, "num_experts_per_tok", size="moe_router_topk")
    normalised = switch(config, "norm_topk_prob", default=True)
    if normalised != (topk > 1):
        raise ValueError(
            f"config.json norm_topk_prob is {normalised} with num_experts_per_tok {topk}: Megatron "
            "normalises sigmoid scores of two experts and more, and never of one"
        )
    return {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": real_number(
            config, "routed_scaling_factor", low=0, high=1e6
        ),
        "moe_router_dtype": "fp32",
        **_group_args(config, topk),
    }


def _group_args(config: Mapping[str, Any], topk: int) -> dict[str, int]:
    groups = whole_number(config, "n_group", size="num_moe_experts", default=1)
    if groups == 1:
        return {}
    chosen = whole_number(config, "topk_group", size="num_moe_experts", default=1)
    if topk != _BEST_OF_GROUP * chosen:
        raise ValueError(
            f"config.json topk_group is {chosen} of {groups} with num_experts_per_tok {topk}: "
            f"Megatron scores a group as transformers does, by its two best experts, where "
            f"num_experts_per_tok is twice topk_group"
        )
    return {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}


def _router_fields(built: "TransformerConfig", experts: Experts) -> dict[str, Any]:
    if not experts.sigmoid:
        normalised = not built.moe_router_pre_softmax
        return {} if experts.always_normalised else {"norm_topk_prob": normalised}
    return {
        "norm_topk_prob": built.moe_router_topk > 1,
        "routed_scaling_factor": built.moe_router_topk_scaling_factor or 1.0,
        "n_group": built.moe_router_num_groups or 1,
        "topk_group": built.moe_router_group_topk or 1,
    }


def _shared(config: Mapping[str, Any], experts: Experts, size: int) -> dict[str, Any]:
    name = "moe_shared_expert_intermediate_size"
    if experts.shared_size:
        found = whole_number(config, experts.shared_size, size=name)
    elif experts.shared_count and config.get(experts.shared_count):
        found = size * whole_number(config, experts.shared_count, size="num_moe_experts")
    else:
        return {}
    return {name: found, "moe_shared_expert_gate": experts.shared_gate}


def _layer_freq(config: Mapping[str, Any], experts: Experts) -> int | list[int]:
    if experts.in_all_layers:
        return 1
    count = whole_number(config, "num_hidden_layers", size="num_layers")
    layers = range(count)
    if experts.kinds and (kinds := config.get(experts.kinds)):
        frequency = kinds_of_layers(kinds, experts.kinds, _KINDS, count)
    elif experts.dense_first:
        dense = whole_number(config, experts.dense_first, size="num_layers", low=0, default=0)
        frequency = [int(layer >= dense) for layer in layers]
    else:
        step = whole_number(config, "decoder_sparse_step", size="num_layers", default=1)
        without = set(_dense_layers(config))
        frequency = [int(layer not in without and (layer + 1) % step == 0) for layer in layers]
    return 1 if all(frequency) else frequency


def _dense_layers(config: Mapping[str, Any]) -> list[int]:
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise ValueError(f"config.json mlp_only_layers is {dense!r:.100}: must be a list of layers")
    return dense
