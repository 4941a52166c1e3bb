"""Real MLflow servers on this machine: of a tracking store, that a test can stop and start again,
and of a model."""

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
        self.environment = {**os.environ, "MLFLOW_TRACKING_URI": ""}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, start_new_session=True, env=self.environment
            )
        assert wait(self._answers, 200), (self.folder / "server.log").read_text()

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


class ModelServer(Server):
    """``mlflow models serve`` of the model at ``uri`` in the tracking store of this process."""

    def __init__(self, uri: str, folder: Path) -> None:
        super().__init__("", folder)
        words = ["models", "serve", "-m", uri, "--env-manager", "local", "--port", str(self.port)]
        self.command = [sys.executable, "-m", "mlflow", *words]
        # It starts uvicorn by its name.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path}
