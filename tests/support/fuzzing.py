"""All readers under changed files: each refuses in one line, or reads what is there."""

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hypothesis import HealthCheck, Phase, example, given, settings

from megalora.__main__ import main
from megalora.hf.adapters import from_hf
from megalora.hf.cuts import Placement, Shard
from megalora.hf.merge import merge_adapter
from megalora.hf.offline import infer_config
from megalora.hf.peft import read_adapter
from megalora.hf.safetensors_files import HFWeights
from megalora.hf.weights import Weights
from megalora.model.config_json import model_shape, read_config
from megalora.model.families import names_of
from megalora.model.megatron import megatron_flags
from megalora.printable import printable
from tests.support import fp8, honest
from tests.support.mutations import Mutation, apply, fresh_copy, mutations
from tests.support.soon import soon

SECONDS, MEGABYTES, CHARACTERS = 10.0, 3000, 2000
ITERATION = "release"
type Reader = Callable[[Path], object]


class Target(NamedTuple):
    """What is read: honest files, which of them are changed, and the readers."""

    write: Callable[[Path], object]
    readers: tuple[Reader, ...]


def command(*words: object) -> str:
    """Run a command; return what it printed, raise what it refused by."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        status = main([str(word) for word in words])
    if status:
        said = error.getvalue().splitlines()
        assert status == 2
        assert [line for line in said if line.startswith("error: ")] == said[-1:], said
        raise ValueError(said[-1].removeprefix("error: "))
    lines = out.getvalue().splitlines()
    assert all(is_printable(line) for line in lines), lines
    return out.getvalue()


def is_printable(line: str) -> bool:
    return all(unicodedata.category(character) not in ("Cc", "Cs", "Zl") for character in line)


# === Readers ===


def flags(directory: Path) -> object:
    return megatron_flags(read_config(directory))


def recommend(directory: Path) -> object:
    found = json.loads(command("recommend", "--model", directory, "--rank", 2, "--json"))
    command("recommend", "--model", directory, "--rank", 2)
    return {**found, "model": {**found["model"], "name": ""}}


def weights(directory: Path) -> object:
    config = read_config(directory)
    files = HFWeights(directory, names_of(config["model_type"]))
    wanted = Weights(config, Placement(Shard(), Shard(), Shard()))
    files.check(wanted.expected(), tied=wanted.shape.tied_embeddings)
    return {name: files.read(name, 0, size[0]).tolist() for name, size in files.shapes.items()}


def merge(directory: Path) -> object:
    """Merge an honest adapter into the base."""
    adapter = directory.with_name("adapter")
    if not adapter.exists():
        honest.write_peft(adapter)
    return _merged(adapter, directory)


def merge_into_honest(directory: Path) -> object:
    """Merge the adapter into an honest base."""
    base = directory.with_name("base")
    if not base.exists():
        honest.write_base(base, honest.LLAMA)
    return _merged(directory, base)


def _merged(adapter: Path, base: Path) -> object:
    output = Path(tempfile.mkdtemp(dir=base.parent)) / "merged"
    merge_adapter(base, read_adapter(adapter, hidden_size=8), output)
    merged = HFWeights(output)
    return {name: merged.read(name, 0, size[0]).tolist() for name, size in merged.shapes.items()}


def inspect(directory: Path) -> object:
    command("inspect", directory)
    return {**json.loads(command("inspect", directory, "--json")), "directory": ""}


def importing(directory: Path) -> object:
    shape = model_shape(honest.LLAMA)
    factors = read_adapter(directory, hidden_size=8)
    tensors = from_hf(factors, infer_config(factors, shape), shape)
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def rows(directory: Path) -> object:
    from megalora.data.build import check_dataset
    from megalora.data.examples import encode_rows, gather_examples
    from megalora.data.rows import load_rows, schema_of
    from megalora.data.tokenizers import ByteTokenizer, encoder_for

    file = str(directory / "data.jsonl")
    check_dataset(file, ByteTokenizer(), 64)
    found = load_rows(file)
    encoded = encode_rows(found, schema_of(found, file), encoder_for(ByteTokenizer()), 64, set())
    examples = gather_examples(encoded, file)
    return examples.ids.tolist(), examples.trained.tolist()


def checkpoint(directory: Path) -> object:
    from megalora.checkpoint.read import read_adapter_checkpoint

    tensors, config, facts = read_adapter_checkpoint(directory)
    return {name: tensor.tolist() for name, tensor in tensors.items()}, config, facts


def finding(directory: Path) -> object:
    from megalora.checkpoint.find import find_checkpoint

    said: list[str] = []
    found = find_checkpoint(directory, step=None, on_corrupt="previous", warn=said.append)
    assert all(is_printable(line) and len(line) < CHARACTERS for line in said), said
    return found and (found.iteration, found.description)


def write_checkpoint(directory: Path) -> None:
    """Write an adapter checkpoint of `honest.LLAMA`; Megatron has to be imported."""
    from megalora.config import LoRAConfig
    from megalora.hf.one_process import write_adapter_checkpoint

    adapter = honest.write_peft(directory.with_name("for-checkpoint"))
    factors, shape = read_adapter(adapter), model_shape(honest.LLAMA)
    config: LoRAConfig = infer_config(factors, shape)
    write_adapter_checkpoint(directory, from_hf(factors, config, shape), config, shape)


def write_checkpoint_without_manifest(directory: Path) -> None:
    write_checkpoint(directory)
    (directory / ITERATION / "integrity.json").unlink()


def write_fp8(directory: Path) -> None:
    config = {"quantization_config": fp8.fp8_config((4, 8))}
    fp8.change(honest.write_base(directory, honest.LLAMA), fp8.in_fp8((4, 8)), **config)


TARGETS = {
    "a dense base": Target(
        lambda place: honest.write_base(place, honest.LLAMA, shards=2),
        (flags, weights, recommend, merge),
    ),
    "a base with experts": Target(
        lambda place: honest.write_base(place, honest.MOE), (flags, weights, recommend)
    ),
    "a base in FP8": Target(write_fp8, (flags, weights, merge)),
    "a config.json alone": Target(
        lambda place: (
            place.mkdir(),
            (place / "config.json").write_text(json.dumps({**honest.MOE, "model_type": "mixtral"})),
        ),
        (recommend,),
    ),
    "an adapter": Target(honest.write_peft, (inspect, importing, merge_into_honest)),
    "an adapter of stacked experts": Target(honest.write_stacked_peft, (inspect,)),
    "chats": Target(lambda place: honest.write_rows(place, honest.ROWS), (rows,)),
    "texts": Target(lambda place: honest.write_rows(place, honest.TEXTS), (rows,)),
    "a checkpoint": Target(write_checkpoint, (checkpoint, finding)),
    "a checkpoint without a manifest": Target(write_checkpoint_without_manifest, (checkpoint,)),
}


# What was found once, and is tried first for ever.
FOUND = {
    "a dense base": [Mutation("config.json", "replace", 1, "1")],
    "a base with experts": [Mutation("model.safetensors", "sparse")],
    "a checkpoint": [
        *(Mutation(f"{ITERATION}/metadata.json", kind) for kind in ("mark", "sparse")),
        Mutation(f"{ITERATION}/__0_0.distcp", "sparse"),
    ],
    "a checkpoint without a manifest": [
        *(Mutation(f"{ITERATION}/__0_0.distcp", "flip", place) for place in (457, 461)),
        *(Mutation(f"{ITERATION}/{name}", "pipe") for name in (".metadata", "__0_0.distcp")),
        Mutation(f"{ITERATION}/metadata.json", "link to /dev/zero"),
    ],
    "an adapter": [Mutation("adapter_config.json", kind) for kind in ("directory", "pipe")],
    "chats": [Mutation("data.jsonl", "replace", 1, '[{"from": [], "value": "x"}]')],
}


# === The property ===


def try_one(reader: Reader, directory: Path, expected: object = None) -> str:
    """Read changed files; return the sentence of a refusal, which has to be a good one.

    expected: what an honest file gives, where the change means nothing.
    """
    result, refusal = None, None
    with soon(SECONDS):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = reader(directory)
        except ValueError as error:
            refusal = error
    said = "" if refusal is None else printable(refusal)
    if refusal is not None:
        # A subclass is some library's own sentence, which names no file.
        assert type(refusal) is ValueError, repr(refusal)[:500]
        assert is_printable(said), said
        assert len(said) < CHARACTERS, len(said)
        assert names_something(said, directory), f"names no file and no field: {said}"
    if expected is not None:
        assert not said, f"refused: {said}"
        assert result == expected, "read as something else"
    return said


def names_something(said: str, directory: Path) -> bool:
    fields = ("config.json", "adapter_config", "safetensors", "dataset", "checkpoint", "adapter")
    return str(directory) in said or any(field in said for field in fields)


def check(whole: dict[Reader, object], honest_files: Path, place: Path, change: Mutation) -> None:
    """Change a copy of the honest files once and let all readers read it.

    whole: what each reader makes of the honest files.
    """
    directory = fresh_copy(honest_files, place)
    same = apply(change, directory)
    for reader, expected in whole.items():
        try_one(reader, directory, expected if same else None)


def fuzz(name: str, place: Path, examples: int) -> str:
    """Try so many changes of a target's files; return what went wrong, in a forked process."""
    _limit()
    target, files = TARGETS[name], place / "honest" / "snapshots" / "x"
    files.parent.mkdir(parents=True)
    target.write(files)
    found = sorted(str(p.relative_to(files)) for p in files.rglob("*") if p.is_file())
    copy = place / "case" / "snapshots" / "x"
    whole = {reader: reader(files) for reader in target.readers}

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(mutations(found))
    def every_change(mutation: Mutation) -> None:
        check(whole, files, copy, mutation)

    for mutation in FOUND.get(name, []):
        every_change = example(mutation)(every_change)
    try:
        every_change()
    except BaseException:
        return traceback.format_exc()[-6000:]
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return ""


def _limit() -> None:
    """Let this process end where it takes memory or time without a bound."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEGABYTES * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    signal.alarm(900)


if __name__ == "__main__":
    names = sys.argv[2:] or [name for name in TARGETS if "checkpoint" not in name]
    for each in names:
        begin = time.monotonic()
        print(each, fuzz(each, Path(tempfile.mkdtemp()), int(sys.argv[1])) or "fine", end=" ")
        print(f"{time.monotonic() - begin:.1f} s")
