"""``compose.yaml``: pinned, guarded, and without a secret of its own."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "compose.yaml").read_text()
COMPOSE = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
JOBS = {"databases", "bucket"}  # they end
SECRET = re.compile("PASSWORD|SECRET|ACCESS_KEY")
# No default, and a sentence for whom it is missing.
REQUIRED = re.compile(r"\$\{[A-Z_]+:\?[^}]{10,}\}")


def _pinned(image: str) -> bool:
    """Whether an image has the tag of one release."""
    return bool(re.fullmatch(r"[\w./-]+:v?\d+(\.\d+)+[\w.-]*", image))


@pytest.mark.parametrize("name", SERVICES)
def test_images_are_pinned(name: str) -> None:
    assert _pinned(SERVICES[name]["image"])


def test_what_is_not_pinned_is_noticed() -> None:
    for image in ("postgres", "postgres:latest", "postgres:17", "minio/minio:edge"):
        assert not _pinned(image)


@pytest.mark.parametrize("name", sorted(set(SERVICES) - JOBS))
def test_what_serves_is_watched_and_starts_again(name: str) -> None:
    service = SERVICES[name]
    assert service["restart"] == "unless-stopped"
    test = service["healthcheck"]["test"]
    assert test != "NONE" if isinstance(test, str) else test[0] == "CMD"
    assert service["healthcheck"]["retries"] > 1


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_needed_is_waited_for(name: str) -> None:
    for other, how in SERVICES[name].get("depends_on", {}).items():
        end = "service_completed_successfully" if other in JOBS else "service_healthy"
        assert how == {"condition": end}


def test_who_is_named_is_waited_for() -> None:
    """A service that has another's host name in its settings starts after it, or after a job."""
    for name, service in SERVICES.items():
        words = str(service.get("environment", {})) + str(service.get("command", ""))
        for other in set(SERVICES) - JOBS - {name}:
            if re.search(rf"(://|@){other}[:/]", words):
                assert other in _before(name), f"{name} does not wait for {other}"


def _before(name: str) -> set[str]:
    near = set(SERVICES[name].get("depends_on", {}))
    return near.union(*(_before(other) for other in near))


@pytest.mark.parametrize("name", SERVICES)
def test_no_secret_is_in_the_file(name: str) -> None:
    for key, value in SERVICES[name].get("environment", {}).items():
        if SECRET.search(key):
            assert REQUIRED.fullmatch(str(value)), key
    assert not re.search(r"://[^/@\s]*:[^/@\s]+@", TEXT)  # an address with a password


def test_every_password_is_asked_for() -> None:
    asked = set(re.findall(r"\$\{([A-Z_]+)", TEXT))
    assert len(re.findall(r"\$\{", TEXT)) == len(REQUIRED.findall(TEXT))
    told = (ROOT / "docs/cluster.md").read_text()
    assert asked == set(re.findall(r"^([A-Z_]+)=", told, re.MULTILINE))


def test_ports_are_open_to_this_machine_only() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_the_server_asks_for_passwords_and_keeps_them_in_the_database() -> None:
    assert "--app-name=basic-auth" in SERVICES["mlflow"]["command"]
    assert "@postgres/users" in COMPOSE["configs"]["basic_auth"]["content"]
    made = SERVICES["databases"]["command"][-1]
    assert all(name in made for name in ("mlflow", "users", "optuna"))


def test_volumes_are_named_and_declared() -> None:
    used = {mount.split(":")[0] for one in SERVICES.values() for mount in one.get("volumes", [])}
    assert used == set(COMPOSE["volumes"])


def test_the_image_is_made_of_the_locks_and_nothing_else_goes_in() -> None:
    for name in ("mlflow", "bucket", "scheduler", "worker"):
        assert SERVICES[name]["build"] == {"context": ".", "dockerfile": "sweeps/Dockerfile"}
    lines = (ROOT / "sweeps/Dockerfile").read_text().splitlines()
    installs = [line for line in lines if "pip install" in line]
    assert len(installs) == 2
    assert all("--require-hashes" in line for line in installs)
    assert _pinned(lines[1].removeprefix("FROM "))
    assert lines[-1] == "USER letters"
    ignored = (ROOT / "sweeps/Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    for line in ignored[2:]:
        assert line.startswith("**/") or (ROOT / line.removeprefix("!")).exists()
