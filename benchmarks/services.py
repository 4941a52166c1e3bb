"""What a team's MLflow server stands on, started on this machine for as long as it is needed.

    with Postgres() as postgres, S3() as s3, TrackingServer(postgres, s3) as server:
        os.environ.update(server.client_environment)

PostgreSQL is the system's own (Debian: ``apt-get install postgresql``), the S3-compatible store is
moto's, MLflow's server is that of this environment. Each listens on 127.0.0.1 alone, on a port of
its own, and has a random password that goes by environment or file, never on a command line. All
that they keep goes with them: they serve tests and demonstrations.
"""

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import boto3
import psycopg2
import requests
from botocore.exceptions import BotoCoreError, ClientError

HOST = "127.0.0.1"
DEBIAN = Path("/usr/lib/postgresql")  # where Debian keeps PostgreSQL, off the PATH
START_SECONDS = 200  # a busy machine is slow, not broken
STOP_SECONDS = 30


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        return int(free.getsockname()[1])


class Service:
    """A process that serves, with a folder and a port of its own.

    ``process`` is in a session of its own: Ctrl-C at a terminal is for who started it, who stops it
    when nobody needs it any longer.
    """

    name = "service"
    stop_signal = signal.SIGTERM

    def __init__(self) -> None:
        # Not in a folder that is given: a service may run as another user, who could not get in.
        self.folder = Path(tempfile.mkdtemp(prefix=f"letters-{self.name}-"))
        self.log = self.folder / "log.txt"
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        raise NotImplementedError

    def stop(self) -> None:
        """Ask it to end and, where it does not, kill it. ``start`` starts it again."""
        if self.process is None:
            return
        with suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(self.process.pid, self.stop_signal)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
        self.process = None

    def kill(self) -> None:
        """Kill it, whatever it is doing."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def close(self) -> None:
        """Stop it, and leave nothing behind."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _launch(
        self,
        command: Sequence[str | Path],
        answers: Callable[[], bool],
        environment: Mapping[str, str],
        user: str | None = None,
    ) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=environment,
                start_new_session=True,
                **_as(user),
            )
        deadline = time.monotonic() + START_SECONDS
        while not answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.1)


class HttpService(Service):
    """A service at ``uri`` that says at ``/health`` when it is there."""

    def __init__(self) -> None:
        super().__init__()
        self.uri = f"http://{HOST}:{self.port}"

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.uri}/health", timeout=5).ok
        except requests.RequestException:  # on a busy machine it is slow
            return False


