"""Commands whose writing fails or is stopped: one sentence, nothing half written, nothing left."""

import codecs
import contextlib
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megalora.__main__ import main
from megalora.hf.peft import write_adapter
from tests.support import forked
from tests.support.hf_models import hf_model, random_factors

FAILS = pytest.mark.bad_input("a write that fails")
COMMANDS = {
    "export": "export checkpoint --vocab-size 66",
    "import": "import peft --hf-model base --padded-vocab-size 72",
    "merge": "merge peft --hf-model base",
    "import-base": "import-base --hf-model base --dtype float32",
}
# Of a user who may do nothing.
NOBODY = 65534

type Said = tuple[int, str]


def run(place: Path, command: str, prepare: Callable[[Path], object] | None = None) -> Said:
    """Run a command, in a process of its own; return its status and what it says is wrong."""
    os.chdir(place)
    forked._fork_results()
    os.environ.pop("MEGALORA_TRACEBACK", None)
    if prepare is not None:
        prepare(place)
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        status = main(command.split())
    return status, "\n".join(x for x in said.getvalue().splitlines() if x.startswith("error"))


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """Return a directory that everybody may look into, with a base, an adapter, a checkpoint."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    model = hf_model("qwen3")
    model.save_pretrained(str(place / "base"), max_shard_size="20KB")
    (place / "base" / "tokenizer.json").write_text("{}")
    write_adapter(place / "peft", random_factors(model, {"": (8, 4.0)}), base_model_name="tiny")
    for file in place.rglob("*.safetensors"):
        file.chmod(0o644)
    done = forked.call(run, place, f"{COMMANDS['import']} --output checkpoint")
    assert done == (0, "")
    yield place
    shutil.rmtree(place)


@pytest.fixture
def there(place: Path) -> Iterator[set[str]]:
    """Return what is in the place; a test leaves it as it was."""
    before = set(os.listdir(place))
    yield before
    left = set(os.listdir(place)) - before
    for name in left:
        shutil.rmtree(place / name)
    assert not left


def limit_files(_: Path) -> None:
    # Writing beyond it is an OSError, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))


@pytest.mark.parametrize("command", COMMANDS)
@FAILS
def test_a_write_that_fails_says_why(place: Path, there: set[str], command: str) -> None:
    status, said = forked.call(run, place, f"{COMMANDS[command]} --output new/out", limit_files)
    assert status == 2
    assert said.startswith("error: output 'new/out' cannot be written: ")
    assert "File too large" in said
    assert said.endswith(": nothing was written to it")


def fill_a_disk(place: Path) -> None:
    user = os.geteuid()
    os.unshare(os.CLONE_NEWNS | (os.CLONE_NEWUSER if user else 0))
    words = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(place / "disk")]
    subprocess.run(words, check=True)


def run_on_full_disk(place: Path, command: str) -> Said | str:
    try:
        status, said = run(place, f"{command} --output disk/out", fill_a_disk)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no mounts: {error}"
    left = os.listdir("disk")
    return status, f"{said}; left: {left}"


# Safetensors writes the one, torch the other.
@pytest.mark.parametrize("command", ["merge", "import"])
@FAILS
def test_a_full_disk_says_so(place: Path, there: set[str], command: str) -> None:
    (place / "disk").mkdir()
    done = forked.call(run_on_full_disk, place, COMMANDS[command])
    (place / "disk").rmdir()
    if isinstance(done, str):
        pytest.skip(done)
    status, said = done
    assert status == 2
    assert said.startswith("error: output 'disk/out' cannot be written: ")
    assert "No space left on device" in said
    assert said.endswith(": nothing was written to it; left: []")


# === Permissions ===


def as_nobody(_: Path) -> None:
    """Give up the right to read and write everything."""
    # What is imported later may be out of reach, and so may a codec.
    codecs.lookup("utf-8-sig")
    from megalora.hf import commands, one_process  # noqa: F401

    if os.geteuid() == 0:
        os.setegid(NOBODY)
        os.seteuid(NOBODY)


def merge_as_nobody(place: Path, output: str) -> Said:
    """Merge in this process, as it needs no Megatron."""
    from megalora.hf import commands  # noqa: F401

    codecs.lookup("utf-8-sig")
    user, group, said = os.geteuid(), os.getegid(), io.StringIO()
    with contextlib.chdir(place), contextlib.redirect_stderr(said):
        if user == 0:
            os.setegid(NOBODY)
            os.seteuid(NOBODY)
        try:
            status = main(f"{COMMANDS['merge']} --output {output}".split())
        finally:
            os.seteuid(user)
            os.setegid(group)
    return status, "".join(x for x in said.getvalue().splitlines() if x.startswith("error"))


@pytest.fixture
def modes(place: Path) -> Iterator[Callable[[str, int], None]]:
    """Change modes of files, and back."""
    before: dict[Path, int] = {}

    def change(name: str, mode: int) -> None:
        before[place / name] = (place / name).stat().st_mode
        (place / name).chmod(mode)

    yield change
    for path, mode in before.items():
        path.chmod(mode)


UNREADABLE = {
    "peft/adapter_config.json": "merge",
    "peft/adapter_model.safetensors": "merge",
    "peft": "merge",
    "base/config.json": "merge",
    "base/model-00001-of-00006.safetensors": "import-base",
    "base/tokenizer.json": "merge",
    "base": "merge",
    "checkpoint/release/.metadata": "export",
    "checkpoint/latest_checkpointed_iteration.txt": "export",
}


@pytest.mark.parametrize("name", UNREADABLE)
@FAILS
def test_what_may_not_be_read_is_not_called_missing(
    place: Path, there: set[str], modes: Callable[[str, int], None], name: str
) -> None:
    modes(name, 0)
    place.chmod(0o777)
    if UNREADABLE[name] == "merge":
        status, said = merge_as_nobody(place, "out")
    else:
        command = f"{COMMANDS[UNREADABLE[name]]} --output out"
        status, said = forked.call(run, place, command, as_nobody)
    assert status == 2
    assert name.rpartition("/")[2] in said
    assert "Permission denied" in said
    assert "missing" not in said
    assert "exist" not in said
    assert said.count("\n") == 0


@FAILS
def test_a_place_that_may_not_be_written_is_named(place: Path, there: set[str]) -> None:
    place.chmod(0o755)
    (place / "closed").mkdir(mode=0o700)
    for output, why in (("out", f"{place}:"), ("closed/out", "closed"), ("new/below/out", "new:")):
        status, said = merge_as_nobody(place, output)
        assert status == 2
        assert said.startswith(f"error: output {output!r}")
        assert "Permission denied" in said
        assert why in said
    (place / "closed").rmdir()


def test_a_base_may_be_read_only_and_the_result_is_not(
    place: Path, modes: Callable[[str, int], None]
) -> None:
    place.chmod(0o777)
    for name in ("base/tokenizer.json", "base/config.json", "base"):
        modes(name, 0o555)
    os.utime(place / "base" / "tokenizer.json", (1, 1))
    assert merge_as_nobody(place, "out") == (0, "")
    files = [path.stat() for path in (place / "out").iterdir()]
    assert {status.st_mode & 0o777 for status in files} == {0o644}
    assert min(status.st_mtime for status in files) > 1, "times are not the stranger's"
    shutil.rmtree(place / "out")


# === Signals ===


def signal_when(event: str, part: str, number: int) -> Callable[[Path], None]:
    """Send this process a signal once something happens to a file whose path has a part."""
    sent: list[int] = []

    def hook(name: str, args: tuple[object, ...]) -> None:
        if name == event and part in str(args[1 if event == "os.rename" else 0]) and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    return lambda _: sys.addaudithook(hook)


def run_stopped(place: Path, command: str, event: str, part: str, number: int) -> Said:
    return run(place, f"{command} --output out", signal_when(event, part, number))


def run_noticing(place: Path, command: str, number: int) -> Said:
    # Where tests run in the background, or under nohup, some signals are ignored.
    signal.signal(number, signal.SIG_DFL)
    return run_stopped(place, command, "open", ".out.megalora-new", number)


@pytest.mark.parametrize(
    ("command", "number"),
    [
        *((command, signal.SIGTERM) for command in COMMANDS),
        ("import", signal.SIGINT),
        ("merge", signal.SIGHUP),
    ],
)
@FAILS
def test_a_signal_stops_a_command_and_nothing_is_left(
    place: Path, there: set[str], command: str, number: signal.Signals
) -> None:
    done = forked.call(run_noticing, place, COMMANDS[command], number)
    assert done == (128 + number, f"error: stopped by {number.name}: nothing was written")


@FAILS
def test_a_signal_in_the_last_moment_waits_for_it(place: Path) -> None:
    renamed = f"{place}/out"
    done = forked.call(run_stopped, place, COMMANDS["merge"], "os.rename", renamed, signal.SIGTERM)
    assert done == (143, "error: stopped by SIGTERM: out is written")
    assert (place / "out" / "megalora.json").is_file()
    shutil.rmtree(place / "out")


def test_a_signal_that_is_ignored_stays_so(place: Path) -> None:
    assert forked.call(run_under_nohup, place) == (0, "")
    shutil.rmtree(place / "out")


def run_under_nohup(place: Path) -> Said:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    return run_stopped(place, COMMANDS["merge"], "open", ".out.megalora-new", signal.SIGHUP)


@FAILS
def test_what_a_killed_command_left_the_next_one_removes(place: Path, there: set[str]) -> None:
    half = ".out.megalora-new"
    with pytest.raises(EOFError):
        forked.call(run_stopped, place, COMMANDS["merge"], "open", half, signal.SIGKILL)
    assert [name for name in os.listdir(place) if name.startswith(half)]
    status, _ = forked.call(run, place, f"{COMMANDS['export']} --output out")
    assert status == 0
    assert set(os.listdir(place)) == there | {"out"}
    shutil.rmtree(place / "out")
