"""Which process a file or directory belongs to, and whether that process is gone."""

import hashlib
import os
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Owner:
    """A process, so named that no later one is taken for it.

    machine: digest of the host's name, its last start and the namespace of process ids, in which
    alone a pid means something. start: when the process started, in the kernel's ticks; -1 where
    the kernel does not say.
    """

    machine: str
    pid: int
    start: int

    @classmethod
    def this(cls) -> "Owner":
        """Return the calling process."""
        return cls(_machine(), os.getpid(), _start_of(os.getpid()))

    def is_gone(self) -> bool:
        """Say whether the process surely is gone: of another machine's that cannot be said."""
        if self.machine != _machine():
            return False
        start = _start_of(self.pid)
        # The files of other users' processes may be hidden.
        return not _exists(self.pid) if start < 0 else start != self.start


@cache
def _machine() -> str:
    """Return what tells this kernel and its process ids from all others that share the files."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        parts.append(os.readlink("/proc/self/ns/pid"))
    except OSError:
        # No Linux: processes can still be told by whether they exist.
        parts.append("")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _start_of(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return -1
    # After the name, which may have spaces: the state, and as the 20th field the start.
    state, *fields = stat.rpartition(")")[2].split()
    # A zombie is gone: only its parent has not heard of it.
    return 0 if state in "ZX" else int(fields[18])


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
