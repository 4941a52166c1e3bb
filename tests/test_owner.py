import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import owner

pytestmark = pytest.mark.skipif(owner.me() == "", reason="owners are told apart by /proc only")


def _fields(**change: str) -> str:
    names = ("machine", "boot", "namespace", "pid", "began")
    return " ".join((dict(zip(names, owner.me().split(), strict=True)) | change).values())


def test_this_process_lives() -> None:
    assert not owner.is_dead(owner.me())


def test_a_process_that_has_ended_is_dead() -> None:
    code = "from pipeline import owner; print(owner.me())"
    root = Path(__file__).parent.parent
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert owner.is_dead(told.stdout)


def test_a_later_process_with_the_same_pid_is_another() -> None:
    assert owner.is_dead(_fields(began="1"))


def test_a_process_of_an_earlier_boot_is_dead() -> None:
    assert owner.is_dead(_fields(boot="another", pid=str(os.getpid())))


def test_what_cannot_be_seen_is_not_called_dead() -> None:
    assert not owner.is_dead(_fields(machine="elsewhere", pid="1", began="1"))
    assert not owner.is_dead(_fields(namespace="pid:[1]", began="1"))
