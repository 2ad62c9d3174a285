"""Adapters on TransformerEngine's real Python layers, with torch in place of its kernels."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.extensions import transformer_engine as te
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from torch import Tensor

from megalora.adapters import one_gemm
from megalora.adapters.opened import adapt_opened_experts
from megalora.builder import apply_lora, named_adapters
from megalora.checkpoint.gather import load_adapters
from megalora.config import LoRAConfig
from megalora.ops import reference
from tests.dist.support.cases import TP2, TP2_SP
from tests.dist.support.layouts import Layout, model_parallel, over
from tests.dist.support.models import MOE, build_config
from tests.dist.support.parity import Tensors, assemble, draw_b, largest, relative
from tests.support.te_on_cpu import kernels_of_torch

pytestmark = [
    pytest.mark.transformer_engine,
    pytest.mark.skipif(not te.HAVE_TE, reason="TransformerEngine is not asked for"),
]
TOLERANCE = 1e-6
TOKENS, IN, OUT, RANK, SCALE = 8, 24, 32, 4, 1.5
CONFIG = LoRAConfig(rank=RANK, alpha=SCALE * RANK, targets=("all",))


@pytest.fixture(autouse=True)
def torch_kernels() -> Iterator[None]:
    with kernels_of_torch():
        yield


class Holder(torch.nn.Module):
    """What apply_lora needs of a model chunk around single linears."""

    def __init__(self, config: Any, **linears: torch.nn.Module) -> None:
        super().__init__()
        self.config = config
        for name, linear in linears.items():
            self.add_module(name, linear)

    def sharded_state_dict(self, **_kwargs: Any) -> dict[str, Any]:
        return {}


def draw(name: str, *shape: int) -> Tensor:
    return draw_b(name, torch.empty(shape))


def part(full: Tensor, dim: int, layout: Layout) -> Tensor:
    return full.chunk(layout.tp, dim)[parallel_state.get_tensor_model_parallel_rank()]


def build(kind: str, config: Any, *, bias: bool = False, skip_bias_add: bool = False) -> Any:
    common = {"config": config, "init_method": torch.nn.init.zeros_, "bias": bias}
    common |= {"skip_bias_add": skip_bias_add}
    group = parallel_state.get_tensor_model_parallel_group()
    if kind == "duplicated":
        return te.TELinear(
            IN, OUT, parallel_mode="duplicated",
            skip_weight_param_allocation=False, **common,
        )  # fmt: skip
    common |= {"is_expert": False, "tp_group": group}
    if kind == "row":
        return te.TERowParallelLinear(IN, OUT, input_is_parallel=True, **common)
    made = te.TELayerNormColumnParallelLinear if kind == "layernorm column" else None
    return (made or te.TEColumnParallelLinear)(IN, OUT, gather_output=False, **common)


NAMES = {
    "column": "linear_q_up_proj",
    "layernorm column": "linear_fc1",
    "row": "linear_proj",
    "duplicated": "linear_q_down_proj",
}


def normed(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("kind", list(NAMES))
@over(Layout(), TP2, TP2_SP)
def test_te_linears_equal_the_merged_weight(layout: Layout, kind: str, backend: str) -> None:
    w, x, r = draw("w", OUT, IN), draw("x", TOKENS, 1, IN), draw("r", TOKENS, 1, OUT)
    with model_parallel(layout):
        config = build_config(layout, gated_linear_unit=False)
        linear = build(kind, config)
        name = NAMES[kind]
        linear.weight.data.copy_(_shard_of_weight(w, kind, layout))
        fields = {**CONFIG.to_dict(), "targets": (name,), "ops": backend}
        chunks = apply_lora([Holder(config, **{name: linear})], LoRAConfig(**fields))
        factors = drawn_factors(chunks)
        load_adapters(chunks, factors)
        local_x = _shard_of_x(x, kind, layout).clone().requires_grad_()
        y, _ = linear(local_x)
        is_opened = type(y.grad_fn).__name__ == "OpenedLinearBackward"
        assert is_opened == (layout == Layout())
        local_y = y.detach().clone()
        (y * _shard_of_y(r, kind, layout)).sum().backward()
        gradients = assemble(chunks, lambda parameter: parameter.grad)
        expected = _expected(kind, w, x, r, factors, name)
        assert relative(local_y, _shard_of_y(expected["y"], kind, layout)) < TOLERANCE
        assert relative(local_x.grad, _shard_of_x(expected["x"], kind, layout)) < TOLERANCE
        assert largest(gradients, {key: expected[key] for key in factors}) < TOLERANCE
        assert linear.weight.grad is None


@pytest.mark.parametrize("skip_bias_add", [True, False])
@pytest.mark.parametrize("kind", ["column", "row", "duplicated"])
@over(Layout())
def test_an_opened_te_linear_gives_what_a_closed_one_does(
    layout: Layout, kind: str, skip_bias_add: bool
) -> None:
    with model_parallel(layout):
        config = build_config(layout, gated_linear_unit=False)
        linear = build(kind, config, bias=True, skip_bias_add=skip_bias_add)
        for name, parameter in linear.named_parameters():
            parameter.data = draw(name, *parameter.shape)
        chunks = apply_lora([Holder(config, **{NAMES[kind]: linear})], CONFIG)
        load_adapters(chunks, drawn_factors(chunks))
        ((_, adapter),) = named_adapters(chunks)
        opened, closed = _both_passes(linear), _both_passes(linear, adapter)
        assert opened.pop(1) is closed.pop(1) is (linear.bias if skip_bias_add else None)
        torch.testing.assert_close(opened, closed)


def _both_passes(linear: Any, closed: Any = None) -> list[Any]:
    if closed is not None:
        closed.opens = False
    x = draw("x", TOKENS, 1, IN).requires_grad_()
    y, bias = linear(x)
    assert (type(y.grad_fn).__name__ == "OpenedLinearBackward") == (closed is None)
    return [y, bias, *torch.autograd.grad(y, [x], draw("r", TOKENS, 1, OUT))]


@over(Layout())
def test_a_te_linear_stays_closed_in_fp8(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    with model_parallel(layout):
        linear = build("column", build_config(layout)).requires_grad_(False)
        x = draw("x", TOKENS, 1, IN)
        assert one_gemm.open_weight(linear, x) is linear.weight
        state = te.FP8GlobalStateManager.quantization_state
        monkeypatch.setattr(state, "fp8_enabled", True)
        assert one_gemm.open_weight(linear, x) is None


def drawn_factors(chunks: list[Any]) -> Tensors:
    start = assemble(chunks, torch.Tensor.detach)
    return {key: draw_b(key, f) if key.endswith("B") else f for key, f in start.items()}


def _expected(kind: str, w: Tensor, x: Tensor, r: Tensor, factors: Tensors, name: str) -> Tensors:
    leaves = {key: f.clone().requires_grad_() for key, f in {**factors, "x": x}.items()}
    a, b = leaves[f"{name}_lora.lora_A"], leaves[f"{name}_lora.lora_B"]
    seen = normed(leaves["x"]) if kind == "layernorm column" else leaves["x"]
    y = seen @ (w + SCALE * b @ a).T
    (y * r).sum().backward()
    gradients = {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}
    return {**gradients, "y": y.detach()}


def _shard_of_weight(w: Tensor, kind: str, layout: Layout) -> Tensor:
    return w if kind == "duplicated" else part(w, 1 if kind == "row" else 0, layout)


def _shard_of_x(x: Tensor, kind: str, layout: Layout) -> Tensor:
    if kind == "row":
        return part(x, -1, layout)
    return part(x, 0, layout) if layout.sp else x


def _shard_of_y(y: Tensor, kind: str, layout: Layout) -> Tensor:
    if kind in ("row", "duplicated"):
        return part(y, 0, layout) if layout.sp else y
    return part(y, -1, layout)


@over(TP2_SP)
def test_te_drops_the_gradient_of_its_gathered_layer_norm_output(layout: Layout) -> None:
    """The negative control: why adapters take the local output, and that the test would notice."""
    w, x, r = draw("w", OUT, IN), draw("x", TOKENS, 1, IN), draw("r", TOKENS, 1, OUT)
    a, b = draw("a", RANK, IN), draw("b", OUT, RANK)
    name = "linear_fc1"
    factors = {f"{name}_lora.lora_A": a, f"{name}_lora.lora_B": b}
    expected = _expected("layernorm column", w, x, r, factors, name)["x"]
    with model_parallel(layout):
        linear = build("layernorm column", build_config(layout, gated_linear_unit=False))
        linear.return_layernorm_output = linear.return_layernorm_output_gathered = True
        linear.weight.data.copy_(part(w, 0, layout))
        linear.requires_grad_(False)
        local_x = part(x, 0, layout).clone().requires_grad_()
        (y, gathered), _ = linear(local_x)
        assert gathered.shape[0] == TOKENS
        y = y + SCALE * gathered @ a.T @ part(b, 0, layout).T
        (y * part(r, -1, layout)).sum().backward()
        assert relative(local_x.grad, part(expected, 0, layout)) > 0.01


FFN, EXPERTS = 12, 4
SPLITS = [3, 0, 4, 1]
GROUPED_LAYOUTS = (Layout(), Layout(tp=2, sp=True, etp=2), Layout(dp=2, ep=2))


def _splits(form: str, splits: list[int]) -> Any:
    return splits if form == "list" else torch.tensor(splits, dtype=torch.int64)


@pytest.fixture
def calls_that_open(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Let experts' linears open as on a GPU that computes them in one launch; list which do."""
    opened: list[object] = []

    def adapt(*arguments: Any) -> Tensor:
        opened.append(arguments)
        return adapt_opened_experts(*arguments)

    for ops in (reference, torch.ops.megalora):
        monkeypatch.setattr(ops, "experts_linear_is_fused", lambda *_: True)
    monkeypatch.setattr("megalora.adapters.experts.adapt_opened_experts", adapt)
    return opened


