"""A damaged adapter checkpoint is refused by name, whoever reads it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megalora.checkpoint.layout import TRACKER
from tests.support.forked import call
from tests.support.readers import READERS
from tests.support.tiny import LORA, flags, train

ITERATION = "iter_0000001"
TP2 = [*LORA, *flags("tp2")]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def tear(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


# Megatron's older releases write common.pt; a stray one would be read before all else.
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a bit of rank 0's tensors": (flip, f"{ITERATION}/__0_0.distcp"),
    "a bit of rank 1's tensors": (flip, f"{ITERATION}/__1_0.distcp"),
    "a bit of .metadata": (flip, f"{ITERATION}/.metadata"),
    "a bit of metadata.json": (flip, f"{ITERATION}/metadata.json"),
    "a bit of integrity.json": (flip, f"{ITERATION}/integrity.json"),
    "a bit of the tracker file": (flip, TRACKER),
    "a torn file of tensors": (tear, f"{ITERATION}/__1_0.distcp"),
    "a torn integrity.json": (tear, f"{ITERATION}/integrity.json"),
    "a missing file of tensors": (Path.unlink, f"{ITERATION}/__1_0.distcp"),
    "a missing .metadata": (Path.unlink, f"{ITERATION}/.metadata"),
    "a missing metadata.json": (Path.unlink, f"{ITERATION}/metadata.json"),
    "an additional common.pt": (Path.touch, f"{ITERATION}/common.pt"),
    "an empty tracker file": (lambda file: file.write_text(""), TRACKER),
}


Said = dict[tuple[str | None, str], str]


def try_all(checkpoint: Path, place: Path) -> Said:
    """Let every reader read every damaged copy; return what each said, empty where it read."""
    said: Said = {}
    for damage in (None, *DAMAGES):
        for name, reader in READERS.items():
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(checkpoint, place / "run")
            if damage is not None:
                change, file = DAMAGES[damage]
                change(place / "run" / file)
            said[damage, name] = ""
            try:
                reader(place / "run")
            except ValueError as error:
                said[damage, name] = str(error)
    return said


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One iteration of two ranks: `run` has their checkpoint, `merged` the whole model."""
    place = tmp_path_factory.mktemp("damage")
    train(2, place / "run", *TP2, "--save-merged", place / "merged", iters=1).succeed()
    return place


@pytest.fixture(scope="module")
def said(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Said:
    return call(try_all, trained / "run", tmp_path_factory.mktemp("copy") / "place")


@pytest.mark.parametrize("reader", READERS)
def test_an_intact_checkpoint_is_read(said: Said, reader: str) -> None:
    assert said[None, reader] == ""


@pytest.mark.bad_input("a malformed file")
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_and_its_file_named(said: Said, damage: str, reader: str) -> None:
    name = DAMAGES[damage][1].rpartition("/")[2]
    assert name in said[damage, reader]


@pytest.mark.parametrize("reader", READERS)
def test_the_sentence_says_what_to_do(said: Said, reader: str) -> None:
    assert "copy it again" in said["a bit of rank 0's tensors", reader]
    assert "write 1 into it" in said["a bit of the tracker file", reader]


def test_a_run_goes_on_where_a_tracker_file_says_nothing(said: Said) -> None:
    assert "going on from iteration 1" in said["an empty tracker file", "resume"]


@pytest.mark.parametrize(
    ("flag", "source", "directory"),
    [("--lora-load", "run", ITERATION), ("--pretrained-checkpoint", "merged", "release")],
)
def test_all_ranks_of_a_run_end_with_the_same_sentence(
    trained: Path, tmp_path: Path, flag: str, source: str, directory: str
) -> None:
    copy = shutil.copytree(trained / source, tmp_path / source)
    flip(copy / directory / "__1_0.distcp")
    run = train(2, tmp_path / "bad", *TP2, flag, copy, iters=1)
    run.fail()
    sentence = f"checkpoint {copy / directory} is damaged: __1_0.distcp does not match its checksum"
    assert all(f"error: {sentence}" in log.read_text() for log in run.logs), run.text()


def test_a_merged_model_is_verified_and_trained_on(trained: Path, tmp_path: Path) -> None:
    assert (trained / "merged" / "release" / "integrity.json").is_file()
    merged = ["--pretrained-checkpoint", trained / "merged"]
    train(2, tmp_path / "run", *TP2, *merged, iters=1).succeed()
