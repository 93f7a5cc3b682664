"""A store of objects behind HTTP on this machine, as S3 is one: puts, ranges, lists and removal; and fsspec over it."""

import json
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fsspec import AbstractFileSystem


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, content: bytes = b"", cut: int = 0) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) - cut])

    def do_GET(self) -> None:
        objects, faults = self.server.objects, self.server.faults
        if self.path.startswith("/?"):
            sizes = {name: len(content) for name, content in objects.items() if name.startswith(self.path[2:])}
            self.answer(200, json.dumps(sizes).encode())
        elif self.path[1:] not in objects:
            self.answer(404)
        else:
            content, asked = objects[self.path[1:]], re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if asked and faults:
                status, cut = faults.pop(0)
                self.close_connection = bool(cut)
                self.answer(status, content[int(asked[1]) : int(asked[2]) + 1] if status < 300 else b"", cut)
            else:
                self.answer(206 if asked else 200, content[int(asked[1]) : int(asked[2]) + 1] if asked else content)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        self.server.objects[self.path[1:]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(201)

    def do_DELETE(self) -> None:
        self.answer(404 if self.server.objects.pop(self.path[1:], None) is None else 204)


@contextmanager
def object_store() -> Iterator[ThreadingHTTPServer]:
    """A server whose `objects` are bytes by name, and that answers ranges with `faults` first: a status, and bytes cut off."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.objects, server.faults = {}, []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Objects(AbstractFileSystem):
    """fsspec over that; a URL is ``objects://localhost:PORT/folder``."""

    protocol = "objects"
    cachable = False

    def _ask(self, method: str, path: str, content: bytes | None = None, **headers: str) -> Any:
        host, _, name = path.partition("/")
        request = urllib.request.Request(f"http://{host}/{name}", content, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.read() if method != "HEAD" else int(answer.headers["Content-Length"])
        except urllib.error.HTTPError as error:
            if error.code == 404:
                raise FileNotFoundError(path) from None
            raise

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "size": self._ask("HEAD", path), "type": "file"}

    def find(self, path: str, *_: Any, **__: Any) -> dict[str, Any]:
        host, _, name = path.partition("/")
        found = json.loads(self._ask("GET", f"{host}/?{name}"))
        return {f"{host}/{each}": {"size": size} for each, size in found.items()}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        return self._ask("GET", path, Range=f"bytes={start}-{end - 1}")

    def pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        self._ask("PUT", path, value)

    def rm_file(self, path: str) -> None:
        self._ask("DELETE", path)
