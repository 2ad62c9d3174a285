"""HTTP with a server of inference: bounded in time and size, and every failure in one sentence."""

import contextlib
import re
import socket
import ssl
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from megalora.printable import printable
from megalora.reading import NotJSONError, parse_json

_MAX_RESPONSE_BYTES = 64 * 2**20
_CHUNK = 2**16
# Letters of a header's value that can end no line.
_KEY = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server answered: its status, and the bytes behind it."""

    status: int
    body: bytes


@dataclass(frozen=True, kw_only=True)
class Http:
    """A server at an address, which is asked over a connection of its own each time.

    url: `http://` or `https://`, where needed with a path before that of each endpoint. api_key:
    sent as a bearer token, shown nowhere. timeout_s: of a whole request, its answer included. Other
    ranks wait for it in a collective, so it has to be below --distributed-timeout-minutes.
    max_response_bytes: what is read of an answer at most. Redirects and proxies are not followed.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 300.0
    max_response_bytes: int = _MAX_RESPONSE_BYTES

    def __post_init__(self) -> None:
        """Raise ValueError for an address that is none of HTTP, or holds more than an address."""
        shown = f"server URL is {printable(self.url, 200)!r}"
        try:
            parts = urlsplit(self.url)
            has_host = bool(parts.hostname) and parts.port != 0
        except ValueError as error:
            raise ValueError(f"{shown}: {error}: give one like http://host:8000") from None
        if parts.scheme not in ("http", "https") or not has_host or not self.url.isprintable():
            raise ValueError(f"{shown}: give one like http://host:8000 or https://host")
        if parts.username is not None or parts.password is not None:
            raise ValueError(
                f"server URL of {parts.hostname} has a user or a password: give a key as api_key"
            )
        if parts.query or parts.fragment or " " in self.url:
            raise ValueError(f"{shown}: it ends before ? and #, and has no blanks")
        if self.api_key is not None and not _KEY.fullmatch(self.api_key):
            raise ValueError("api_key is empty or has characters that no header can hold")
        if not 0 < self.timeout_s < threading.TIMEOUT_MAX:
            raise ValueError(f"timeout_s is {self.timeout_s}: give seconds, above 0")

    def get(self, path: str) -> Reply:
        """Ask for a path; see `post`."""
        return self._request("GET", path, None)

    def post(self, path: str, body: bytes | Iterable[bytes]) -> Reply:
        """Send JSON to a path and return the answer, of whatever status.

        body: whole, or piece by piece, each of which is sent before the next is asked for. Raises
        ValueError, which names the URL, where there is no answer, or none that is allowed.
        """
        return self._request("POST", path, body)

    def _request(self, method: str, path: str, body: bytes | Iterable[bytes] | None) -> Reply:
        connection, where = self._connection(), f"{self.url.rstrip('/')}{path}"
        deadline = _Deadline(connection, self.timeout_s)
        try:
            with deadline:
                prefix = urlsplit(self.url).path.rstrip("/")
                # Of the size of an iterable nothing is known: it goes in HTTP's chunks.
                connection.request(method, prefix + path, body, self._headers())
                with connection.getresponse() as response:
                    reply = Reply(response.status, self._read(response, where))
            # What is cut off by it may look like an answer.
            deadline.check()
        except (OSError, HTTPException) as error:
            raise ValueError(self._failure(where, error, deadline)) from error
        finally:
            connection.close()
        if 300 <= reply.status < 400:
            raise ValueError(
                f"{where} redirects (HTTP {reply.status}), which is not followed: give the URL of "
                "the server itself"
            )
        return reply

    def _connection(self) -> HTTPConnection:
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        if parts.scheme == "http":
            return HTTPConnection(parts.hostname, parts.port, timeout=self.timeout_s)
        context = ssl.create_default_context()
        return HTTPSConnection(parts.hostname, parts.port, timeout=self.timeout_s, context=context)

    def _headers(self) -> dict[str, str]:
        key = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return {"Content-Type": "application/json", "Accept": "application/json", **key}

    def _read(self, response: HTTPResponse, where: str) -> bytes:
        # NOTE: http.client takes headers that are cut off for whole ones, and such a body too.
        if response.length is None and not response.chunked:
            raise HTTPException("its answer does not say how long it is")
        body = bytearray()
        while chunk := response.read(_CHUNK):
            body += chunk
            if len(body) > self.max_response_bytes:
                raise ValueError(
                    f"{where} answers with more than {self.max_response_bytes:,} bytes: ask for "
                    "fewer tokens, or look whether it is the server of inference"
                )
        if response.length:
            raise HTTPException(f"its answer ends {response.length} bytes too early")
        return bytes(body)

    def _failure(self, where: str, error: Exception, deadline: "_Deadline") -> str:
        if deadline.is_over or isinstance(error, TimeoutError):
            return (
                f"{where} has not answered within {self.timeout_s:g} seconds: look at the server, "
                "or allow more by timeout_s"
            )
        reason = printable(getattr(error, "strerror", None) or error or type(error).__name__, 300)
        return f"{where} does not answer ({reason}): is the server up, and is this its address?"


class _Deadline:
    """Ends a connection when its time is up: a timeout of sockets counts from each byte anew."""

    def __init__(self, connection: HTTPConnection, seconds: float) -> None:
        self.is_over = False
        self._connection = connection
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def check(self) -> None:
        """Raise TimeoutError where the time is up."""
        if self.is_over:
            raise TimeoutError

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _end(self) -> None:
        self.is_over = True
        sock = self._connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def json_of(reply: Reply, where: str) -> dict[str, Any]:
    """Return the JSON object of an answer; ValueError, which names its URL, for anything else."""
    try:
        value = parse_json(reply.body, max_bytes=len(reply.body))
    except NotJSONError as error:
        raise ValueError(
            f"{where} answers what is not JSON ({error}): look whether it is the server of "
            "inference"
        ) from None
    except RecursionError:
        raise ValueError(f"{where} answers JSON that is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} answers a JSON {type(value).__name__}, expected an object")
    return value


def reason_of(reply: Reply) -> str:
    """Return what a refusal says: its message where there is one, else its text, in one line."""
    text = reply.body[:_CHUNK].decode("utf-8", "replace")
    with contextlib.suppress(NotJSONError, RecursionError):
        text = " ".join(_messages(parse_json(text))) or text
    return printable(text.strip() or "no reason given", 600)


def _messages(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key in ("message", "error_message", "error", "detail"):
            yield from _messages(value.get(key))