@pytest.mark.parametrize(("backend", "where"), [("fused", "main_grad"), ("reference", "grad")])
@pytest.mark.parametrize("mode", ["per_expert", "shared_outer"])
@over(*GROUPED_LAYOUTS)
def test_te_grouped_experts_that_open_equal_the_merged_weights(
    layout: Layout, mode: Any, backend: Any, where: str, calls_that_open: list[object]
) -> None:
    """They open where nothing of theirs is split or shared."""
    test_te_grouped_experts_equal_the_merged_weights(layout, mode, backend, "list", where)
    opens = layout.etp == 1 and mode == "per_expert"
    assert len(calls_that_open) == (2 if opens else 0)


@pytest.mark.parametrize(("form", "where"), [("list", "grad"), ("tensor", "main_grad")])
@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("mode", ["per_expert", "shared_outer"])
@over(*GROUPED_LAYOUTS)
def test_te_grouped_experts_equal_the_merged_weights(
    layout: Layout, mode: Any, backend: Any, form: str, where: str
) -> None:
    """where: what backward adds the gradients to, main_grad if gradient accumulation is fused."""
    w1, w2 = draw("w1", EXPERTS, 2 * FFN, IN), draw("w2", EXPERTS, IN, FFN)
    x, r = draw("x", sum(SPLITS), IN), draw("r", sum(SPLITS), IN)
    with model_parallel(layout):
        num_local = EXPERTS // layout.ep
        first = parallel_state.get_expert_model_parallel_rank() * num_local
        local = range(first, first + num_local)
        experts, config = grouped_mlp(layout, num_local)
        config.gradient_accumulation_fusion = where == "main_grad"
        copy_expert_weights(experts, w1, w2, local)
        lora = LoRAConfig(rank=6, alpha=4.0, targets=("mlp",), expert_mode=mode, ops=backend)
        chunks = apply_lora([Holder(config, experts=experts)], lora)
        factors = drawn_factors(chunks)
        load_adapters(chunks, factors)
        for parameter in chunks[0].parameters():
            parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
        starts = torch.tensor([0, *SPLITS]).cumsum(0)
        rows = slice(int(starts[first]), int(starts[first + num_local]))
        local_x = x[rows].clone().requires_grad_()
        y, _ = _run_experts(experts, local_x, _splits(form, [SPLITS[e] for e in local]))
        (y * r[rows]).sum().backward()
        # Partial sums over expert-tensor-parallel ranks: the dispatcher adds them in both ways.
        whole_y, dx = _sum_over_etp(y.detach()), _sum_over_etp(local_x.grad)
        _sum_shared_over_ep(chunks, layout, where)
        gradients = assemble(chunks, lambda parameter: getattr(parameter, where))
        expected = _expected_experts(w1, w2, x, r, factors, lora)
        assert relative(whole_y, expected["y"][rows]) < TOLERANCE
        assert relative(dx, expected["x"][rows]) < TOLERANCE
        assert largest(gradients, {key: expected[key] for key in factors}) < TOLERANCE
        if mode == "per_expert":
            empty = SPLITS.index(0)
            assert all(not gradient[empty].any() for gradient in gradients.values())


