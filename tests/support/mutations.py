"""Honest files changed as a slip, a bad disk or a stranger would, one change at a time."""

import json
import os
import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

# JSON as it may stand in a file, some of it no JSON at all.
VALUES = [
    *("null", "true", "false", "0", "1", "2", "3", "-1", "32.0", "0.5", "1e999", "-0.0"),
    *("NaN", "Infinity", "-Infinity", "1" + "0" * 12, str(2**63), "9" * 301, "1" * 5000, "1e", ""),
    *('""', '"2"', '"model"', '"\\ud800"', '"\\u001b[31mred\\nerror: done\\u202e"', '"\\u0000"'),
    *('"F64"', '"I32"', '"BOOL"', "[1, 1]", "[0, 4]", "[64]"),
    *('"../x"', '"/dev/zero"', '"x.safetensors"', '"ﬀ é 你"', '"' + "x" * 100_000 + '"'),
    *("[]", "{}", "[1]", '["a"]', "[[0, 1]]", '{"a": 1}', '{"a": 1, "a": 2}', '[{"a": null}]'),
    *('{"(a+)+!": 2}', '{"(": 2}', '{"q_proj": 2}', '{".*": 1}', '{"(?=q)q_proj": 3}'),
    "[" * 60 + "]" * 60,
    "[" * 65 + "]" * 65,
    '{"a":' * 3000 + "1" + "}" * 3000,
    "[" * 200_000,
    '["' + '\\"' * 100_000,
    "[" + "1," * 100_000 + "1]",
]
KEYS = ["", "a", "model_type", "use_dora", "weight_map", "\x1b[31m\n", "x" * 2000, "__metadata__"]
JSON_OPS = ["replace", "drop", "twice", "add", "rename"]
BYTE_OPS = ["flip", "cut", "insert", "remove", "zero", "utf-16", "append"]
FILE_OPS = [
    *("missing", "empty", "directory", "pipe", "socket", "sparse", "loop"),
    *("link to /dev/zero", "link outside", "link to nothing"),
]
# The same content, which must be read as the same.
HARMLESS = ["link inside", "hub link", "mark", "spaces", "order"]


class Mutation(NamedTuple):
    """What is done to one file; place: where, in what is there, counted round and round."""

    file: str
    kind: str
    place: int = 0
    value: str = "null"
    key: str = ""


def mutations(files: list[str]) -> st.SearchStrategy[Mutation]:
    """Draw one change of one of these files."""
    kinds = [*JSON_OPS, *JSON_OPS, *JSON_OPS, *BYTE_OPS, *FILE_OPS, *HARMLESS]
    plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    nested = st.recursive(
        plain, lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=3), each)
    )
    return st.builds(
        Mutation,
        st.sampled_from(files),
        st.sampled_from(kinds),
        st.integers(0, 10_000),
        st.sampled_from(VALUES) | st.sampled_from(VALUES) | nested.map(json.dumps),
        st.sampled_from(KEYS),
    )


def apply(mutation: Mutation, directory: Path) -> bool:
    """Change a directory's file; return whether it holds the same still."""
    path = directory / mutation.file
    if mutation.kind in FILE_OPS:
        _replace(path, mutation.kind, mutation.place)
        return False
    if mutation.kind in ("link inside", "hub link"):
        _link(path, mutation.kind)
        return True
    data = path.read_bytes()
    if mutation.kind in BYTE_OPS:
        changed = _bytes_changed(data, mutation)
    elif mutation.file.endswith(".safetensors"):
        size = struct.unpack("<Q", data[:8])[0]
        header = _json_changed(data[8 : 8 + size], mutation._replace(kind=_structural(mutation)))
        changed = struct.pack("<Q", len(header)) + header + data[8 + size :]
    elif mutation.file.endswith(".jsonl"):
        lines = data.splitlines(keepends=True)
        number = mutation.place % len(lines)
        lines[number] = _json_changed(lines[number], mutation).replace(b"\n", b" ") + b"\n"
        changed = b"".join(lines)
    elif mutation.file.endswith(".json"):
        changed = _json_changed(data, mutation)
    else:
        changed = _bytes_changed(data, mutation._replace(kind="flip"))
        path.write_bytes(changed)
        return False
    path.write_bytes(changed)
    # A checkpoint's files are held against their checksums, and read by Megatron.
    return mutation.kind in HARMLESS and path.parent == directory


