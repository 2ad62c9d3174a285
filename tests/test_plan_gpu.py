"""What a plan says that a GPU holds: against an H200's own numbers, and tensor by tensor."""

import contextlib
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from megalora.plan.engine import attention, kernels
from megalora.plan.meter import Meter
from tests.support import gpu_plans
from tests.support.plans import rank_plan

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "NVIDIA-H200"
MIB = 2**20
RUN = (
    *("--position-embedding-type", "rope", "--untie-embeddings-and-output-weights", "--bf16"),
    *("--tokenizer-type", "NullTokenizer", "--make-vocab-size-divisible-by", "1", "--lr", "1e-4"),
    *("--micro-batch-size", "1", "--train-iters", "2", "--eval-iters", "0"),
    *("--eval-interval", "10", "--use-distributed-optimizer", "--disable-bias-linear"),
)


# === Against an H200: models of benchmarks/bench_model.py ===

LLAMA_LAYERS = (
    *("--hidden-size", "4096", "--ffn-hidden-size", "14336", "--num-attention-heads", "32"),
    *("--group-query-attention", "--num-query-groups", "8", "--vocab-size", "4096"),
)
QWEN_LAYERS = (
    *("--hidden-size", "2048", "--ffn-hidden-size", "6144", "--num-attention-heads", "32"),
    *("--group-query-attention", "--num-query-groups", "4", "--vocab-size", "151936"),
    *("--kv-channels", "128", "--qk-layernorm", "--num-experts", "128"),
    *("--moe-router-topk", "8", "--moe-ffn-hidden-size", "768", "--moe-grouped-gemm"),
    *("--moe-router-load-balancing-type", "none", "--moe-token-dispatcher-type", "alltoall"),
    "--moe-permute-fusion",
)
# A TransformerConfig's own defaults, where flags have others.
BENCHMARK = (
    *("--seq-length", "4096", "--max-position-embeddings", "4096", "--global-batch-size", "1"),
    *("--swiglu", "--normalization", "RMSNorm", "--no-bias-swiglu-fusion", "--no-rope-fusion"),
    *("--no-bias-dropout-fusion", "--attention-dropout", "0", "--hidden-dropout", "0"),
)


class Measured(NamedTuple):
    """A row of results: which model, and whether with adapters or trained whole."""

    folder: str
    kind: str
    layers: int
    rank: int
    name: str

    @property
    def flags(self) -> list[str]:
        """Return the flags that build the model of the row."""
        adapters = ["--lora-rank", str(self.rank)] if self.name == "LoRA" else []
        layers = LLAMA_LAYERS if self.kind == "dense" else QWEN_LAYERS
        return [*RUN, *BENCHMARK, *layers, "--num-layers", str(self.layers), *adapters]

    def row(self) -> dict[str, Any]:
        """Return what the H200 measured."""
        lines = (RESULTS / self.folder / "results.jsonl").read_text().splitlines()
        wanted = {
            "kind": self.kind, "layers": self.layers, "rank": self.rank, "name": self.name
        }  # fmt: skip
        (found,) = (
            row
            for row in map(json.loads, lines)
            if wanted.items() <= row.items() and "step_peak_mib" in row
        )
        return found


def measures(argv: Sequence[str]) -> dict[str, float]:
    """Plan a run of one rank, as benchmarks/bench_model.py measures one."""
    from megalora.plan import step, world
    from megalora.plan.processes import OWN_SCRIPT
    from megalora.plan.script import Built, build

    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta and not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            saved[storage._cdata] = storage.nbytes()
        return tensor

    def use(built: Built) -> dict[str, float]:
        trained = [p for m in built.model for p in m.parameters() if p.requires_grad]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            found = step.run_step(built.model, built.optimizer, built.args, Meter())
        return {
            "trained_parameters": sum(p.numel() for p in trained),
            "saved_activations_mib": sum(saved.values()) / MIB,
            "step_peak_mib": (found.peak - found.before) / MIB,
        }

    world.become(0, 1)
    return build(OWN_SCRIPT, argv, use)


MEASURED = (
    Measured("2026-11-27-2", "dense", 8, 16, "LoRA"),
    Measured("2026-11-27-2", "dense", 8, 16, "full"),
    Measured("2026-11-27-3", "qwen3-30b-a3b", 4, 32, "LoRA"),
)


