"""A proxy before a real S3 server that does to some calls what a script says, and counts it."""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LATENCY_S = 0.5
ERRORS = {"500": (500, "InternalError"), "slow-down": (503, "SlowDown")}


@dataclass
class Fault:
    """What happens to the next `times` calls of a method whose path contains a text.

    kind: latency; cut (no answer); 500, slow-down (errors); torn (half the answer, then the end);
    flip (an answer with one wrong bit).
    """

    kind: str
    method: str
    text: str
    times: int = 1
    fired: int = 0


class S3Proxy:
    """Listens on a free port of 127.0.0.1."""

    def __init__(self, endpoint: str) -> None:
        self._target = urllib.parse.urlsplit(endpoint).netloc
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def script(self, kind: str, method: str, text: str, times: int = 1) -> Fault:
        """Add a fault."""
        self._faults.append(Fault(kind, method, text, times))
        return self._faults[-1]

    def strike(self, method: str, path: str) -> str:
        """The kind of fault that a call meets, counted; empty: none."""
        with self._lock:
            for fault in self._faults:
                if fault.fired < fault.times and fault.method == method and fault.text in path:
                    fault.fired += 1
                    return fault.kind
        return ""

    def forward(
        self, method: str, path: str, body: bytes, headers: dict[str, str]
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """The server's answer; headers as the client signed them."""
        connection = http.client.HTTPConnection(self._target, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer, answer.read()

    @contextlib.contextmanager
    def running(self) -> Iterator[S3Proxy]:
        """Serve until left."""
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: S3Proxy

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind = self.proxy.strike(self.command, self.path)
        if kind == "cut":
            self.close_connection = True
            return
        if kind in ERRORS:
            status, code = ERRORS[kind]
            self._answer(status, [], f"<Error><Code>{code}</Code></Error>".encode())
            return
        if kind == "latency":
            time.sleep(LATENCY_S)
        headers = {k: v for k, v in self.headers.items() if k.lower() != "expect"}
        answer, content = self.proxy.forward(self.command, self.path, body, headers)
        length = len(content)
        if kind == "flip":
            content = content[:-1] + bytes([content[-1] ^ 1])
        elif kind == "torn":
            content = content[: length // 2]
            self.close_connection = True
        if self.command == "HEAD":
            length = int(answer.headers.get("Content-Length") or 0)
        skipped = {"content-length", "transfer-encoding", "connection"}
        kept = [(k, v) for k, v in answer.headers.items() if k.lower() not in skipped]
        self._answer(answer.status, kept, content, length)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _handle  # noqa: N815 - http.server's names

    def _answer(
        self, status: int, headers: list[tuple[str, str]], body: bytes, length: int | None = None
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing."""
