"""Asynchronous saves: another process writes while training goes on."""

import hashlib
import json
import os
import signal
from pathlib import Path

import pytest

from tests.support.forked import Ranks, call
from tests.support.tiny import ASYNC, LORA, back_to, flags, same_tensors, train

ITERATIONS = 8
LAYOUT = flags("dp")


def start(base: Path, directory: Path, *more: object, world_size: int = 2, **kwargs) -> Ranks:
    given = [*LORA, "--pretrained-checkpoint", base, "--save-interval", 1, *more]
    return train(world_size, directory, *given, **{"iters": ITERATIONS, **kwargs})


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every iteration, saved synchronously."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    start(base, directory, *LAYOUT).succeed()
    return directory


@pytest.fixture(scope="module")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """Every iteration, saved asynchronously: training is ahead of what is written."""
    directory = tmp_path_factory.mktemp("async") / "run"
    return start(base, directory, *LAYOUT, *ASYNC).succeed()


def directory_of(run: Ranks) -> Path:
    return run.logs[0].parent.parent / "run"


def test_training_does_not_change_what_is_being_written(whole: Path, written: Ranks) -> None:
    # Else nothing was written while training went on, and equal bits are no wonder.
    assert "Starting a checkpoint save before previous has finished" in written.text()
    for iteration in range(1, ITERATIONS + 1):
        assert call(same_tensors, whole, directory_of(written), iteration)


def test_the_manifest_names_every_file_with_its_checksum(written: Ranks) -> None:
    for directory in directory_of(written).glob("iter_*"):
        files = json.loads((directory / "integrity.json").read_text())["files"]
        assert {*files, "integrity.json"} == {path.name for path in directory.iterdir()}
        for name, digest in files.items():
            assert hashlib.sha256((directory / name).read_bytes()).hexdigest() == digest


def test_an_asynchronous_run_goes_on_in_another_layout(
    base: Path, written: Ranks, tmp_path: Path
) -> None:
    back_to(directory_of(written), tmp_path / "run", 4)
    run = start(base, tmp_path / "run", *flags("tp2"), *ASYNC).succeed()
    # NOTE: Megatron logs the mean of the first two iterations after a start as the second's.
    for iteration in range(7, ITERATIONS + 1):
        assert run.losses()[iteration] == pytest.approx(written.losses()[iteration], rel=1e-5)


def test_a_kill_while_a_save_is_under_way_changes_no_bit(
    base: Path, whole: Path, tmp_path: Path
) -> None:
    run = start(base, tmp_path / "run", *LAYOUT, *ASYNC)
    run.wait_until(lambda: save_is_under_way(run))
    run.kill(1)
    assert any(run.wait())
    run = start(base, tmp_path / "run", *LAYOUT, *ASYNC).succeed()
    assert f"checkpoint from {tmp_path / 'run'} at iteration" in run.text()
    assert call(same_tensors, whole, tmp_path / "run", ITERATIONS)


def save_is_under_way(run: Ranks) -> bool:
    """Say whether one save has ended and another has not."""
    text = run.logs[0].read_text() if run.logs[0].exists() else ""
    saved = text.count("successfully saved checkpoint")
    return 0 < saved < text.count("scheduled an async checkpoint save")


def test_a_full_disk_is_reported_by_the_process_that_trains(
    base: Path, whole: Path, tmp_path: Path
) -> None:
    back_to(whole, tmp_path / "run", 4)
    run = start(base, tmp_path / "run", *LAYOUT, *ASYNC, env={"FILE_LIMIT": "200000"})
    text = run.fail()
    assert "error: checkpoint of iteration 5 was not saved" in text
    assert "OSError" in text
    assert "What is left there is iteration 4, intact" in text
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "4"


def test_a_writer_that_dies_ends_the_run_with_a_report(base: Path, tmp_path: Path) -> None:
    run = start(base, tmp_path / "run", *ASYNC, world_size=2, iters=1000)
    first = "successfully saved checkpoint from iteration       1"
    run.wait_until(lambda: first in run.text())
    os.kill(writer_of(run.processes[1].pid), signal.SIGKILL)
    text = run.fail()
    assert "the process that writes checkpoints ended (-9)" in text
    assert "intact" in text


def writer_of(rank: int) -> int:
    """Return the process that a rank has forked to write: not the one of the results."""
    children = Path(f"/proc/{rank}/task/{rank}/children").read_text().split()
    return min(int(child) for child in children)
