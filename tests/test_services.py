"""What the tests of a team's server stand on does what it says."""

import importlib.util
import sys
from pathlib import Path

import psycopg2
import pytest

from benchmarks import services


def test_postgres_lets_nobody_in_without_the_password(postgres: services.Postgres) -> None:
    where = {"host": services.HOST, "port": postgres.port, "user": postgres.user}
    for password in ("", "wrong"):
        with pytest.raises(psycopg2.OperationalError, match="password"):
            psycopg2.connect(dbname="postgres", password=password, **where)
    # It listens on loopback alone, and by no socket in the file system.
    with psycopg2.connect(dbname="postgres", password=postgres.password, **where) as connection:
        with connection.cursor() as cursor:
            cursor.execute("SHOW listen_addresses")
            assert cursor.fetchone() == (services.HOST,)
            cursor.execute("SHOW unix_socket_directories")
            assert cursor.fetchone() == ("",)
    connection.close()


def test_no_password_is_on_a_command_line(postgres: services.Postgres) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("the system has no /proc")
    command = Path(f"/proc/{postgres.process.pid}/cmdline")  # type: ignore[union-attr]
    assert postgres.password not in command.read_text()
    assert postgres.password not in postgres.log.read_text()


def test_a_database_outlives_a_crash_of_its_server(postgres: services.Postgres) -> None:
    postgres.create("survivor")
    postgres.kill()
    postgres.start()
    assert "CREATE DATABASE survivor" in postgres.dump()


def test_a_service_leaves_nothing_behind() -> None:
    with services.S3() as s3:
        folder, process = s3.folder, s3.process
        assert s3.objects() == {}
    assert process is not None
    assert process.poll() is not None
    assert not folder.exists()


def test_a_service_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = services.S3()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="s3 did not start"), broken:
        pass
    assert not broken.folder.exists()


def test_where_postgresql_is_absent_its_tests_are_skipped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(services, "DEBIAN", tmp_path)
    with pytest.raises(FileNotFoundError, match="apt-get install postgresql"):
        services.find_postgres()
    spec = importlib.util.spec_from_file_location("shared", Path(__file__).with_name("conftest.py"))
    assert spec is not None
    assert spec.loader is not None
    conftest = importlib.util.module_from_spec(spec)  # its name is that of other files too
    spec.loader.exec_module(conftest)
    fixture = conftest.postgres.__wrapped__()
    with pytest.raises(pytest.skip.Exception, match="PostgreSQL's server is not installed"):
        next(fixture)
