"""Real MLflow servers on this machine: of a tracking store, that a test can kill and start again,
and of a model; and what may stand between a server and its clients."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import requests

from benchmarks import services


class Server(services.HttpService):
    """``mlflow server`` over a tracking store of SQLite."""

    name = "mlflow"

    def __init__(self, store_uri: str) -> None:
        super().__init__()
        words = ["server", "--backend-store-uri", store_uri, "--port", str(self.port)]
        words += ["--artifacts-destination", str(self.folder / "served"), "--workers", "1"]
        self.command = [sys.executable, "-m", "mlflow", *words]
        self.environment = {
            **os.environ,
            "MLFLOW_TRACKING_URI": "",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # as in compose.yaml; 8 processes more
        }

    def start(self) -> None:
        self._launch(self.command, self._answers, self.environment)


class ModelServer(Server):
    """``mlflow models serve`` of the model at ``uri`` in the tracking store of this process."""

    def __init__(self, uri: str) -> None:
        super().__init__("")
        words = ["models", "serve", "-m", uri, "--env-manager", "local", "--port", str(self.port)]
        self.command = [sys.executable, "-m", "mlflow", *words]
        # It starts uvicorn by its name.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path}


Fault = str  # "refuse": the server is not asked; "lose": it is, and its answer is lost; "": neither
HOPS = {"connection", "transfer-encoding", "content-encoding", "content-length", "host"}


@contextmanager
def faulty(
    uri: str, fault: Callable[[str, str, bytes], Fault], seconds: float = 0.0
) -> Iterator[str]:
    """A way to the server at ``uri`` that is slow and breaks down; gives its address.

    ``fault`` says what happens to a request, by its method, path and body: it is answered by 503
    where the server is not asked, and by 500 where the server's answer is lost.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            what = fault(self.command, self.path, body)
            time.sleep(seconds)
            if what == "refuse":
                self.answer(503, b"busy", {})
                return
            headers = {
                name: self.headers[name] for name in self.headers if name.lower() not in HOPS
            }
            found = requests.request(
                self.command, f"{uri}{self.path}", data=body, headers=headers, timeout=60
            )
            if what == "lose":
                self.answer(500, b"lost", {})
            else:
                self.answer(found.status_code, found.content, dict(found.headers))

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in HOPS | {"date", "server"}:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    proxy.daemon_threads = True
    thread = threading.Thread(target=proxy.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{proxy.server_port}"
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