@pytest.mark.parametrize("measured", MEASURED, ids=lambda m: f"{m.kind}-{m.layers}-{m.name}")
def test_a_plan_holds_what_an_h200_held(measured: Measured) -> None:
    row, found = measured.row(), gpu_plans.call(measures, measured.flags)
    assert found["trained_parameters"] == row["trained_parameters"]
    # Every tensor that autograd keeps; without a few numbers of a loss.
    assert found["saved_activations_mib"] == pytest.approx(row["saved_activations_mib"], abs=0.1)
    # The H200's counts no tensors of its step before that are freed meanwhile.
    assert found["step_peak_mib"] == pytest.approx(row["step_peak_mib"], rel=0.01)


# === Tensor by tensor: Korthikanti et al. 2022, Reducing Activation Recomputation ===

S, H, HEADS, RANK = 512, 256, 8, 8
SBH = S * H
GPT = (
    *("--hidden-size", str(H), "--ffn-hidden-size", str(4 * H), "--num-attention-heads"),
    *(str(HEADS), "--seq-length", str(S), "--max-position-embeddings", str(S), "--vocab-size"),
    *("1024", "--global-batch-size", "8", "--hidden-dropout", "0.1", "--attention-dropout", "0.1"),
)
# fp32: the log of each row's sum of scores, mean and 1/sigma of each token in both norms.
ROWS, STATISTICS = 4 * HEADS * S, 4 * 4 * S
TP = ("--tensor-model-parallel-size", "2")
TP_SP = (*TP, "--sequence-parallel")
FULL = (*("--recompute-granularity", "full", "--recompute-method", "uniform"),)
EACH = (*FULL, "--recompute-num-layers", "1")
LORA = ("--lora-rank", str(RANK), "--lora-alpha", "32")