def grouped_mlp(layout: Layout, num_local: int, **more: Any) -> tuple[Any, Any]:
    fields = {**MOE, "moe_grouped_gemm": True, "hidden_size": IN, "moe_ffn_hidden_size": FFN}
    config = build_config(layout, **{**fields, "num_attention_heads": 4, "kv_channels": 6, **more})
    experts = TEGroupedMLP(
        num_local,
        config,
        GroupedMLPSubmodules(te.TEColumnParallelGroupedLinear, te.TERowParallelGroupedLinear),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    return experts, config


def copy_expert_weights(experts: Any, w1: Tensor, w2: Tensor, local: range) -> None:
    size = parallel_state.get_expert_tensor_parallel_world_size()
    rank = parallel_state.get_expert_tensor_parallel_rank()
    for index, expert in enumerate(local):
        gate_and_up = w1[expert].view(2, FFN, IN).chunk(size, 1)[rank].flatten(0, 1)
        getattr(experts.linear_fc1, f"weight{index}").data.copy_(gate_and_up)
        getattr(experts.linear_fc2, f"weight{index}").data.copy_(w2[expert].chunk(size, 1)[rank])


def _run_experts(experts: Any, x: Tensor, m_splits: Any) -> Any:
    """Run both linears as TEGroupedMLP does, with m_splits in every form that it may give them."""
    hidden, _ = experts.linear_fc1(x, m_splits)
    gate, up = hidden.chunk(2, -1)
    return experts.linear_fc2(torch.nn.functional.silu(gate) * up, m_splits)


def _sum_over_etp(partial: Tensor | None) -> Tensor:
    assert partial is not None
    dist.all_reduce(partial, group=parallel_state.get_expert_tensor_parallel_group())
    return partial


def _sum_shared_over_ep(chunks: list[Any], layout: Layout, where: str) -> None:
    """Sum the gradients of shared factors as data parallelism does: ranks have other tokens."""
    for parameter in chunks[0].parameters():
        if parameter.requires_grad and parameter.dim() == 2 and layout.ep > 1:
            dist.all_reduce(getattr(parameter, where))


def _expected_experts(
    w1: Tensor, w2: Tensor, x: Tensor, r: Tensor, factors: Tensors, lora: LoRAConfig
) -> Tensors:
    leaves = {key: f.clone().requires_grad_() for key, f in {**factors, "x": x}.items()}
    scale = 4.0 / (3 if lora.expert_mode == "per_expert" else 6)
    (a1, b1), (a2, b2) = (
        tuple(_per_expert(leaves[f"experts.linear_{fc}_lora.lora_{f}"]) for f in "AB")
        for fc in ("fc1", "fc2")
    )
    rank = b1.shape[-1]
    gate, up = b1[:, :FFN] @ a1[:, :rank], b1[:, FFN:] @ a1[:, rank:]
    merged1, merged2 = w1 + scale * torch.cat([gate, up], 1), w2 + scale * b2 @ a2
    outputs = []
    for expert, rows in enumerate(leaves["x"].split(SPLITS)):
        left, right = (rows @ merged1[expert].T).chunk(2, -1)
        outputs.append((torch.nn.functional.silu(left) * right) @ merged2[expert].T)
    y = torch.cat(outputs)
    (y * r).sum().backward()
    gradients = {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}
    return {**gradients, "y": y.detach()}


def _per_expert(factor: Tensor) -> Tensor:
    return factor if factor.dim() == 3 else factor.expand(EXPERTS, *factor.shape)


@over(Layout())
def test_te_grouped_mlp_runs_with_adapters(layout: Layout) -> None:
    """Megatron's own caller: what it hands to the grouped linears."""
    with model_parallel(layout):
        experts, config = grouped_mlp(layout, EXPERTS)
        w1, w2 = draw("w1", EXPERTS, 2 * FFN, IN), draw("w2", EXPERTS, IN, FFN)
        copy_expert_weights(experts, w1, w2, range(EXPERTS))
        lora = LoRAConfig(rank=6, alpha=4.0, targets=("mlp",))
        chunks = apply_lora([Holder(config, experts=experts)], lora)
        load_adapters(chunks, drawn_factors(chunks))
        x, splits = draw("x", sum(SPLITS), IN), torch.tensor(SPLITS)
        y, _ = experts(x, splits, torch.ones(sum(SPLITS)))
        expected, _ = _run_experts(experts, x, splits)
    torch.testing.assert_close(y, expected)


@over(Layout())
def test_interleaved_gate_and_up_are_refused(layout: Layout) -> None:
    with model_parallel(layout):
        experts, config = grouped_mlp(layout, EXPERTS)
        config.moe_mlp_glu_interleave_size = 4
        with pytest.raises(ValueError, match="leave out --moe-mlp-glu-interleave-size"):
            apply_lora([Holder(config, experts=experts)], LoRAConfig(rank=6, targets=("mlp",)))


CLAMP = 0.4
# As gpt-oss has them.
BIASED = {
    "add_bias_linear": True,
    "activation_func": quick_gelu,
    "activation_func_clamp_value": CLAMP,
    "glu_linear_offset": 1.0,
}


def _copy_expert_biases(experts: Any, b1: Tensor, b2: Tensor, local: range) -> None:
    size = parallel_state.get_expert_tensor_parallel_world_size()
    rank = parallel_state.get_expert_tensor_parallel_rank()
    for index, expert in enumerate(local):
        gate_and_up = b1[expert].view(2, FFN).chunk(size, 1)[rank].flatten()
        getattr(experts.linear_fc1, f"bias{index}").data.copy_(gate_and_up)
        getattr(experts.linear_fc2, f"bias{index}").data.copy_(b2[expert])


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused activation"])
@over(*GROUPED_LAYOUTS)
def test_te_grouped_experts_add_their_biases_once(layout: Layout, fused: bool) -> None:
    drawn = {"w1": (2 * FFN, IN), "w2": (IN, FFN), "b1": (2 * FFN,), "b2": (IN,)}
    w1, w2, b1, b2 = (draw(name, EXPERTS, *size) for name, size in drawn.items())
    x, r = draw("x", sum(SPLITS), IN), draw("r", sum(SPLITS), IN)
    probs = draw("p", sum(SPLITS)).sigmoid()
    with model_parallel(layout):
        num_local = EXPERTS // layout.ep
        first = parallel_state.get_expert_model_parallel_rank() * num_local
        local = range(first, first + num_local)
        experts, config = grouped_mlp(layout, num_local, **BIASED, bias_activation_fusion=fused)
        copy_expert_weights(experts, w1, w2, local)
        _copy_expert_biases(experts, b1, b2, local)
        chunks = apply_lora([Holder(config, experts=experts)], LoRAConfig(rank=6, alpha=4.0))
        factors = drawn_factors(chunks)
        load_adapters(chunks, factors)
        starts = torch.tensor([0, *SPLITS]).cumsum(0)
        rows = slice(int(starts[first]), int(starts[first + num_local]))
        local_x = x[rows].clone().requires_grad_()
        y, _ = experts(local_x, torch.tensor([SPLITS[e] for e in local]), probs[rows])
        (y * r[rows]).sum().backward()
        whole_y, dx = _sum_over_etp(y.detach()), _sum_over_etp(local_x.grad)
        gradients = assemble(chunks, lambda parameter: parameter.grad)
    leaves = {key: f.clone().requires_grad_() for key, f in {**factors, "x": x}.items()}
    outputs = []
    for expert, (own, p) in enumerate(
        zip(leaves["x"].split(SPLITS), probs.split(SPLITS), strict=True)
    ):
        fc1, fc2 = (_updates(leaves, name)[expert] for name in ("linear_fc1", "linear_fc2"))
        gate, up = (own @ (w1[expert] + fc1).T + b1[expert]).chunk(2, -1)
        gate, up = gate.clamp(max=CLAMP), up.clamp(-CLAMP, CLAMP)
        inner = gate * torch.sigmoid(1.702 * gate) * (up + 1)
        outputs.append((inner @ (w2[expert] + fc2).T + b2[expert]) * p[:, None])
    expected = torch.cat(outputs)
    (expected * r).sum().backward()
    assert relative(whole_y, expected.detach()[rows]) < TOLERANCE
    assert relative(dx, leaves["x"].grad[rows]) < TOLERANCE
    assert largest(gradients, {key: leaves[key].grad for key in factors}) < TOLERANCE


def _updates(leaves: Tensors, name: str) -> Tensor:
    """Return c B A of every expert [E, out, in], gate and up having an A each."""
    a, b = (leaves[f"experts.{name}_lora.lora_{factor}"] for factor in "AB")
    rank = b.shape[-1]
    if name == "linear_fc1":
        halves = zip(b.chunk(2, 1), (a[:, :rank], a[:, rank:]), strict=True)
        return 4.0 / rank * torch.cat([own_b @ own_a for own_b, own_a in halves], 1)
    return 4.0 / rank * b @ a
