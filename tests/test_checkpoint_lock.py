"""One run at a time saves in a directory, and a dead run keeps nobody out of it."""

import dataclasses
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from megalora.checkpoint import lock
from megalora.checkpoint.lock import LOCK, Holder, Lock
from megalora.checkpoint.owner import Owner
from tests.support.forked import Ranks
from tests.support.tiny import LORA, MODEL, TRAIN

NOT_OURS = pytest.mark.bad_input("a directory that is not ours")
FORK = multiprocessing.get_context("fork")
# Of a machine that this one cannot look into.
ELSEWHERE = Owner("0123456789ab", 1, 1)
BEAT_S = 0.05
LONG_S = 60.0


@pytest.fixture(autouse=True)
def beating_fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(lock, "BEAT_S", BEAT_S)
    monkeypatch.setattr(lock, "WATCH_S", 6 * BEAT_S)
    monkeypatch.setattr(lock, "_POLL_S", 0.01)
    yield
    for held in lock._HELD.values():
        held.release()
    lock._HELD.clear()


def put(root: Path, **fields: Any) -> Path:
    """Write the lock file of a run of which nothing else is there."""
    holder = dataclasses.replace(Holder.this(), **fields)
    os.close(lock._make(root / LOCK, holder, instead=False))
    return root / LOCK


def nonce(root: Path) -> str:
    return json.loads((root / LOCK).read_bytes().partition(b"\n")[2])["nonce"]


def hold(root: Path, told: Connection) -> None:
    """Take a directory, say what came of it, and hold it until told to end."""
    try:
        lock.take(root)
        told.send("")
    except ValueError as error:
        told.send(str(error))
    told.recv()


class Other:
    """Another process that wants a directory."""

    def __init__(self, root: Path) -> None:
        self.told, end = FORK.Pipe()
        self.process = FORK.Process(target=hold, args=(root, end), daemon=True)
        self.process.start()

    def end(self, how: int = 0) -> None:
        """End it in order, or by a signal."""
        if how:
            os.kill(self.process.pid or 0, how)
        else:
            self.told.send("end")
        self.process.join()


@NOT_OURS
def test_a_second_run_is_told_who_has_the_directory(tmp_path: Path) -> None:
    other = Other(tmp_path)
    assert other.told.recv() == ""
    with pytest.raises(ValueError, match=r"is in use by another run .*give another --save") as said:
        lock.take(tmp_path)
    assert f"process {other.process.pid} on {os.uname().nodename}, since 2" in str(said.value)
    other.end()
    assert not (tmp_path / LOCK).exists(), "an orderly end gives it back"
    lock.take(tmp_path)


def test_a_killed_run_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "WATCH_S", LONG_S)
    other = Other(tmp_path)
    assert other.told.recv() == ""
    other.end(signal.SIGKILL)
    assert (tmp_path / LOCK).exists()
    start = time.monotonic()
    lock.take(tmp_path)
    assert time.monotonic() - start < LONG_S / 2


def put_dead(root: Path) -> None:
    """Write the lock file of an earlier process that had this one's number."""
    this = Owner.this()
    put(root, owner=Owner(this.machine, this.pid, this.start - 1))


def test_a_later_process_of_the_same_number_is_another(tmp_path: Path) -> None:
    put_dead(tmp_path)
    lock.take(tmp_path)
    assert nonce(tmp_path) == lock._HELD[str(tmp_path)].holder.nonce


def test_a_run_on_another_machine_is_watched_and_its_silence_is_death(tmp_path: Path) -> None:
    put(tmp_path, owner=ELSEWHERE)
    start = time.monotonic()
    lock.take(tmp_path)
    assert time.monotonic() - start >= lock.WATCH_S
    lock.check(tmp_path)


@NOT_OURS
def test_a_run_on_another_machine_that_beats_is_alive(tmp_path: Path) -> None:
    alive = Lock(
        tmp_path / LOCK, dataclasses.replace(Holder.this(), owner=ELSEWHERE), instead=False
    )
    with pytest.raises(ValueError, match="is in use by another run"):
        lock.take(tmp_path)
    alive.check()
    alive.release()


@pytest.mark.parametrize(
    ("job", "restarts", "waits"),
    [("42", "1", False), ("42", "0", True), ("43", "1", True), ("", "", True)],
    ids=["requeued", "twice in one job", "another job", "no job"],
)
def test_a_requeued_slurm_job_goes_on_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, restarts: str, waits: bool
) -> None:
    put(tmp_path, owner=ELSEWHERE, job="42", restarts=0)
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    if not waits:
        monkeypatch.setattr(lock, "WATCH_S", LONG_S)
    start = time.monotonic()
    lock.take(tmp_path)
    assert waits == (time.monotonic() - start >= min(lock.WATCH_S, LONG_S / 2))