def held(argv: Sequence[str], world_size: int) -> int:
    """Return the bytes that a layer's forward leaves for its backward: the first of two."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from megalora.plan import world
    from megalora.plan.assumed import assumptions
    from megalora.plan.processes import OWN_SCRIPT
    from megalora.plan.script import Built, build

    def use(built: Built) -> int:
        (model,) = built.model
        tokens = torch.empty(1, S, dtype=torch.long, device="cuda")
        meter, seen = Meter(), []
        for module in model.modules():
            if isinstance(module, TransformerLayer):
                module.register_forward_pre_hook(lambda *_: seen.append(meter.live))
        meter.hold([tokens, *model.parameters()])
        with assumptions(), meter:
            assert model(tokens, tokens, None, labels=tokens).requires_grad
        before, after = seen
        return after - before

    world.become(0, world_size)
    return build(OWN_SCRIPT, argv, use)


@functools.cache
def of_a_layer(*flags: str, world_size: int = 1) -> int:
    """Return what a layer of a GPT model holds."""
    return gpu_plans.call(held, [*RUN, *GPT, "--num-layers", "2", *flags], world_size)


def test_a_trained_layer_holds_the_34_sbh_of_the_paper() -> None:
    # Norms' inputs 2 + 2, their outputs 2 + 2, q, k and v 6, attention's output 2, masks of
    # dropout 1 + 1, fc1's output 8, fc2's input 8. Flash attention has no 5 a s² b, but its rows.
    assert of_a_layer() == 34 * SBH + ROWS + STATISTICS


def test_tensor_parallelism_splits_24_sbh_and_with_sequences_all_34() -> None:
    # Whole on each rank: norms' inputs and outputs, and the masks.
    assert of_a_layer(*TP, world_size=2) == (10 + 24 // 2) * SBH + ROWS // 2 + STATISTICS
    assert of_a_layer(*TP_SP, world_size=2) == (34 * SBH + ROWS + STATISTICS) // 2


def test_a_layer_that_is_computed_again_holds_its_input() -> None:
    assert of_a_layer(*EACH) == 2 * SBH
    shared = (*TP, *EACH, "--distribute-saved-activations")
    assert of_a_layer(*shared, world_size=2) == SBH


def test_an_mlp_that_is_computed_again_holds_its_input() -> None:
    # Not its norm's output, fc1's output and fc2's input: 2 + 8 + 8.
    found = of_a_layer("--recompute-granularity", "selective", "--recompute-modules", "mlp")
    assert found == (34 - 2 - 8 - 8) * SBH + ROWS + STATISTICS // 2


def test_what_experts_compute_again_is_let_go_of_and_shared() -> None:
    experts = (
        *("--num-experts", "4", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "128"),
        *("--moe-grouped-gemm", "--moe-token-dispatcher-type", "alltoall", "--swiglu"),
    )
    again = ("--recompute-granularity", "selective", "--recompute-modules", "moe_act")
    # fc2's input, of two experts for each token.
    less = of_a_layer(*LORA, *experts) - of_a_layer(*LORA, *experts, *again)
    assert less == 2 * 2 * S * 128


def test_a_frozen_layer_with_adapters_holds_their_inputs_and_s() -> None:
    # s of q, k, v, of proj, fc1 and fc2; in TransformerEngine a frozen linear keeps nothing.
    s = 2 * (3 + 1 + 1 + 1) * RANK * S
    assert of_a_layer(*LORA) == 34 * SBH + s + ROWS + STATISTICS


def test_a_frozen_linear_without_an_adapter_holds_nothing() -> None:
    # Neither the norm's output before fc1 nor fc2's input.
    s = 2 * (3 + 1) * RANK * S
    assert of_a_layer(*LORA, "--lora-targets", "attn") == (34 - 2 - 8) * SBH + s + ROWS + STATISTICS


def test_all_scores_are_held_where_flags_ask_for_them() -> None:
    # Probabilities, a byte of dropout's mask for each, and what is left of them: 5 a s² b.
    more = of_a_layer("--attention-backend", "unfused") - of_a_layer()
    assert more == 5 * HEADS * S * S - ROWS


def stand_ins(argv: Sequence[str]) -> set[tuple[int, ...]]:
    """Return the shapes of what stands for gradients that kernels add to main_grad."""
    from megalora.plan import gpu, world
    from megalora.plan.engine import base
    from megalora.plan.processes import OWN_SCRIPT
    from megalora.plan.script import Built, build

    def use(built: Built) -> set[tuple[int, ...]]:
        gpu.keep_stand_ins(built.model)
        return {tuple(shape) for shape, _dtype in base._stand_ins}

    world.become(0, 1)
    return build(OWN_SCRIPT, argv, use)


def test_a_gradient_that_is_added_elsewhere_leaves_a_tensor_for_each_shape() -> None:
    argv = [*RUN, *GPT, "--num-layers", "2"]
    whole = {(3 * H, H), (H, H), (4 * H, H), (H, 4 * H), (1024, H)}
    assert gpu_plans.call(stand_ins, argv) == whole
    assert gpu_plans.call(stand_ins, [*argv, *LORA]) == set()


def peak_of_swiglu() -> tuple[int, int]:
    """Return the peaks of Megatron's SwiGLU [1024, 2 * 512] in bf16, as a kernel and as it is."""
    from megatron.core.fusions import fused_bias_swiglu

    from megalora.plan import gpu

    x = torch.empty(1024, 1024, device="meta", dtype=torch.bfloat16)
    peaks = []
    for context in (gpu.kernels(), contextlib.nullcontext()):
        with context, Meter() as meter:
            fused_bias_swiglu.swiglu(x)
            peaks.append(meter.peak - x.nbytes)
    return peaks[0], peaks[1]


def test_what_megatron_compiles_is_one_kernel() -> None:
    # The result alone; and with it silu of the gate.
    assert gpu_plans.call(peak_of_swiglu) == (MIB, 2 * MIB)


# === Microbatches in flight ===


@functools.cache
def activations(stage: int, microbatches: int, *flags: str) -> int:
    """Return the most that a stage of four holds beside weights and states."""
    argv = [*RUN, *GPT, "--num-layers", "4", "--pipeline-model-parallel-size", "4", *flags]
    argv[argv.index("--global-batch-size") + 1] = str(microbatches)
    return gpu_plans.call(peak_of, stage, argv)


def peak_of(stage: int, argv: Sequence[str]) -> int:
    step = rank_plan(stage, argv, world_size=4).step
    return step.peak - step.before


def test_the_first_stage_holds_a_microbatch_for_each_stage_and_the_last_holds_one() -> None:
    # A microbatch leaves its layer's, and of the embedding's dropout a byte of mask.
    grown = (activations(0, 4) - activations(0, 2)) / 2
    assert grown == pytest.approx(35 * SBH + ROWS + STATISTICS, abs=SBH / 4)
    assert activations(0, 8) == activations(0, 4)
    # One more that comes, and one that goes; and the sum of losses.
    assert activations(3, 8) == pytest.approx(activations(3, 1) + 2 * 2 * SBH, abs=64)


