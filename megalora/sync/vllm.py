"""vLLM 0.33.0 over HTTP: adapters by path, and completions of token ids.

Read in its source: serve/lora/{api_router,protocol}.py, openai/models/serving.py and
openai/completion/{protocol,serving}.py under vllm/entrypoints; lora/worker_manager.py.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from megalora.sync.http import Http, Reply, json_of, reason_of

_LOAD, _UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
_COMPLETIONS = "/v1/completions"
_RUNTIME = "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora"


@dataclass(frozen=True)
class VLLMClient:
    """A vLLM server, started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora."""

    http: Http

    def load(self, name: str, path: Path) -> None:
        """Serve the adapter in a directory under a name, in place of one that has it already.

        The path has to be another each time: vLLM knows what it has cached of prompts by name and
        path, and keeps it. The server must see the directory under the same path.
        Raises ValueError, which names the URL and the server's reason, where it does not.
        """
        self._post(_LOAD, {"lora_name": name, "lora_path": str(path), "load_inplace": True})

    def unload(self, name: str) -> None:
        """Serve an adapter no longer; ValueError where the server refuses."""
        self._post(_UNLOAD, {"lora_name": name})

    def complete(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to a request of `/v1/completions`; ValueError where it is refused."""
        return json_of(self._post(_COMPLETIONS, request), self._where(_COMPLETIONS))

    def _post(self, path: str, request: Mapping[str, Any]) -> Reply:
        reply = self.http.post(path, json.dumps(request).encode())
        if reply.status != HTTPStatus.OK:
            # An endpoint that is not there answers by itself, an adapter that is not by a message.
            is_missing = reply.status == HTTPStatus.NOT_FOUND and b'"detail"' in reply.body
            remedy = f": {_RUNTIME}" if is_missing and path != _COMPLETIONS else ""
            raise ValueError(
                f"{self._where(path)} refuses (HTTP {reply.status}): {reason_of(reply)}{remedy}"
            )
        return reply

    def _where(self, path: str) -> str:
        return self.http.url.rstrip("/") + path
