"""Overhead of LoRA over a frozen linear: forward, backward and both, paired in one run.

python benchmarks/bench_linear.py [--cases goal forms grid] [--compile] [--results FILE]

`frozen` computes y and dX of the base alone. `eager` is LoRA in plain torch, `addmm` lets the BLAS
add in place (what hand-tuned code does). `megalora` is the layer of this package, which opens its
base where it can (no dropout), `megalora, products` that op by one product after another;
`megalora, closed base` goes around it, as where a weight is split over ranks or quantized, on a GPU
also by each of its routes (MEGALORA_CUDA_ROUTE). The
others are in _peers.py. Cases: `goal`, the shapes of the stated goals; `forms`, the other forms of
a Megatron linear; `grid`, sizes, ranks and dropout. `floor` is what no LoRA can be faster than:
forward one more read of x, backward one of dY and one of x, at the speed of a large copy on this
device.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _peers import peers
from _results import append, machine, print_rows
from _timing import Variant, assert_agreement, ceilings, floor_row, measure, that_run
from torch import Tensor

from megalora.adapters.call import Call
from megalora.adapters.opened import adapt_opened
from megalora.adapters.routes import LOCAL_ROUTE
from megalora.adapters.sandwich import adapt, add_update
from megalora.ops import backend

ALPHA = 32.0


@dataclass(frozen=True)
class Case:
    """One adapted linear.

    segments: output columns of the projections that share the input, in one period; they repeat to
    fill the output, as q, k and v do by query group. form: `plain`; `main_grad`, where gradients
    are added to fp32 buffers, as Megatron's fused accumulation has it; `after`, behind a norm, as
    in TransformerEngine's LayerNormLinear, where a closed base gives its output once it has run.
    """

    num_in: int
    num_out: int
    tokens: int
    rank: int
    p: float = 0.0
    segments: tuple[int, ...] = ()
    form: str = "plain"

    def row(self) -> dict[str, Any]:
        """Return what identifies the case in results."""
        return {
            "in": self.num_in,
            "out": self.num_out,
            "tokens": self.tokens,
            "rank": self.rank,
            "p": self.p,
            "segments": "+".join(map(str, self.segments)) or "-",
            "form": self.form,
        }

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.row().items())


def grid(sizes: list[tuple[int, int]], *rest: Sequence[Any]) -> list[Case]:
    """Return the cases of all combinations of (in, out), tokens, ranks and dropouts."""
    return [Case(*size, *others) for size, *others in product(sizes, *rest)]


# Cases by name. out x in of Llama-3.1-8B's qkv, fc1 and fc2, of a half shard, and squares.
CPU_CASES = {
    "goal": [Case(2048, 2048, 1024, 16)],
    "forms": [
        Case(512, 768, 256, 16, segments=(256, 64, 64)),
        Case(512, 1536, 256, 16, segments=(768, 768)),
        Case(512, 512, 256, 1),
        Case(512, 512, 256, 16, form="main_grad"),
        Case(512, 512, 256, 16, form="after"),
    ],
    "grid": [
        *grid([(2048, 2048)], [256, 1024], [4, 16, 64], [0.0, 0.1]),
        *grid([(1024, 1536), (1024, 7168), (3584, 1024)], [1024], [16], [0.0, 0.1]),
    ],
}
CUDA_CASES = {
    "goal": grid([(4096, 4096)], [8192], [16, 32, 64], [0.0]),
    "forms": [
        Case(4096, 6144, 8192, 16, segments=(512, 128, 128)),
        Case(4096, 28672, 8192, 16, segments=(14336, 14336)),
        Case(4096, 4096, 8192, 1),
        Case(4096, 4096, 8192, 16, form="main_grad"),
        Case(4096, 4096, 8192, 16, form="after"),
        Case(4096, 4096, 8192, 16, p=0.1),
    ],
    "grid": [
        *grid([(14336, 4096), (4096, 128256)], [8192], [16, 64], [0.0]),
        *grid([(4096, 4096)], [512, 2048, 16384], [16], [0.0]),
        *grid([(4096, 4096)], [8192], [4, 128, 256], [0.0]),
        *grid([(8192, 8192), (3584, 4096), (4096, 1536)], [8192], [16, 64], [0.0]),
        *grid([(4096, 4096)], [8192], [64], [0.1]),
    ],
}
TINY_CASES = {
    "goal": [Case(64, 64, 32, 8)],
    "forms": [
        Case(32, 48, 32, 4, segments=(16, 4, 4)),
        Case(32, 96, 32, 4, segments=(48, 48)),
        Case(32, 32, 32, 1),
        Case(32, 32, 32, 4, form="main_grad"),
        Case(32, 32, 32, 4, form="after"),
        Case(32, 32, 32, 4, p=0.1),
    ],
    "grid": [Case(32, 32, 8, 2), Case(48, 64, 32, 16, p=0.1)],
}


# Who computes which product of ours, beside the library's own choice; choose.py compares them.
ROUTES = [
    f"{product}:{route}"
    for product in ("project", "update", "outer", "backward")
    for route in ("gemm", "kernels")
]


def split_projections(s: Tensor, lora_B: Tensor, case: Case) -> Tensor:
    """Return s Bᵀ in plain torch, each projection by its own part of s, interleaved by period."""
    if not case.segments:
        return F.linear(s, lora_B)
    periods = case.num_out // sum(case.segments)
    rows = lora_B.view(periods, -1, case.rank).split(list(case.segments), dim=1)
    parts = []
    for own, b in zip(s.chunk(len(rows), dim=-1), rows, strict=True):
        parts.append(F.linear(own, b.flatten(0, 1)).unflatten(-1, (periods, -1)))
    return torch.cat(parts, dim=-1).flatten(-2)


def add_to_main_grad(parameters: Sequence[Tensor]) -> None:
    """Add each gradient to the fp32 buffer of its parameter, as Megatron's DDP does in a hook."""

    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if not getattr(parameter, "grad_added_to_main_grad", False):
            parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
        parameter.grad = None

    for parameter in parameters:
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)  # type: ignore[attr-defined]
        parameter.register_post_accumulate_grad_hook(hook)


