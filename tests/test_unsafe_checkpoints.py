"""No code from a checkpoint: a payload in any of its files is refused by name, and never runs."""

import argparse
import contextlib
import itertools
import pickle
import shutil
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PosixPath

import pytest
import torch
from torch.distributed._shard.sharded_tensor import metadata as before_torch_2_3
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from megalora.checkpoint.unpickle import (
    ALLOWED,
    MetadataUnpickler,
    check_readable,
    read_metadata,
)
from megalora.config import LoRAConfig
from megalora.training.trust import check_spec, check_trust
from tests.support.forgery import Payload, forge, in_file, in_tensor, runs, set_flag
from tests.support.forked import SCRIPT, Ranks, call
from tests.support.readers import READERS
from tests.support.tiny import LORA, flags, train

RUN, BASE = "iter_0000001", "iter_0000001"
COMMON, RNG = "common_state/shard_0_1", "rng_state/shard_0.0_1.1"
EXTRA = "decoder.layers.mlp.linear_fc1._extra_state/shard_0_4"
LEGACY = "mp_rank_00/model_optim_rng.pt"
FILES = (".metadata", "common.pt", COMMON)
COMMANDS = {name: reader for name, reader in READERS.items() if name != "base"}
code_in_a_file = pytest.mark.bad_input("code in a file")


