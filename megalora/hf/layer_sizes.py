"""The shapes of a layer's weights, by Megatron's modules, and which of them have a bias."""

from megalora.hf.attention_sizes import Sizes, attention_sizes
from megalora.model.facts import mamba_parts
from megalora.model.family import Names
from megalora.model.layer_kinds import ATTENTION, EXPERTS, MAMBA
from megalora.model.shape import ModelShape

# Parameters that are no module's weight: their names are whole, here and in Hugging Face's files.
BARE = ("A_log", "D", "dt_bias", "softmax_offset", "sinks")


def layer_sizes(shape: ModelShape, names: Names, layer: int) -> Sizes:
    """Return, by Megatron's module of a layer from 0, the shapes of the weights that it stacks.

    names: of the family, which say what is joined.

    A parameter that is no weight (`BARE`) is a module of its own here.
    """
    if shape.kind(layer):
        return _of_one_kind(shape, names, layer)
    h = shape.hidden_size
    sizes: Sizes = dict.fromkeys(("input_layernorm", "pre_mlp_layernorm"), ((h,),))
    of_attention = attention_sizes(shape, names, layer)
    sizes |= {f"self_attention.{name}": size for name, size in of_attention.items()}
    sizes |= _experts(shape) if shape.has_experts(layer) else _mlp(shape)
    for module in ("self_attention.linear_qkv", "mlp.linear_fc1"):
        if module in sizes and names.parts_of(names.modules[module][0])[1:]:
            sizes[module] = ((sum(rows for rows, _ in sizes[module]), h),)
    return sizes


def _of_one_kind(shape: ModelShape, names: Names, layer: int) -> Sizes:
    norm, kind = ((shape.hidden_size,),), shape.kind(layer)
    if kind == MAMBA:
        return {"norm": norm, **_mamba(shape)}
    if kind == ATTENTION:
        attention = attention_sizes(shape, names, layer).items()
        return {"input_layernorm": norm, **{f"self_attention.{k}": size for k, size in attention}}
    return {"pre_mlp_layernorm": norm, **(_experts(shape) if kind == EXPERTS else _mlp(shape))}


def _mamba(shape: ModelShape) -> Sizes:
    rows, h = mamba_parts(shape), shape.hidden_size
    channels = rows["x"] + rows["B"] + rows["C"]
    sizes: Sizes = {
        "mixer.in_proj": ((sum(rows.values()), h),),
        # Megatron's layers know no other width of the convolution.
        "mixer.conv1d": ((channels, 1, 4),),
        "mixer.norm": ((rows["x"],),),
        "mixer.out_proj": ((h, rows["x"]),),
    }
    return {**sizes, **{f"mixer.{name}": ((rows["dt"],),) for name in ("A_log", "D", "dt_bias")}}


def _mlp(shape: ModelShape) -> Sizes:
    return _pair("mlp", shape, shape.hidden_size, shape.ffn_hidden_size)


def _experts(shape: ModelShape) -> Sizes:
    h, latent = shape.hidden_size, shape.moe_latent_size
    sizes: Sizes = {"mlp.router": ((shape.num_moe_experts, h),)}
    if shared := shape.moe_shared_expert_intermediate_size:
        sizes |= _pair("mlp.shared_experts", shape, h, shared)
    if shape.moe_shared_expert_gate:
        sizes["mlp.shared_experts.gate"] = ((1, h),)
    if latent:
        sizes |= {"mlp.fc1_latent_proj": ((latent, h),), "mlp.fc2_latent_proj": ((h, latent),)}
    return {**sizes, **_pair("mlp.experts", shape, latent or h, shape.moe_ffn_hidden_size)}


def _pair(mlp: str, shape: ModelShape, features: int, ffn: int) -> Sizes:
    """Return the two linears of an MLP of so many features, a gate's included."""
    first = (ffn, features)
    return {
        f"{mlp}.linear_fc1": (first, first) if shape.gated_linear_unit else (first,),
        f"{mlp}.linear_fc2": ((features, ffn),),
    }


def has_bias(module: str, shape: ModelShape) -> bool:
    """Say whether a module of a layer has a bias beside its weight, one for each row."""
    if module == "mixer.conv1d":
        return True
    if shape.add_bias_linear:
        return module == "mlp.router" or module.rpartition(".")[2].startswith("linear_")
    return module.endswith("linear_qkv") and shape.add_qkv_bias


def tensor_name(name: str, kind: str = "weight") -> str:
    """Return the name of a tensor of a Hugging Face module, or of what is a parameter itself."""
    return name if name.rpartition(".")[2] in BARE else f"{name}.{kind}"
