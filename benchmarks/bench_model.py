"""Compare a whole Megatron model frozen, with LoRA and fully trained, side by side in one run.

python benchmarks/bench_model.py [--kind dense|moe|qwen3-30b-a3b] [--rank 16] [--results FILE]

`frozen` runs forward and backward through the frozen base (what LoRA cannot save), `LoRA` adds the
adapters and their gradients, `full` trains every weight. Each round times all three in turn; the
table has medians of the rounds and medians of the ratios inside a round. The article's yardstick is
(2 N^2 + 6 N R) / (3 N^2) of the floating-point operations of full fine-tuning.
"""

import argparse
import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _results import append, machine

from megalora import cpu, mends

if not cpu.install_if_wanted(sys.argv):
    mends.install()

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.extensions import transformer_engine as te
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megalora import LoRAConfig, apply_lora

KINDS = ("frozen", "LoRA", "full")


@dataclass(frozen=True)
class Size:
    """What a model is made of; no experts means dense."""

    hidden_size: int
    ffn_hidden_size: int
    num_layers: int
    num_heads: int
    num_query_groups: int
    head_size: int
    seq_length: int
    vocab_size: int = 4096
    num_experts: int = 0
    top_k: int = 4
    expert_ffn_hidden_size: int = 0


# Layers of Llama-3.1-8B, experts of a middle size, layers of Qwen3-30B-A3B.
SIZES = {
    "dense": Size(4096, 14336, 8, 32, 8, 128, 4096),
    "moe": Size(4096, 14336, 4, 32, 8, 128, 4096, 4096, 16, 4, 2048),
    "qwen3-30b-a3b": Size(2048, 6144, 8, 32, 4, 128, 4096, 151936, 128, 8, 768),
}
SMALL = {
    "dense": Size(512, 1536, 4, 8, 2, 64, 256),
    "moe": Size(512, 1536, 4, 8, 2, 64, 256, 4096, 16, 4, 256),
    "qwen3-30b-a3b": Size(128, 384, 2, 4, 2, 32, 64, 4096, 128, 8, 48),
}
TOY = {
    "dense": Size(64, 96, 2, 4, 2, 16, 16, 256),
    "moe": Size(64, 96, 2, 4, 2, 16, 16, 256, 4, 2, 32),
    "qwen3-30b-a3b": Size(64, 96, 2, 4, 2, 16, 16, 256, 32, 8, 32),
}


def main() -> None:
    """Measure, print the table, write JSON lines where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=tuple(SIZES), default="dense")
    parser.add_argument("--layers", type=int, help="instead of the kind's own number")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--toy", action="store_true", help="toy sizes: does the command work?")
    parser.add_argument("--results", type=Path, help="file to add the numbers to, as JSON lines")
    options = parser.parse_args()
    start_one_process()
    device = "cuda" if torch.cuda.device_count() and not cpu.installed() else "cpu"
    size = SIZES[options.kind]
    if device == "cpu" or options.toy:
        size = SMALL[options.kind] if not options.toy else TOY[options.kind]
    size = dataclasses.replace(size, num_layers=options.layers or size.num_layers)
    append(options.results, {"machine": machine(torch.device(device)), "TE": has_te()})
    models = {name: build(name, options.rank, size, device) for name in KINDS}
    steps = {name: make_step(model, size, device) for name, model in models.items()}
    for step in steps.values():
        step()
        step()
    rounds = [
        {name: timed(step, device) for name, step in steps.items()} for _ in range(options.rounds)
    ]
    rows = [row(name, rounds, models[name], steps[name], size, device) for name in KINDS]
    print(table(rows, options, device))
    which = {"bench": "model", "kind": options.kind, "layers": size.num_layers}
    for found in rows:
        append(options.results, which | {"rank": options.rank} | found)
    dist.destroy_process_group()


def start_one_process() -> None:
    """Set Megatron's process groups up for this one process."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1234)


