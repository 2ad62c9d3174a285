"""The shapes of attention's weights, by Megatron's modules."""

from megalora.model.facts import delta_parts
from megalora.model.family import Names
from megalora.model.shape import ModelShape

# By Megatron's module: the shapes of the Hugging Face weights that it stacks.
Sizes = dict[str, tuple[tuple[int, ...], ...]]


def attention_sizes(shape: ModelShape, names: Names, layer: int) -> Sizes:
    """Return the shapes of the weights of a layer's attention, of any build of it.

    names: of the family; layer: from 0.
    """
    if shape.is_delta_net(layer):
        return _of_delta_net(shape, names)
    return _of_latents(shape) if shape.multi_latent_attention else _of_heads(shape)


def _of_delta_net(shape: ModelShape, names: Names) -> Sizes:
    h, rows, heads = shape.hidden_size, delta_parts(shape), shape.linear_num_value_heads
    joined = names.modules["self_attention.in_proj"]
    convolved = rows["query"] + rows["key"] + rows["value"]
    return {
        "in_proj": tuple((sum(rows[part] for part in names.parts_of(m)), h) for m in joined),
        "conv1d": ((convolved, 1, shape.linear_conv_kernel_dim),),
        "A_log": ((heads,),),
        "dt_bias": ((heads,),),
        "out_norm": ((shape.linear_value_head_dim,),),
        "out_proj": ((h, rows["value"]),),
    }


def _of_heads(shape: ModelShape) -> Sizes:
    h, d = shape.hidden_size, shape.kv_channels
    q, kv = shape.query_size, shape.num_query_groups * d
    more: Sizes = {f"{p}_layernorm": ((d,),) for p in "qk"} if shape.qk_layernorm else {}
    if shape.softmax_type == "learnable":
        more["core_attention.softmax_offset"] = ((shape.num_attention_heads,),)
    queries = 2 * q if shape.attention_output_gate else q
    return {"linear_qkv": ((queries, h), (kv, h), (kv, h)), **more, "linear_proj": ((h, q),)}


def _of_latents(shape: ModelShape) -> Sizes:
    h, q, heads = shape.hidden_size, shape.q_lora_rank, shape.num_attention_heads
    query = heads * (shape.qk_head_dim + shape.qk_pos_emb_head_dim)
    down = (shape.kv_lora_rank + shape.qk_pos_emb_head_dim, h)
    sizes: Sizes = {
        "linear_kv_down_proj": (down,),
        "kv_layernorm": ((shape.kv_lora_rank,),),
        "linear_kv_up_proj": (
            (heads * (shape.qk_head_dim + shape.v_head_dim), shape.kv_lora_rank),
        ),
        "linear_proj": ((h, heads * shape.v_head_dim),),
    }
    if not q:
        return {**sizes, "linear_q_proj": ((query, h),)}
    return {
        **sizes,
        "linear_q_down_proj": ((q, h),),
        "linear_qkv_down_proj": ((q, h), down),
        "q_layernorm": ((q,),),
        "linear_q_up_proj": ((query, q),),
    }
