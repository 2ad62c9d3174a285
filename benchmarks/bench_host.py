"""Host time of one adapted linear: what Python and dispatch cost where the tensors are tiny.

python benchmarks/bench_host.py [--rounds 200] [--results FILE]

First the autograd functions alone, over a frozen product of torch's. Then Megatron's own linear as
a model calls it, with all that its adapter looks up on each call, over the linear without adapter.
One thread, 16 tokens, width 64, rank 8, so that nothing but the calls takes time. Forward and
backward by the wall clock; on a GPU the host does not wait for the device, and a replayed CUDA
graph of both passes, device included, is measured too. Medians; all variants in turn.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _results import append, line, machine
from _timing import Variant, synchronize
from bench_linear import ALPHA, Case, factors, share_values, variants_of
from megatron.core import ModelParallelConfig, parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from megalora.adapters.bases import Base, describe
from megalora.adapters.linear import LinearAdapter
from megalora.config import LoRAConfig
from megalora.targets import AdapterSpec, Rows

CASE = Case(64, 64, 16, 8)
FUNCTIONS = ("frozen", "eager", "PEFT layer", "megalora", "megalora, closed base")


def linear_of_megatron(weight: Tensor) -> ColumnParallelLinear:
    """Return Megatron's linear with a frozen weight, on a group of one."""
    config = ModelParallelConfig(use_cpu_initialization=True, params_dtype=weight.dtype)
    linear = ColumnParallelLinear(
        CASE.num_in, CASE.num_out, config=config, init_method=torch.nn.init.zeros_, bias=False
    )
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return linear


def layers(weight: Tensor) -> list[Variant]:
    """Return Megatron's linear without an adapter, with eager LoRA after it, and with ours."""
    trained = factors(CASE, weight)

    def eager(x: Tensor) -> Tensor:
        s = torch.nn.functional.linear(x, trained[0])
        return plain(x)[0] + ALPHA / CASE.rank * torch.nn.functional.linear(s, trained[1])

    plain = linear_of_megatron(weight)
    found = [
        Variant("Megatron's linear", lambda x: plain(x)[0], [], [weight]),
        Variant("with eager LoRA", eager, trained, [weight]),
    ]
    for name, opens in (("with megalora", True), ("with megalora, closed base", False)):
        linear = linear_of_megatron(weight)
        adapter = adapted(describe(linear)[""], weight)
        assert adapter.opens
        adapter.opens = opens
        share_values(trained, (own := [adapter.lora_A, adapter.lora_B]))
        found.append(Variant(name, lambda x, linear=linear: linear(x)[0], own, [weight]))
    return found


def adapted(base: Base, weight: Tensor) -> LinearAdapter:
    """Put an adapter on a base."""
    spec = AdapterSpec(
        name="linear", rank=CASE.rank, scale=ALPHA / CASE.rank, rows=Rows(blocks=(CASE.num_out,))
    )
    groups: Any = {"dense_group": base.group, "expert_group": None}
    adapter = LinearAdapter(
        base, spec, LoRAConfig(rank=CASE.rank), dtype=weight.dtype, device=weight.device, **groups
    )
    adapter.bind()
    return adapter


def host_microseconds(variant: Variant, x: Tensor, dy: Tensor) -> dict[str, float]:
    """Return the microseconds of the host in one forward and one backward pass."""
    for leaf in (x, *variant.parameters):
        leaf.grad = None
    synchronize(x.device)
    start = time.perf_counter()
    y = variant.forward(x)
    between = time.perf_counter()
    y.backward(dy)
    end = time.perf_counter()
    return {"forward_us": 1e6 * (between - start), "backward_us": 1e6 * (end - between)}


def captured(variant: Variant, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """Return the replay of a CUDA graph of both passes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            variant.forward(x).backward(dy)
    torch.cuda.current_stream().wait_stream(stream)
    for leaf in (x, *variant.parameters):
        leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        variant.forward(x).backward(dy)
    return graph.replay


def replay_microseconds(replay: Callable[[], None], rounds: int) -> float:
    """Return the microseconds of one replay, the median over rounds of ten."""
    seconds = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            replay()
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / 10)
    return 1e6 * statistics.median(seconds)


def main() -> None:
    """Measure, print the table, write JSON lines where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--results", type=Path, help="file to add the numbers to, as JSON lines")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    append(options.results, {"machine": machine(device)})
    weight = torch.randn(CASE.num_out, CASE.num_in, device=device, dtype=dtype)
    x = torch.randn(CASE.tokens, CASE.num_in, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(CASE.tokens, CASE.num_out, device=device, dtype=dtype)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    functions = [v for v in variants_of(CASE, weight, compiled=False)[0] if v.name in FUNCTIONS]
    for variants in (functions, layers(weight)):
        for row in rows(variants, x, dy, options.rounds):
            append(options.results, {"bench": "host"} | row)
            print(line(f"{v:.1f}" if isinstance(v, float) else v for v in row.values()), flush=True)


def rows(variants: list[Variant], x: Tensor, dy: Tensor, rounds: int) -> list[dict[str, Any]]:
    """Return one row for each variant: microseconds, and what it adds to the frozen linear."""
    for variant in variants:
        for _ in range(20):
            host_microseconds(variant, x, dy)
    measured = [{v.name: host_microseconds(v, x, dy) for v in variants} for _ in range(rounds)]
    found = []
    for variant in variants:
        row: dict[str, Any] = {"variant": variant.name}
        for key in ("forward_us", "backward_us"):
            row[key] = statistics.median(m[variant.name][key] for m in measured)
            row[f"added_{key}"] = row[key] - (found[0][key] if found else row[key])
        if x.device.type == "cuda":
            row["graph_us"] = replay_microseconds(captured(variant, x, dy), 20)
        found.append(row)
    return found


if __name__ == "__main__":
    main()
