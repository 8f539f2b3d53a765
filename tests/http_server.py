"""A web server on localhost that serves a folder, ranges included, counts what it is asked, and fails on command."""

import contextlib
import itertools
import re
import socket
import struct
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from zlib import crc32

FOR_EVER = 1_000_000


@dataclass
class Request:
    """What arrived."""

    method: str
    name: str
    range: tuple[int, int | None] | None  # first and last byte
    sent: int = 0  # bytes of the body


class FileServer:
    """Serve a folder; `fail(name, fault, times)` spoils the next answers about a file.

    Faults, by name: `whole` (200 to a range), `wrong` (a flipped bit in the first byte), `reset` and `short` (half the
    body, then a reset or the end), `503`, `404` ..., `stall` (silence), `etag` (another one each time), `html` (a page
    in place of the file), `shifted` (a Content-Range one byte off), `redirect` (302 to `?again`).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[Request] = []
        self.delay_seconds = 0.0
        self.chunk_seconds = 0.0  # after each 64 KiB
        self._faults: dict[str, deque[str]] = defaultdict(deque)
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self.serial = itertools.count()
        outer = self

        class Handler(_Handler):
            server_state = outer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda request, client_address: None  # a client that went is no news
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FileServer":
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def fail(self, name: str, fault: str, times: int = FOR_EVER) -> None:
        """Let the next `times` answers about a file have a fault."""
        self._faults[name].append(fault) if times == 1 else self._faults[name].extend(
            [fault] * min(times, 1000)
        )

    def heal(self) -> None:
        """Forget all faults."""
        self._faults.clear()

    def next_fault(self, name: str) -> str:
        """Return the fault of this answer."""
        with self.lock:
            waiting = self._faults[name]
            return waiting.popleft() if waiting else ""

    def count(self, name: str, *, whole: bool | None = None) -> int:
        """Return how often a file was asked for: in one piece, in parts, or either."""
        asked = [request for request in self.requests if request.name == name and request.method == "GET"]
        return sum(whole is None or whole == (request.range is None) for request in asked)

    def counts(self) -> Counter:
        """Return how often each file was asked for."""
        return Counter(request.name for request in self.requests if request.method == "GET")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_state: FileServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_GET(self) -> None:
        self._answer("GET")

    def _answer(self, method: str) -> None:
        state = self.server_state
        path, _, query = self.path.lstrip("/").partition("?")
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        span = (int(match[1]), int(match[2]) if match[2] else None) if match else None
        request = Request(method, path, span)
        with state.lock:
            state.requests.append(request)
        time.sleep(state.delay_seconds)
        fault = state.next_fault(path)
        if fault == "stall":
            state.closing.wait(30)
            self.close_connection = True
            return
        if fault.isdigit():
            return self._send(request, int(fault), b"no", {})
        if fault == "redirect" and query != "again":
            return self._send(request, 302, b"", {"Location": f"{state.url}/{path}?again"})
        file = state.folder / path
        if not file.is_file():
            return self._send(request, 404, b"nothing here", {})
        data = b"<html>Please log in</html>" if fault == "html" else file.read_bytes()
        tag = '"' + f"{crc32(data):08x}" + (str(next(state.serial)) if fault == "etag" else "") + '"'
        headers = {"ETag": tag, "Accept-Ranges": "bytes"}
        status, body = 200, data
        if span is not None and fault != "whole" and self.headers.get("If-Range", tag) == tag:
            first, last = span[0], min(len(data) - 1 if span[1] is None else span[1], len(data) - 1)
            if first >= len(data):
                return self._send(request, 416, b"", {"Content-Range": f"bytes */{len(data)}"})
            status, body = 206, data[first : last + 1]
            off = 1 if fault == "shifted" else 0
            headers["Content-Range"] = f"bytes {first + off}-{last + off}/{len(data)}"
        if fault == "wrong":
            body = bytes([body[0] ^ 1]) + body[1:]
        self._send(request, status, body, headers, cut=fault if fault in ("reset", "short") else "")

    def _send(
        self, request: Request, status: int, body: bytes, headers: dict[str, str], cut: str = ""
    ) -> None:
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if request.method == "HEAD":
                return
            for start in range(0, len(body) // 2 if cut else len(body), 1 << 16):
                chunk = body[start : min(start + (1 << 16), len(body) // 2 if cut else len(body))]
                self.wfile.write(chunk)
                request.sent += len(chunk)
                time.sleep(self.server_state.chunk_seconds)
            if cut:
                self.wfile.flush()
                if cut == "reset":  # lingering for no time makes close() a reset
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True


@contextmanager
def serve(folder: Path, prepare: Callable[[FileServer], None] = lambda server: None) -> Iterator[FileServer]:
    """Serve a folder while the block runs."""
    with FileServer(folder) as server:
        prepare(server)
        yield server