def purposes_of(argv: Sequence[str]) -> set[tuple[str, str]]:
    found = rank_plan(0, argv, world_size=4).traffic
    return {(one.purpose, one.kind) for one in found}


def test_backward_starts_in_the_schedule_and_is_not_the_pipelines() -> None:
    stages = ("--num-layers", "2", "--pipeline-model-parallel-size", "2", "--lora-rank", "4")
    found = gpu_plans.call(purposes_of, [*RUN, *GPT, *TP_SP, *stages])
    assert {kind for purpose, kind in found if purpose == "pipeline"} == {"send", "receive"}
    assert {kind for purpose, kind in found if purpose == "adapters"} == {
        "all-gather", "reduce-scatter"
    }  # fmt: skip


# === Flags that need a GPU to build ===


def notes_of(argv: Sequence[str]) -> list[str]:
    return rank_plan(0, argv, world_size=2).notes


def test_what_is_planned_otherwise_is_said() -> None:
    flags = (
        *("--fp8-format", "hybrid", "--tp-comm-overlap", "--cuda-graph-impl", "local"),
        *("--num-experts", "4", "--moe-token-dispatcher-type", "flex", "--moe-router-dtype"),
        *("fp32", "--moe-grouped-gemm", "--expert-tensor-parallel-size", "1"),
        *("--moe-ffn-hidden-size", "64", "--expert-model-parallel-size", "2"),
    )
    said = gpu_plans.call(notes_of, [*RUN, *GPT, *TP_SP, "--num-layers", "2", *flags])
    assert "TransformerEngine's layers and flash attention" in said[0]
    for flag in ("--fp8-format", "--tp-comm-overlap", "--cuda-graph-impl", "flex", "experts:"):
        assert sum(flag in note for note in said) == 1, flag
    plain = gpu_plans.call(notes_of, [*RUN, *GPT, *TP_SP, "--num-layers", "2"])
    assert not any("planned" in note for note in plain)


# === The kernels by themselves ===


@pytest.mark.parametrize(("causal", "share"), [(False, 1), (True, 2)])
def test_attention_counts_the_pairs_that_a_mask_leaves(causal: bool, share: int) -> None:
    s, b, heads, groups, d = 128, 2, 8, 2, 16
    q = torch.empty(s, b, heads, d, device="meta", requires_grad=True)
    k, v = (torch.empty(s, b, groups, d, device="meta", requires_grad=True) for _ in range(2))
    pairs = b * attention.num_pairs(s, s, causal=causal)
    with Meter() as meter:
        attention.flash(q, k, v, pairs).sum().backward()
    flops = {product.op: count for product, count in meter.flops.items()}
    forward = 4 * b * s * s * heads * d // share
    assert flops == {
        "megalora_plan.attention": forward,
        "megalora_plan.attention_backward": 5 * forward // 2,
    }
    assert attention.num_pairs(s, s, causal=True, window=16) == 128 * 16 - 16 * 16 // 2


def test_a_fused_function_holds_what_it_returns() -> None:
    x = torch.empty(1024, 1024, device="meta")
    with Meter() as meter:
        with meter.in_one_kernel():
            y = (x * 2).float() + 1
        assert meter.peak == meter.live == y.nbytes


def test_a_storage_that_is_let_go_of_is_counted_once() -> None:
    with Meter() as meter:
        x = torch.empty(1024, device="meta")
        y = torch.empty(1024, device="meta")
        for storage, size in ((x.untyped_storage(), 0), (y.untyped_storage(), 4096)):
            storage.resize_(size)
            meter.resized(storage)
            del storage
        assert meter.live == 4096
        del x
        assert meter.live == 4096
        del y
        assert meter.live == 0


def test_the_backward_of_shared_keys_has_a_gradient_of_each_head_in_its_workspace() -> None:
    q = torch.empty(128, 1, 8, 16, device="meta", dtype=torch.bfloat16)
    k = torch.empty(128, 1, 2, 16, device="meta", dtype=torch.bfloat16)
    *_, alone = kernels.ops.attention_backward(q, q, q, q, 1)
    *_, shared = kernels.ops.attention_backward(q, q, k, k, 1)
    assert alone.nbytes == 4 * q.numel() + 4 * 128 * 8
    assert shared.nbytes == alone.nbytes + 2 * q.nbytes
