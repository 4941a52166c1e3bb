"""Plans as a user types them: in a process of its own, whose CPU-seconds are all theirs."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
from steps import SWEEP, arguments, runs

from pipeline.models import lstm
from pipeline.spec import UserError
from sweeps import plan as plans
from sweeps.engine import Task
from sweeps.phases import Growth
from sweeps.plan import PLAN_CPU_SECONDS, Timed, on_all, phased, searched

TIMED = Timed(extra=2.0, step=10.0, later=5.0, n_steps=4)


@pytest.mark.parametrize(("n_steps", "cpu_seconds"), [(1, 12.0), (2, 17.0), (4, 27.0)])
def test_a_trial_costs_its_steps_and_what_is_beside_them(n_steps: int, cpu_seconds: float) -> None:
    assert TIMED.cost(n_steps) == cpu_seconds
    # Law: with exactly that, so many steps can be paid for, and with a little less one less.
    assert TIMED.n_affordable(cpu_seconds) == n_steps
    assert TIMED.n_affordable(cpu_seconds - 0.1) == n_steps - 1


def test_no_more_steps_are_paid_for_than_a_fit_has() -> None:
    assert TIMED.n_affordable(1000.0) == 4


@pytest.mark.parametrize(
    ("seen", "cpu_seconds"),
    [
        ([(1.0, 7.0)], 7.0),
        ([(0.1, 0.7)], 7.0),
        ([(0.1, 2.5), (0.3, 3.5)], 7.0),  # of which 2 are the same for any number of letters
        ([(0.02, 0.9), (0.1, 0.7)], 7.0),  # a first look may have been slow
        ([(0.02, 0.65), (0.1, 0.7)], 3.5),  # here half of it is taken to be
    ],
)
def test_what_a_step_takes_on_all_letters(
    seen: list[tuple[float, float]], cpu_seconds: float
) -> None:
    assert on_all(seen) == pytest.approx(cpu_seconds)


@pytest.mark.parametrize(
    ("cpu_seconds", "race", "confirm"),
    [
        (60.0, ["race", "1", "about 3", "25.4"], None),
        (300.0, ["race", "1 to 2", "about 14 to 28", "102 to 203"], None),
        (1200.0, ["race", "1 to 2", "about 30 to 41", "220 to 293"], "2"),
        (9000.0, ["race", "18", "about 47", "337"], "2"),
    ],
)
def test_a_plan_knows_how_many_fits_race_as_far_as_a_screen_can_change_it(
    cpu_seconds: float, race: list[str], confirm: str | None
) -> None:
    timed = Timed(extra=2.0, step=8.0, later=7.0, n_steps=48)
    left, growth = cpu_seconds - 18.0, Growth(40, 10, 1.0)
    screen, *whole = phased([timed], None, cpu_seconds, left, growth, 1.0)
    assert [row[1:] for row in whole] == [race[1:]] + ([[confirm, *race[2:]]] if confirm else [])


def test_what_is_known_to_race_is_planned_with_whatever_else_was_timed() -> None:
    timed = Timed(extra=2.0, step=8.0, later=7.0, n_steps=48)
    dear, budget = timed._replace(later=70.0), (1200.0, 1180.0, Growth(40, 10, 1.0), 1.0)
    alone = phased([timed], None, *budget)
    assert phased([timed, dear, dear], timed, *budget) == alone
    assert phased([timed, dear, dear], None, *budget) == phased([dear], None, *budget) != alone


def test_a_plan_of_fits_without_a_length_has_a_screen_and_the_best_of_it_on_all_letters() -> None:
    timed = [Timed(1.0, 3.0, 3.0, 10), Timed(1.0, 20.0, 20.0, 1)]
    growth = Growth(40, 10, 2.0)  # 3.5 times as dear
    screen, race = searched(timed, timed[1], 300.0, 285.0, growth)
    assert screen[1:] == ["about 24", "short", "8.14 (6.71 to 9.57)"]  # 195 CPU-seconds
    assert race == ["race", "about 4", "all letters", "21"]
    # Law: what is left of a small budget pays for one of them.
    screen, race = searched(timed, timed[1], 60.0, 45.0, growth)
    assert race == ["race", "about 1", "all letters", "21"]
    # Law: without one that is known to race they cost what those timed do: 31 and 21.
    assert searched(timed, None, 300.0, 285.0, growth)[1][3] == "26"


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deck's model takes 16 CPU-seconds a step on all letters, 2 beside its steps."""
    costs = {0: Timed(2.0, 16.0, 16.0, 40)}
    monkeypatch.setattr(plans, "_time", lambda task, prepared: (costs, 0, 5.0))
    monkeypatch.setattr(plans, "own_cpu_seconds", lambda: 5.0)
    monkeypatch.setattr(plans, "growth", lambda member, data: Growth(40_000, 10_000, 1953.0))