def _structural(mutation: Mutation) -> str:
    """Safetensors allows no mark before its header."""
    return "spaces" if mutation.kind == "mark" else mutation.kind


def _replace(path: Path, kind: str, place: int) -> None:
    path.unlink()
    target = path.with_name(".target")
    match kind:
        case "empty":
            path.touch()
        case "directory":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "socket":
            with socket.socket(socket.AF_UNIX) as server:
                here = os.open(path.parent, os.O_RDONLY)
                server.bind(f"/proc/self/fd/{here}/{path.name}"[:100])
                os.close(here)
        case "sparse":
            with path.open("wb") as file:
                file.truncate(2**40 + place)
        case "loop":
            target.symlink_to(path)
            path.symlink_to(target)
        case "link to /dev/zero":
            path.symlink_to("/dev/zero")
        case "link outside":
            path.symlink_to("/etc/hostname")
        case "link to nothing":
            path.symlink_to(path.parent / "nothing")


def _link(path: Path, kind: str) -> None:
    inside = path.with_name(f".real-{path.name}.kept")
    if kind == "hub link" and path.parent.parent.name == "snapshots":
        inside = path.parent.parent.parent / "blobs" / f"{path.parent.name}-{path.name}"
        inside.parent.mkdir(exist_ok=True)
    shutil.move(path, inside)
    path.symlink_to(os.path.relpath(inside, path.parent))


def _bytes_changed(data: bytes, mutation: Mutation) -> bytes:
    place = mutation.place * 7919 % (len(data) + 1)
    text = mutation.value.encode("utf-8", "surrogatepass")[:1000]
    match mutation.kind:
        case "flip":
            changed = bytearray(data or b"\0")
            changed[place % len(changed)] ^= 1 << (mutation.place % 8)
            return bytes(changed)
        case "cut":
            return data[:place]
        case "insert":
            return data[:place] + text + data[place:]
        case "remove":
            return data[:place] + data[place + 1 + mutation.place % 50 :]
        case "zero":
            return data[:place] + bytes(min(64, len(data) - place)) + data[place + 64 :]
        case "utf-16":
            return data.decode("latin-1").encode("utf-16")
        case _:
            return data + text


def _json_changed(data: bytes, mutation: Mutation) -> bytes:
    document = json.loads(data)
    match mutation.kind:
        case "mark":
            return b"\xef\xbb\xbf" + data
        case "spaces":
            return b"".join([json.dumps(document, separators=(" , ", " : ")).encode(), b"  "])
        case "order":
            return json.dumps(_reversed(document)).encode()
    places = list(_places(document))
    holder, key = places[mutation.place % len(places)]
    if mutation.kind == "replace":
        holder[key] = _RAW
    elif mutation.kind == "drop":
        del holder[key]
    elif isinstance(holder, dict) and mutation.kind in ("twice", "add"):
        name = str(key) + _TWICE if mutation.kind == "twice" else mutation.key
        holder[name] = _RAW
    elif isinstance(holder, dict):
        holder[mutation.key] = holder.pop(key)
    else:
        holder[key] = _RAW
    text = json.dumps(document, ensure_ascii=False).replace(_TWICE, "")
    return text.replace(f'"{_RAW}"', mutation.value).encode("utf-8", "surrogatepass")


_RAW, _TWICE = "@raw@", "@twice@"


def _reversed(value: Any) -> Any:
    return dict(reversed(value.items())) if isinstance(value, dict) else value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each place in a document as what holds it and its key there."""
    stack: list[Any] = [value]
    while stack:
        holder = stack.pop()
        keys: Any = holder if isinstance(holder, dict) else range(len(holder))
        for key in list(keys):
            yield holder, key
            if isinstance(holder[key], dict | list):
                stack.append(holder[key])


def fresh_copy(honest: Path, place: Path) -> Path:
    """Return a copy of an honest directory, which replaces the one of the case before."""
    shutil.rmtree(place.parent.parent, ignore_errors=True)
    return shutil.copytree(honest, place)


type Reader = Callable[[Path], object]
