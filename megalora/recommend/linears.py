"""The base weights of a model by their Megatron names, from its sizes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from megalora.model.facts import delta_parts, mamba_parts
from megalora.model.layer_kinds import ATTENTION, MAMBA
from megalora.model.shape import ModelShape

Group = Literal["attention", "mamba", "mlp", "experts", "router", "prediction", "unembedding"]


@dataclass(frozen=True, slots=True)
class Linear:
    """A base weight [out_features, in_features] under its global Megatron name.

    num_experts: experts that have such a weight, 0 for a dense linear.
    uses: how many of these weights a token passes through.
    duplicated: every tensor-parallel rank has the whole weight.
    parts: names and sizes of the blocks of output rows, where these have names.
    """

    name: str
    group: Group
    layer: int
    in_features: int
    out_features: int
    num_experts: int = 0
    uses: int = 1
    duplicated: bool = False
    parts: Mapping[str, int] | None = None

    @property
    def parameters(self) -> int:
        """Count the weight's elements, over all experts."""
        return max(1, self.num_experts) * self.in_features * self.out_features


def linears(shape: ModelShape) -> Iterator[Linear]:
    """Yield every linear in the order of the forward pass, the unembedding last."""
    for layer, is_moe in enumerate(shape.moe_pattern):
        yield from _layer(shape, f"decoder.layers.{layer}.", layer, is_moe=bool(is_moe))
    hidden, last = shape.hidden_size, shape.num_layers - 1
    for depth in range(shape.mtp_num_layers):
        prefix = f"mtp.layers.{depth}."
        yield Linear(prefix + "eh_proj", "prediction", last, 2 * hidden, hidden)
        # Of the decoder's last kind, on its stage.
        is_moe = shape.has_experts(last)
        yield from _layer(shape, prefix + "mtp_model_layer.", last, is_moe=is_moe)
    uses = 1 + shape.mtp_num_layers
    yield Linear("output_layer", "unembedding", last, hidden, shape.vocab_size, uses=uses)


def _layer(shape: ModelShape, prefix: str, layer: int, *, is_moe: bool) -> Iterator[Linear]:
    kind = shape.kind(layer)
    if kind == MAMBA:
        parts, hidden = mamba_parts(shape), shape.hidden_size
        rows = sum(parts.values())
        yield Linear(prefix + "mixer.in_proj", "mamba", layer, hidden, rows, parts=parts)
        yield Linear(prefix + "mixer.out_proj", "mamba", layer, parts["x"], hidden)
        return
    if kind in ("", ATTENTION):
        yield from _attention(shape, prefix + "self_attention.", layer)
    if kind == ATTENTION:
        return
    if is_moe:
        yield from _experts(shape, prefix + "mlp.", layer)
    else:
        yield from _pair(shape, prefix + "mlp.", "mlp", layer, shape.ffn_hidden_size)


def base_parameters(shape: ModelShape) -> int:
    """Count the parameters of the base."""
    total = sum(linear.parameters for linear in linears(shape))
    total += shape.hidden_size * (0 if shape.tied_embeddings else shape.vocab_size)
    return total + shape.hidden_size + sum(layer_extras(shape))


def layer_extras(shape: ModelShape) -> list[int]:
    """Count each layer's norms, biases and shared expert gate: replicated, and small.

    Biases of experts are spread as these are; they count as whole.
    Those of layers that predict more tokens are counted with the last. What a delta net has beside
    its linears is split over tensor-parallel ranks, but for a norm; it counts as whole.
    """
    if shape.hybrid_layer_pattern:
        mamba = _mamba_extras(shape)
        return [
            shape.hidden_size + (mamba if kind == MAMBA else 0)
            for kind in shape.hybrid_layer_pattern
        ]
    attention = _qk_norms(shape) if shape.qk_layernorm else 0
    attention += shape.qkv_rows if shape.add_qkv_bias else 0
    attention += shape.num_attention_heads if shape.softmax_type == "learnable" else 0
    gated = shape.moe_layers if shape.moe_shared_expert_gate else []
    extras = [
        2 * shape.hidden_size + (_delta_net_extras(shape) if is_delta_net else attention)
        for is_delta_net in shape.delta_net_pattern
    ]
    for layer in gated:
        extras[layer] += shape.hidden_size
    for layer in range(shape.num_layers) if shape.add_bias_linear else ():
        extras[layer] += _biases_beside_qkv(shape, is_moe=shape.has_experts(layer))
    extras[-1] += shape.mtp_num_layers * (extras[-1] + 3 * shape.hidden_size)
    return extras