def factors(case: Case, weight: Tensor) -> list[torch.nn.Parameter]:
    """Return random lora_A [P r, in] and lora_B [out, r]; B is not zero."""
    options: Any = {"device": weight.device, "dtype": weight.dtype}
    stacked = max(1, len(case.segments)) * case.rank
    lora_A = torch.randn(stacked, case.num_in, **options) / case.num_in**0.5
    lora_B = torch.randn(case.num_out, case.rank, **options) / case.rank**0.5
    return [torch.nn.Parameter(lora_A), torch.nn.Parameter(lora_B)]


def own_variant(
    case: Case,
    weight: Tensor,
    before: Callable[[Tensor], Tensor],
    way: str = "",
) -> Variant:
    """Return this package's way: as a layer chooses it, or another.

    way: `closed base`, around the base; one of ROUTES, likewise with a product by that route; or
    `products`, in one op with the base, whose products run one after another.
    """
    lora_A, lora_B = factors(case, weight)
    if case.form == "main_grad":
        add_to_main_grad([lora_A, lora_B])
    cuda_route = way if way in ROUTES else {"products": "linear:gemm"}.get(way, "auto")
    call = Call(
        ops=backend("fused"),
        route=LOCAL_ROUTE,
        scale=ALPHA / case.rank,
        segments=list(case.segments),
        dropout=case.p,
        seed=torch.tensor([1], device=weight.device),
        a_param=lora_A if case.form == "main_grad" else None,
        b_param=lora_B if case.form == "main_grad" else None,
    )

    def forward(x: Tensor) -> Tensor:
        # Read at every call; a variant's backward runs before the next one's forward.
        os.environ["MEGALORA_CUDA_ROUTE"] = cuda_route
        x = before(x)
        if way in ("", "products") and case.p == 0.0:
            return adapt_opened(x, weight, lora_A, lora_B, call)
        if case.form == "after":
            return add_update(x, F.linear(x, weight), lora_A, lora_B, call)
        return adapt(lambda x: (F.linear(x, weight), None), x, lora_A, lora_B, call)[0]

    name = f"megalora, {way}" if way else "megalora"
    return Variant(name, forward, [lora_A, lora_B], [weight])


