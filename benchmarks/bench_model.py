"""Compare a whole Megatron model frozen, with LoRA and fully trained, side by side in one run.

python benchmarks/bench_model.py [--kind dense|moe] [--rank 16] [--json FILE]

`frozen` runs forward and backward through the frozen base (what LoRA cannot save), `LoRA` adds the
adapters and their gradients, `full` trains every weight. Each round times all three in turn; the
table has medians of the rounds and medians of the ratios inside a round. The article's yardstick is
(2 N^2 + 6 N R) / (3 N^2) of the floating-point operations of full fine-tuning.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _timing import machine, write_json

from megalora import cpu

if not torch.cuda.is_available():
    cpu.install()

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.extensions import transformer_engine as te
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megalora import LoRAConfig, apply_lora

KINDS = ("frozen", "LoRA", "full")
SIZES = {
    "cpu": {"hidden_size": 512, "num_layers": 4, "ffn_hidden_size": 1536, "seq_length": 256},
    "cuda": {"hidden_size": 4096, "num_layers": 8, "ffn_hidden_size": 14336, "seq_length": 4096},
}
MOE = {"num_moe_experts": 16, "moe_router_topk": 4, "moe_token_dispatcher_type": "alltoall"}
VOCAB_SIZE = 4096


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=("dense", "moe"), default="dense")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    options = parser.parse_args()
    start_one_process()
    device = "cuda" if torch.cuda.device_count() and not cpu.installed() else "cpu"
    sizes = SIZES[device]
    models = {name: build(name, options, sizes, device) for name in KINDS}
    steps = {name: make_step(model, sizes, device) for name, model in models.items()}
    for step in steps.values():
        step()
    rounds = [
        {name: timed(step, device) for name, step in steps.items()} for _ in range(options.rounds)
    ]
    rows = [row(name, rounds, models[name], steps[name], sizes, device) for name in KINDS]
    print(table(rows, options, device))
    if options.json:
        kind = {"kind": options.kind, "rank": options.rank}
        write_json(options.json, {"machine": machine(torch.device(device)), **kind, "rows": rows})
    dist.destroy_process_group()


def start_one_process() -> None:
    """Set Megatron's process groups up for this one process."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1234)


def build(name: str, options: argparse.Namespace, sizes: dict[str, int], device: str) -> GPTModel:
    """Build the model of one row of the table."""
    hidden = sizes["hidden_size"]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    moe: dict[str, Any] = {**MOE, "moe_ffn_hidden_size": hidden // 2}
    config = TransformerConfig(
        num_layers=sizes["num_layers"],
        hidden_size=hidden,
        ffn_hidden_size=sizes["ffn_hidden_size"],
        num_attention_heads=hidden // 64,
        num_query_groups=hidden // 256,
        kv_channels=64,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        params_dtype=dtype,
        bf16=device == "cuda",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        **(moe if options.kind == "moe" else {}),
    )
    model = GPTModel(
        config,
        layer_spec(config),
        vocab_size=VOCAB_SIZE,
        max_sequence_length=sizes["seq_length"],
        position_embedding_type="rope",
    )
    if name == "LoRA":
        apply_lora([model], LoRAConfig(rank=options.rank))
    if name == "frozen":
        model.requires_grad_(False)
        model.embedding.register_forward_hook(lambda _m, _i, output: output.requires_grad_(True))
    return model


def layer_spec(config: TransformerConfig) -> Any:
    """Return TransformerEngine's layers, or Megatron's own with torch's fused attention."""
    if te.HAVE_TE and not cpu.installed():
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True)
    from megalora.cpu.attention import CpuCoreAttention

    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    for layer in block.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = CpuCoreAttention
    return block


def make_step(model: GPTModel, sizes: dict[str, int], device: str) -> Callable[[], None]:
    """Return one forward and backward pass over fixed random tokens."""
    generator = torch.Generator().manual_seed(0)
    length = sizes["seq_length"]
    tokens = torch.randint(VOCAB_SIZE, (1, length), generator=generator).to(device)
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
    sizes: dict[str, int],
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
        "tokens_per_second": sizes["seq_length"] / seconds,
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