def build(name: str, rank: int, size: Size, device: str) -> GPTModel:
    """Build the model of one row of the table."""
    config = TransformerConfig(
        num_layers=size.num_layers,
        hidden_size=size.hidden_size,
        ffn_hidden_size=size.ffn_hidden_size,
        num_attention_heads=size.num_heads,
        num_query_groups=size.num_query_groups,
        kv_channels=size.head_size,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        qk_layernorm=size.num_experts > 16,
        add_bias_linear=False,
        params_dtype=torch.bfloat16 if device == "cuda" else torch.float32,
        bf16=device == "cuda",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        **(moe_fields(size) if size.num_experts else {}),
    )
    model = GPTModel(
        config,
        layer_spec(config),
        vocab_size=size.vocab_size,
        max_sequence_length=size.seq_length,
        position_embedding_type="rope",
    )
    model.to(device)
    if name == "LoRA":
        apply_lora([model], LoRAConfig(rank=rank))
    if name == "frozen":
        model.requires_grad_(False)
        model.embedding.register_forward_hook(lambda _m, _i, output: output.requires_grad_(True))
    return model


def moe_fields(size: Size) -> dict[str, Any]:
    """Return what a TransformerConfig needs to know about experts."""
    return {
        "num_moe_experts": size.num_experts,
        "moe_router_topk": size.top_k,
        "moe_ffn_hidden_size": size.expert_ffn_hidden_size,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": has_te(),
    }


def has_te() -> bool:
    """Say whether TransformerEngine's layers can run here."""
    return te.HAVE_TE and not cpu.installed()


def layer_spec(config: TransformerConfig) -> Any:
    """Return TransformerEngine's layers, or Megatron's own with torch's fused attention."""
    if has_te():
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True)
    from megalora.mends.attention import CoreAttention

    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    for layer in block.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = CoreAttention
    return block


def make_step(model: GPTModel, size: Size, device: str) -> Callable[[], None]:
    """Return one forward and backward pass over fixed random tokens."""
    generator = torch.Generator().manual_seed(0)
    length = size.seq_length
    tokens = torch.randint(size.vocab_size, (1, length), generator=generator).to(device)
    positions = torch.arange(length, device=device)[None]

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(tokens, positions, None, labels=tokens.roll(-1, 1)).mean().backward()

    return step


def timed(step: Callable[[], None], device: str) -> float:
    """Return the seconds of one step."""
    gc.collect()
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def row(
    name: str,
    rounds: list[dict[str, float]],
    model: GPTModel,
    step: Callable[[], None],
    size: Size,
    device: str,
) -> dict[str, Any]:
    """Return the numbers of one row; memory is counted, not sampled."""
    seconds = statistics.median(r[name] for r in rounds)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    # A gradient and two Adam moments in fp32, and an fp32 copy of 16-bit weights.
    training_state = trained * (4 + 8 + (4 if device == "cuda" else 0))
    return {
        "name": name,
        "milliseconds": seconds * 1e3,
        "tokens_per_second": size.seq_length / seconds,
        "over_frozen": statistics.median(r[name] / r["frozen"] for r in rounds),
        "over_full": statistics.median(r[name] / r["full"] for r in rounds),
        "trained_parameters": trained,
        "weights_and_training_state_mib": (weights + training_state) / 2**20,
        "saved_activations_mib": saved_bytes(step) / 2**20,
        **({"step_peak_mib": peak_bytes(step) / 2**20} if device == "cuda" else {}),
    }


def saved_bytes(step: Callable[[], None]) -> int:
    """Count the bytes that autograd keeps for backward, each storage once, without weights."""
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(seen.values())


def peak_bytes(step: Callable[[], None]) -> int:
    """Return the most that a step has allocated on the GPU beyond what was there before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def table(rows: list[dict[str, Any]], options: argparse.Namespace, device: str) -> str:
    """Return the rows as a table for people."""
    head = f"{'':8} {'ms':>8} {'tokens/s':>9} {'x frozen':>9} {'x full':>7} {'trained':>12}"
    lines = [
        f"{options.kind} model, rank {options.rank}, {device}",
        head + f" {'state MiB':>10} {'saved MiB':>10}",
    ]
    lines += [
        f"{r['name']:8} {r['milliseconds']:8.1f} {r['tokens_per_second']:9.0f} "
        f"{r['over_frozen']:9.3f} {r['over_full']:7.3f} {r['trained_parameters']:12,} "
        f"{r['weights_and_training_state_mib']:10.1f} {r['saved_activations_mib']:10.1f}"
        for r in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
