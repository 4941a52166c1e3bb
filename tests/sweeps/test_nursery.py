"""The kernel stops a trial whose nursery does not look, and none that is within its grant."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from steps import alive, wait

from sweeps import processes
from sweeps.nursery import Message, Nursery


@pytest.fixture
def nursery(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nursery]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    nursery = Nursery("spinning:body", [])
    yield nursery
    nursery.close()


def _end(nursery: Nursery) -> dict[str, Any]:
    ends: list[Message] = []
    assert wait(lambda: ends.extend(nursery.events(0.1)) or ends, 30)
    return ends[0]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="the system has no /proc")
def test_the_kernel_stops_a_trial_whose_nursery_does_not_look(nursery: Nursery) -> None:
    nursery.start(0, {"spins": True}, 1.0)
    assert wait(lambda: processes.children(nursery.process.pid), 30)
    (trial,) = processes.children(nursery.process.pid)
    os.kill(nursery.process.pid, signal.SIGSTOP)
    try:
        assert wait(lambda: not alive(trial), 60)
    finally:
        os.kill(nursery.process.pid, signal.SIGCONT)
    end = _end(nursery)
    assert end["over_budget"]
    assert 1.0 < end["cpu_seconds"] < 6.0


@pytest.mark.parametrize("grant", [1.0, 327.5, 3600.0])
def test_clock_ticks_that_run_ahead_do_not_end_a_trial_within_its_grant(
    grant: float, nursery: Nursery
) -> None:
    nursery.start(0, {"spins": False}, grant)
    soft, hard = _end(nursery)["end"]["limits"]
    assert grant * 1.05 < soft < hard < grant * 1.1 + 4
