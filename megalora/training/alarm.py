"""A rank that fails alone tells all others, which then end too instead of waiting for it.

Over the store by which torch's processes meet, at MASTER_ADDR and MASTER_PORT: torchrun's, or else
rank 0's, which `init_process_group` then shares. A thread of each rank waits there for a key of its
own, without asking again; who fails sets those of all. A rank that is killed tells nobody: torchrun
or Slurm notices that, and the others where it was rank 0 and its store is gone.
"""

import atexit
import contextlib
import datetime
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistError, DistStoreError

# For rank 0 to listen, whose start may be slow; and for a word when the run ends.
_START = datetime.timedelta(minutes=5)
_WORD = datetime.timedelta(seconds=10)
# What a socket can be told to wait: 24 days are 2 ** 31 ms.
_LONG = datetime.timedelta(days=20)
# A rank that is told may be about to end by itself, with the same error or a file to close.
GRACE_S = 2.0
# The store ends with rank 0, which waits for those that have not yet read its last word.
LINGER_S = 10.0
_DONE = "done"


class Alarm:
    """This rank's end of the alarm between all ranks of a run."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Meet the other ranks; ValueError where that fails."""
        self.rank, self.world_size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
        self._address = f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}"
        has_agent = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._has_store = self.rank == 0 and not has_agent
        # torchrun's store outlives the ranks, and starts them again.
        names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
        self._prefix = "/".join(["megalora/alarm", *(environ.get(name, "") for name in names)])
        self._is_told_of = self.rank == 1 or environ.get("LOCAL_RANK") == "0"
        self._pid = os.getpid()
        self._is_first: bool | None = None
        self._woken, self._ends = threading.Event(), threading.Event()
        self._why = ""
        self._store = self._meet()
        self._watcher = threading.Thread(target=self._watch, name="megalora-alarm", daemon=True)
        self._watcher.start()

    def compare(self, name: str, value: str) -> None:
        """Raise ValueError where another rank has told another value of this name before."""
        own = f"{value} on rank {self.rank} ({socket.gethostname()})"
        first = self._connect(_WORD).compare_set(name, "", own).decode()
        if first.partition(" on rank ")[0] != value:
            raise ValueError(f"ranks disagree: {name} is {own}, but {first}")

    def tell(self) -> bool:
        """Tell all ranks that this one has failed; return whether it is the first that has.

        It is the one that says why: what the others then meet follows from it, or is the same.
        """
        if self._pid != os.getpid():
            return True
        if self._is_first is None:
            self._is_first = self._tell_first()
        return self._is_first

    def close(self) -> None:
        """Let this process end: no thread may wait in torch while the interpreter is taken down."""
        if self._pid != os.getpid():
            return
        self._ends.set()
        if self._is_first is None and not self._woken.is_set():
            ranks = range(self.world_size) if self._has_store else [self.rank]
            with contextlib.suppress(DistError):
                self._wake(self._connect(_WORD), ranks, _DONE)
        self._watcher.join(LINGER_S + _WORD.total_seconds())

    def _tell_first(self) -> bool:
        own = f"rank {self.rank} on {socket.gethostname()} has failed"
        with contextlib.suppress(DistError):
            if not self._woken.is_set():
                store = self._connect(_WORD)
                is_first = store.compare_set("failed", "", own).decode() == own
                if is_first:
                    self._wake(store, range(self.world_size), own)
                return is_first
        # Nobody can be asked: rank 0 has ended well, or another has told already.
        return not self._woken.is_set() or self._why == _DONE

    def _meet(self) -> Store:
        try:
            return self._connect(_START, has_store=self._has_store)
        except DistError as error:
            does = "listen" if self._has_store else "reach rank 0"
            raise ValueError(
                f"rank {self.rank} on {socket.gethostname()} cannot {does} at {self._address} "
                f"({str(error).splitlines()[0]}): set MASTER_ADDR to rank 0's node and "
                "MASTER_PORT to a free port of it"
            ) from None

    def _connect(self, timeout: datetime.timedelta, *, has_store: bool = False) -> Store:
        host, _, port = self._address.rpartition(":")
        store = TCPStore(
            host,
            int(port),
            is_master=has_store,
            timeout=timeout,
            wait_for_workers=False,
            # Of one process and port, so also the store of init_process_group.
            multi_tenant=True,
        )
        return PrefixStore(self._prefix, store)

    def _wake(self, store: Store, ranks: Sequence[int], why: str) -> None:
        # One message for all of them.
        store.multi_set([str(rank) for rank in ranks], [why] * len(ranks))  # type: ignore[attr-defined]

    def _watch(self) -> None:
        self._wait()
        if self._has_store:
            self._wait_for_readers()
        if self._why == _DONE or self._ends.wait(GRACE_S):
            return
        if self._is_told_of:
            who = f"rank {self.rank} on {socket.gethostname()}"
            print(f"megalora: {who} ends, because {self._why}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)

    def _wait(self) -> None:
        """Wait until this rank is woken, and know why."""
        own = str(self.rank)
        try:
            while not self._store.check([own]):
                with contextlib.suppress(DistStoreError):
                    self._store.wait([own], _LONG)
            self._why = self._store.get(own).decode()
            self._woken.set()
            self._store.add("read", 1)
        except DistError:
            self._why = self._why or f"rank 0 has gone, whose store was at {self._address}"
            self._woken.set()

    def _wait_for_readers(self) -> None:
        until = time.monotonic() + LINGER_S
        with contextlib.suppress(DistError):
            while self._store.add("read", 0) < self.world_size and time.monotonic() < until:
                time.sleep(0.02)


# A process is one rank of one run.
_alarms: list[Alarm] = []


def start(environ: Mapping[str, str]) -> None:
    """Watch for ranks that fail, where a launcher started several; a second call does nothing.

    Raises ValueError where the ranks cannot meet.
    """
    needed = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    if _alarms or int(environ.get("WORLD_SIZE", 1)) < 2 or not all(map(environ.get, needed)):
        return
    alarm = Alarm(environ)
    _alarms.append(alarm)
    atexit.register(alarm.close)
    show = sys.excepthook

    def show_first(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if tell():
            show(kind, error, traceback)

    sys.excepthook = show_first


def compare(name: str, value: str) -> None:
    """Raise ValueError where another rank has another value; nothing where no alarm is started."""
    for alarm in _alarms:
        alarm.compare(name, value)


def tell() -> bool:
    """Tell all ranks that this one fails; return whether it is to say why.

    MEGALORA_TRACEBACK in the environment lets all say it.
    """
    is_first = all(alarm.tell() for alarm in _alarms)
    return is_first or bool(os.environ.get("MEGALORA_TRACEBACK"))