def _mamba_extras(shape: ModelShape) -> int:
    """Count the convolution of four steps with its bias, the gated norm, A, D and dt's bias."""
    rows = mamba_parts(shape)
    return 5 * (rows["x"] + rows["B"] + rows["C"]) + rows["x"] + 3 * rows["dt"]


def _biases_beside_qkv(shape: ModelShape, *, is_moe: bool) -> int:
    """Count the biases of a layer's linear_proj, and of its MLP or of its experts and router."""
    ffn = shape.moe_ffn_hidden_size if is_moe else shape.ffn_hidden_size
    stacked = 2 if shape.gated_linear_unit else 1
    mlp = stacked * ffn + shape.hidden_size
    return shape.hidden_size + (shape.num_moe_experts * (mlp + 1) if is_moe else mlp)


def _delta_net_extras(shape: ModelShape) -> int:
    """Count a delta net's convolution, decay and step of each head, and norm of a head's output."""
    convolution = shape.linear_conv_kernel_dim * (2 * shape.delta_key_size + shape.delta_value_size)
    return convolution + 2 * shape.linear_num_value_heads + shape.linear_value_head_dim


def _qk_norms(shape: ModelShape) -> int:
    latents = shape.q_lora_rank + shape.kv_lora_rank
    return latents if shape.multi_latent_attention else 2 * shape.kv_channels


def _attention(shape: ModelShape, prefix: str, layer: int) -> Iterator[Linear]:
    hidden = shape.hidden_size
    if shape.multi_latent_attention:
        for name, inputs, outputs in _latent_attention(shape):
            # TransformerEngine's down projections are whole on every rank; those of Megatron's own
            # layers are split.
            whole = "_down_" in name
            yield Linear(prefix + name, "attention", layer, inputs, outputs, duplicated=whole)
        return
    if shape.is_delta_net(layer):
        parts, values = delta_parts(shape), shape.delta_value_size
        rows = sum(parts.values())
        yield Linear(prefix + "in_proj", "attention", layer, hidden, rows, parts=parts)
        yield Linear(prefix + "out_proj", "attention", layer, values, hidden)
        return
    yield Linear(prefix + "linear_qkv", "attention", layer, hidden, shape.qkv_rows)
    yield Linear(prefix + "linear_proj", "attention", layer, shape.query_size, hidden)


def _latent_attention(shape: ModelShape) -> Iterator[tuple[str, int, int]]:
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    queries = heads * (shape.qk_head_dim + shape.qk_pos_emb_head_dim)
    if shape.q_lora_rank:
        yield "linear_q_down_proj", hidden, shape.q_lora_rank
        yield "linear_q_up_proj", shape.q_lora_rank, queries
    else:
        yield "linear_q_proj", hidden, queries
    yield "linear_kv_down_proj", hidden, shape.kv_lora_rank + shape.qk_pos_emb_head_dim
    keys_and_values = heads * (shape.qk_head_dim + shape.v_head_dim)
    yield "linear_kv_up_proj", shape.kv_lora_rank, keys_and_values
    yield "linear_proj", heads * shape.v_head_dim, hidden


def _experts(shape: ModelShape, prefix: str, layer: int) -> Iterator[Linear]:
    sizes = shape.hidden_size, shape.num_moe_experts
    yield Linear(prefix + "router", "router", layer, *sizes, duplicated=True)
    hidden, latent = shape.hidden_size, shape.moe_latent_size
    if latent:
        yield Linear(prefix + "fc1_latent_proj", "mlp", layer, hidden, latent, duplicated=True)
    yield from _pair(
        shape,
        prefix + "experts.",
        "experts",
        layer,
        shape.moe_ffn_hidden_size,
        num_experts=shape.num_moe_experts,
        uses=shape.moe_router_topk,
        features=latent,
    )
    if latent:
        yield Linear(prefix + "fc2_latent_proj", "mlp", layer, latent, hidden, duplicated=True)
    if shared := shape.moe_shared_expert_intermediate_size:
        yield from _pair(shape, prefix + "shared_experts.", "mlp", layer, shared)


def _pair(
    shape: ModelShape,
    prefix: str,
    group: Group,
    layer: int,
    ffn: int,
    *,
    num_experts: int = 0,
    uses: int = 1,
    features: int = 0,
) -> Iterator[Linear]:
    """Yield the two linears of an MLP; features: that it reads, those of the hidden state if 0."""
    hidden = features or shape.hidden_size
    width = ffn * (2 if shape.gated_linear_unit else 1)
    yield Linear(prefix + "linear_fc1", group, layer, hidden, width, num_experts, uses)
    yield Linear(prefix + "linear_fc2", group, layer, ffn, hidden, num_experts, uses)
