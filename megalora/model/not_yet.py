"""Families that have no row: what megatron-core lacks for each, and what has not been written."""

from collections.abc import Mapping

# What it was tried with, by tests/dist/test_not_yet.py: a newer one may have more.
TRIED = "0.19.2"

_NORMS = "a norm between attention or MLP and the residual that it is added to"
_OWN_NORMS = f"{_NORMS}, in place of the one in front"
_WIDE_NORMS = "norms of q and k over all heads: its own are of each head"
_BASES = "rotary embeddings that differ by layer"
_BESIDE = "attention and MLP side by side, of one norm"
_SCALED = "a factor of what is added to the residual"
_STREAMS = "a residual of several streams (hyper-connections)"

# What megatron-core does not compute, by config.json's model_type.
LACKS: dict[str, str] = {
    "gemma2": f"{_NORMS}, and soft caps of scores and of logits",
    "gemma3": f"{_NORMS}, and {_BASES}",
    "gemma3n": f"{_NORMS}, and {_BASES}",
    "gemma4": f"{_NORMS}, norms of values, {_BASES}, heads whose size differs by layer, and "
    "factors of layers",
    "glm4": _NORMS,
    "olmo2": f"{_OWN_NORMS}, and {_WIDE_NORMS}",
    "olmo3": f"{_OWN_NORMS}, and {_WIDE_NORMS}",
    "exaone4": _OWN_NORMS,
    "olmoe": _WIDE_NORMS,
    "minimax_m2": _WIDE_NORMS,
    "llama4": "attention in chunks, scores that grow with the position, and norms of q and k in "
    "layers with a rotary embedding alone",
    "cohere": _BESIDE,
    "cohere2": _BESIDE,
    "granite": _SCALED,
    "granitemoe": _SCALED,
    "granitemoeshared": _SCALED,
    "granitemoehybrid": _SCALED,
    "minimax": "layers of lightning attention",
    "kimi_linear": "layers of Kimi's delta attention",
    "lfm2": "layers of short convolutions",
    "lfm2_moe": "layers of short convolutions",
    "deepseek_v4": _STREAMS,
    "qwen4_exp": _STREAMS,
}
LACKS |= {f"{name}_text": LACKS[name] for name in ("gemma3", "gemma3n", "gemma4", "llama4")}

# What it computes, and whose names and layouts are in no row.
_SPARSE = "attention with an indexer (DSA)"
UNWRITTEN: Mapping[str, str] = {
    "smollm3": "layers without a rotary embedding",
    "ernie4_5": "a rotary embedding of neighbouring features",
    "qwen3_vl_moe": "tensor of all experts, which files may have transposed,",
    "deepseek_v32": _SPARSE,
    "glm_moe_dsa": _SPARSE,
}


def why_not_yet(model_type: str) -> str:
    """Say why a family has no row, in half a sentence; empty where nothing is known of it."""
    if lacking := LACKS.get(model_type):
        return f"megatron-core {TRIED} lacks {lacking}"
    unwritten = UNWRITTEN.get(model_type)
    return f"its {unwritten} is not exchanged yet" if unwritten else ""
