"""The project's own laws: who imports whom, who reads which part, what MLproject promises."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from mlflow.utils.environment import _PythonEnv

from pipeline import compare, evaluate, predict, prep, promote, reproduce, train
from sweeps import main, sweep

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("sweeps/**/*.py")])
MLPROJECT = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
STEPS = {
    "main": main,
    "prep": prep,
    "train": train,
    "sweep": sweep,
    "evaluate": evaluate,
    "reproduce": reproduce,
    "compare": compare,
    "promote": promote,
    "predict": predict,
}


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _imports(path: Path) -> set[str]:
    """Modules that a file imports, at its top or inside of functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _ours(path: Path) -> set[str]:
    return {name for name in _imports(path) if name.split(".")[0] in ("pipeline", "sweeps")}


def test_pipeline_never_imports_sweeps() -> None:
    for path in ROOT.glob("pipeline/**/*.py"):
        assert not any(name.startswith("sweeps") for name in _ours(path)), path


def test_the_nouns_import_nothing_of_ours() -> None:
    assert _ours(ROOT / "pipeline/spec.py") == set()


def test_what_is_served_imports_nothing_of_ours() -> None:
    # The files travel inside the logged model, to where the project is absent.
    assert _ours(ROOT / "pipeline/models/_neighbours.py") == set()
    assert _ours(ROOT / "pipeline/served_letters.py") == set()


@pytest.mark.parametrize("package", ["models", "datasets"])
def test_members_import_only_nouns_and_their_own_machinery(package: str) -> None:
    allowed = (
        f"pipeline.{package}._",
        "pipeline.spec.",
        "pipeline.quiet",
        "pipeline.bill.",
        "pipeline.nist",
        "pipeline.disk.",
    )
    for path in ROOT.glob(f"pipeline/{package}/*.py"):
        for name in _ours(path):
            private = name == f"pipeline.{package}._" or name.startswith(allowed)
            assert private, f"{path} imports {name}"


def test_models_load_tensorflow_only_when_they_fit() -> None:
    for path in ROOT.glob("pipeline/models/[a-z]*.py"):
        body = ast.parse(path.read_text()).body
        top = {
            alias.name if isinstance(node, ast.Import) else str(node.module)
            for node in body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assert not any(name.split(".")[0] in ("keras", "tensorflow") for name in top), path


def test_only_evaluate_reads_test_and_only_promote_reads_the_gate() -> None:
    readers: dict[str, set[str]] = {}
    for path in SOURCES:
        for part in re.findall(r"\.part\(\s*[\"'](\w+)", path.read_text()):
            readers.setdefault(part, set()).add(_name(path))
    assert readers == {
        "train": {"pipeline.train", "pipeline.prep", "sweeps.plan"},
        "val": {"pipeline.train", "sweeps.plan"},
        "gate": {"pipeline.promote"},
        "test": {"pipeline.evaluate"},
    }


def test_mlproject_has_every_step() -> None:
    assert set(MLPROJECT) == set(STEPS)


@pytest.mark.parametrize("name", STEPS)
def test_parameters_of_mlproject_are_those_of_the_step(name: str) -> None:
    entry = MLPROJECT[name]
    options = list(STEPS[name].OPTIONS)
    assert sorted(entry["parameters"]) == sorted(options)
    # Each is passed on, under its own name, to the module of the step.
    passed = re.findall(r"--(\w+) \{(\w+)\}", entry["command"])
    assert sorted(passed) == sorted((option, option) for option in options)
    assert entry["command"].startswith(f"python -m {STEPS[name].__name__} ")


@pytest.mark.parametrize("name", STEPS)
def test_defaults_of_mlproject_are_good_values(name: str) -> None:
    for option, parameter in MLPROJECT[name]["parameters"].items():
        if "default" in parameter:
            STEPS[name].OPTIONS[option](option, str(parameter["default"]))
        else:
            assert option in ("model", "image")


def test_every_parameter_of_mlproject_has_a_comment() -> None:
    for line in (ROOT / "MLproject").read_text().splitlines():
        if re.match(r"\s+\w+: \{type", line):
            assert re.search(r"\}  # \w", line), line


def test_conda_yaml_gives_every_library_to_pip() -> None:
    found = _PythonEnv.get_dependencies_from_conda_yaml(str(ROOT / "conda.yaml"))
    # MLflow drops conda packages other than these, with a warning, where it makes no conda env.
    assert found["python"] in ("3.11", "3.12", "3.13")
    assert found["dependencies"] == ["-r requirements.txt"]
    conda = yaml.safe_load((ROOT / "conda.yaml").read_text())["dependencies"]
    assert [str(entry).split("=")[0] for entry in conda if isinstance(entry, str)] == [
        "python",
        "pip",
    ]


@pytest.mark.parametrize("lock", ["requirements.txt", "tests/requirements.txt"])
def test_a_lock_has_exact_versions_and_hashes_and_no_address(lock: str) -> None:
    text = (ROOT / lock).read_text()
    entries = [entry for entry in re.split(r"\n(?=\w)", text) if not entry.startswith("#")]
    for entry in entries:
        assert re.match(r"[\w.-]+==[\w.]+", entry), entry
        assert "--hash=sha256:" in entry, entry
    assert "://" not in text
    assert "index" not in text


def test_the_lock_has_every_direct_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = set(re.findall(r"^([\w.-]+)==", (ROOT / "requirements.txt").read_text(), re.M))
    for requirement in project["dependencies"]:
        name = re.match(r"[\w.-]+", requirement)
        assert name is not None
        assert name.group().lower() in locked
