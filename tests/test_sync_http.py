"""A server that fails in whatever way ends in one sentence that names its URL."""

import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch

from megalora.rollouts.asking import checked
from megalora.rollouts.engine import Answer, Sampling
from megalora.rollouts.sglang import _answer as sglang_answer
from megalora.rollouts.vllm import _answer as vllm_answer
from megalora.sync import Http, SGLangClient, VLLMClient
from megalora.sync.pickled import pickle_tensors
from tests.support.stand_in_servers import Handler, serving, unpickled

malformed = pytest.mark.bad_input("a malformed file")
unbounded = pytest.mark.bad_input("work without bound")


def routed(status: int, body: bytes, **options: Any) -> Iterator[Http]:
    with serving({"/x": lambda _: (status, body)}) as url:
        yield Http(url=url, timeout_s=10, **options)


@malformed
def test_a_server_that_is_down_is_named() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(ValueError, match=rf"http://127.0.0.1:{port}/x does not answer .*refused"):
        Http(url=f"http://127.0.0.1:{port}").get("/x")


class _Dripping(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        """Send a byte now and then, and never come to an end."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX: ")
        for _ in range(100):
            time.sleep(0.02)
            self.wfile.write(b"x")

    def log_message(self, *_: object) -> None:
        """Be quiet."""


@unbounded
def test_a_server_that_hangs_is_left_at_the_deadline_whether_it_drips_or_not() -> None:
    begin = time.monotonic()
    with (
        serving({}, _Dripping) as url,
        pytest.raises(ValueError, match=r"/x has not answered within 0.3 seconds.*timeout_s"),
    ):
        Http(url=url, timeout_s=0.3).get("/x")
    listening = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    with listening, pytest.raises(ValueError, match=r"has not answered within 0\.2 seconds"):
        Http(url=url, timeout_s=0.2).get("/x")
    assert time.monotonic() - begin < 5
    assert threading.active_count() < 10


@unbounded
def test_an_answer_is_read_up_to_its_bound() -> None:
    for http in routed(200, b"x" * 70_000, max_response_bytes=66_000):
        with pytest.raises(ValueError, match="answers with more than 66,000 bytes"):
            http.post("/x", b"{}")


class _Cut(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        """Say that more comes than does."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + b'{"a": 1}')

    def log_message(self, *_: object) -> None:
        """Be quiet."""


@malformed
def test_half_an_answer_is_none() -> None:
    with (
        serving({}, _Cut) as url,
        pytest.raises(ValueError, match=r"does not answer .*92 bytes too early"),
    ):
        VLLMClient(Http(url=url, timeout_s=10)).complete({})


class _CutHeaders(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        """End among the headers of what would be a success."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self.wfile.write(b"HTTP/1.1 200 OK\r\nServer: uvicorn\r\n")

    def log_message(self, *_: object) -> None:
        """Be quiet."""


@malformed
def test_half_of_the_headers_are_no_success() -> None:
    with serving({}, _CutHeaders) as url, pytest.raises(ValueError, match="how long it is"):
        VLLMClient(Http(url=url, timeout_s=10)).load("a", Path("/b"))


class _Elsewhere(BaseHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012

    def do_POST(self) -> None:
        """Point to another place on this server."""
        self.asked.append(self.path)
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(307)
        self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Be quiet."""


@malformed
def test_a_redirect_is_not_followed() -> None:
    with serving({}, _Elsewhere) as url, pytest.raises(ValueError, match="redirects"):
        VLLMClient(Http(url=url, timeout_s=10)).load("a", Path("/b"))
    assert _Elsewhere.asked == ["/v1/load_lora_adapter"]


@pytest.mark.parametrize(
    "url",
    [
        *("ftp://host/x", "file:///etc/passwd", "host:8000", "http://", "http://host:99999", ""),
        *("http://me:secret@host", "http://host/?a=1", "http://host/a b", "http://host/\r\nX: 1"),
    ],
)
@malformed
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="server URL") as found:
        Http(url=url)
    assert "secret" not in str(found.value)


@pytest.mark.parametrize("key", ["", "a\r\nX: 1", "ä"])
@malformed
def test_a_key_that_no_header_holds_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ValueError, match="api_key"):
        Http(url="http://host", api_key=key)
    assert "secret" not in repr(Http(url="http://host", api_key="secret"))


