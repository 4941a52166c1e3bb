"""The environment of a run against the present one."""

import importlib.metadata

import pytest
from stores import ROOT

from pipeline import environment, tracking

LOCK = r"""# compiled
numpy==2.1.0 ; python_full_version < '3.0' \
    --hash=sha256:aa
packaging==1.02 \
    --hash=sha256:bb \
    --hash=sha256:cc
surely-absent==3.0 \
    --hash=sha256:dd
elsewhere==1.0 ; sys_platform == 'never' \
    --hash=sha256:ee
"""


def test_a_lock_is_read_for_this_platform() -> None:
    assert environment.locked(LOCK) == {"packaging": "1.2", "surely-absent": "3.0"}


def test_the_projects_own_lock_is_read() -> None:
    locked = environment.locked((ROOT / "requirements.txt").read_text())
    assert len(locked) > 100
    assert {"numpy", "scipy", "mlflow", "optuna"} <= set(locked)


@pytest.fixture
def tags() -> dict[str, str]:
    """The tags of a run that was made here and now."""
    return dict(tracking.environment_tags())


def test_nothing_has_changed_since_now(tags: dict[str, str]) -> None:
    packages = environment.compare(tags, "")
    assert environment.changes(packages).empty
    n_recorded = len(tags["versions"].split())
    assert environment.described(packages) == (
        f"The environment is as it was: the processor and {n_recorded} packages."
    )


def test_what_has_changed_is_listed_package_by_package(tags: dict[str, str]) -> None:
    keras = tracking.version("keras")
    tags["versions"] = tags["versions"].replace(f"keras={keras}", "keras=1.0.0")
    tags["versions"] += " gone=2.0"
    tags["cpu_model"] = "Abacus"
    packages = environment.compare(tags, LOCK)
    changed = environment.changes(packages).set_index("package")
    now = importlib.metadata.version("packaging")
    # What the run says itself goes before what the lock says.
    assert changed.to_dict("index") == {
        "processor": {
            "recorded": "Abacus",
            "recorded_by": "run",
            "now": tracking.environment_tags()["cpu_model"],
        },
        "keras": {"recorded": "1.0.0", "recorded_by": "run", "now": keras},
        "gone": {"recorded": "2.0", "recorded_by": "run", "now": "not installed"},
        "packaging": {"recorded": "1.2", "recorded_by": "lock", "now": now},
        "surely-absent": {"recorded": "3.0", "recorded_by": "lock", "now": "not installed"},
    }
    described = environment.described(packages)
    assert "| keras " in described
    assert "| numpy " not in described


def test_tensorflow_is_one_package_whatever_its_build_is_called(tags: dict[str, str]) -> None:
    version = tracking.version("tensorflow")
    lock = "tensorflow-cpu==0.1 \\\n    --hash=sha256:aa\n"
    packages = environment.compare(tags, lock).set_index("package")
    assert packages.loc["tensorflow", "now"] == version
    assert "tensorflow-cpu" not in packages.index
