"""Overhead of LoRA over a frozen linear: forward, backward and both, paired in one run.

python benchmarks/bench_linear.py [--goal] [--compile] [--rounds 15] [--json FILE]

`frozen` computes y and dX of the base alone. `eager` is LoRA in plain torch, `addmm` lets the BLAS
add in place (what hand-tuned code does), `megalora` is the layer of this package, on a GPU also
with two reads of dY where its kernel makes do with one; the others are in _peers.py. `--goal`
measures only the shapes of the stated goals.
"""

import argparse
import functools
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _peers import peers
from _timing import (
    Variant,
    assert_agreement,
    machine,
    measure,
    print_rows,
    that_run,
    write_json,
)
from torch import Tensor

from megalora.contract import LOCAL_ROUTE
from megalora.layers import Journey, adapt
from megalora.ops import backend

ALPHA = 32.0
CPU_GOAL = [((2048, 2048), 1024, 16, 0.0)]
CUDA_GOAL = [((4096, 4096), 8192, rank, 0.0) for rank in (16, 32, 64)]
# (in, out), tokens, rank, dropout; out x in of Llama-3.1-8B's qkv, fc1 and fc2, and a half shard.
CPU_GRID = [
    *product([(2048, 2048)], [256, 1024], [4, 16, 64], [0.0, 0.1]),
    *product([(1024, 1536), (1024, 7168), (3584, 1024)], [1024], [16], [0.0, 0.1]),
]
CUDA_GRID = [
    *product([(4096, 4096)], [512, 2048, 8192, 16384], [4, 16, 64, 256], [0.0, 0.1]),
    *product([(8192, 8192), (4096, 6144), (4096, 28672), (14336, 4096)], [8192], [16, 64], [0.0]),
    *product([(4096, 1536), (3584, 4096)], [8192], [16, 64], [0.0, 0.1]),
]


class TwoReads:
    """Our ops, but for the gradients of B's side, made in two reads of dY as peers do."""

    def __getattr__(self, name: str) -> Any:
        """Return one of our ops."""
        return getattr(backend("fused"), name)

    def expand_backward(
        self, dy: Tensor, s: Tensor, lora_B: Tensor, *how: Any
    ) -> tuple[Tensor, Tensor]:
        """Return ds and dB."""
        return self.expand_dgrad(dy, lora_B, *how), self.expand_wgrad(dy, s, lora_B, *how)


def variants_of(
    weight: Tensor, rank: int, p: float, compiled: bool
) -> tuple[list[Variant], list[str]]:
    """Return the frozen base and everything that adds LoRA to it, and which peers are absent."""
    num_out, num_in = weight.shape
    options = {"device": weight.device, "dtype": weight.dtype}
    lora_A = (torch.randn(rank, num_in, **options) / num_in**0.5).requires_grad_()
    lora_B = (torch.randn(num_out, rank, **options) / rank**0.5).requires_grad_()
    scale = ALPHA / rank
    seed = torch.tensor([1], device=weight.device)
    fused = backend("fused")

    def frozen(x: Tensor) -> Tensor:
        return F.linear(x, weight)

    def eager(x: Tensor) -> Tensor:
        dropped = F.dropout(x, p) if p else x
        return F.linear(x, weight) + scale * F.linear(F.linear(dropped, lora_A), lora_B)

    def megalora(x: Tensor, ops: Any = fused) -> Tensor:
        journey = Journey(
            ops=ops, route=LOCAL_ROUTE, scale=scale, segments=[], dropout=p, seed=seed
        )
        return adapt(lambda x: (F.linear(x, weight), None), x, lora_A, lora_B, journey)[0]

    trained = [lora_A, lora_B]
    others, absent = peers((weight, lora_A, lora_B), scale=scale, alpha=ALPHA, p=p)
    if compiled:
        others.append(Variant("torch.compile", torch.compile(eager), trained, [weight]))
    if weight.is_cuda:
        two_reads = functools.partial(megalora, ops=TwoReads())
        others.append(Variant("megalora, 2 reads", two_reads, trained, [weight]))
    own = Variant("megalora", megalora, trained, [weight])
    frozen_and_eager = [
        Variant("frozen", frozen, [], [weight]),
        Variant("eager", eager, trained, [weight]),
    ]
    return [*frozen_and_eager, *others, own], absent


def run(
    grid: list, device: torch.device, dtype: torch.dtype, rounds: int, compiled: bool
) -> tuple[list[dict], list[str]]:
    """Measure a grid of shapes, print a table for each; return rows and what was not measured."""
    rows, missing = [], []
    for (num_in, num_out), tokens, rank, p in grid:
        torch.manual_seed(0)
        torch.compiler.reset()
        weight = torch.randn(num_out, num_in, device=device, dtype=dtype) / num_in**0.5
        x = torch.randn(tokens, num_in, device=device, dtype=dtype, requires_grad=True)
        dy = torch.randn(tokens, num_out, device=device, dtype=dtype)
        variants, absent = variants_of(weight, rank, p, compiled)
        title = f"{num_in} -> {num_out}, {tokens} tokens, rank {rank}, dropout {p}"
        variants, failed = that_run(variants, x, dy)
        missing += [*absent, *(f"{failure} ({title})" for failure in failed)]
        if p == 0.0:
            assert_agreement(variants, x)
        shape = {"in": num_in, "out": num_out, "tokens": tokens, "rank": rank, "p": p}
        found = measure(variants, x, dy, rounds)
        print_rows(title, found)
        rows += [shape | row for row in found]
    return rows, sorted(set(missing))


def main() -> None:
    """Measure, print the tables, write JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--goal", action="store_true", help="only the shapes of the stated goals")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of eager LoRA")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    goal, whole = (CUDA_GOAL, CUDA_GRID) if on_gpu else (CPU_GOAL, CPU_GRID)
    grid = goal if options.goal else whole
    rows, missing = run(grid, device, dtype, options.rounds, options.compile)
    print(f"\nnot measured: {'; '.join(missing) or 'nothing'}")
    if options.json:
        content = {"machine": machine(device), "dtype": str(dtype), "missing": missing}
        write_json(options.json, {**content, "rows": rows})


if __name__ == "__main__":
    main()
