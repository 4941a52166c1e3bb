"""The file name is the registry: members of ``pipeline.datasets`` and ``pipeline.models``."""

import importlib
import pkgutil
from types import ModuleType

from pipeline.spec import UserError


def names(package: ModuleType) -> list[str]:
    """Names of a package's members: its modules but those that start with ``_``."""
    found = (module.name for module in pkgutil.iter_modules(package.__path__))
    return sorted(name for name in found if not name.startswith("_"))


def load(package: ModuleType, name: str) -> ModuleType:
    """Import the member called ``name``; an unknown name is a ``UserError``."""
    noun = package.__name__.rpartition(".")[2].removesuffix("s")
    if name not in names(package):
        known = ", ".join(names(package))
        raise UserError(f"{noun} must be one of {known}, but {name!r} came: pass -P {noun}=NAME")
    return importlib.import_module(f"{package.__name__}.{name}")


def preload(member: ModuleType) -> None:
    """Import what a model's fits need (``PRELOAD``), so that it is no part of a fit."""
    for name in getattr(member, "PRELOAD", ()):
        importlib.import_module(name)
