"""SGLang 0.5.23 over HTTP: adapters as tensors or by path, and answers to token ids.

Read in its source, under sglang/srt: entrypoints/http_server.py, managers/{io_struct,tp_worker,
tokenizer_control_mixin}.py, utils/common.py (SafeUnpickler), lora/{lora,lora_manager}.py.
"""

import json
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from megalora.sync.http import Http, Reply, json_of, reason_of

_TENSORS, _LOAD = "/load_lora_adapter_from_tensors", "/load_lora_adapter"
_UNLOAD, _GENERATE, _INFO = "/unload_lora_adapter", "/generate", "/server_info"
_MAX_TP = 1024


@dataclass(frozen=True)
class SGLangClient:
    """An SGLang server, started with --enable-lora."""

    http: Http

    def tp_size(self) -> int:
        """Return its tensor-parallel size, each rank of which wants tensors of its own."""
        reply, where = self.http.get(_INFO), self._where(_INFO)
        self._check(reply, _INFO)
        size = json_of(reply, where).get("tp_size")
        if type(size) is not int or not 1 <= size <= _MAX_TP:
            raise ValueError(f"{where} says tp_size {size!r:.100}: expected a number from 1 on")
        return size

    def load_tensors(
        self, name: str, config: Mapping[str, Any], pickled: Iterable[bytes], *, tp_size: int
    ) -> None:
        """Serve an adapter of tensors under a name that it has not yet.

        config: adapter_config.json. pickled: pieces of what `pickled.pickle_tensors` gives, each
        sent before the next is asked for where tp_size is 1, else held for the other ranks.
        Raises ValueError, which names the URL and the server's reason, where it does not.
        """
        pieces: Iterable[bytes] = pickled if tp_size == 1 else list(pickled)
        self._update(_TENSORS, _body(name, config, [pieces] * tp_size))

    def load(self, name: str, path: Path) -> None:
        """Serve the adapter in a directory under a name that it has not yet; see `load_tensors`."""
        self._update(_LOAD, _json({"lora_name": name, "lora_path": str(path)}))

    def unload(self, name: str) -> None:
        """Serve an adapter no longer; ValueError where the server refuses."""
        self._update(_UNLOAD, _json({"lora_name": name}))

    def generate(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to a request of `/generate`; ValueError where it is refused."""
        reply = self.http.post(_GENERATE, _json(request))
        self._check(reply, _GENERATE)
        return json_of(reply, self._where(_GENERATE))

    def _update(self, path: str, body: bytes | Iterable[bytes]) -> None:
        reply = self.http.post(path, body)
        self._check(reply, path)
        found = json_of(reply, self._where(path))
        if found.get("success") is not True:
            raise ValueError(f"{self._where(path)} refuses: {reason_of(reply)}")

    def _check(self, reply: Reply, path: str) -> None:
        if reply.status != HTTPStatus.OK:
            raise ValueError(
                f"{self._where(path)} refuses (HTTP {reply.status}): {reason_of(reply)}"
            )

    def _where(self, path: str) -> str:
        return self.http.url.rstrip("/") + path


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value).encode()


def _body(
    name: str, config: Mapping[str, Any], ranks: Sequence[Iterable[bytes]]
) -> Iterator[bytes]:
    """Yield the JSON of a request piece by piece: what the last field holds, in base64."""
    head = _json({"lora_name": name, "config_dict": dict(config)})
    yield head[:-1] + b', "serialized_named_tensors": ['
    for number, pieces in enumerate(ranks):
        yield b', "' if number else b'"'
        left = b""
        for piece in pieces:
            data = left + piece
            whole = len(data) - len(data) % 3
            left = data[whole:]
            yield b64encode(memoryview(data)[:whole])
        yield b64encode(left) + b'"'
    yield b"]}"
