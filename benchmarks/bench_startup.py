"""How the start of a run grows with its ranks: each step of megalora on rank 0 of up to 4,096.

python benchmarks/bench_startup.py [--world-sizes 8 64 512 4096] [--results FILE]

torch's fake process group stands for all other ranks: their groups are made as Megatron makes them,
and nobody is at the other end. So a step takes here what this rank itself does in it, of which the
time of a network is no part; bytes and objects are counted that it would receive. Of a layout with
tensor, pipeline and expert parallelism a stage has two layers and a rank four experts, whatever the
world: what grows is not the model's. The base's files have the sizes and names that their headers
say, and holes for weights; a checkpoint has two files for each rank. Medians of all rounds.
Milliseconds are of CPU time, which other processes do not lengthen.

calls: of functions, Python's and C's, in one step. objects: unpickled of what other ranks sent.
"""

import argparse
import hashlib
import inspect
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from _results import Row, append, line, machine
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import megalora.cpu

megalora.cpu.install()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

import megalora.cpu.gloo  # noqa: E402
from megalora import LoRAConfig, apply_lora  # noqa: E402
from megalora.adapters.adapter import named_adapters  # noqa: E402
from megalora.checkpoint import lock  # noqa: E402
from megalora.checkpoint.base import fingerprint  # noqa: E402
from megalora.checkpoint.find import find_on_all_ranks  # noqa: E402
from megalora.checkpoint.gather import gather_layers  # noqa: E402
from megalora.checkpoint.layout import MANIFEST, iteration_directory  # noqa: E402
from megalora.checkpoint.ranks import on_all_ranks  # noqa: E402
from megalora.checkpoint.state import refuse_not_finite  # noqa: E402
from megalora.hf.adapters import from_hf  # noqa: E402
from megalora.hf.base import load_hf_base  # noqa: E402
from megalora.hf.exchange import check_export  # noqa: E402
from megalora.hf.factors import LoRAFactors  # noqa: E402
from megalora.hf.linears import locate  # noqa: E402
from megalora.hf.one_process import write_adapter_checkpoint  # noqa: E402
from megalora.hf.safetensors_files import HFWeights  # noqa: E402
from megalora.hf.weights import Placement, Shard, Weights  # noqa: E402
from megalora.model.megatron import megatron_args  # noqa: E402
from megalora.rollouts.replicas import Replicas  # noqa: E402
from megalora.sync.tensors import RunningAdapters  # noqa: E402
from megalora.training import agree, fingerprints  # noqa: E402
from megalora.training.replicas import check_replicas  # noqa: E402

LORA = LoRAConfig(rank=8)
NUM_FLAGS = 900
FILES_OF_RANK = 2
BASE_SHARDS, DTYPE_BYTES = 16, 2
# Of a sample of answers that a replica tells the others.
NUM_NUMBERS = 1000


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel dimensions; experts have no tensor parallelism."""

    world_size: int
    tp: int
    pp: int
    ep: int

    @classmethod
    def of(cls, world_size: int) -> "Layout":
        """Return what a run of a mixture of experts would take, as far as there are ranks."""
        tp = min(8, world_size)
        pp = max(1, min(16, world_size // 256) if world_size > 512 else world_size // 8 // 16)
        return cls(world_size, tp, pp, min(64, world_size // pp))

    def config(self) -> dict[str, Any]:
        """Return the config.json of a model that has two layers and four experts for a rank."""
        return {
            "model_type": "qwen3_moe",
            "num_hidden_layers": 2 * self.pp,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 32,
            "vocab_size": 4096,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "num_experts": 4 * self.ep,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
        }


# === A rank among ranks that are not there ===


def fake_world(layout: Layout, rank: int = 0) -> None:
    """Make this process one rank of a world that nobody else is in, with Megatron's groups."""
    for name, *_ in megalora.cpu.gloo._ROWS:
        for owner in (dist, dist.distributed_c10d):
            setattr(owner, name, inspect.unwrap(getattr(owner, name)))
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1234)


def build(layout: Layout) -> list[Any]:
    """Build this rank's stage of the model."""
    args = megatron_args(layout.config())
    known = TransformerConfig.__dataclass_fields__
    config = TransformerConfig(
        **{name: value for name, value in args.items() if name in known},
        num_moe_experts=args["num_experts"],
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.tp > 1,
        pipeline_model_parallel_size=layout.pp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=1,
    )
    spec: Any = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    model = GPTModel(
        config,
        spec,
        vocab_size=args["vocab_size"],
        max_sequence_length=args["max_position_embeddings"],
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        rotary_base=args["rotary_base"],
        share_embeddings_and_output_weights=False,
    )
    return [model]


# === What it reads ===


