"""The shapes of attention's weights, by Megatron's modules."""

from megalora.model.shape import ModelShape

# By Megatron's module: the shapes of the Hugging Face weights that it stacks.
Sizes = dict[str, tuple[tuple[int, ...], ...]]


def attention_sizes(shape: ModelShape) -> Sizes:
    """Return the shapes of the weights of one layer's attention, of any build of it."""
    return _of_latents(shape) if shape.multi_latent_attention else _of_heads(shape)


def _of_heads(shape: ModelShape) -> Sizes:
    h, d = shape.hidden_size, shape.kv_channels
    q, kv = shape.query_size, shape.num_query_groups * d
    norms: Sizes = {f"{p}_layernorm": ((d,),) for p in "qk"} if shape.qk_layernorm else {}
    return {"linear_qkv": ((q, h), (kv, h), (kv, h)), **norms, "linear_proj": ((h, q),)}


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
