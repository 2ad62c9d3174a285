"""Overhead of LoRA over a frozen gated MLP, linear by linear or by one op, paired in one run.

python benchmarks/bench_mlp.py [--rounds 15] [--results FILE]

`frozen` is Megatron's SwiGLU between the products with two frozen weights, `eager` has LoRA in
plain torch at both. `megalora, gate:gemm` opens one linear after the other, `megalora,
gate:kernels` the whole MLP: the low-rank terms are added, and the next are read off, in one pass
between the products (docs/ops.md). benchmarks/choose.py writes which of them a GPU takes by itself.
`floor` as in bench_linear.py, of the MLP's input and output.
"""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _results import append, machine, print_rows
from _timing import Variant, assert_agreement, ceilings, floor_row, measure
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from torch import Tensor

from megalora.adapters.call import Call
from megalora.adapters.gated import OpenedGatedMLP
from megalora.adapters.node import apply
from megalora.adapters.opened import adapt_opened
from megalora.adapters.routes import LOCAL_ROUTE
from megalora.ops import backend

ALPHA = 32.0
ROUTES = ("gate:gemm", "gate:kernels")


@dataclass(frozen=True)
class Case:
    """One gated MLP, gate and up with an A each."""

    hidden: int
    ffn: int
    tokens: int
    rank: int

    def row(self) -> dict[str, Any]:
        """Return what identifies the case in results, in the words of bench_linear.py."""
        return {
            "in": self.hidden,
            "out": self.ffn,
            "tokens": self.tokens,
            "rank": self.rank,
            "p": 0.0,
            "segments": f"{self.ffn}+{self.ffn}",
            "form": "plain",
        }

    def __str__(self) -> str:
        return f"hidden {self.hidden}, ffn {self.ffn}, tokens {self.tokens}, rank {self.rank}"


# A dense layer and an expert.
CPU_CASES = [Case(512, 1408, 1024, 16), Case(512, 768, 256, 1)]
# MLPs of Llama-3.1-8B, and an expert of Qwen3-30B-A3B with many tokens.
CUDA_CASES = [*(Case(4096, 14336, 8192, rank) for rank in (1, 16, 32)), Case(2048, 768, 2048, 4)]
TOY_CASES = [Case(64, 48, 32, 4)]


@dataclass(frozen=True)
class Weights:
    """The base weights and the factors of both linears; B is not zero."""

    w1: Tensor
    w2: Tensor
    a1: Tensor
    b1: Tensor
    a2: Tensor
    b2: Tensor

    @property
    def factors(self) -> list[Tensor]:
        """Return what is trained."""
        return [self.a1, self.b1, self.a2, self.b2]


def draw(case: Case, device: torch.device, dtype: torch.dtype) -> Weights:
    """Return random weights whose products keep the size of what they read."""

    def normal(*shape: int, trained: bool = False) -> Tensor:
        values = torch.randn(shape, device=device, dtype=dtype) / shape[-1] ** 0.5
        return values.requires_grad_(trained)

    return Weights(
        normal(2 * case.ffn, case.hidden),
        normal(case.hidden, case.ffn),
        normal(2 * case.rank, case.hidden, trained=True),
        normal(2 * case.ffn, case.rank, trained=True),
        normal(case.rank, case.ffn, trained=True),
        normal(case.hidden, case.rank, trained=True),
    )


def variants_of(case: Case, w: Weights) -> list[Variant]:
    """Return the frozen MLP and what adds LoRA to it."""
    scale, halves = ALPHA / case.rank, [case.ffn, case.ffn]
    ops = backend("fused")
    one = Call(ops=ops, route=LOCAL_ROUTE, scale=scale, segments=halves)
    two = Call(ops=ops, route=LOCAL_ROUTE, scale=scale, segments=[])

    def swiglu(y: Tensor) -> Tensor:
        made = bias_swiglu_impl(y, None)
        assert isinstance(made, Tensor)
        return made

    def eager(x: Tensor) -> Tensor:
        parts = zip(F.linear(x, w.a1).chunk(2, -1), w.b1.chunk(2), strict=True)
        term = torch.cat([F.linear(s, b) for s, b in parts], dim=-1)
        a = swiglu(F.linear(x, w.w1) + scale * term)
        return F.linear(a, w.w2) + scale * F.linear(F.linear(a, w.a2), w.b2)

    def by_linears(x: Tensor) -> Tensor:
        os.environ["MEGALORA_CUDA_ROUTE"] = ROUTES[0]  # read at every call
        y = adapt_opened(x, w.w1, w.a1, w.b1, one)
        return adapt_opened(swiglu(y), w.w2, w.a2, w.b2, two)

    def by_one_op(x: Tensor) -> Tensor:
        os.environ["MEGALORA_CUDA_ROUTE"] = ROUTES[1]
        return apply(OpenedGatedMLP, x, w.a1, w.b1, w.a2, w.b2, None, w.w1, w.w2, one, two)

    frozen = [w.w1, w.w2]
    return [
        Variant("frozen", lambda x: F.linear(swiglu(F.linear(x, w.w1)), w.w2), [], frozen),
        Variant("eager", eager, w.factors, frozen),
        Variant(f"megalora, {ROUTES[0]}", by_linears, w.factors, frozen),
        Variant(f"megalora, {ROUTES[1]}", by_one_op, w.factors, frozen),
    ]


def main() -> None:
    """Measure, print the tables, write JSON lines where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="toy sizes: does the command work?")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--results", type=Path, help="file to add the numbers to, as JSON lines")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    append(options.results, {"machine": machine(device)})
    found = ceilings(device, dtype)
    for case in TOY_CASES if options.toy else CUDA_CASES if device.type == "cuda" else CPU_CASES:
        torch.manual_seed(0)
        x = torch.randn(case.tokens, case.hidden, device=device, dtype=dtype, requires_grad=True)
        dz = torch.randn_like(x)
        variants = variants_of(case, draw(case, device, dtype))
        assert_agreement(variants, x)
        rows = measure(variants, x, dz, options.rounds)
        rows.append(floor_row(rows[0], found, x_bytes=x.nbytes, y_bytes=dz.nbytes))
        print_rows(str(case), rows)
        for row in rows:
            append(options.results, {"bench": "mlp"} | case.row() | row)


if __name__ == "__main__":
    main()
