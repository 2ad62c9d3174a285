"""Small servers that speak vLLM's and SGLang's HTTP, and really answer with a real adapter.

They hold transformers' model of a base and load what they are handed with PEFT, refuse what the
servers refuse in their words, and sample token by token with log probabilities. The tests of
readers run the servers' own code; `odd` gives answers that are none.
"""

import base64
import io
import json
import pickle
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file

from tests.support import hf_models

type Answer = tuple[int, bytes]
type Routes = Mapping[str, Callable[[Any], Answer]]


class Handler(BaseHTTPRequestHandler):
    """Passes JSON to a function by path; of no endpoint it says what FastAPI says."""

    routes: ClassVar[Routes] = {}

    def do_POST(self) -> None:
        """Answer a request, whose body has a length or comes in chunks."""
        assert self.headers["Content-Type"] == "application/json"
        route = self.routes.get(self.path)
        request = json.loads(b"".join(self._body()) or b"null")
        status, body = route(request) if route else (404, b'{"detail":"Not Found"}')
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        """Answer without a body."""
        self.headers["Content-Type"] = self.headers.get("Content-Type") or "application/json"
        self.do_POST()

    def _body(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                assert self.rfile.readline() == b"\r\n"
            self.rfile.readline()
        else:
            yield self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def log_message(self, *_: object) -> None:
        """Be quiet."""


class Server(ThreadingHTTPServer):
    """Lets as many wait to be accepted as ranks ask at once, which the default of 5 resets."""

    request_queue_size = 128
    daemon_threads = True


@contextmanager
def serving(routes: Routes, handler: type[BaseHTTPRequestHandler] = Handler) -> Iterator[str]:
    """Yield the URL of a server on this machine that has these routes."""
    kind = type("Routed", (handler,), {"routes": routes})
    server = Server(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Sampler:
    """A base, and the adapters that it has been given, by name."""

    def __init__(self, base: Path) -> None:
        self.base = hf_models.hf_model_from(base)
        self.adapters: dict[str, torch.nn.Module] = {}
        self.loads: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def load(self, name: str, directory: Path) -> None:
        """Load an adapter with PEFT, which leaves nothing of it out."""
        with self._lock:
            self.adapters[name] = hf_models.peft_model(self.base, directory)

    @torch.no_grad()
    def sample(
        self, name: str, prompt: list[int], count: int, stop: list[int], seed: int
    ) -> tuple[list[int], list[float], str]:
        """Return tokens, their log probabilities at temperature 1, and why they end."""
        generator = torch.Generator().manual_seed(seed)
        tokens: list[int] = []
        logprobs: list[float] = []
        with self._lock:
            for _ in range(count):
                logits = self.adapters[name](torch.tensor([[*prompt, *tokens]])).logits[0, -1]
                every = logits.double().log_softmax(-1)
                token = int(torch.multinomial(every.exp(), 1, generator=generator))
                tokens.append(token)
                logprobs.append(float(every[token]))
                if token in stop:
                    return tokens, logprobs, "stop"
        return tokens, logprobs, "length"


def vllm_routes(sampler: Sampler) -> Routes:
    """Return vLLM's endpoints."""
    paths: dict[str, str] = {}

    def load(request: dict[str, Any]) -> Answer:
        name, path = request["lora_name"], request["lora_path"]
        assert request.keys() <= {"lora_name", "lora_path", "load_inplace", "is_3d_lora_weight"}
        if not request.get("load_inplace") and name in sampler.adapters:
            return _vllm_error(400, f"The lora adapter '{name}' has already been loaded.")
        # What is cached of prompts is known by both, so a second time would be stale.
        assert paths.get(name) != path
        try:
            sampler.load(name, Path(path))
        except ValueError as error:
            return _vllm_error(500, str(error))
        sampler.loads.append(request)
        paths[name] = path
        return 200, f"Success: LoRA adapter '{name}' added successfully.".encode()

    def unload(request: dict[str, Any]) -> Answer:
        name = request["lora_name"]
        if name not in sampler.adapters:
            return _vllm_error(404, f"The lora adapter '{name}' cannot be found.")
        del sampler.adapters[name]
        return 200, f"Success: LoRA adapter '{name}' removed successfully.".encode()

    def complete(request: dict[str, Any]) -> Answer:
        if request["model"] not in sampler.adapters:
            return _vllm_error(404, f"The model `{request['model']}` does not exist.")
        assert request["temperature"] == request["top_p"] == request["repetition_penalty"] == 1.0
        assert (request["top_k"], request["min_p"], request["ignore_eos"]) == (0, 0.0, True)
        assert request["return_token_ids"]
        tokens, logprobs, reason = sampler.sample(
            request["model"],
            request["prompt"],
            request["max_tokens"],
            request["stop_token_ids"],
            request["seed"],
        )
        choice = {
            "index": 0,
            "text": "",
            "token_ids": tokens,
            "prompt_token_ids": request["prompt"],
            "logprobs": {"token_logprobs": logprobs, "tokens": [f"token_id:{t}" for t in tokens]},
            "finish_reason": reason,
        }
        return 200, json.dumps({"object": "text_completion", "choices": [choice]}).encode()

    return {
        "/v1/load_lora_adapter": load,
        "/v1/unload_lora_adapter": unload,
        "/v1/completions": complete,
    }


def _vllm_error(status: int, message: str) -> Answer:
    error = {"message": message, "type": "Error", "param": None, "code": status}
    return status, json.dumps({"error": error}).encode()


# What SGLang's unpickler lets a pickle name, of all that ours could.
ALLOWED = {("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict")}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda data: torch.load(io.BytesIO(data), weights_only=True)
        assert (module, name) in ALLOWED, (module, name)
        return super().find_class(module, name)


def unpickled(data: bytes) -> dict[str, torch.Tensor]:
    """Read tensors as SGLang does."""
    return _Unpickler(io.BytesIO(data)).load()


def sglang_routes(sampler: Sampler, *, tp_size: int = 1) -> Routes:
    """Return SGLang's endpoints."""

    def load(request: dict[str, Any]) -> Answer:
        name = request["lora_name"]
        if name in sampler.adapters:
            return _sglang_update(
                f"Failed to load LoRA adapter {name} because it is already loaded"
            )
        ranks = [base64.b64decode(r, validate=True) for r in request["serialized_named_tensors"]]
        assert len(ranks) == tp_size
        assert ranks.count(ranks[0]) == tp_size
        with tempfile.TemporaryDirectory() as place:
            directory = Path(place)
            tensors = {key: t.clone() for key, t in unpickled(ranks[-1]).items()}
            save_file(tensors, directory / "adapter_model.safetensors")
            (directory / "adapter_config.json").write_text(json.dumps(request["config_dict"]))
            sampler.load(name, directory)
        sampler.loads.append({"lora_name": name, "tensors": tensors})
        return _sglang_update(None)

    def unload(request: dict[str, Any]) -> Answer:
        if sampler.adapters.pop(request["lora_name"], None) is None:
            return _sglang_update(f"LoRA with name {request['lora_name']} does not exist.")
        return _sglang_update(None)

    def generate(request: dict[str, Any]) -> Answer:
        if request["lora_path"] not in sampler.adapters:
            message = f"Got LoRA adapter that has never been loaded: {request['lora_path']}"
            return 400, json.dumps({"error": {"message": message}}).encode()
        given = request["sampling_params"]
        assert given["temperature"] == given["top_p"] == given["repetition_penalty"] == 1.0
        assert (given["top_k"], given["min_p"]) == (-1, 0.0)
        assert request["return_logprob"]
        stop = [] if given["ignore_eos"] else given["stop_token_ids"]
        tokens, logprobs, reason = sampler.sample(
            request["lora_path"],
            request["input_ids"],
            given["max_new_tokens"],
            stop,
            given["sampling_seed"],
        )
        pairs = [[value, token, None] for value, token in zip(logprobs, tokens, strict=True)]
        meta = {
            "prompt_tokens": len(request["input_ids"]),
            "finish_reason": {"type": reason},
            "output_token_logprobs": pairs,
        }
        return 200, json.dumps({"text": "", "output_ids": tokens, "meta_info": meta}).encode()

    return {
        "/server_info": lambda _: (200, json.dumps({"tp_size": tp_size}).encode()),
        "/load_lora_adapter_from_tensors": load,
        "/unload_lora_adapter": unload,
        "/generate": generate,
    }


def _sglang_update(problem: str | None) -> Answer:
    found = {"success": problem is None, "error_message": problem, "loaded_adapters": {}}
    return 400 if problem else 200, json.dumps(found).encode()