def test_a_key_is_sent_as_a_bearer_token_to_a_path_below_the_address() -> None:
    seen: list[str | None] = []

    class Seeing(Handler):
        def do_POST(self) -> None:
            seen.append(self.headers["Authorization"])
            super().do_POST()

    with serving({"/below/v1/unload_lora_adapter": lambda _: (200, b"ok")}, Seeing) as url:
        VLLMClient(Http(url=f"{url}/below/", api_key="secret")).unload("a")
    assert seen == ["Bearer secret"]


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (404, b'{"detail":"Not Found"}', "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"),
        (404, b'{"error": {"message": "No adapter found for /b"}}', "No adapter found for /b$"),
        (500, b'{"error": {"message": "LoRA rank 64 is greater"}}', r"HTTP 500\): LoRA rank 64"),
        (500, b"Internal\x1b[31m Server Error", r"Internal\\x1b\[31m Server"),
        (503, b"", "no reason given"),
    ],
)
@malformed
def test_what_vllm_refuses_is_said_with_its_reason(status: int, body: bytes, message: str) -> None:
    with (
        serving({"/v1/load_lora_adapter": lambda _: (status, body)}) as url,
        pytest.raises(ValueError, match=message) as found,
    ):
        VLLMClient(Http(url=url, timeout_s=10)).load("a", Path("/b"))
    assert f"{url}/v1/load_lora_adapter refuses" in str(found.value)


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (400, b'{"success": false, "error_message": "already loaded"}', "already loaded"),
        (200, b'{"success": false, "error_message": "rank 64"}', "refuses: rank 64"),
        (200, b'{"success": 1}', "refuses"),
        (200, b"[]", "a JSON list"),
        (200, b"<html>", "not JSON"),
        (200, b"[" * 5000, "nested deeper"),
    ],
)
@malformed
def test_what_sglang_refuses_is_said_with_its_reason(
    status: int, body: bytes, message: str
) -> None:
    with (
        serving({"/load_lora_adapter": lambda _: (status, body)}) as url,
        pytest.raises(ValueError, match=f"{url}/load_lora_adapter .*{message}"),
    ):
        SGLangClient(Http(url=url, timeout_s=10)).load("a", Path("/b"))


@pytest.mark.parametrize("size", [None, 0, True, "2", 10**9])
@malformed
def test_a_size_that_is_none_is_refused(size: object) -> None:
    info = json.dumps({"tp_size": size}).encode()
    with (
        serving({"/server_info": lambda _: (200, info)}) as url,
        pytest.raises(ValueError, match="says tp_size"),
    ):
        SGLangClient(Http(url=url, timeout_s=10)).tp_size()


@pytest.mark.parametrize("tp_size", [1, 3])
def test_each_rank_of_sglang_is_sent_all_tensors(tp_size: int) -> None:
    tensors = {
        f"t{n}": torch.randn(3, n + 1).to(torch.bfloat16 if n % 2 else torch.float32)
        for n in range(9)
    }
    tensors |= {"a view": torch.arange(12.0).view(3, 4).T, "none": torch.empty(0, 2)}
    seen: list[dict[str, Any]] = []

    def load(request: dict[str, Any]) -> tuple[int, bytes]:
        seen.append(request)
        return 200, b'{"success": true}'

    with serving({"/load_lora_adapter_from_tensors": load}) as url:
        client = SGLangClient(Http(url=url, timeout_s=10))
        pieces = pickle_tensors(tensors.items(), piece_bytes=50)
        client.load_tensors("a", {"r": 1, "é": "ü"}, pieces, tp_size=tp_size)
    [request] = seen
    assert (request["lora_name"], request["config_dict"]) == ("a", {"r": 1, "é": "ü"})
    ranks = request["serialized_named_tensors"]
    assert ranks == [ranks[0]] * tp_size
    found = unpickled(base64.b64decode(ranks[0], validate=True))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype, name


# === Answers ===

PROMPT, SAMPLING = [5, 6], Sampling(max_tokens=3, stop=(9,))
GOOD: dict[str, Any] = {"tokens": [1, 9], "logprobs": [-0.5, -1.0], "reason": "stop"}


def as_vllm(**changes: Any) -> Answer:
    given = {**GOOD, "prompt": PROMPT, **changes}
    choice = {
        "token_ids": given["tokens"],
        "prompt_token_ids": given["prompt"],
        "logprobs": {"token_logprobs": given["logprobs"]},
        "finish_reason": given["reason"],
    }
    return vllm_answer("http://h/v1", {"choices": [choice]}, PROMPT, SAMPLING)


