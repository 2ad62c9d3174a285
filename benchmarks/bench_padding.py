"""What it costs to leave Megatron's padding of the vocabulary out of the softmax.

python benchmarks/bench_padding.py [--rounds 15] [--results FILE]

Output layer and cross entropy, forward and backward, of Llama 3's vocabulary (128,256 rows) as
Megatron pads it at TP 8 (129,024), on one rank: as Megatron computes them, with the padding filled
by autograd, and as megalora does it. Medians of paired rounds, all in turn; one thread on a CPU.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _results import append, machine, print_rows
from _timing import Variant, measure

from megalora import cpu, mends

if not cpu.install_if_wanted(sys.argv):
    mends.install()

import torch.distributed as dist
from _models import Size, build
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from megalora.adapters.padding import leave_out_padding

ROWS, PADDED = 128_256, 129_024
TOKENS, WIDTH = 128, 256


def variants(device: str) -> list[Variant]:
    """Return the ways to the losses [s] of x [s, 1, h], with one frozen weight."""
    size = Size(WIDTH, WIDTH, 1, 4, 4, 64, TOKENS, vocab_size=PADDED)
    models = [build(size, device).requires_grad_(False) for _ in range(3)]
    plain, by_autograd, ours = models
    for model in models[1:]:
        model.output_layer.weight = plain.output_layer.weight
    leave_out_padding(ours, ROWS)
    by_autograd.output_layer.register_forward_hook(_fill)
    labels = torch.randint(ROWS, (1, TOKENS), device=device)
    names = ("Megatron", "filled by autograd", "megalora")
    weight = plain.output_layer.weight
    return [
        Variant(name, _losses(model, labels), (), [weight])
        for name, model in zip(names, models, strict=True)
    ]


def _fill(_layer: torch.nn.Module, _inputs: object, output: tuple) -> None:
    output[0][..., ROWS:].fill_(torch.finfo(output[0].dtype).min)


def _losses(model: Any, labels: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: model.compute_language_model_loss(labels, model.output_layer(x)[0])[0]


def main() -> None:
    """Measure, print the table, write JSON lines where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--results", type=Path, help="file to add the numbers to, as JSON lines")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = "cpu" if cpu.installed() else "cuda"
    append(options.results, {"machine": machine(torch.device(device))})
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    ways = variants(device)
    dtype = ways[0].frozen[0].dtype
    x = torch.randn(TOKENS, 1, WIDTH, device=device, dtype=dtype, requires_grad=True)
    dy = torch.full((TOKENS,), 1 / TOKENS, device=device)
    rows = measure(ways, x, dy, options.rounds)
    print_rows(f"{TOKENS} tokens, width {WIDTH}, {ROWS} rows padded to {PADDED}, {dtype}", rows)
    for row in rows:
        append(options.results, {"bench": "padding"} | row)


if __name__ == "__main__":
    main()