def changed(content: bytes, **fields: object) -> bytes:
    first, _, rest = content.partition(b"\n")
    return first + b"\n" + json.dumps({**json.loads(rest), **fields}).encode()


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "torn": lambda content: content[:-20],
    "no JSON": lambda content: b"\xff" * 100,
    "a list": lambda content: b"0\n[1, 2]",
    "deep": lambda content: b"0\n" + b"[" * 60_000,
    "a path for a pid": lambda content: changed(
        content, owner={"machine": "", "pid": "../x", "start": 1}
    ),
    "no nonce": lambda content: content.replace(b"nonce", b"other"),
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.bad_input("a malformed file")
def test_a_damaged_lock_file_keeps_nobody_out_for_ever(tmp_path: Path, damage: str) -> None:
    file = put(tmp_path)
    file.write_bytes(DAMAGED[damage](file.read_bytes()))
    start = time.monotonic()
    lock.take(tmp_path)
    assert time.monotonic() - start >= lock.WATCH_S, "its owner may be alive"
    lock.check(tmp_path)


@NOT_OURS
def test_of_many_newcomers_one_gets_a_dead_runs_place(tmp_path: Path) -> None:
    put_dead(tmp_path)
    others = [Other(tmp_path) for _ in range(4)]
    said = [other.told.recv() for other in others]
    assert said.count("") == 1, said
    for other in others:
        other.end()


@NOT_OURS
def test_where_newcomers_cannot_wait_for_each_other_the_last_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError

    def let_another_in(_: float) -> None:
        holder = dataclasses.replace(Holder.this(), owner=ELSEWHERE, host="elsewhere")
        os.close(lock._make(tmp_path / LOCK, holder, instead=True))

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    put_dead(tmp_path)
    monkeypatch.setattr(lock.time, "sleep", let_another_in)
    with pytest.raises(ValueError, match=r"taken over by another run \(process 1 on elsewhere"):
        lock.take(tmp_path)


@NOT_OURS
def test_who_stood_still_does_not_write_over_its_follower(tmp_path: Path) -> None:
    lock.take(tmp_path)
    os.unlink(tmp_path / LOCK)
    put(tmp_path, owner=ELSEWHERE, host="elsewhere")
    theirs = (tmp_path / LOCK).read_bytes()
    time.sleep(3 * BEAT_S)
    with pytest.raises(ValueError, match=r"was taken over by another run \(process 1 on elsewhere"):
        lock.check(tmp_path)
    lock._HELD[str(tmp_path)].release()
    assert (tmp_path / LOCK).read_bytes() == theirs


def test_a_lost_file_is_made_anew(tmp_path: Path) -> None:
    lock.take(tmp_path)
    before = nonce(tmp_path)
    os.unlink(tmp_path / LOCK)
    lock.check(tmp_path)
    assert nonce(tmp_path) == before


@pytest.mark.bad_input("a write that fails")
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"save '.*/file/run' cannot be written: .*Not a directory"
    ):
        lock.take(tmp_path / "file" / "run")


# === Real runs ===


def start(base: Path, directory: Path, name: str, *more: object) -> Ranks:
    given = [*MODEL, *TRAIN, *LORA, "--pretrained-checkpoint", base, "--save", directory, *more]
    return Ranks(2, given, directory.parent / name)


@NOT_OURS
def test_no_run_writes_into_the_checkpoints_of_another(base: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    short = start(base, directory, "short", "--train-iters", 3).succeed()
    assert max(short.losses()) == 3
    assert not (directory / LOCK).exists(), "an orderly end gives the directory back"

    goes_on = ["--load", directory, "--train-iters", 300]
    run = start(base, directory, "long", *goes_on)
    run.wait_until(lambda: max(run.losses(), default=0) >= 5)
    second = start(base, directory, "second", *goes_on)
    assert all(second.wait())
    assert f"is in use by another run (process {run.processes[0].pid} on" in second.text()
    assert run.is_alive(), run.text()

    (directory / LOCK).unlink()
    put(directory, owner=ELSEWHERE)
    assert all(run.wait())
    assert "was taken over by another run (process 1 on" in run.text()
    newest = int((directory / "latest_checkpointed_iteration.txt").read_text())
    assert newest >= max(run.losses()) - 3, "the next save ends it"
    assert max(directory.glob("iter_*")) == directory / f"iter_{newest:07d}"

    new = start(base, directory, "new", "--train-iters", 3)
    assert all(new.wait())
    assert f"save '{directory}' holds checkpoints already" in new.text()