class Postgres(Service):
    """A PostgreSQL server, with passwords (SCRAM) for everybody and no unix socket."""

    name = "postgres"
    stop_signal = signal.SIGINT  # "fast": it does not wait for its clients to leave
    user = "letters"

    def __init__(self) -> None:
        super().__init__()
        self.programs = find_postgres()
        self.password = secrets.token_hex(16)
        self.passfile = self.folder / "pgpass"
        # PostgreSQL refuses to run as root.
        self.runs_as = _unprivileged() if os.getuid() == 0 else None
        self.environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "TZ": "UTC"}

    def url(self, database: str, password: bool = True) -> str:
        """Where a database is, for SQLAlchemy; without its password for whom PGPASSFILE is set."""
        secret = f":{self.password}" if password else ""
        # The driver is named: what SQLAlchemy takes by default depends on its version.
        return f"postgresql+psycopg2://{self.user}{secret}@{HOST}:{self.port}/{database}"

    def start(self) -> None:
        data = self.folder / "data"
        if not data.exists():
            self._initialise(data)
        command = [self.programs / "postgres", "-D", data, "-p", str(self.port)]
        for setting in (f"listen_addresses={HOST}", "unix_socket_directories=", "fsync=off"):
            command += ["-c", setting]
        self._launch(command, self._answers, self.environment, self.runs_as)

    def create(self, database: str) -> str:
        """Make an empty database; gives its URL without the password."""
        connection = self._connect("postgres")
        connection.autocommit = True  # a database is not made inside of a transaction
        with connection.cursor() as cursor:
            cursor.execute(f'CREATE DATABASE "{database}"')
        connection.close()
        return self.url(database, password=False)

    def dump(self) -> str:
        """All rows of all databases, as SQL."""
        command = [self.programs / "pg_dumpall", "--no-role-passwords", "--host", HOST]
        command += ["--port", str(self.port), "--username", self.user, "--no-password"]
        environment = self.environment | {"PGPASSFILE": str(self.passfile)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout

    def _initialise(self, data: Path) -> None:
        secret = self.folder / "password"
        secret.touch(mode=0o600)
        secret.write_text(self.password)
        self.passfile.touch(mode=0o600)
        self.passfile.write_text(f"{HOST}:{self.port}:*:{self.user}:{self.password}\n")
        if self.runs_as:
            shutil.chown(self.folder, self.runs_as)
            shutil.chown(secret, self.runs_as)
        command = [self.programs / "initdb", "--pgdata", data, "--username", self.user]
        command += ["--pwfile", secret, "--auth", "scram-sha-256", "--encoding", "UTF8"]
        command += ["--no-locale", "--no-sync", "--no-instructions"]
        with self.log.open("ab") as log:
            subprocess.run(
                command,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=self.environment,
                check=True,
                **_as(self.runs_as),
            )
        secret.unlink()

    def _connect(self, database: str) -> "psycopg2.extensions.connection":
        return psycopg2.connect(
            host=HOST,
            port=self.port,
            user=self.user,
            password=self.password,
            dbname=database,
            connect_timeout=5,
        )

    def _answers(self) -> bool:
        try:
            self._connect("postgres").close()
        except psycopg2.OperationalError:
            return False
        return True


class S3(Service):
    """moto's server: an S3-compatible store in the memory of one process, with a bucket."""

    name = "s3"
    bucket = "letters"

    def __init__(self) -> None:
        super().__init__()
        self.endpoint = f"http://{HOST}:{self.port}"
        # What boto3 reads, in MLflow's server as here.
        self.environment = {
            "AWS_ACCESS_KEY_ID": secrets.token_hex(8),
            "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
            "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_S3_ENDPOINT_URL": self.endpoint,
        }

    def start(self) -> None:
        command = [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(self.port)]
        self._launch(command, self._answers, {"PATH": os.environ["PATH"]})
        self.client().create_bucket(Bucket=self.bucket)

    def client(self) -> "boto3.client":
        """A boto3 client of it."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            region_name=self.environment["AWS_DEFAULT_REGION"],
        )

    def objects(self) -> dict[str, bytes]:
        """Content of each object of the bucket, by its key."""
        client = self.client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        keys = [one["Key"] for page in pages for one in page.get("Contents", [])]
        return {key: client.get_object(Bucket=self.bucket, Key=key)["Body"].read() for key in keys}

    def _answers(self) -> bool:
        try:
            self.client().list_buckets()
        except (BotoCoreError, ClientError):
            return False
        return True


class TrackingServer(HttpService):
    """``mlflow server`` over a database of a PostgreSQL and a bucket, artifacts proxied.

    With ``auth`` it asks for a name and a password (MLflow's ``basic-auth``; it needs Flask-WTF).
    """

    name = "mlflow"
    user = "letters"

    def __init__(self, postgres: Postgres, s3: S3, auth: bool = False) -> None:
        super().__init__()
        self.auth = auth
        self.password = secrets.token_hex(16)
        names = [f"{kind}_{self.port}" for kind in ("mlflow", "auth")]
        self.environment = (
            dict(os.environ) | s3.environment | {"PGPASSFILE": str(postgres.passfile)}
        )
        self.environment |= {
            "MLFLOW_TRACKING_URI": "",
            "MLFLOW_BACKEND_STORE_URI": postgres.create(names[0]),
            "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{s3.bucket}/{self.port}",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # for language models; processes more
        }
        if auth:
            self._ask_for_passwords(postgres.create(names[1]))

    @property
    def client_environment(self) -> dict[str, str]:
        """What a client of it has to have in its environment."""
        secret = {
            "MLFLOW_TRACKING_USERNAME": self.user,
            "MLFLOW_TRACKING_PASSWORD": self.password,
        }
        return {"MLFLOW_TRACKING_URI": self.uri} | (secret if self.auth else {})

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", HOST]
        command += ["--port", str(self.port), "--workers", "1"]
        command += ["--app-name", "basic-auth"] if self.auth else []
        self._launch(command, self._answers, self.environment)

    def _ask_for_passwords(self, users: str) -> None:
        """Have it keep its users in the database at the URL ``users``."""
        config = self.folder / "basic_auth.ini"
        config.write_text(
            f"[mlflow]\ndefault_permission = READ\ndatabase_uri = {users}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
            "auth_cache_ttl_seconds = 60\n"  # else each request costs a slow hash of its password
        )
        self.environment |= {
            "MLFLOW_AUTH_CONFIG_PATH": str(config),
            "MLFLOW_AUTH_ADMIN_USERNAME": self.user,
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
        }


def find_postgres() -> Path:
    """The folder of PostgreSQL's programs."""
    folders = [Path(found).parent for found in [shutil.which("postgres")] if found]
    folders += sorted(DEBIAN.glob("*/bin"))
    for folder in reversed(folders):  # the latest version
        if all((folder / program).exists() for program in ("postgres", "initdb", "pg_dumpall")):
            return folder
    raise FileNotFoundError("PostgreSQL's server is not installed: apt-get install postgresql")


def _unprivileged() -> str:
    """A user to be instead of root: PostgreSQL's own, else the one that owns nothing."""
    known = {user.pw_name for user in pwd.getpwall()}
    return next(user for user in ("postgres", "nobody") if user in known)


def _as(user: str | None) -> dict[str, object]:
    """What has ``subprocess`` start a program as another user, without root's groups."""
    if user is None:
        return {}
    return {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}