def write_base(directory: Path, layout: Layout) -> None:
    """Write config.json and shards whose headers are right and whose weights are holes."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(layout.config()))
    weights = Weights(layout.config(), Placement(Shard(), Shard(), Shard()))
    names = list(weights.expected().items())
    size, weight_map = -(-len(names) // BASE_SHARDS), {}
    for number, first in enumerate(range(0, len(names), size)):
        file = f"model-{number + 1:05d}-of-{BASE_SHARDS:05d}.safetensors"
        header, end = {}, 0
        for name, shape in names[first : first + size]:
            begin, end = end, end + DTYPE_BYTES * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
            weight_map[name] = file
        text = json.dumps(header).encode()
        with (directory / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def write_checkpoint(directory: Path, layout: Layout) -> None:
    """Write an adapter checkpoint that has files of all ranks, with checksums."""
    weights = Weights(layout.config(), Placement(Shard(), Shard(), Shard()))
    factors = {}
    for weight, size in weights.expected().items():
        found = locate(name := weight.removesuffix(".weight"), weights.shape)
        if found is not None and found[1].megatron.startswith("self_attention"):
            rank = found[1].rank(LORA, weights.shape)
            factors[name] = LoRAFactors(
                torch.zeros(rank, size[1]), torch.zeros(size[0], rank), LORA.scale(rank)
            )
    tensors = from_hf(factors, replace(LORA, targets=("attn",)), weights.shape)
    write_adapter_checkpoint(directory, tensors, replace(LORA, targets=("attn",)), weights.shape)
    made = iteration_directory(directory, "release")
    manifest = json.loads((made / MANIFEST).read_text())
    content = bytes(1 << 14)
    for rank in range(1, layout.world_size):
        for number in range(FILES_OF_RANK):
            name = f"__{rank}_{number}.distcp"
            (made / name).write_bytes(content)
            manifest["files"][name] = hashlib.sha256(content).hexdigest()
    (made / MANIFEST).write_text(json.dumps(manifest))


# === The steps ===


@dataclass
class Run:
    """A rank on its way through the start, and what it reads."""

    layout: Layout
    place: Path
    chunks: list[Any]

    def flags(self) -> None:
        """Compare the flags of all ranks."""
        fields = {f"flag {number}": str(number) for number in range(NUM_FLAGS)}
        agree.check(fields, "start all ranks with the same flags")

    def software(self) -> None:
        """Compare packages and the environment."""
        agree.check(fingerprints.of_software({}), "give every node the same")

    def lock(self) -> None:
        """Take the directory of checkpoints."""
        on_all_ranks(lambda: lock.take(self.place / "save"), only=0)

    def find(self) -> None:
        """Find the checkpoint to go on from, and check its files."""
        load = str(self.place / "checkpoint")
        assert find_on_all_ranks(load, step=None, on_corrupt="stop", warn=print) is not None

    def sources(self) -> None:
        """Compare what ranks read: the base and the checkpoint."""
        sources = {"hf_model": str(self.place / "base"), "load": str(self.place / "checkpoint")}
        agree.check(fingerprints.of_sources(sources), "give every node the same files")

    def base(self) -> None:
        """Read the base of a Hugging Face directory."""
        load_hf_base(self.chunks, self.place / "base")

    def replicas(self) -> None:
        """Compare the bits of the base on those that hold the same part."""
        check_replicas(self.chunks)

    def fingerprint(self) -> None:
        """Make the numbers that the base is known again by."""
        fingerprint(self.chunks)

    def attach(self) -> None:
        """Attach the adapters."""
        apply_lora(self.chunks, LORA, vocab_size=4096)

    def draw(self) -> None:
        """Draw start values: a part of attaching them."""
        for _, adapter in named_adapters(self.chunks):
            adapter.reset_parameters()

    def export(self) -> None:
        """Check that the adapter can be exported."""
        check_export(self.chunks, config=LORA, vocab_size=4096, hf_model=None)

    def describe(self) -> None:
        """Tell Megatron what a checkpoint is to have."""
        for chunk in self.chunks:
            chunk.sharded_state_dict()

    def finite(self) -> None:
        """Refuse to save what is not finite."""
        refuse_not_finite(self.chunks, "{}".format)

    def plan(self) -> None:
        """Plan what a server is given."""
        RunningAdapters(self.chunks, LORA, server="vllm")

    def gather(self) -> None:
        """Gather the adapter on rank 0, layer by layer."""
        deque(gather_layers(self.chunks), maxlen=0)

    def rewards(self) -> None:
        """Bring together what each replica has of its answers."""
        count = self.layout.world_size // (self.layout.tp * self.layout.pp)
        Replicas(number=0, count=1, speaks=True).each(lambda: [0.5] * NUM_NUMBERS)
        Replicas(number=0, count=count, speaks=True).largest(1.0)


STEPS: tuple[Callable[[Run], None], ...] = (
    *(Run.flags, Run.software, Run.lock, Run.find, Run.sources, Run.base, Run.replicas),
    *(Run.fingerprint, Run.attach, Run.draw, Run.export, Run.describe, Run.finite, Run.plan),
    *(Run.gather, Run.rewards),
)


def start_up(layout: Layout, place: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield the steps of one start, each to be done before the next is asked for."""
    run = Run(layout, place, build(layout))
    yield from ((step.__name__, lambda step=step: step(run)) for step in STEPS)


