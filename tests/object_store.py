"""A store that speaks S3 on this machine: moto's server, and in front of it a proxy that notes requests and can fail.

moto keeps objects in memory, and is exact about uploads in parts, lists, conditions and the texts of errors. It checks
no signatures: what a store refuses, the proxy answers.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from nodes import free_port

BUCKET = "shop"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests"}


@dataclass
class Request:
    """A request that came in."""

    time: float
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]

    @property
    def kind(self) -> str:
        """ "list", "copy", "part", or the method."""
        if self.method == "GET" and {"list-type", "prefix"} & self.query.keys():
            return "list"
        return "copy" if "x-amz-copy-source" in self.headers else "part" if "partNumber" in self.query else self.method


@dataclass
class ObjectStore:
    """The store, and what to do with its next requests."""

    endpoint: str = ""
    direct: str = ""
    """endpoint beside the proxy, for those who look on"""
    requests: list[Request] = field(default_factory=list)
    answer: Callable[[Request], int | str | float | None] = lambda request: None
    """what becomes of a request: None lets it through, a number of 400 or more is the answer's status, a smaller one
    the seconds that it waits, and "cut" ends the connection in its middle"""

    def uri(self, name: str) -> str:
        return f"s3://{BUCKET}/{name}"

    @property
    def env(self) -> dict[str, str]:
        """Of processes that use it."""
        return {**CREDENTIALS, "AWS_ENDPOINT_URL": self.endpoint, "AWS_EC2_METADATA_DISABLED": "true"}

    def replace(self, request: Request, content: bytes) -> None:
        """Replace the object of a request, which is about to be answered."""
        headers = {"content-length": str(len(content)), "authorization": request.headers["authorization"]}
        assert _forward(int(self.direct.rpartition(":")[2]), "PUT", request.path, headers, content)[0] == 200

    @contextlib.contextmanager
    def failing(self, answer: Callable[[Request], int | str | float | None]) -> Iterator[None]:
        """The store with faults, for as long as the block lasts."""
        self.answer = answer
        try:
            yield
        finally:
            self.answer = lambda request: None

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """Keys below a prefix and what they hold."""
        from clipfh.storage.store import Folder

        folder = Folder(self.uri(prefix))
        return {name: folder.read_bytes(name) for name in sorted(folder.files())}


@contextlib.contextmanager
def serve() -> Iterator[ObjectStore]:
    """Run a store with an empty bucket."""
    port = free_port()
    store = ObjectStore(direct=f"http://127.0.0.1:{port}")
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), _proxy(store, port))
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    store.endpoint = f"http://127.0.0.1:{proxy.server_address[1]}"
    try:
        _make_bucket(port)
        yield store
    finally:
        proxy.shutdown()
        process.kill()
        process.wait()


@contextlib.contextmanager
def serve_to_nodes() -> Iterator[ObjectStore]:
    """An object store, which this process looks at beside the proxy, so that what is counted is the nodes' own."""
    with serve() as store:
        os.environ |= {**store.env, "AWS_ENDPOINT_URL": store.direct}
        yield store


def _make_bucket(port: int) -> None:
    end = time.monotonic() + 120
    while True:
        try:
            _forward(port, "PUT", f"/{BUCKET}", {}, b"")
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)  # it is starting, which nothing tells of


def _forward(port: int, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, list, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.getheaders(), content


ERRORS = {403: "AccessDenied", 404: "NoSuchBucket", 500: "InternalError", 503: "SlowDown"}


def _proxy(store: ObjectStore, port: int) -> type[BaseHTTPRequestHandler]:
    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            split = urllib.parse.urlsplit(self.path)
            query = urllib.parse.parse_qs(split.query, keep_blank_values=True)
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(time.monotonic(), self.command, split.path, query, headers)
            store.requests.append(request)
            fault = store.answer(request)
            if fault == "cut":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            body = self.read_body(headers)
            if len(body) < int(headers.get("content-length", 0)):  # its sender was killed: a store keeps no half of it
                self.close_connection = True
                return
            if isinstance(fault, int | float) and fault < 400:
                time.sleep(fault)
            elif fault:
                self.answer(int(fault), [], f"<Error><Code>{ERRORS[int(fault)]}</Code></Error>".encode())
                return
            passed = {name: value for name, value in headers.items() if name not in ("transfer-encoding", "expect")}
            passed["content-length"] = str(len(body))
            with contextlib.suppress(ConnectionError):  # who asked was killed
                self.answer(*_forward(port, self.command, self.path, passed, body))

        def read_body(self, headers: dict[str, str]) -> bytes:
            if "chunked" not in headers.get("transfer-encoding", ""):
                return self.rfile.read(int(headers.get("content-length", 0)))
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return body

        def answer(self, status: int, headers: list, content: bytes) -> None:
            self.send_response_only(status)
            length = str(len(content))
            for name, value in headers:
                if name.lower() == "content-length" and self.command == "HEAD":
                    length = value
                if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                    self.send_header(name, value)
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

        def log_message(self, *words: object) -> None:
            """Nothing."""

    return Proxy


def main(folder: Path) -> None:
    """Serve until killed, for trying things out: prints what to set."""
    with serve() as store:
        for name, value in store.env.items():
            print(f"export {name}={value}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main(Path())