def variants_of(case: Case, weight: Tensor, compiled: bool) -> tuple[list[Variant], list[str]]:
    """Return the frozen base and everything that adds LoRA to it, and which peers are absent."""
    scale = ALPHA / case.rank

    def before(x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:]) if case.form == "after" else x

    def frozen(x: Tensor) -> Tensor:
        return F.linear(before(x), weight)

    trained = factors(case, weight)

    def eager(x: Tensor) -> Tensor:
        x = before(x)
        s = F.linear(F.dropout(x, case.p) if case.p else x, trained[0])
        return F.linear(x, weight) + scale * split_projections(s, trained[1], case)

    if case.form == "main_grad":
        add_to_main_grad(trained)
    others: list[Variant] = []
    absent: list[str] = []
    if case.form == "plain" and not case.segments:
        others, absent = peers((weight, *trained), scale=scale, alpha=ALPHA, p=case.p)
    if compiled:
        others.append(Variant("torch.compile", torch.compile(eager), trained, [weight]))
    ways = [*ROUTES, "products"] if weight.is_cuda else []
    if case.p == 0.0:
        ways.append("closed base")
    others += [own_variant(case, weight, before, way) for way in ways]
    own = own_variant(case, weight, before)
    found = [Variant("frozen", frozen, [], [weight]), Variant("eager", eager, trained, [weight])]
    for variant in (own, *others):
        if variant.name != "PEFT layer":  # whose weights are its own
            share_values(trained, variant.parameters)
    return [*found, *others, own], absent


def share_values(source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    """Give parameters the values of others."""
    with torch.no_grad():
        for theirs, own in zip(source, target, strict=True):
            own.copy_(theirs)


def run(
    name: str, cases: list[Case], device: torch.device, options: argparse.Namespace
) -> list[str]:
    """Measure some cases, print a table for each; return what was not measured."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = ceilings(device, dtype)
    missing: list[str] = []
    for case in cases:
        torch.manual_seed(0)
        if options.compile:
            torch.compiler.reset()
        weight = torch.randn(case.num_out, case.num_in, device=device, dtype=dtype)
        weight /= case.num_in**0.5
        x = torch.randn(case.tokens, case.num_in, device=device, dtype=dtype, requires_grad=True)
        dy = torch.randn(case.tokens, case.num_out, device=device, dtype=dtype)
        variants, absent = variants_of(case, weight, options.compile)
        variants, failed = that_run(variants, x, dy)
        missing += [*absent, *(f"{failure} ({case})" for failure in failed)]
        if case.p == 0.0:
            assert_agreement(variants, x)
        rows = measure(variants, x, dy, options.rounds, profiled=options.profile)
        rows.append(floor_row(rows[0], found, x_bytes=x.nbytes, y_bytes=dy.nbytes))
        print_rows(str(case), rows)
        for row in rows:
            append(options.results, {"bench": f"linear {name}"} | case.row() | row)
    return sorted(set(missing))


def main() -> None:
    """Measure, print the tables, write JSON lines where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(CUDA_CASES), default=list(CUDA_CASES))
    parser.add_argument("--compile", action="store_true", help="also torch.compile of eager LoRA")
    parser.add_argument("--profile", action="store_true", help="list the kernels of a GPU")
    parser.add_argument("--toy", action="store_true", help="toy sizes: do the commands work?")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--results", type=Path, help="file to add the numbers to, as JSON lines")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = CUDA_CASES if device.type == "cuda" else CPU_CASES
    append(options.results, {"machine": machine(device)})
    missing: list[str] = []
    for name in options.cases:
        cases = (TINY_CASES if options.toy else table)[name]
        missing += run(name, cases, device, options)
    print(f"\nnot measured: {'; '.join(missing) or 'nothing'}")
    append(options.results, {"bench": "linear", "missing": missing})


if __name__ == "__main__":
    main()
