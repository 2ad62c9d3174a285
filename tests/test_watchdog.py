"""A run that stands still is ended with all that it started; a slow one goes on."""

from pathlib import Path

import psutil
import pytest

from tests.support import watchdog
from tests.support.forked import Ranks
from tests.support.watchdog import Watchdog, run_watched


class Clock:
    """Time that passes when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(watchdog.time, "monotonic", lambda: self.now)

    def watch(self, dog: Watchdog, seconds: int) -> bool:
        """Ask a watchdog twice a second, and return its last answer."""
        for _ in range(2 * seconds):
            self.now += 0.5
            stalled = dog.stalled()
        return stalled


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_run_that_writes_may_take_any_time(clock: Clock, tmp_path: Path) -> None:
    dog, log = Watchdog(tmp_path, 300), tmp_path / "rank0" / "out.log"
    log.parent.mkdir()
    for minutes in range(60):
        log.write_text("." * (minutes + 1))
        assert not clock.watch(dog, 240)


def test_a_run_that_writes_nothing_stands_still(clock: Clock, tmp_path: Path) -> None:
    dog = Watchdog(tmp_path, 300)
    assert not clock.watch(dog, 299)
    assert clock.watch(dog, 2)


def test_a_pause_of_the_machine_is_not_the_runs(clock: Clock, tmp_path: Path) -> None:
    dog = Watchdog(tmp_path, 300)
    clock.now += 10_000
    assert not dog.stalled()
    assert not clock.watch(dog, 290)
    assert clock.watch(dog, 20)


def test_a_command_that_stands_still_is_killed_with_its_children(tmp_path: Path) -> None:
    # The child is in a session of its own, as the ranks of torchrun are.
    hang = f"sh -c 'echo $$ > {tmp_path}/child; exec setsid sleep 1000' & echo started; sleep 1000"
    with pytest.raises(pytest.fail.Exception, match=r"nothing written for 1\.0 s\n.*\nstarted"):
        run_watched(["sh", "-c", hang], tmp_path, stall_s=1.0)
    assert not psutil.pid_exists(int((tmp_path / "child").read_text()))


def test_a_commands_output_and_status_come_back(tmp_path: Path) -> None:
    finished = run_watched(["sh", "-c", "echo one; echo two >&2; exit 3"], tmp_path)
    assert (finished.returncode, finished.stdout, finished.stderr) == (3, "one\n", "two\n")


def test_ranks_that_stand_still_are_killed(tmp_path: Path) -> None:
    script = tmp_path / "hang.py"
    script.write_text("import time\nprint('here', flush=True)\ntime.sleep(1000)\n")
    run = Ranks(2, [], tmp_path / "logs", script=script, by_megalora=False)
    run.wait_until(lambda: run.text().count("here") == 2)
    run.watchdog.stall_s = 0.5
    with pytest.raises(pytest.fail.Exception, match="nothing written"):
        run.wait()
    assert [process.exitcode for process in run.processes] == [-9, -9]
