"""What it costs to hand an adapter to a server: bytes, seconds and memory, beside merged weights.

python benchmarks/bench_sync.py [--model qwen3-30b-a3b] [--rank 32] [--results FILE]

Adapters of random values and real sizes lie in memory as Megatron has them, whole, layer by layer,
and go once as a version in a directory for vLLM, on --place with all that makes it durable, and
once over HTTP on this machine as tensors for SGLang, to a process that reads and drops them. What
the server then does with them is not in it, nor the gathering over ranks. Of merged weights, which
would go instead, a layer is merged and written, and the whole is reckoned from it. Each is done in
a process of its own; memory is what it has at its worst beyond the adapter. Medians of all rounds.
"""

import argparse
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from _results import Row, append, line, machine
from bench_exchange import configuration
from torch import Tensor

from megalora.config import LoRAConfig
from megalora.hf.adapters import from_hf
from megalora.hf.factors import LoRAFactors
from megalora.hf.files import save_tensors
from megalora.hf.linears import locate
from megalora.hf.servers import choose_format
from megalora.hf.weights import Placement, Shard, Weights
from megalora.model.presets import PRESETS
from megalora.model.served import ServedModel
from megalora.sync import Http, SGLangClient, VersionedDirectory
from megalora.sync.pickled import pickle_tensors
from megalora.sync.plan import Plan

Pieces = list[dict[str, Tensor]]
ITS_OWN_DTYPE = torch.bfloat16


