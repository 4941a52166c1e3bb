"""A real MLflow server on this machine, that a test can stop and start again."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import requests
from steps import wait


class Server:
    """``mlflow server`` over a tracking store of SQLite, on a port of its own."""

    def __init__(self, store_uri: str, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        words = ["server", "--backend-store-uri", store_uri, "--port", str(self.port)]
        words += ["--artifacts-destination", str(folder / "served"), "--workers", "1"]
        self.command = [sys.executable, "-m", "mlflow", *words]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        environment = {**os.environ, "MLFLOW_TRACKING_URI": ""}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, start_new_session=True, env=environment
            )
        assert wait(self._answers, 90), (self.folder / "server.log").read_text()

    def stop(self) -> None:
        """Kill it, whatever it is doing."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.uri}/health", timeout=5).ok
        except requests.ConnectionError:
            return False
