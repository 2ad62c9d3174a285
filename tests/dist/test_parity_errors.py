"""What apply_lora refuses on real models, before it changes anything; and gradients in fp64."""

from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from megalora.builder import apply_lora, named_adapters
from megalora.checkpoint.gather import load_adapters
from megalora.config import LoRAConfig
from tests.dist.support.cases import KINDS
from tests.dist.support.layouts import Layout, model_parallel, over
from tests.dist.support.models import build_model
from tests.dist.support.parity import assemble, draw_b, lora_config, start_values


class _Wrapped(torch.nn.Module):
    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


class TEFusedMLP(torch.nn.Module):
    """Named as the module that runs its linears without calling them."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.linear_fc1, self.linear_fc2 = mlp.linear_fc1, mlp.linear_fc2


def refused(chunks: list[Any], message: str, **fields: Any) -> None:
    names = [name for name, _ in chunks[0].named_parameters()]
    with pytest.raises(ValueError, match=message):
        apply_lora(chunks, LoRAConfig(**{"rank": 4, **fields}))
    assert [name for name, _ in chunks[0].named_parameters()] == names
    assert all(parameter.requires_grad for parameter in chunks[0].parameters())


@over(Layout())
def test_mistakes_are_refused_before_anything_changes(layout: Layout) -> None:
    with model_parallel(layout):
        dense = build_model(layout, num_layers=1)
        refused(dense, r"lora_targets \['router'\] match no module", targets=("all", "router"))
        refused(dense, "'q_proj', which has no adapter", targets=("q_proj",))
        refused([_Wrapped(dense[0])], "is a _Wrapped, which is wrapped already")
        experts = build_model(layout, **KINDS["experts"].model)
        refused(experts, "lora_rank 5 is not divisible by moe_router_topk 2: use 2, 4, 6", rank=5)


@over(Layout(), Layout(pp=2))
def test_tensors_that_do_not_fit_the_adapters_are_refused_on_every_stage(layout: Layout) -> None:
    with model_parallel(layout):
        chunks = apply_lora(build_model(layout, num_layers=2), LoRAConfig(rank=4))
        whole = start_values(chunks)
        before = assemble(chunks, torch.Tensor.detach)
        key = "decoder.layers.0.mlp.linear_fc2_lora.lora_B"
        with pytest.raises(ValueError, match=f"tensors are missing: {key}$"):
            load_adapters(chunks, {name: whole[name] for name in whole if name != key})
        with pytest.raises(ValueError, match=r"no adapter for mlp\.router.*--lora-targets"):
            load_adapters(chunks, {**whole, "mlp.router_lora.lora_A": whole[key]})
        after = assemble(chunks, torch.Tensor.detach)
        assert all(torch.equal(after[name], before[name]) for name in before)


@over(Layout())
def test_modules_that_bypass_their_linears_are_refused(layout: Layout) -> None:
    with model_parallel(layout):
        chunks: list[Any] = build_model(layout, num_layers=1)
        layer = chunks[0].decoder.layers[0]
        layer.mlp = TEFusedMLP(layer.mlp)
        refused(chunks, "TEFusedMLP runs its linears as one fused operation: leave out --use-te-op")
        # Its attention can still have adapters.
        apply_lora(chunks, LoRAConfig(rank=4, targets=("attn",)))


@over(Layout())
def test_presets_leave_out_what_absorbed_attention_does_not_call(
    layout: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    with model_parallel(layout):
        chunks = build_model(layout, **KINDS["sparse absorbed attention"].model)
        apply_lora(chunks, LoRAConfig(rank=4))
        names = {name.rpartition(".")[2] for name, _ in named_adapters(chunks)}
    down_and_up = {f"linear_{n}_lora" for n in ("q_down_proj", "q_up_proj", "kv_down_proj")}
    rest = {"linear_proj_lora", "linear_fc1_lora", "linear_fc2_lora", "output_layer_lora"}
    assert names == down_and_up | rest
    assert capsys.readouterr().out.count("linear_kv_up_proj has no adapter: AbsorbedMLA") == 1


@pytest.mark.parametrize("target", ["linear_kv_up_proj", "decoder.layers.1.*"])
@over(Layout())
def test_a_linear_that_is_not_called_is_refused_where_it_is_named(
    layout: Layout, target: str
) -> None:
    with model_parallel(layout):
        chunks = build_model(layout, **KINDS["sparse absorbed attention"].model)
        message = (
            r"self_attention\.linear_kv_up_proj: .*without calling it; use --lora-targets attn"
        )
        refused(chunks, message, targets=("mlp", target))


@over(Layout())
def test_linears_that_the_loss_does_not_reach_are_refused(layout: Layout) -> None:
    with model_parallel(layout):
        chunks = build_model(layout, **KINDS["sparse absorbed attention"].model)
        indexer = chunks[0].decoder.layers[0].self_attention.core_attention.indexer
        sizes, init = (32, 12), torch.nn.init.zeros_
        indexer.linear_wk = ColumnParallelLinear(
            *sizes, config=chunks[0].config, init_method=init, bias=False
        )
        refused(chunks, r"indexer\.linear_wk: DSAIndexer picks tokens", targets=("*indexer*",))
        apply_lora(chunks, LoRAConfig(rank=4))
        assert not any("indexer" in name for name, _ in named_adapters(chunks))


@over(Layout())
def test_adapters_are_attached_once(layout: Layout) -> None:
    with model_parallel(layout):
        chunks = apply_lora(build_model(layout, num_layers=1), LoRAConfig(rank=4))
        with pytest.raises(ValueError, match="has adapters already: call apply_lora once"):
            apply_lora(chunks, LoRAConfig(rank=4))


@over(Layout(tp=2))
def test_widths_that_cannot_be_sharded_are_refused(layout: Layout) -> None:
    # The hidden size shards linear_proj's B, and 2 ranks cannot halve 33.
    sizes = {"hidden_size": 33, "num_attention_heads": 2, "num_query_groups": 2, "kv_channels": 8}
    with model_parallel(layout):
        chunks = build_model(layout, num_layers=1, **sizes)
        with pytest.raises(ValueError, match=r"33 features to shard.*tensor-parallel size 2"):
            apply_lora(chunks, LoRAConfig(rank=4, targets=("linear_proj",)))


@pytest.mark.parametrize("name", ["self_attention.linear_qkv", "mlp.linear_fc2"])
@pytest.mark.parametrize("backend", ["fused", "reference"])
@over(Layout())
def test_a_whole_adapted_linear_passes_gradcheck(layout: Layout, name: str, backend: Any) -> None:
    with model_parallel(layout):
        model = {"num_layers": 1, "params_dtype": torch.float64}
        (chunk,) = apply_lora(build_model(layout, **model), lora_config("dense", ops=backend))
        linear = chunk.get_submodule(f"decoder.layers.0.{name}")
        adapter = dict(named_adapters([chunk]))[f"decoder.layers.0.{name}_lora"]
        adapter.lora_B.data.copy_(draw_b(name, adapter.lora_B))
        x = draw_b("x", torch.empty(2, 1, adapter.base.in_features, dtype=torch.float64))

        def forward(x: Tensor, _a: Tensor, _b: Tensor) -> Tensor:
            return linear(x)[0]

        inputs = (x.requires_grad_(), adapter.lora_A, adapter.lora_B)
        assert torch.autograd.gradcheck(forward, inputs, fast_mode=True)


@over(Layout())
def test_a_compiled_linear_computes_the_same(layout: Layout) -> None:
    """torch.compile leaves the adapter's travel between two calls to Python, and must not mind."""
    with model_parallel(layout):
        (chunk,) = apply_lora(build_model(layout, num_layers=1), lora_config("dense"))
        adapter = chunk.decoder.layers[0].mlp.linear_fc1_lora
        adapter.lora_B.data.copy_(draw_b("b", adapter.lora_B))
        linear = chunk.decoder.layers[0].mlp.linear_fc1

        def results(function: Any) -> list[Tensor]:
            adapter.zero_grad()
            x = draw_b("x", torch.empty(4, 1, 32)).requires_grad_()
            y, _ = function(x)
            y.square().sum().backward()
            return [y.detach(), x.grad, adapter.lora_A.grad, adapter.lora_B.grad]

        plain = results(linear)
        compiled = results(torch.compile(lambda x: linear(x), backend="aot_eager"))
        for one, other in zip(compiled, plain, strict=True):
            torch.testing.assert_close(one, other)
