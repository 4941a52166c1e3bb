"""The environment of a run and the present one, package by package."""

import importlib.metadata
import re
from collections.abc import Mapping

import pandas as pd
from packaging.requirements import Requirement
from packaging.version import Version

from pipeline import tracking

MISSING = "not installed"


def compare(tags: Mapping[str, str], lock: str) -> pd.DataFrame:
    """What a run with these tags ran on, and what there is now: a row for each package.

    Columns are package, recorded, recorded_by (``run``: by the run itself; ``lock``: by the lock of
    its commit, for what the run does not say) and now. The processor is a row too.
    """
    now = tracking.environment_tags()
    here = _versions(now["versions"])
    rows = [("processor", tags["cpu_model"], "run", now["cpu_model"])]
    recorded = _versions(tags["versions"])
    rows += [(name, then, "run", here.get(name, MISSING)) for name, then in recorded.items()]
    known = {*recorded, "tensorflow-cpu"}  # a run records the CPU build as tensorflow
    rows += [
        (name, then, "lock", _installed(name))
        for name, then in locked(lock).items()
        if name not in known
    ]
    return pd.DataFrame(rows, columns=["package", "recorded", "recorded_by", "now"])


def changes(packages: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``compare`` in which something is not as it was."""
    return packages[packages["recorded"] != packages["now"]]


def described(packages: pd.DataFrame) -> str:
    """What has changed, as a markdown table; or that nothing has."""
    changed = changes(packages)
    if changed.empty:
        return f"The environment is as it was: the processor and {len(packages) - 1} packages."
    table = tracking.markdown(
        ["package", "recorded", "recorded by", "now"], changed.to_numpy().tolist()
    )
    return f"Changed in the environment, of {len(packages)}:\n\n{table}"


def locked(lock: str) -> dict[str, str]:
    """Versions that a lock has for this platform, by package."""
    entries = [Requirement(text) for text in re.findall(r"^(\w[^\\\n]*)", lock, re.MULTILINE)]
    return {
        entry.name: str(Version(next(iter(entry.specifier)).version))
        for entry in entries
        if entry.marker is None or entry.marker.evaluate()
    }


def _versions(text: str) -> dict[str, str]:
    """The tag ``versions`` of a run: name=version pairs."""
    return dict(pair.split("=", maxsplit=1) for pair in text.split())


def _installed(name: str) -> str:
    try:
        return str(Version(importlib.metadata.version(name)))  # as a lock spells it
    except importlib.metadata.PackageNotFoundError:
        return MISSING
