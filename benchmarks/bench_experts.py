"""Overhead of per-expert LoRA over frozen experts, paired in one run.

python benchmarks/bench_experts.py [--ranks 4] [--rounds 15] [--results FILE]

Shapes are fc1 (gate and up, each with its own A) and fc2 of Qwen3-30B-A3B, 128 experts, top 8,
with skewed routing; on a CPU the sizes are divided by 4 and fewer tokens are routed. `frozen` is
the base alone. `eager` is LoRA by a Python loop over the experts, `grouped_mm` by torch's grouped
GEMM with ranks padded to what it can take (the way of the peers, in our code), `megalora` ours as a
layer chooses it: base and adapters in one launch where there is a kernel for that, else around the
base, as `megalora, closed base` is everywhere; `floor` as in bench_linear.py.
"""

import argparse
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from _results import append, machine, print_rows
from _timing import Ceilings, Variant, assert_agreement, ceilings, floor_row, measure
from torch import Tensor

from megalora.adapters.call import Call
from megalora.adapters.opened import adapt_opened_experts
from megalora.adapters.routes import LOCAL_ROUTE
from megalora.adapters.sandwich import adapt
from megalora.ops import backend

NUM_EXPERTS = 128
RANKS = [1, 4, 16, 32]


@dataclass(frozen=True)
class Shape:
    """One expert linear: `projections` Hugging Face matrices share its input."""

    name: str
    num_in: int
    num_out: int
    projections: int

    @property
    def segments(self) -> list[int]:
        """Return the sizes of the projections' column blocks, none where there is one."""
        if self.projections == 1:
            return []
        return [self.num_out // self.projections] * self.projections


def shapes(divisor: int) -> list[Shape]:
    """Return fc1 and fc2 of Qwen3-30B-A3B, each size divided."""
    hidden, ffn = 2048 // divisor, 768 // divisor
    return [Shape("fc1", hidden, 2 * ffn, 2), Shape("fc2", ffn, hidden, 1)]


def route(num_rows: int, device: torch.device) -> tuple[list[int], Tensor]:
    """Return skewed token counts of the experts and their cumulative sum on the device."""
    generator = torch.Generator().manual_seed(0)
    popularity = torch.rand(NUM_EXPERTS, generator=generator) ** 3
    chosen = torch.multinomial(popularity, num_rows, replacement=True, generator=generator)
    counts = torch.bincount(chosen, minlength=NUM_EXPERTS)
    return counts.tolist(), counts.cumsum(0).to(device)


def loop(x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """Multiply each expert's tokens by its own weight."""
    return torch.cat([F.linear(t, w) for t, w in zip(x.split(counts), weight, strict=True)])


def block_diagonal(shape: Shape, lora_B: Tensor) -> Tensor:
    """Return B as [E, out, projections * r], which multiplies the stacked s in one GEMM."""
    if shape.projections == 1:
        return lora_B
    parts = lora_B.chunk(shape.projections, dim=1)
    rank = lora_B.shape[-1]
    last = shape.projections - 1
    return torch.cat(
        [F.pad(part, (i * rank, (last - i) * rank)) for i, part in enumerate(parts)], dim=1
    )


def grouped_base(x: Tensor, weight: Tensor, counts: list[int], ends: Tensor) -> Tensor:
    """Run the frozen experts as Megatron would: one grouped GEMM on a GPU, a loop on a CPU."""
    if x.device.type == "cuda":
        return F.grouped_mm(x, weight.mT, offs=ends.int())
    return loop(x, weight, counts)


def variants_of(
    shape: Shape, weight: Tensor, rank: int, counts: list[int], ends: Tensor
) -> list[Variant]:
    """Return the frozen experts and everything that adds LoRA to them."""
    options = {"device": weight.device, "dtype": weight.dtype}
    stacked = shape.projections * rank
    lora_A = torch.randn(NUM_EXPERTS, stacked, shape.num_in, **options) / shape.num_in**0.5
    lora_B = torch.randn(NUM_EXPERTS, shape.num_out, rank, **options) / rank**0.5
    trained = [lora_A.requires_grad_(), lora_B.requires_grad_()]
    ops, scale = backend("fused"), 1.0

    def base(x: Tensor) -> Tensor:
        return grouped_base(x, weight, counts, ends)

    def eager(x: Tensor) -> Tensor:
        parts = []
        for tokens, a, b in zip(x.split(counts), lora_A, lora_B, strict=True):
            s = F.linear(tokens, a).chunk(shape.projections, dim=1)
            columns = b.chunk(shape.projections, dim=0)
            parts.append(torch.cat([F.linear(*p) for p in zip(s, columns, strict=True)], dim=1))
        return base(x) + scale * torch.cat(parts)

    def grouped_mm(x: Tensor) -> Tensor:
        # grouped_mm wants strides of whole 16 bytes: pad the rank as the peers do.
        pad = -stacked % (16 // x.element_size())
        wide_b = F.pad(block_diagonal(shape, lora_B), (0, pad))
        s = F.grouped_mm(x, F.pad(lora_A, (0, 0, 0, pad)).mT, offs=ends.int())
        return base(x) + scale * F.grouped_mm(s, wide_b.mT, offs=ends.int())

    def call_with(ends: Tensor | None) -> Call:
        return Call(
            ops=ops,
            route=LOCAL_ROUTE,
            scale=scale,
            segments=shape.segments,
            a_offsets=ends,
            b_offsets=ends,
        )

    def closed(x: Tensor) -> Tensor:
        return adapt(lambda x: (base(x), None), x, lora_A, lora_B, call_with(ends))[0]

    def opened(x: Tensor) -> Tensor:
        return adapt_opened_experts(x, weights, lora_A, lora_B, ends, call_with(None))

    weights = list(weight.unbind())
    found = [
        Variant("frozen", base, [], [weight]),
        Variant("eager", eager, trained, [weight]),
        Variant("grouped_mm", grouped_mm, trained, [weight]),
        Variant("megalora, closed base", closed, trained, [weight]),
    ]
    fused = ops.experts_linear_is_fused(weights[0], NUM_EXPERTS, stacked)
    return [*found, Variant("megalora", opened if fused else closed, trained, [weight])]


def main() -> None:
    """Measure, print the tables, write JSON lines where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--profile", action="store_true", help="list the kernels of a GPU")
    parser.add_argument("--toy", action="store_true", help="toy sizes: does the command work?")
    parser.add_argument("--results", type=Path, help="file to add the numbers to, as JSON lines")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    append(options.results, {"machine": machine(device)})
    divisor, tokens = (1, 4096) if device.type == "cuda" else (4, 512)
    if options.toy:
        divisor, tokens = 32, 32
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = ceilings(device, dtype)
    for shape, rank in product(shapes(divisor), options.ranks):
        run(shape, rank, 8 * tokens, found, device, options)


def run(
    shape: Shape,
    rank: int,
    num_rows: int,
    found: Ceilings,
    device: torch.device,
    options: argparse.Namespace,
) -> None:
    """Measure one shape at one rank, print a table, add the rows to the results."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    counts, ends = route(num_rows, device)
    weight = torch.randn(NUM_EXPERTS, shape.num_out, shape.num_in, device=device, dtype=dtype)
    weight /= shape.num_in**0.5
    x = torch.randn(num_rows, shape.num_in, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(num_rows, shape.num_out, device=device, dtype=dtype)
    variants = variants_of(shape, weight, rank, counts, ends)
    assert_agreement(variants, x)
    rows = measure(variants, x, dy, options.rounds, profiled=options.profile)
    least = floor_row(rows[0], found, x_bytes=x.nbytes, y_bytes=dy.nbytes)
    rows.append(least)
    title = f"{shape.name} {shape.num_in} -> {shape.num_out}, {num_rows} rows, rank {rank}"
    print_rows(f"{title}, {NUM_EXPERTS} experts", rows)
    for row in rows:
        append(
            options.results,
            {"bench": "experts", "shape": shape.name, "rank": rank, "rows": num_rows} | row,
        )


if __name__ == "__main__":
    main()
