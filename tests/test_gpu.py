"""The ops on a GPU against the reference; benchmarks/gpu_check.py runs these."""

from typing import Any

import pytest
import torch
from megatron.core.extensions import transformer_engine as te
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megalora.adapters.bases import Split, State, describe
from megalora.adapters.call import Call
from megalora.adapters.linear import LayerNormLinearAdapter
from megalora.adapters.opened import adapt_opened
from megalora.adapters.routes import LOCAL_ROUTE, ROUTES
from megalora.adapters.sandwich import adapt
from megalora.config import LoRAConfig
from megalora.ops import reference
from megalora.ops.fused import load
from megalora.ops.philox import dropout_mask
from megalora.targets import AdapterSpec, Rows
from tests.support.op_cases import CASES, TOLERANCE, Case, draw, on, relative_error, run_all

fused = load()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# Sizes that fill a GPU: dense, interleaved and gated projections, many experts.
LARGE = [
    Case(4096, 2048, (2048,), 1, rank=16),
    Case(4096, 2048, (512, 128, 128), 4, rank=32),
    Case(2049, 1032, (776, 776), 1, rank=64),
    Case(8192, 768, (1024,), 1, rank=4, experts=128),
    Case(8192, 2048, (768, 768), 1, rank=4, experts=127),
]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_every_op_on_a_gpu_matches_the_reference(case: Case, dtype: torch.dtype, p: float) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    given = on("cuda", draw(case, dtype))
    expected = run_all(reference, given, p)
    for name, got in run_all(fused, given, p).items():
        assert relative_error(got, expected[name]) < TOLERANCE[got.dtype], name


@pytest.mark.parametrize("route", ["gemm", "kernels", "project:kernels,update:gemm"])
@pytest.mark.parametrize("case", [LARGE[0], LARGE[2]], ids=str)
def test_every_route_matches_the_reference(
    case: Case, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGALORA_CUDA_ROUTE", route)
    given = on("cuda", draw(case, torch.bfloat16))
    expected = run_all(reference, given, 0.0)
    for name, got in run_all(fused, given, 0.0).items():
        assert relative_error(got, expected[name]) < TOLERANCE[got.dtype], name


@pytest.mark.parametrize(
    ("route", "message"),
    [
        ("project:cutlass", 'route "cutlass": use auto, gemm or kernels'),
        ("projct:gemm", 'product "projct": use project, update, outer, backward or linear'),
    ],
)
def test_an_unknown_route_is_refused(
    route: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGALORA_CUDA_ROUTE", route)
    given = on("cuda", draw(LARGE[0], torch.bfloat16))
    with pytest.raises(ValueError, match=message):
        fused.shrink(given.x, given.lora_A)


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_every_op_on_a_gpu_repeats_itself_bit_for_bit(case: Case) -> None:
    given = on("cuda", draw(case, torch.bfloat16))
    first, second = run_all(fused, given, 0.3), run_all(fused, given, 0.3)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_gpu_drops_the_same_elements_as_a_cpu() -> None:
    x, seed = torch.ones(133, 71), torch.tensor([2**50 + 3])
    kept = fused.shrink(x.cuda(), torch.eye(71).cuda(), p=0.4, seed=seed.cuda()) != 0
    assert torch.equal(kept.cpu(), dropout_mask(x.shape, 0.4, seed))


def test_grouped_ops_do_not_wait_for_the_gpu() -> None:
    given = on("cuda", draw(LARGE[-1], torch.bfloat16))
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused.shrink(given.x, given.lora_A, given.offsets)
        fused.expand_backward(given.y, given.s, given.lora_B, 1.0, given.offsets, given.segments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("way", ["opened", "on one rank", "sandwich"])
def test_both_passes_of_an_adapted_linear_replay_from_a_graph(way: str) -> None:
    given = on("cuda", draw(LARGE[1], torch.bfloat16))
    # The sandwich takes a route that merely sends nothing.
    route = ROUTES[Split.COLUMN, State.PARTIAL] if way == "sandwich" else LOCAL_ROUTE
    call = Call(ops=fused, route=route, scale=0.7, segments=given.segments)
    weight = torch.randn(given.y.shape[1], given.x.shape[1], device="cuda", dtype=torch.bfloat16)
    leaves = [t.clone().requires_grad_() for t in (given.x, given.lora_A, given.lora_B)]

    def both_passes() -> list[Tensor]:
        x, lora_A, lora_B = leaves
        if way == "opened":
            y = adapt_opened(x, weight, lora_A, lora_B, call)
        else:
            y, _ = adapt(lambda x: (x @ weight.T, None), x, lora_A, lora_B, call)
        return [y, *torch.autograd.grad(y, leaves, given.y)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = [t.clone() for t in both_passes()]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = both_passes()
    for result in replayed:
        result.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(one, two) for one, two in zip(replayed, expected, strict=True))


def behind_a_norm(in_features: int, out_features: int, **norm: Any) -> LayerNormLinearAdapter:
    """Return an adapter with a random B around TransformerEngine's linear behind a layer norm."""
    dtype, device = torch.bfloat16, torch.device("cuda")
    config = TransformerConfig(
        num_layers=1, hidden_size=in_features, num_attention_heads=1, params_dtype=dtype, **norm
    )
    linear: Any = te.TELayerNormColumnParallelLinear(
        in_features, out_features, config=config, init_method=torch.nn.init.normal_,
        gather_output=False, bias=False, skip_bias_add=False, is_expert=False,
    )  # fmt: skip
    torch.nn.init.normal_(linear.layer_norm_weight)
    rows = Rows(blocks=(out_features,))
    adapter = LayerNormLinearAdapter(
        describe(linear.requires_grad_(False))[""],
        AdapterSpec(name="linear_fc1", rank=16, scale=0.7, rows=rows),
        LoRAConfig(rank=16),
        dtype=dtype, device=device, dense_group=None, expert_group=None,
    )  # fmt: skip
    adapter.bind()
    for factor in adapter.parameters():
        torch.nn.init.normal_(factor)
    return adapter


@pytest.mark.skipif(not te.HAVE_TE, reason="no TransformerEngine")
@pytest.mark.parametrize(
    "norm",
    [
        {"normalization": "RMSNorm"},
        {"normalization": "RMSNorm", "layernorm_zero_centered_gamma": True},
        {"normalization": "LayerNorm"},
    ],
    ids=str,
)
def test_transformer_engines_linear_behind_a_norm_opens(norm: dict[str, Any]) -> None:
    adapter = behind_a_norm(2048, 3072, **norm)
    linear = adapter.base.module
    x, dy = (torch.randn(1024, 2, n, device="cuda", dtype=torch.bfloat16) for n in (2048, 3072))
    leaves = [x.requires_grad_(), *adapter.parameters()]

    def both_passes() -> list[Tensor]:
        y, _ = linear(x)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    opened = both_passes()
    assert type(opened[0].grad_fn).__name__ == "OpenedLinearBackward"
    (_, normed), _ = linear.forward.args[0](x)
    assert torch.equal(adapter._norm(x), normed)
    adapter.opens = False
    for got, expected in zip(opened, both_passes(), strict=True):
        assert relative_error(got, expected) < TOLERANCE[got.dtype]