# === What it costs ===


class Received(TorchDispatchMode):
    """Count the bytes that collectives bring this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            # Gathers have their outputs first, all others the tensors that become the result.
            tensors = [leaf for leaf in tree_leaves(args[0]) if isinstance(leaf, torch.Tensor)]
            self.num_bytes += sum(tensor.nbytes for tensor in tensors)
        return result


@contextmanager
def counted(row: Row) -> Iterator[None]:
    """Count calls, and what other ranks send this one, into a row."""
    torch_dist, files = cast(Any, dist.distributed_c10d), cast(Any, HFWeights)
    unpickle, read = torch_dist._tensor_to_object, files.read
    row |= {"calls": 0, "objects": 0, "received_bytes": 0, "read_bytes": 0}

    def count_object(*args: Any) -> Any:
        row["objects"] += 1
        return unpickle(*args)

    def count_read(*args: Any) -> Any:
        found = read(*args)
        row["read_bytes"] += found.nbytes
        return found

    def count_call(frame: Any, event: str, arg: Any) -> None:
        row["calls"] += event in ("call", "c_call")

    torch_dist._tensor_to_object, files.read = count_object, count_read
    try:
        with Received() as received:
            sys.setprofile(count_call)
            try:
                yield
            finally:
                sys.setprofile(None)
        row["received_bytes"] = received.num_bytes
    finally:
        torch_dist._tensor_to_object, files.read = unpickle, read


def measure(layout: Layout, place: Path, rounds: int) -> list[Row]:
    """Return a row for each step: milliseconds, and what was counted in a start by itself."""
    begin = time.process_time()
    fake_world(layout)
    rows = [{"step": "(Megatron's groups)", "ms": 1e3 * (time.process_time() - begin)}]
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, step in start_up(layout, place):
            begin = time.process_time()
            step()
            times.setdefault(name, []).append(1e3 * (time.process_time() - begin))
    for name, step in start_up(layout, place):
        row: Row = {"step": name, "ms": statistics.median(times[name])}
        with counted(row):
            step()
        rows.append(row)
    return rows


def _measure(layout: Layout, place: Path, rounds: int, sender: Connection) -> None:
    write_base(place / "base", layout)
    write_checkpoint(place / "checkpoint", layout)
    sender.send(measure(layout, place, rounds))


def table(rows: list[Row], key: str) -> list[str]:
    """Return Markdown: a line for each step, a column for each size of the world."""
    sizes = list(dict.fromkeys(row["world_size"] for row in rows))
    cells = {(row["step"], row["world_size"]): row for row in rows}
    lines = [line([key, *(f"{size:,}" for size in sizes)]), line(["---"] * (len(sizes) + 1))]
    for step in dict.fromkeys(row["step"] for row in rows):
        values = [cells.get((step, size), {}).get(key, "") for size in sizes]
        lines.append(line([step, *(f"{v:,.1f}" if isinstance(v, float) else v for v in values)]))
    return lines


def main() -> None:
    """Start rank 0 of each world in a process of its own, print tables, write JSON lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[8, 64, 512, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--place", help="where to make a temporary directory, on the disk to try")
    parser.add_argument("--results", type=Path, help="file to add the numbers to, as JSON lines")
    options = parser.parse_args()
    torch.set_num_threads(1)
    append(options.results, {"machine": machine(torch.device("cpu"))})
    rows: list[Row] = []
    for world_size in options.world_sizes:
        place, layout = Path(tempfile.mkdtemp(dir=options.place)), Layout.of(world_size)
        try:
            receiver, sender = get_context("fork").Pipe(duplex=False)
            given = (layout, place, options.rounds, sender)
            process = get_context("fork").Process(target=_measure, args=given, daemon=True)
            process.start()
            sender.close()
            found = receiver.recv()
            process.join()
        finally:
            shutil.rmtree(place)
        for row in found:
            rows.append({"bench": "startup", "world_size": world_size, **row})
            append(options.results, rows[-1])
    for key in ("ms", "calls", "objects", "received_bytes", "read_bytes"):
        print("\n".join([*table(rows, key), ""]))


if __name__ == "__main__":
    main()
