"""One run at a time in a directory of checkpoints, on machines that share nothing but its files.

The lock is a file. Who has it writes a new number into it every few seconds; whoever finds it
watches that number on a clock of its own, as clocks of two machines need not agree, unless it can
tell at once that the owner is gone. A run that slept so long that another took its place finds the
other's name there before it saves.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path

from megalora.checkpoint.durable import sync
from megalora.checkpoint.owner import Owner
from megalora.reading import parse_json

LOCK = "megalora.lock"
BEAT_S = 5.0
# After so long without a new number the owner is dead: several beats, should some come late.
WATCH_S = 6 * BEAT_S
_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Holder:
    """The run that has a directory. job, restarts: of Slurm, where it started the run."""

    host: str
    owner: Owner
    nonce: str
    since: str
    job: str
    restarts: int

    @classmethod
    def this(cls) -> "Holder":
        """Return this process as a new holder."""
        return cls(
            socket.gethostname(),
            Owner.this(),
            secrets.token_hex(8),
            time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            os.environ.get("SLURM_JOB_ID", ""),
            _number(os.environ.get("SLURM_RESTART_COUNT")),
        )

    def is_followed_by(self, other: "Holder") -> bool:
        """Say whether the other is the same Slurm job, requeued: Slurm has ended the one before."""
        return bool(self.job) and self.job == other.job and self.restarts < other.restarts

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.owner.pid} on {self.host}{job}, since {self.since}"


class Lock:
    """A directory's lock file, which this process holds."""

    def __init__(self, path: Path, holder: Holder, *, instead: bool) -> None:
        """Make the file; FileExistsError where it is there, unless it is to be replaced."""
        self.path, self.holder = path, holder
        self._stopped = threading.Event()
        self._file = _make(path, holder, instead=instead)
        threading.Thread(target=self._beat, daemon=True).start()
        # A forked process is not the owner, and multiprocessing clears its list of these.
        self._at_exit = Finalize(None, self.release, exitpriority=0)

    def _beat(self) -> None:
        number = 0
        while not self._stopped.wait(BEAT_S):
            number += 1
            # NOTE: into the file that was made, never by its name, which may be another's by now.
            with contextlib.suppress(OSError):
                os.pwrite(self._file, _first_line(number), 0)
                os.fsync(self._file)

    def check(self) -> None:
        """Raise ValueError where another run has the directory; a lost file is made anew."""
        found = _read(self.path)
        if found is None:
            with contextlib.suppress(FileExistsError):
                self._file = _make(self.path, self.holder, instead=False)
            found = _read(self.path)
        holder = _holder(found)
        if holder is None or holder.nonce != self.holder.nonce:
            raise ValueError(
                f"save {str(self.path.parent)!r} was taken over by another run ({_named(holder)}) "
                f"while this one stood still for more than {WATCH_S:g} s: this one ends before it "
                "writes"
            )

    def release(self) -> None:
        """Remove the file, unless it is another's by now."""
        self._stopped.set()
        holder = _holder(_read(self.path))
        if holder is not None and holder.nonce == self.holder.nonce:
            self.path.unlink(missing_ok=True)


# A process holds a lock until it ends, whoever asks for it.
_HELD: dict[str, Lock] = {}


def take(directory: str | os.PathLike[str]) -> None:
    """Hold a directory of checkpoints, made if missing, until this process ends.

    Raises ValueError where another run has it, after up to `WATCH_S` seconds where that run is on
    another machine.
    """
    root = Path(os.path.realpath(directory))
    if str(root) not in _HELD:
        try:
            root.mkdir(parents=True, exist_ok=True)
            _HELD[str(root)] = _take(root)
        except OSError as error:
            raise ValueError(
                f"save {os.fspath(directory)!r} cannot be written: {error.filename}: "
                f"{error.strerror}"
            ) from error


def _take(root: Path) -> Lock:
    path, holder = root / LOCK, Holder.this()
    lock, found = None, None
    with _alone(root) as is_alone:
        while lock is None:
            found = _read(path)
            if found is not None:
                _wait_for_end(path, found, holder)
            # Another may be faster, which the next round finds.
            with contextlib.suppress(FileExistsError):
                lock = Lock(path, holder, instead=found is not None)
        if not is_alone and found is not None:
            time.sleep(2 * _POLL_S)
            lock.check()
    return lock


def check(directory: str | os.PathLike[str]) -> None:
    """Raise ValueError where this process held a directory and another run has taken it."""
    lock = _HELD.get(os.path.realpath(directory))
    if lock is not None:
        lock.check()


def _wait_for_end(path: Path, found: bytes, newcomer: Holder) -> None:
    """Return once a lock's owner is known to be gone; ValueError where it is alive."""
    holder = _holder(found)
    if holder is not None and (holder.owner.is_gone() or holder.is_followed_by(newcomer)):
        return
    if holder is None or holder.owner.machine != newcomer.owner.machine:
        print(
            f"> LoRA: {path.parent} is locked by {_named(holder)}: watching for {WATCH_S:g} s "
            "whether that run is alive",
            flush=True,
        )
        end = time.monotonic() + WATCH_S
        while (seen := _read(path)) == found and time.monotonic() < end:
            time.sleep(_POLL_S)
        if seen in (found, None):
            return
    raise ValueError(
        f"save {str(path.parent)!r} is in use by another run ({_named(holder)}): wait for its end "
        "or stop it, or give another --save"
    )


def _make(path: Path, holder: Holder, *, instead: bool) -> int:
    """Write a lock file and return it open. instead: replace the one that is there."""
    new = path.with_name(f".{path.name}.{holder.nonce}") if instead else path
    file = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    os.write(file, _first_line(0) + json.dumps(dataclasses.asdict(holder)).encode())
    os.fsync(file)
    if instead:
        new.replace(path)
    sync(path.parent)
    return file


def _first_line(number: int) -> bytes:
    return b"%012d\n" % number


def _read(path: Path) -> bytes | None:
    try:
        # A lock has some hundred bytes.
        with path.open("rb") as file:
            return file.read(1 << 16)
    except FileNotFoundError:
        return None


def _holder(content: bytes | None) -> Holder | None:
    """Return whom a lock file names, None where it does not say."""
    try:
        fields = parse_json((content or b"").partition(b"\n")[2])
        owner = fields.pop("owner")
        texts = {name: str(fields[name]) for name in ("host", "nonce", "since", "job")}
        owner = Owner(str(owner["machine"]), int(owner["pid"]), int(owner["start"]))
        return Holder(owner=owner, restarts=int(fields["restarts"]), **texts)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _named(holder: Holder | None) -> str:
    return "whose lock file does not say" if holder is None else str(holder)


def _number(text: str | None) -> int:
    return int(text) if text and text.isascii() and text.isdigit() else 0


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[bool]:
    """Let one newcomer at a time look at a directory's lock, where the file system can do that.

    Gives whether it can: else two that replace a dead run's lock have to see who was the last.
    """
    directory = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(directory)
