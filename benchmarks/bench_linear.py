"""Overhead of LoRA over a frozen linear: forward, backward and both, paired in one run.

python benchmarks/bench_linear.py [--goal] [--compile] [--rounds 15] [--json FILE]

`frozen` computes y and dX of the base alone. `eager` is LoRA in plain torch, `beta=1 addmm` our own
autograd function that lets the BLAS add in place (what hand-tuned peers do), `PEFT layer` the real
one, `megalora` the layer of this package. `--goal` measures only the shape of the stated goal.
"""

import argparse
import importlib.util
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from _timing import Variant, assert_agreement, machine, measure, print_rows, write_json
from torch import Tensor, nn

from megalora.layers import LOCAL_ROUTE, Journey, adapt
from megalora.ops import backend

ALPHA = 32.0
# Not measured here; each would need its own installation on a GPU.
PEERS = {
    "LoRAFusion": "lorafusion",
    "Unsloth": "unsloth",
    "Megatron-Bridge": "megatron.bridge",
}
GOAL = [((2048, 2048), 1024, 16, 0.0)]
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


class AddmmLinear(torch.autograd.Function):
    """LoRA by BLAS calls with beta = 1: no copy of x or y, no fused kernel, no dropout."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float):
        """Return x Wᵀ + scale * x Aᵀ Bᵀ."""
        s = x @ lora_A.T
        y = (x @ weight.T).addmm_(s, lora_B.T, alpha=scale)
        ctx.save_for_backward(x, weight, lora_A, lora_B, s)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):  # type: ignore[override]
        """dgrad: dx = dy W + ds A. wgrad: dA = dsᵀ x, dB = scale * dyᵀ s."""
        x, weight, lora_A, lora_B, s = ctx.saved_tensors
        ds = ctx.scale * (dy @ lora_B)
        dx = (dy @ weight).addmm_(ds, lora_A)
        return dx, None, ds.T @ x, ctx.scale * (dy.T @ s), None


def peft_layer(weight: Tensor, rank: int, p: float) -> Variant | None:
    """Return the linear layer of the installed peft, None where there is none."""
    if importlib.util.find_spec("peft") is None:
        return None
    from peft import LoraConfig, get_peft_model

    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    base.weight = nn.Parameter(weight, requires_grad=False)
    config = LoraConfig(r=rank, lora_alpha=ALPHA, lora_dropout=p, target_modules=["0"])  # type: ignore[arg-type]
    model = get_peft_model(nn.Sequential(base), config)  # type: ignore[arg-type]
    layer = model.get_submodule("base_model.model.0").to(weight.dtype)
    return Variant(
        "PEFT layer", layer, [q for q in layer.parameters() if q.requires_grad], [weight]
    )


def variants_of(weight: Tensor, rank: int, p: float, compiled: bool) -> list[Variant]:
    """Return the frozen base and everything that adds LoRA to it."""
    num_out, num_in = weight.shape
    options = {"device": weight.device, "dtype": weight.dtype}
    lora_A = (torch.randn(rank, num_in, **options) / num_in**0.5).requires_grad_()
    lora_B = (torch.randn(num_out, rank, **options) / rank**0.5).requires_grad_()
    scale = ALPHA / rank
    seed = torch.tensor([1], device=weight.device)

    def frozen(x: Tensor) -> Tensor:
        return F.linear(x, weight)

    def eager(x: Tensor) -> Tensor:
        dropped = F.dropout(x, p) if p else x
        return F.linear(x, weight) + scale * F.linear(F.linear(dropped, lora_A), lora_B)

    def megalora(x: Tensor) -> Tensor:
        journey = Journey(
            ops=backend("fused"), route=LOCAL_ROUTE, scale=scale, segments=[], dropout=p, seed=seed
        )
        return adapt(lambda x: (F.linear(x, weight), None), x, lora_A, lora_B, journey)[0]

    trained = [lora_A, lora_B]
    found = [Variant("frozen", frozen, [], [weight]), Variant("eager", eager, trained, [weight])]
    if (peft := peft_layer(weight, rank, p)) is not None:
        found.append(peft)
    if p == 0.0:
        addmm = lambda x: AddmmLinear.apply(x, weight, lora_A, lora_B, scale)  # noqa: E731
        found.append(Variant("beta=1 addmm", addmm, trained, [weight]))
    if compiled:
        found.append(Variant("torch.compile eager", torch.compile(eager), trained, [weight]))
    return [*found, Variant("megalora", megalora, trained, [weight])]


def run(grid: list, device: torch.device, dtype: torch.dtype, rounds: int, compiled: bool) -> list:
    """Measure a grid of shapes and print a table for each."""
    rows = []
    for (num_in, num_out), tokens, rank, p in grid:
        torch.manual_seed(0)
        weight = torch.randn(num_out, num_in, device=device, dtype=dtype) / num_in**0.5
        x = torch.randn(tokens, num_in, device=device, dtype=dtype, requires_grad=True)
        dy = torch.randn(tokens, num_out, device=device, dtype=dtype)
        variants = variants_of(weight, rank, p, compiled)
        if p == 0.0:
            assert_agreement(variants, x)
        shape = {"in": num_in, "out": num_out, "tokens": tokens, "rank": rank, "p": p}
        found = measure(variants, x, dy, rounds)
        print_rows(f"{num_in} -> {num_out}, {tokens} tokens, rank {rank}, dropout {p}", found)
        rows += [shape | row for row in found]
    return rows


def main() -> None:
    """Measure, print the tables, write JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--goal", action="store_true", help="only the shape of the stated goal")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of eager LoRA")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    grid = GOAL if options.goal else CUDA_GRID if on_gpu else CPU_GRID
    rows = run(grid, device, dtype, options.rounds, options.compile or on_gpu)
    absent = [name for name, module in PEERS.items() if _absent(module)]
    print(f"\nnot measured, because not installed: {', '.join(absent) or 'none'}")
    if options.json:
        content = {"machine": machine(device), "dtype": str(dtype), "absent": absent, "rows": rows}
        write_json(options.json, content)


def _absent(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:
        return True


if __name__ == "__main__":
    main()