def as_sglang(**changes: Any) -> Answer:
    given = {**GOOD, "prompt": PROMPT, **changes}
    values, tokens = given["logprobs"], given["tokens"]
    pairs = None
    if isinstance(values, list):
        pairs = [[v, t, None] for v, t in zip(values, tokens or [], strict=False)]
    meta = {
        "prompt_tokens": len(given["prompt"] or []),
        "output_token_logprobs": pairs,
        "finish_reason": {"type": given["reason"]},
    }
    return sglang_answer("http://h/v1", {"output_ids": tokens, "meta_info": meta}, PROMPT, SAMPLING)


@pytest.mark.parametrize("read", [as_vllm, as_sglang])
def test_an_answer_is_read(read: Any) -> None:
    assert read() == Answer([1, 9], [-0.5, -1.0], True)
    by_limit = {"tokens": [1, 2, 3], "logprobs": [-1, -2.0, 1e-6], "reason": "length"}
    assert read(**by_limit) == Answer([1, 2, 3], [-1.0, -2.0, 0.0], False)
    by_both = {"tokens": [1, 2, 9], "logprobs": [-1, -2.0, -3.0]}
    assert read(**by_both, reason="length") == read(**by_both, reason="stop")
    assert read(**by_both, reason="length").ended


ODD: dict[str, tuple[dict[str, Any], str]] = {
    "no tokens": ({"tokens": []}, "3 tokens at most"),
    "too many tokens": ({"tokens": [1, 2, 3, 9], "logprobs": [-1.0] * 4}, "3 tokens at most"),
    "tokens that are none": ({"tokens": [1.5, 9]}, "3 tokens at most"),
    "a negative token": ({"tokens": [-1, 9]}, "3 tokens at most"),
    "too few log probabilities": ({"logprobs": [-1.0]}, "log probabilities"),
    "no log probabilities": ({"logprobs": None}, "log probabilities"),
    "one that is missing": ({"logprobs": [-1.0, None]}, "missing or not finite"),
    "one that is not a number": ({"logprobs": [-1.0, float("nan")]}, "missing or not finite"),
    "one that is text": ({"logprobs": [-1.0, "-1"]}, "missing or not finite"),
    "logits": ({"logprobs": [3.0, 12.0]}, "--logprobs-mode"),
    "an impossible token": ({"logprobs": [-1.0, -9999.0]}, "no log probabilities of sampled"),
    "another end": ({"tokens": [1, 2]}, "add what ends the model's texts to stop"),
    "a limit of the server's own": ({"tokens": [1, 2], "reason": "length"}, "longest context"),
    "an end passed over": ({"tokens": [9, 9]}, "ended by 'stop'"),
    "an end by failure": ({"reason": "abort"}, "ended by 'abort'"),
    "another prompt": ({"prompt": [5, 6, 7]}, "prompt"),
}


@pytest.mark.parametrize("read", [as_vllm, as_sglang])
@pytest.mark.parametrize("odd", ODD)
@malformed
def test_an_answer_that_was_not_asked_for_is_refused(odd: str, read: Any) -> None:
    changes, message = ODD[odd]
    with pytest.raises(ValueError, match=message) as found:
        read(**changes)
    assert str(found.value).startswith("http://h/v1")


@pytest.mark.parametrize("found", [{}, {"choices": []}, {"choices": [1]}, {"choices": {}}])
@malformed
def test_no_choice_or_two_are_no_answer(found: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="one choice was asked for"):
        vllm_answer("http://h", found, PROMPT, SAMPLING)


@pytest.mark.parametrize("logprobs", [[1], [[1]], [{}], "x", None])
@malformed
def test_pairs_that_are_none_are_no_answer(logprobs: object) -> None:
    meta = {"prompt_tokens": 2, "output_token_logprobs": logprobs}
    with pytest.raises(ValueError, match="log probabilities were asked for"):
        sglang_answer("http://h", {"output_ids": [1], "meta_info": meta}, PROMPT, SAMPLING)


def test_a_token_that_ends_answers_may_come_as_the_last_of_all() -> None:
    at_once = Sampling(max_tokens=1, stop=(9,))
    assert checked("h", [9], [-1.0], "stop", at_once) == checked(
        "h", [9], [-1.0], "length", at_once
    )
