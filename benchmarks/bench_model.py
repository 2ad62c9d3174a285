"""Compare a whole training step of a Megatron model: frozen, with LoRA and fully trained.

python benchmarks/bench_model.py [--kind dense|moe|qwen3-30b-a3b] [--rank 16] [--results FILE]

`LoRA` and `full` train as Megatron does: its DistributedDataParallel with fp32 main_grad and fused
gradient accumulation, its Adam with the distributed optimizer (on a GPU over bf16 weights), the
gradient norm clipped to 1. A step zeroes the gradients, goes forward and backward, and updates;
forward and backward, and the update with its clipping, are the spans of Megatron's own timers.
`frozen` runs forward and backward through the frozen base (what LoRA cannot save) and updates
nothing. Each round times all three in turn, where they fit on the device together; the table has
medians of the rounds and medians of the ratios inside a round. The article's yardstick is
(2 N^2 + 6 N R) / (3 N^2) of the floating-point operations of full fine-tuning.
"""

import argparse
import dataclasses
import gc
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from _results import Row, append, machine
from _timing import elapsed, mark, synchronize

from megalora import cpu, mends

if not cpu.install_if_wanted(sys.argv):
    mends.install()

import torch.distributed as dist
from _models import SIZES, SMALL, TOY, Size, build, has_te
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from megalora import LoRAConfig, apply_lora

KINDS = ("frozen", "LoRA", "full")
PHASES = ("zero_ms", "forward_backward_ms", "optimizer_ms")
Times = dict[str, float]
# bf16 weights; to train them also a gradient, master weights and two moments of Adam in fp32.
FROZEN_BYTES, TRAINED_BYTES = 2, 18
# The most that a step allocates for a token, a third more than was seen: the output layer's logits,
# and what each layer of Qwen3-30B-A3B keeps.
OUTPUT_BYTES, LAYER_BYTES = int(1.4 * 2**20), int(0.2 * 2**20)