@pytest.fixture(scope="module")
def honest(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One iteration of each: `base`, `legacy` in Megatron's older format, and a `run` of LoRA."""
    place = tmp_path_factory.mktemp("honest")
    shutil.copytree(base, place / "base")
    train(1, place / "legacy", "--ckpt-format", "torch", iters=1).succeed()
    train(1, place / "run", *LORA, "--pretrained-checkpoint", place / "base", iters=1).succeed()
    return place


# --- what reads without a run ---

Said = dict[tuple[str, str], tuple[bool, str, bool]]


def read_forged(run: Path, place: Path) -> Said:
    """Return of each file and reader: whether the payload works, what was said, whether it ran."""
    said: Said = {}
    marker = place / "marker"
    for file in FILES:
        for name, reader in COMMANDS.items():
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(run, place / "run")
            works = runs(forge(place / "run" / RUN, file, Payload(marker)), marker)
            try:
                reader(place / "run")
                error = ""
            except ValueError as refusal:
                error = str(refusal)
            said[file, name] = works, error, marker.exists()
    return said


@pytest.fixture(scope="module")
def said(honest: Path, tmp_path_factory: pytest.TempPathFactory) -> Said:
    return call(read_forged, honest / "run", tmp_path_factory.mktemp("forged") / "place")


@code_in_a_file
@pytest.mark.parametrize("reader", COMMANDS)
@pytest.mark.parametrize("file", FILES)
def test_a_reader_refuses_a_payload_by_its_file(said: Said, file: str, reader: str) -> None:
    works, error, has_run = said[file, reader]
    assert works
    assert not has_run
    assert "asks for '_io.open'" in error
    assert file in error


# --- what a run of training loads ---


@dataclass(frozen=True, slots=True)
class Forged:
    """A checkpoint with a payload in a file, and the flags of a run that meets it."""

    kind: str
    file: str
    flags: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Name it, as in `base .metadata --use-checkpoint-args`."""
        return " ".join([self.kind, self.file, *self.flags])


ARGS = ("--use-checkpoint-args",)
FORGED = [
    *(Forged("base", file) for file in (*FILES, EXTRA)),
    Forged("base", ".metadata", ("--ckpt-assume-constant-structure",)),
    *(Forged("base", file, ARGS) for file in FILES),
    Forged("legacy", LEGACY),
    Forged("legacy", LEGACY, ARGS),
    *(Forged("run", file) for file in (".metadata", RNG)),
    *(Forged("run", file, ARGS) for file in FILES),
]


def start(honest: Path, forged: Path, kind: str, *more: str, world: int = 1) -> Ranks:
    """Start a run on a forged copy of one of the honest ones."""
    base = forged if kind != "run" else honest / "base"
    saved = forged if kind == "run" else forged.parent / "out"
    return train(world, saved, *LORA, "--pretrained-checkpoint", base, *more, iters=2)


@code_in_a_file
@pytest.mark.parametrize("case", FORGED, ids=str)
def test_a_run_ends_at_a_payload_in_one_sentence(
    honest: Path, tmp_path: Path, case: Forged
) -> None:
    copy = shutil.copytree(honest / case.kind, tmp_path / case.kind)
    marker = tmp_path / "marker"
    assert runs(forge(copy / RUN, case.file, Payload(marker)), marker)
    text = start(honest, copy, case.kind, *case.flags).fail()
    (sentence,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert "asks for '_io.open'" in sentence
    assert case.file.removeprefix("mp_rank_00/") in sentence
    assert str(copy) in sentence
    assert not marker.exists()


@code_in_a_file
def test_a_payload_for_the_second_rank_alone_ends_the_run(honest: Path, tmp_path: Path) -> None:
    tp2 = flags("tp2")
    train(2, tmp_path / "run", *LORA, *tp2, iters=1).succeed()
    marker = tmp_path / "marker"
    data = forge(tmp_path / "run" / RUN, "rng_state/shard_0.1_1.2", Payload(marker))
    assert runs(data, marker)
    run = train(2, tmp_path / "run", *LORA, *tp2, iters=2)
    run.fail()
    assert "rng_state/shard_0.1_1.2' in __1_0.distcp asks for '_io.open'" in run.logs[1].read_text()
    assert not marker.exists()


@code_in_a_file
@pytest.mark.parametrize(
    ("kind", "file"), [("run", "rerun_state_machine_state/shard_0_1"), ("base", RNG)]
)
def test_a_payload_in_what_a_run_does_not_read_never_runs(
    honest: Path, tmp_path: Path, kind: str, file: str
) -> None:
    copy = shutil.copytree(honest / kind, tmp_path / kind)
    marker = tmp_path / "marker"
    assert runs(forge(copy / RUN, file, Payload(marker)), marker)
    start(honest, copy, kind).succeed()
    assert not marker.exists()


def test_a_base_of_the_older_format_is_trained_on(honest: Path, tmp_path: Path) -> None:
    start(honest, honest / "legacy", "legacy", "--save", str(tmp_path / "out")).succeed()


# --- what torch saved without Megatron ---


def load_by_torch(directory: Path, *, hooked: bool) -> tuple[str, bool]:
    """Load what torch saved; return the error, and whether the payload ran."""
    from torch.distributed.checkpoint.api import CheckpointException

    from megalora.builder import lora_hook

    if hooked:
        with contextlib.suppress(ValueError):  # there is no model
            lora_hook(LoRAConfig(rank=8))([])
    error, marker = "", directory / "marker"
    try:
        torch.distributed.checkpoint.load({"args": None}, checkpoint_id=directory, no_dist=True)
    except CheckpointException as refusal:
        error = str(refusal)
    has_run = marker.exists()
    marker.unlink(missing_ok=True)
    return error, has_run


def try_torchs(directory: Path) -> list[tuple[str, bool]]:
    """Save a payload by torch; load it as torch does, and behind a hook of LoRA."""
    state = {"args": Payload(directory / "marker"), "iteration": 1}
    torch.distributed.checkpoint.save(state, checkpoint_id=directory, no_dist=True)
    return [load_by_torch(directory, hooked=hooked) for hooked in (False, True)]


@code_in_a_file
def test_what_torch_saved_is_read_safely_behind_a_hook_and_in_a_run(tmp_path: Path) -> None:
    directory = tmp_path / "base" / RUN
    directory.mkdir(parents=True)
    plain, hooked = call(try_torchs, directory)
    assert plain == ("", True)
    assert "'args' in __0_0.distcp asks for '_io.open'" in hooked[0]
    assert not hooked[1]
    (tmp_path / "base" / "latest_checkpointed_iteration.txt").write_text("1")
    text = start(tmp_path, tmp_path / "base", "base").fail()
    assert f"error: checkpoint {tmp_path / 'base'}: 'args' in __0_0.distcp asks for" in text
    assert not (directory / "marker").exists()


# --- what a checkpoint would have a run import ---


@code_in_a_file
def test_a_run_does_not_import_what_a_checkpoint_names(honest: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "stranger.py").write_text(f"layers = open({str(marker)!r}, 'w')")
    copy = shutil.copytree(honest / "base", tmp_path / "base")
    call(set_flag, copy / BASE, "spec", ["stranger", "layers"])
    script = shutil.copy(SCRIPT, tmp_path)
    words = ["--pretrained-checkpoint", copy, *ARGS]
    train(1, tmp_path / "plain", *words, iters=1, script=script).fail()
    assert marker.exists()
    marker.unlink()
    text = train(1, tmp_path / "run", *LORA, *words, iters=1, script=script).fail()
    assert "error: spec is ['stranger', 'layers'] in the checkpoint" in text
    assert "give --spec stranger layers" in text
    assert not marker.exists()


def test_a_checkpoint_may_name_layers_of_megatron_and_what_the_user_named() -> None:
    own = ["megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"]
    for spec, given in ((None, None), (own, None), (["mine", "layers"], ["mine", "layers"])):
        check_spec(spec, given)
    with pytest.raises(ValueError, match="spec is"):
        check_spec(["mine", "layers"], own)


# --- what a layer of TransformerEngine unpickles by itself ---


def extra_states(marker: Path) -> list[tuple[bool, str, bool]]:
    """Return of each payload: whether it works, what is said, whether it ran; a fair one first."""
    from megalora.checkpoint.loading import load_base_checkpoint

    sys.modules["transformer_engine"] = types.ModuleType("transformer_engine")
    fair = {"scale_fwd": torch.ones(2), "extra_fp8_variables": {"fp8_checkpoint": True}}
    found = []
    for value, write in itertools.product((fair, Payload(marker)), (in_tensor, in_file)):
        state = {"model": {"decoder.linear._extra_state": write(value), "other": None}}
        works = runs(write(value, plain=True), marker)
        error = ""
        try:
            assert load_base_checkpoint(lambda load_dir, state=state: (state,), "DIR") == (state,)
        except ValueError as refusal:
            error = str(refusal)
        found.append((works, error, marker.exists()))
    return found


@code_in_a_file
def test_the_state_that_transformer_engine_would_unpickle_is_looked_at_before(
    tmp_path: Path,
) -> None:
    *fair, of_tensor, of_file = call(extra_states, tmp_path / "marker")
    assert fair == [(False, "", False)] * 2
    for works, error, has_run in (of_tensor, of_file):
        assert works
        assert error.startswith("decoder.linear._extra_state in checkpoint DIR asks for ")
        assert not has_run


# --- what a run would save and could not read ---


class Kind:
    """A value of a script's own flag."""


def refusals() -> list[str]:
    """Return what is said of flags: of honest ones, and of two that do not come back."""
    import megatron.core  # noqa: F401  it tells torch what is safe

    said = []
    for value in (Path("a"), Kind(), lambda: None):
        try:
            check_readable(argparse.Namespace(rank=3, kind=value, none=None))
            said.append("")
        except ValueError as refusal:
            said.append(str(refusal))
    return said


def test_a_flag_that_a_checkpoint_could_not_be_read_with_is_refused_at_start() -> None:
    fair, *refused = call(refusals)
    assert fair == ""
    for said, kind in zip(
        refused, ("test_unsafe_checkpoints.Kind", "builtins.function"), strict=True
    ):
        assert said.startswith("kind is a ")
        assert f"{kind}, which no checkpoint of this run could be read with" in said


@pytest.mark.bad_input("code in a file")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"trust_remote_code": True}, "trust_remote_code is set"),
        ({"non_persistent_ckpt_type": "local"}, "non_persistent_ckpt_type is 'local'"),
        ({"modelopt_enabled": True}, "modelopt_enabled is set"),
    ],
    ids=str,
)
def test_a_flag_by_which_data_brings_code_is_refused(given: dict, message: str) -> None:
    check_trust(argparse.Namespace(**dict.fromkeys(given)))
    with pytest.raises(ValueError, match=message):
        check_trust(argparse.Namespace(**given))