class Adapter:
    """An adapter of real sizes in memory, and what its base has."""

    def __init__(self, config: dict[str, Any], lora: LoRAConfig, dtype: torch.dtype) -> None:
        weights = Weights(config, Placement(Shard(), Shard(), Shard()))
        self.config, self.lora, self.shape = config, lora, weights.shape
        self.base_sizes = {name: tuple(size) for name, size in weights.expected().items()}
        self.pieces = list(self._layers(dtype))
        self.num_bytes = sum(t.nbytes for piece in self.pieces for t in piece.values())

    def modules(self) -> dict[int | None, dict[str, tuple[int, int, int]]]:
        """Return rank, in and out of each module by its name, by layer."""
        found: dict[int | None, dict[str, tuple[int, int, int]]] = {}
        for weight, size in self.base_sizes.items():
            name = weight.removesuffix(".weight")
            place = locate(name, self.shape)
            # As trained by default, without routers.
            if place is not None and place[1].megatron != "mlp.router":
                rank = place[1].rank(self.lora, self.shape)
                found.setdefault(place[0], {})[name] = (rank, size[1], size[0])
        return found

    def _layers(self, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
        for modules in self.modules().values():
            factors = {
                name: LoRAFactors(
                    torch.randn(rank, num_in, dtype=dtype),
                    torch.randn(num_out, rank, dtype=dtype).mul_(1e-3),
                    self.lora.scale(rank),
                )
                for name, (rank, num_in, num_out) in modules.items()
            }
            if self.lora.expert_mode == "shared_outer":
                factors = _shared(factors)
            yield from_hf(factors, self.lora, self.shape)

    def plan(self, server: str) -> Plan:
        """Return what a server is given of it."""
        sizes = {n: (t.shape, t.dtype) for piece in self.pieces for n, t in piece.items()}
        shares = self.lora.expert_mode == "shared_outer"
        served = ServedModel.of(self.config)
        format = choose_format(server, None, served, shares_outer=shares)
        return Plan(sizes, self.lora, self.shape, format)


def _shared(factors: dict[str, LoRAFactors]) -> dict[str, LoRAFactors]:
    """Let all experts of a layer have the outer factors of the first."""
    found = {}
    for name, module in factors.items():
        prefix, _, rest = name.partition(".experts.")
        projection = rest.rpartition(".")[2]
        first = factors[f"{prefix}.experts.0.{projection}"] if rest else module
        is_down = projection == "down_proj"
        a = module.lora_A if is_down else first.lora_A
        b = first.lora_B if is_down else module.lora_B
        found[name] = LoRAFactors(a, b, module.scale)
    return found


def plan_once(adapter: Adapter, place: Path) -> int:
    """Plan, as is done once before the first sync; return how many tensors there are."""
    return len(adapter.plan("vllm").sizes)


def to_directory(adapter: Adapter, place: Path) -> int:
    """Write a version for vLLM; return its bytes."""
    plan = adapter.plan("vllm")
    begin = _now()
    tensors = (named for piece in adapter.pieces for named in plan.tensors(piece))
    versions = VersionedDirectory(place / "versions", keep=1)
    path = versions.write(versions.next_version(), lambda folder: plan.write(folder, tensors))
    _took(begin)
    return sum(file.stat().st_size for file in path.iterdir())


def as_tensors(adapter: Adapter, place: Path) -> int:
    """Send a version for SGLang to a process that drops it; return the bytes of the request."""
    plan = adapter.plan("sglang")
    receiver, sender = get_context("fork").Pipe(duplex=False)
    sink = get_context("fork").Process(target=_drop_one, args=(sender,))
    sink.start()
    port = receiver.recv()
    begin = _now()
    tensors = (named for piece in adapter.pieces for named in plan.tensors(piece))
    client = SGLangClient(Http(url=f"http://127.0.0.1:{port}", timeout_s=3600))
    client.load_tensors("policy", plan.adapter_config, pickle_tensors(tensors), tp_size=1)
    _took(begin)
    sink.join()
    return receiver.recv()


class _Sink(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        """Read a request that comes in chunks, and keep its size."""
        self.server.num_bytes = 0  # type: ignore[attr-defined]
        while size := int(self.rfile.readline(), 16):
            left = size + 2
            while left:
                left -= len(self.rfile.read(min(left, 2**20)))
            self.server.num_bytes += size  # type: ignore[attr-defined]
        self.rfile.readline()
        self.send_response(200)
        body = b'{"success": true}'
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Be quiet."""


def _drop_one(sender: Connection) -> None:
    with HTTPServer(("127.0.0.1", 0), _Sink) as server:
        sender.send(server.server_port)
        server.handle_request()
        sender.send(server.num_bytes)  # type: ignore[attr-defined]


def merged_layer(adapter: Adapter, place: Path) -> int:
    """Merge the first layer into its base, as it would have to go, and write it; its bytes."""
    modules = adapter.modules()[0]
    weights = {
        name: torch.randn(out, num_in, dtype=ITS_OWN_DTYPE)
        for name, (_, num_in, out) in modules.items()
    }
    rank = {name: rank for name, (rank, _, _) in modules.items()}
    begin = _now()
    for name, weight in weights.items():
        out, num_in = weight.shape
        a = torch.randn(rank[name], num_in, dtype=ITS_OWN_DTYPE)
        b = torch.randn(out, rank[name], dtype=ITS_OWN_DTYPE)
        weight.add_((b.float() @ a.float()).mul_(adapter.lora.scale(rank[name])))
    path = place / "merged.safetensors"
    save_tensors(path, weights)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    _took(begin)
    size = path.stat().st_size
    path.unlink()
    return size


WAYS: dict[str, Callable[[Adapter, Path], int]] = {
    "plan, once": plan_once,
    "vLLM directory": to_directory,
    "SGLang tensors": as_tensors,
    "merged, one layer": merged_layer,
}
# Wall and CPU seconds of what was done last.
_SECONDS: list[tuple[float, float]] = []


def _now() -> tuple[float, float]:
    return time.monotonic(), time.process_time()


def _took(begin: tuple[float, float]) -> None:
    wall, cpu = _now()
    _SECONDS.append((wall - begin[0], cpu - begin[1]))


def measured(adapter: Adapter, way: str, place: Path) -> Row:
    """Do it once in a copy of this process; return what it cost."""
    receiver, sender = get_context("fork").Pipe(duplex=False)
    process = get_context("fork").Process(target=_measure, args=(adapter, way, place, sender))
    process.start()
    sender.close()
    row = receiver.recv()
    process.join()
    return row


def _measure(adapter: Adapter, way: str, place: Path, sender: Connection) -> None:
    base, begin = _resident(), _now()
    num = WAYS[way](adapter, place)
    if not _SECONDS:
        _took(begin)
    wall, cpu = _SECONDS[-1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - base
    what = "tensors" if way.startswith("plan") else "sent_bytes"
    sender.send({what: num, "wall_s": wall, "cpu_s": cpu, "beyond_bytes": max(peak, 0)})


def _resident() -> int:
    """Return the memory that the process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def reckoned(adapter: Adapter, layer: Row) -> Row:
    """Return what all merged weights would be, from one layer of them."""
    numbers = [torch.Size(size).numel() for size in adapter.base_sizes.values()]
    total = sum(numbers) * ITS_OWN_DTYPE.itemsize
    seconds = layer["wall_s"] * total / layer["sent_bytes"]
    return {"variant": "merged, reckoned", "sent_bytes": total, "wall_s": seconds}


def table(rows: list[Row]) -> list[str]:
    """Return Markdown with a line for each way."""
    head = ["way", "MB", "wall, s", "CPU, s", "memory beyond the adapter, MB"]
    lines = [line(head), line(["---"] * len(head))]
    for row in rows:
        cells = [
            row["variant"],
            f"{row['sent_bytes'] / 1e6:,.1f}" if "sent_bytes" in row else "",
            f"{row['wall_s']:.2f}",
            f"{row['cpu_s']:.2f}" if "cpu_s" in row else "",
            f"{row['beyond_bytes'] / 1e6:,.0f}" if "beyond_bytes" in row else "",
        ]
        lines.append(line(cells))
    return lines


def measure(adapter: Adapter, place: Path, rounds: int) -> list[Row]:
    """Return a row for each way: medians of all rounds."""
    rows = []
    for way in WAYS:
        runs = [measured(adapter, way, place) for _ in range(rounds)]
        row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        rows.append({"variant": way, **row})
        print(f"{way}: {row['wall_s']:.2f} s", file=sys.stderr, flush=True)
    return [*rows, reckoned(adapter, rows[-1])]


def main() -> None:
    """Make an adapter, hand it over in every way, print the table, write JSON lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="qwen3-30b-a3b", choices=PRESETS, help="whose sizes")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--expert-mode", default="per_expert")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--place", help="where to make a temporary directory, on the disk to try")
    parser.add_argument("--results", type=Path, help="file to add the numbers to, as JSON lines")
    parser.add_argument("--toy", action="store_true", help="tiny sizes: a rehearsal")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="sync-", dir=options.place))
    # Threads that torch had started would not be there in copies of this process.
    torch.set_num_threads(1)
    try:
        lora = LoRAConfig(rank=options.rank, expert_mode=options.expert_mode)
        config = configuration(options.model, toy=options.toy)
        adapter = Adapter(config, lora, getattr(torch, options.dtype))
        append(options.results, {"machine": machine(torch.device("cpu"))})
        rows = measure(adapter, place, options.rounds)
        for row in rows:
            what = {
                "bench": "sync",
                "model": options.model,
                "rank": options.rank,
                "expert_mode": options.expert_mode,
                "dtype": options.dtype,
                "adapter_bytes": adapter.num_bytes,
            }
            append(options.results, {**what, **row})
        print("\n".join(table(rows)))
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