class Subject:
    """A model, and what one step with it does."""

    def __init__(self, name: str, rank: int, size: Size, device: str) -> None:
        self.name, self.size, self.device = name, size, torch.device(device)
        model: Any = build(size, device)
        if name == "LoRA":
            apply_lora([model], LoRAConfig(rank=rank))
        if name == "frozen":
            model.requires_grad_(False)
            model.embedding.register_forward_hook(lambda _m, _i, out: out.requires_grad_(True))
        self.config = model.config
        self.model = Float16Module(self.config, model) if self.config.bf16 else model
        self.optimizer: Any = None
        if name != "frozen":
            self._train()
        generator = torch.Generator().manual_seed(0)
        shape = (size.micro_batch_size, size.seq_length)
        self.tokens = torch.randint(size.vocab_size, shape, generator=generator).to(device)
        self.positions = torch.arange(size.seq_length, device=device).expand(shape)

    def _train(self) -> None:
        """Wrap the model and make its optimizer, as Megatron does."""
        wrapping = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True
        )
        self.model = DistributedDataParallel(self.config, wrapping, self.model)
        adam = OptimizerConfig(
            optimizer="adam",
            lr=1e-5,
            clip_grad=1.0,
            bf16=self.config.bf16,
            params_dtype=self.config.params_dtype,
            use_distributed_optimizer=True,
        )
        self.optimizer = get_megatron_optimizer(adam, [self.model])
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.grad_scale_func = self.optimizer.scale_loss

    def step(self) -> Times:
        """Do a step on the same tokens as every other; return the milliseconds of its phases."""
        gc.collect()
        synchronize(self.device)
        marks = [mark(self.device)]
        for act in (self._zero, self._forward_backward, self._update):
            act()
            marks.append(mark(self.device))
        phases = dict(zip(PHASES, elapsed(marks), strict=True))
        return phases | {"step_ms": sum(phases.values())}

    def _zero(self) -> None:
        if self.optimizer is not None:
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()

    def _forward_backward(self) -> None:
        get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=None,
            model=self.model,
            num_microbatches=1,
            seq_length=self.size.seq_length,
            micro_batch_size=self.size.micro_batch_size,
            forward_only=False,
        )

    def _forward(self, _iterator: None, model: Any) -> tuple[torch.Tensor, Any]:
        labels = self.tokens.roll(-1, 1)
        return model(self.tokens, self.positions, None, labels=labels), _loss

    def _update(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()

    def memory(self) -> Row:
        """Return what the model and a step of it need; counted, but for a GPU's peak."""
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        # A gradient and two Adam moments in fp32, and an fp32 copy of 16-bit weights.
        training_state = trained * (4 + 8 + (4 if self.config.bf16 else 0))
        found = {
            "trained_parameters": trained,
            "weights_and_training_state_mib": (weights + training_state) / 2**20,
            "saved_activations_mib": self._saved_bytes() / 2**20,
        }
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            found["step_peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        return found

    def _saved_bytes(self) -> int:
        """Count the bytes that autograd keeps for backward, each storage once, without weights."""
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                storage = tensor.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.step()
        return sum(seen.values())


def _loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Row]:
    """Return the sum of the token losses and their number, as Megatron's loss functions do."""
    count = torch.tensor(output.numel(), dtype=torch.int, device=output.device)
    return output.float().sum(), count, {}


def main() -> None:
    """Measure, print the table, write JSON lines where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kind", choices=tuple(SIZES), default="dense")
    parser.add_argument("--layers", type=int, help="instead of the kind's own number")
    parser.add_argument("--seq-length", type=int, help="instead of the kind's own length")
    parser.add_argument("--micro-batch-size", type=int, default=1, help="sequences of a step")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--toy", action="store_true", help="toy sizes: does the command work?")
    parser.add_argument("--results", type=Path, help="file to add the numbers to, as JSON lines")
    options = parser.parse_args()
    start_one_process()
    device = "cuda" if torch.cuda.device_count() and not cpu.installed() else "cpu"
    size = size_of(options, device)
    append(options.results, {"machine": machine(torch.device(device)), "TE": has_te()})
    which = {
        "bench": "model",
        "kind": options.kind,
        "layers": size.num_layers,
        "rank": options.rank,
        "tokens": size.num_tokens,
    }
    memory = torch.cuda.mem_get_info()[0] if device == "cuda" else None
    groups = that_fit(size, memory)
    if missing := set(KINDS).difference(*groups):
        needed = size.num_weights * TRAINED_BYTES / 2**30
        lacking = f"{', '.join(missing)} of {size.num_layers} layers: {needed:.0f} GiB"
        append(options.results, which | {"missing": [f"{options.kind}, {lacking}"]})
    rows = rows_of(list(measured(groups, options, size, device)), size.num_tokens)
    print(table(rows, options, device))
    for row in rows:
        append(options.results, which | row)
    dist.destroy_process_group()


def start_one_process() -> None:
    """Set Megatron's process groups up for this one process."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1234)


def size_of(options: argparse.Namespace, device: str) -> Size:
    """Return the size that was asked for: a small one on a CPU."""
    sizes = TOY if options.toy else SMALL if device == "cpu" else SIZES
    size = sizes[options.kind]
    return dataclasses.replace(
        size,
        num_layers=options.layers or size.num_layers,
        seq_length=options.seq_length or size.seq_length,
        micro_batch_size=options.micro_batch_size,
    )


def that_fit(size: Size, memory: int | None) -> list[tuple[str, ...]]:
    """Return which models to time in turn, one group after another; without those that must be.

    memory: free bytes of the GPU; None where they do not matter. For 8 layers of Qwen3-30B-A3B,
    5.6e9 weights, `full` takes 94 GiB and each of the others 10.4, so that all three and a step of
    4,096 tokens (8 GiB at its peak) fit on an H200's 140 GiB, and `full` alone does not on an H100.
    All 48 layers, 57 GiB, fit on an H200 frozen or with LoRA, one after the other.
    """
    step = size.num_tokens * (OUTPUT_BYTES + size.num_layers * LAYER_BYTES)
    frozen = size.num_weights * FROZEN_BYTES
    full = size.num_weights * TRAINED_BYTES
    if memory is None or full + 2 * frozen + step <= memory:
        return [KINDS]
    groups = [KINDS[2:]] if full + step <= memory else []
    if 2 * frozen + step <= memory:
        return [KINDS[:2], *groups]
    return [KINDS[:1], KINDS[1:2]] if frozen + step <= memory else []


def measured(
    groups: Sequence[Sequence[str]], options: argparse.Namespace, size: Size, device: str
) -> Iterator[tuple[str, list[Times], Row]]:
    """Yield name, times of all rounds and memory of each model; free a group before the next."""
    for group in groups:
        subjects = [Subject(name, options.rank, size, device) for name in group]
        for subject in subjects:
            # Adam makes its moments in the first step.
            subject.step()
            subject.step()
        rounds = [[subject.step() for subject in subjects] for _ in range(options.rounds)]
        for subject, times in zip(subjects, zip(*rounds, strict=True), strict=True):
            yield subject.name, list(times), subject.memory() | {"in_turn": " ".join(group)}
        del subjects, subject
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def rows_of(found: Sequence[tuple[str, list[Times], Row]], num_tokens: int) -> list[Row]:
    """Return one row of results for each model: medians, and medians of ratios inside a round."""
    times = {name: own for name, own, _memory in found}

    def over(name: str, other: str, phase: str) -> Row:
        if other not in times:
            return {}
        pairs = zip(times[name], times[other], strict=True)
        ratio = statistics.median(own[phase] / theirs[phase] for own, theirs in pairs)
        prefix = "step_" if phase == "step_ms" else ""
        return {f"{prefix}over_{other}": ratio}

    return [
        {"name": name}
        | {phase: statistics.median(t[phase] for t in own) for phase in own[0]}
        | {"tokens_per_second": 1e3 * num_tokens / statistics.median(t["step_ms"] for t in own)}
        | over(name, "frozen", "forward_backward_ms")
        | over(name, "full", "forward_backward_ms")
        | over(name, "full", "step_ms")
        | memory
        for name, own, memory in found
    ]


def table(rows: Sequence[Row], options: argparse.Namespace, device: str) -> str:
    """Return the rows as a table for people: the ratios are of forward and backward, then steps."""
    head = f"{'ms:':8} {'fwd+bwd':>8} {'x frozen':>9} {'x full':>7} {'update':>8}"
    lines = [
        f"{options.kind} model, rank {options.rank}, {device}",
        head + f" {'step':>8} {'x full':>7} {'trained':>13} {'state MiB':>10} {'saved MiB':>10}",
    ]
    lines += [
        f"{r['name']:8} {r['forward_backward_ms']:8.1f} {r['over_frozen']:9.3f} "
        f"{r.get('over_full', float('nan')):7.3f} {r['optimizer_ms']:8.1f} {r['step_ms']:8.1f} "
        f"{r.get('step_over_full', float('nan')):7.3f} {r['trained_parameters']:13,} "
        f"{r['weights_and_training_state_mib']:10.1f} {r['saved_activations_mib']:10.1f}"
        for r in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
