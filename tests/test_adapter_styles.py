"""How an adapter calls its base, on stand-ins for bases whose packages are missing here."""

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from torch import Tensor

from megalora.adapters.bases import Base, Split, Style
from megalora.adapters.linear import LayerNormLinearAdapter
from megalora.config import LoRAConfig
from megalora.targets import AdapterSpec, Rows


class LayerNormLinear(torch.nn.Module):
    """Called as Megatron's TELayerNormColumnParallelLinear, which norms and multiplies."""

    def __init__(self, *, has_bias: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(6, 4), requires_grad=False)
        self.te_return_bias, self.return_layernorm_output = has_bias, False
        self.config, self.sequence_parallel = ModelParallelConfig(), False

    def forward(self, x: Tensor) -> tuple:
        normed = x / x.norm()
        y = normed @ self.weight.T
        if self.te_return_bias:
            bias = torch.ones(6)
            return (y, bias, normed) if self.return_layernorm_output else (y, bias)
        return ((y, normed) if self.return_layernorm_output else y), None


def adapted(*, has_bias: bool) -> tuple[LayerNormLinear, LayerNormLinearAdapter]:
    base = LayerNormLinear(has_bias=has_bias)
    adapter = LayerNormLinearAdapter(
        Base(base, Split.COLUMN, Style.LAYERNORM_LINEAR, None, 4, 6),
        AdapterSpec(name="linear_fc1", rank=2, scale=3.0, rows=Rows(blocks=(6,))),
        LoRAConfig(rank=2),
        dtype=torch.float32,
        device=torch.device("cpu"),
        dense_group=None,
        expert_group=None,
    )
    torch.nn.init.normal_(adapter.lora_A)
    torch.nn.init.normal_(adapter.lora_B)
    adapter.bind()
    return base, adapter


def check_switch(*, has_bias: bool) -> None:
    base, adapter = adapted(has_bias=has_bias)
    x = torch.randn(5, 4)
    normed = x / x.norm()
    update = 3.0 * normed @ adapter.lora_A.T @ adapter.lora_B.T
    y, bias = base(x)
    torch.testing.assert_close(y, normed @ base.weight.T + update)
    adapter.enabled = False
    y, bias_of_base = base(x)
    torch.testing.assert_close(y, normed @ base.weight.T)
    assert (bias is None) == (bias_of_base is None) == (not has_bias)


def test_an_adapter_behind_a_fused_layer_norm_can_be_switched_off() -> None:
    check_switch(has_bias=False)


def test_an_adapter_behind_a_fused_layer_norm_with_bias_can_be_switched_off() -> None:
    check_switch(has_bias=True)
