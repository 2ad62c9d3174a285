"""Host time of one adapted linear: what Python and dispatch cost where the tensors are tiny.

python benchmarks/bench_host.py [--rounds 200] [--results FILE]

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
from _results import append, line, machine
from _timing import Variant, synchronize
from bench_linear import Case, variants_of
from torch import Tensor

CASE = Case(64, 64, 16, 8)


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
    variants, _ = variants_of(CASE, weight, compiled=False)
    variants = [v for v in variants if v.name in ("frozen", "eager", "PEFT layer", "megalora")]
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