@pytest.mark.usefixtures("timed")
def test_a_plan_begins_with_a_short_fit_where_the_sweep_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data: Any = SimpleNamespace(title="letters")
    # A step takes 16 CPU-seconds, and no trial may have more than 15; a short fit takes 7.
    text = plans.plan(Task("cnn", data, 0, 1, False), 60.0, 0.0)
    assert "| screen, the deck's model first | about 3 " in text
    with pytest.raises(UserError, match="these take 10 and 7 CPU-s: raise cpu_minutes above"):
        plans.plan(Task("cnn", data, 0, 1, False), 20.0, 0.0)


def test_a_plan_times_the_first_steps_of_a_long_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    class Idle:
        imported = 0.0

        def __init__(self, body: str, preload: list[str]) -> None: ...

        def cpu_seconds(self) -> float:
            return 0.0

        def start(self, number: int, spec: dict[str, Any], grant: float) -> None:
            asked.append(spec["params"])

        def events(self, timeout: float) -> list[dict[str, Any]]:
            return [{"end": TIMED._asdict() | {"rough": False}}]

        def close(self) -> None: ...

    monkeypatch.setattr(plans, "Nursery", Idle)
    monkeypatch.setattr(plans, "own_cpu_seconds", lambda: 5.0)
    timed, n_too_dear, _ = plans._time(
        Task("lstm", SimpleNamespace(root="data"), 0, 1, False, "float32"), 0.0
    )
    # Law: as a sweep's do, its steps look at val once; the last look, at five copies, is not timed.
    longest = lstm.PARAMS["epochs"].distribution.high
    assert [params["epochs"] for params in asked] == len(asked) * [longest]
    assert asked[1].items() >= {"tta": 5, "n_letters": 0}.items()
    assert (len(timed), n_too_dear) == (len(asked), 0)


def test_a_last_look_that_is_dearer_is_planned_for() -> None:
    timed = Timed(extra=2.0, step=8.0, later=7.0, n_steps=48)
    alone, dearer = (
        phased([timed], timed, 300.0, 282.0, Growth(40, 10, 1.0, last), 1.0) for last in (0, 41 * 9)
    )
    # Nine steps' worth of it: 63 CPU-seconds.
    assert (alone[1][2], dearer[1][2]) == ("about 14 to 28", "about 5 to 19")


def plan(options: dict[str, Any], cpu_minutes: float) -> tuple[int, str, float]:
    """Exit code, output and CPU-seconds of a plan for nearest neighbours."""
    given = arguments(
        options | SWEEP | {"model": "knn", "plan": "true", "cpu_minutes": cpu_minutes}
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "sweeps.sweep", *given],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    with process.stdout as pipe:
        out = pipe.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, out, usage.ru_utime + usage.ru_stime


def test_a_plan_says_what_a_budget_buys_and_searches_nothing(
    store: mlflow.MlflowClient, data_options: dict[str, Any]
) -> None:
    code, out, spent = plan(data_options, 5)
    assert code == 0, out
    assert "what 300 CPU-seconds will buy" in out
    assert "trial 000, the deck's model" in out
    assert "further trials" in out
    assert "Warning" not in out
    assert spent <= PLAN_CPU_SECONDS
    (run,) = runs(store, "plan")
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.note.content"] in out
    assert not (data_options["data_dir"] / "studies").exists()
    assert runs(store, "sweep") == []


def test_a_plan_for_too_small_a_budget_says_how_much_would_do(
    store: mlflow.MlflowClient, data_options: dict[str, Any]
) -> None:
    code, out, _ = plan(data_options, 0.05)
    assert code == 2
    assert "error: cpu_minutes must pay for start-up and a first step, but 0.05 came" in out
    assert "raise cpu_minutes above" in out
    assert [run.info.status for run in runs(store, "plan")] == ["FAILED"]
