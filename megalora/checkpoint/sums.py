"""Checksums of a checkpoint, whose files all ranks share: each is read by one of them.

Rank 0 decides what is looked at, and believes nobody but itself that a file is damaged: another
node may not see the directory, which is found where ranks compare what they read. Nor is anybody
believed that a file is intact who sees another manifest, as on a node with copies of its own.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import torch.distributed as dist

from megalora.adapters.world import rare_names, told_by
from megalora.checkpoint.layout import MANIFEST, Sums, check_sums, verify
from megalora.checkpoint.ranks import on_all_ranks

# Which file a manifest is, alike on all nodes that share it; None where it is not there.
type _Identity = tuple[int, int, int] | None
# Files to look at, with their SHA-256.
type _Asked = tuple[Path, Mapping[str, str], _Identity]


def with_all_ranks[T](work: Callable[[Sums], T]) -> T:
    """Do something on rank 0, and return what it gives on all, which must all call this.

    work: is given a function that checks sums with the help of all ranks. Its ValueError or OSError
    is raised on all of them, as a ValueError.
    """

    def lead() -> T:
        try:
            return work(_ask)
        finally:
            told_by(0, None)

    if dist.get_rank() != 0:
        while (asked := told_by(0, cast("_Asked | None", None))) is not None:
            _suspects(*asked)
    return on_all_ranks(lead, only=0)


def verify_on_all_ranks(directory: Path) -> None:
    """Verify a checkpoint and raise its ValueError on all ranks, which must all call it."""
    with_all_ranks(lambda sums: verify(directory, sums))


def _ask(directory: Path, digests: Mapping[str, str]) -> dict[str, str]:
    asked = directory, digests, _identity(directory)
    suspects = _suspects(*told_by(0, asked))
    return check_sums(directory, {name: digests[name] for name in sorted(suspects)})


def _suspects(directory: Path, digests: Mapping[str, str], identity: _Identity) -> set[str]:
    """Look at this rank's share of files; return the names that a rank cannot say are intact."""
    own = sorted(digests)[dist.get_rank() :: dist.get_world_size()]
    if own and _identity(directory) == identity:
        return rare_names(set(check_sums(directory, {name: digests[name] for name in own})))
    return rare_names(set(own))


def _identity(directory: Path) -> _Identity:
    try:
        found = os.stat(directory / MANIFEST)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
