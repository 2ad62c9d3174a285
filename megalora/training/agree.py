"""Ranks that disagree end together, before they train: what must be equal on all is compared.

Where all agree, one all-reduce of 16 bytes says so on any number of ranks. Only where they do not,
each tells in what it differs from the first.
"""

import hashlib
import json
import socket
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

# What is compared by name, as it is shown where it differs.
Fields = Mapping[str, str]
# A rank's node, and those of its fields that are not the first rank's.
Told = tuple[str, Mapping[str, str]]

# More fields, or more values of a field, than a sentence can take are left out.
_MAX_NAMED = 3
_NO_SAY = -(2**63)
_ABSENT = "not there"


def check(fields: Fields | None, remedy: str) -> None:
    """Raise ValueError on all ranks where the fields of one are not those of rank 0.

    fields: None on a rank that has no say, which rank 0 should have. remedy: what to do, for the
    message. All ranks must call it.
    """
    if problem := difference(fields):
        raise ValueError(f"ranks disagree: {problem}: {remedy}")


def difference(fields: Fields | None, group: ProcessGroup | None = None) -> str | None:
    """Return in what the ranks of a group (default: all) differ, None where they agree.

    All of them must call it, and are told the same.
    """
    own = digest(fields)
    extremes = torch.tensor(own, dtype=torch.int64, device="cuda")
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group)
    if agreed(extremes.tolist()):
        return None
    ranks = dist.get_process_group_ranks(group)
    first: list[Any] = [fields or {}]
    dist.broadcast_object_list(first, src=ranks[0], group=group)
    told: list[Any] = [None] * len(ranks)
    differing = {} if fields is None else differing_fields(fields, first[0])
    dist.all_gather_object(told, (socket.gethostname(), differing), group)
    return describe(first[0], cast(list[Told], told), ranks)


def digest(fields: Fields | None) -> tuple[int, int]:
    """Return a hash of 64 bits and its complement, whose maxima over ranks tell if all are one."""
    if fields is None:
        return _NO_SAY, _NO_SAY
    text = json.dumps(fields, sort_keys=True).encode()
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), signed=True)
    return number, ~number


def agreed(extremes: Sequence[int]) -> bool:
    """Say whether all with a say had the same digest, by the maxima of both its numbers."""
    largest, complement_of_smallest = extremes
    return largest in (_NO_SAY, ~complement_of_smallest)


def differing_fields(fields: Fields, first: Fields) -> dict[str, str]:
    """Return the fields that are not the first rank's, as many as are named."""
    names = sorted(name for name in {*fields, *first} if fields.get(name) != first.get(name))
    return {name: fields.get(name, _ABSENT) for name in names[:_MAX_NAMED]}


def describe(first: Fields, told: Sequence[Told], ranks: Sequence[int]) -> str:
    """Return in words which ranks have which value of the first fields that differ.

    told: of each of `ranks`, of which the first has the fields `first`. The rarest value comes
    first.
    """
    names = sorted({name for _, differing in told for name in differing})
    parts = []
    for name in names[:_MAX_NAMED]:
        places: dict[str, list[str]] = defaultdict(list)
        for rank, (host, differing) in zip(ranks, told, strict=True):
            value = differing.get(name, first.get(name, _ABSENT))
            places[value].append(f"rank {rank} ({host})")
        # Of as many, the first rank's comes last.
        own = first.get(name, _ABSENT)
        rarest = sorted(places.items(), key=lambda place: (len(place[1]), place[0] == own))
        values = [
            f"{value} on {where[0]}{_and_more(where)}" for value, where in rarest[:_MAX_NAMED]
        ]
        parts.append(f"{name} is {', but '.join(values)}")
    return "; ".join(parts)


def _and_more(where: Sequence[str]) -> str:
    return f" and {len(where) - 1} more" if len(where) > 1 else ""