@pytest.mark.bad_input("code in a file")
def test_a_variable_that_lets_torch_run_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(ValueError, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set"):
        check_trust(argparse.Namespace())


# --- what real checkpoints name ---


class Recorder(MetadataUnpickler):
    """Keeps what a file asks for."""

    asked: set[tuple[str, str]] = set()  # noqa: RUF012

    def find_class(self, module: str, name: str) -> object:
        """Note a name, and return what it stands for."""
        self.asked.add((module, name))
        return super().find_class(module, name)


def as_others_wrote_it() -> Iterator[bytes]:
    """Yield what earlier versions of torch, Megatron and Python put into the file."""
    properties = before_torch_2_3.TensorProperties(torch.float32)
    tensor = TensorStorageMetadata(properties, torch.Size([1]), [])  # type: ignore[arg-type]
    data = pickle.dumps(
        Metadata({"a": tensor}, None, {}, StorageMeta(checkpoint_id=PosixPath("a"))), protocol=2
    )
    yield data
    yield data.replace(b"cpathlib\n", b"cpathlib._local\n")


def test_the_table_has_what_real_files_name_and_nothing_else(honest: Path, tmp_path: Path) -> None:
    train(1, tmp_path / "run", *LORA, "--use-distributed-optimizer", iters=1).succeed()
    # Its second save writes names that the first did not.
    constant = ["--ckpt-assume-constant-structure", "--save-interval", 1]
    train(1, tmp_path / "constant", *constant, iters=2).succeed()
    files = [*honest.rglob(".metadata"), *tmp_path.rglob(".metadata")]
    assert len(files) == 5
    for data in (*(file.read_bytes() for file in files), *as_others_wrote_it()):
        assert isinstance(Recorder(data, "file").load(), Metadata)
    dtypes = {name for name, value in ALLOWED.items() if isinstance(value, torch.dtype)}
    assert {name for name in Recorder.asked if name not in dtypes} == {*ALLOWED} - dtypes


def test_a_file_is_read_as_torch_reads_it(honest: Path) -> None:
    reader = FileSystemReader(honest / "base" / BASE)
    ours, torchs = read_metadata(reader), reader.read_metadata()
    assert ours == torchs
    assert pickle.dumps(ours) == pickle.dumps(torchs)
