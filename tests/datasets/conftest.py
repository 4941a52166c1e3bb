"""A web server on this machine that misbehaves as it is told to."""

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.datasets import _download

PIECE = 1 << 14  # bytes written at once


class FileServer(ThreadingHTTPServer):
    """Serves ``content`` at any path.

    Attributes:
        content, etag: what is served.
        ranges: whether range requests are honoured.
        statuses: HTTP statuses with which the next requests are turned away.
        breaks: after how many bytes of bodies the connection is cut, once for each number.
        stalls: after how many bytes of bodies nothing more comes until the test is over.
        spoils: positions of bytes that are sent wrong, once for each time they are listed.
        sent: the spans [start, stop) of content that went out.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content, self.etag = b"", '"1"'
        self.ranges = True
        self.statuses: list[int] = []
        self.breaks: list[int] = []
        self.stalls: int | None = None
        self.spoils: list[int] = []
        self.over = threading.Event()
        self.sent: list[tuple[int, int]] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing where a client hung up."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/some/gzip.zip?token=secret"

    @property
    def n_sent(self) -> int:
        """Bytes of bodies that went out."""
        return sum(stop - start for start, stop in self.sent)


class _Handler(BaseHTTPRequestHandler):
    server: FileServer

    def log_message(self, format: str, *args: object) -> None:
        """Be silent."""

    def do_GET(self) -> None:
        server, content = self.server, self.server.content
        if server.statuses:
            self.send_error(server.statuses.pop(0))
            return
        wanted = self.headers.get("Range")
        start, stop = 0, len(content)
        if server.ranges and wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last) + 1, len(content))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", server.etag)
        self.end_headers()
        self._send(start, stop)

    def _send(self, start: int, stop: int) -> None:
        server = self.server
        while start < stop:
            limits = [
                n - server.n_sent for n in (*server.breaks[:1], server.stalls) if n is not None
            ]
            piece = server.content[start : min(stop, start + min(PIECE, *limits, PIECE))]
            server.sent.append((start, start + len(piece)))
            for at in {at for at in server.spoils if start <= at < start + len(piece)}:
                server.spoils.remove(at)
                wrong = bytes([piece[at - start] ^ 1])
                piece = piece[: at - start] + wrong + piece[at - start + 1 :]
            self.wfile.write(piece)
            start += len(piece)
            if server.breaks and server.n_sent >= server.breaks[0]:
                server.breaks.pop(0)
                return  # the connection closes, though more was promised
            if server.stalls is not None and server.n_sent >= server.stalls:
                server.over.wait(30)
                return


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A running server; retries wait a hundredth of a second instead of many."""
    monkeypatch.setattr(_download, "WAITS", (0.01,) * 4)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with FileServer() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.over.set()
        running.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of downloads."""
    monkeypatch.setenv("LETTERS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
