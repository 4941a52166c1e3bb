import argparse
import itertools
import json
import os
import py_compile
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from steps import left_until

from benchmarks import arms, peers, scale
from pipeline import models, prep, registry
from pipeline.models import cnn, knn
from sweeps import phases, processes, search, sweep
from sweeps.budget import own_cpu_seconds
from sweeps.engine import Engine
from sweeps.trial import Referee

ROOT = Path(__file__).parent.parent


def test_growth_runs_and_writes_its_figures(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.growth", "--n_trials", "35"]
    done = subprocess.run(
        [*command, "--results", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "growth.csv")
    assert len(table) == 35
    assert table["overhead"].is_monotonic_increasing
    assert "MB at the last" in done.stdout


# An arm that finds something after each half of a CPU-second, of which a fifth is not its own.
ARM = """
import json, time
value = 0
while True:
    value += 1
    end = time.process_time() + 0.5
    while time.process_time() < end: pass
    with open("found.jsonl", "a") as file:
        file.write(json.dumps({"val": value, "uncounted": 0.1}) + "\\n")
"""


def test_the_watchdog_stops_at_the_budget_and_counts_what_is_the_arms(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ARM], cwd=tmp_path)
    found, spent, ended = peers._watch(child, tmp_path / "found.jsonl", 2.0, "random")
    assert not ended
    assert child.poll() is not None
    assert 2.0 <= spent < 3.5
    # Law: what is found is dated by the arm's own CPU-seconds at that moment.
    assert [one["val"] for one in found] == list(range(1, len(found) + 1))
    for number, one in enumerate(found, 1):
        assert 0.4 * number - 0.1 <= one["cpu"] <= 0.4 * number + 1.0


def test_the_watchdog_kills_the_arm_alone(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as bystander:
        arm = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        _, _, ended = peers._watch(arm, tmp_path / "found.jsonl", 0.5, "random")
        assert not ended
        assert arm.poll() is not None
        assert bystander.poll() is None
        bystander.communicate(b"\n")
    assert bystander.returncode == 0


# A daemon that starts one worker after the other; what these spend is the kernel's only where it
# waits for them.
DAEMON = """
import signal, subprocess, sys
if sys.argv[1] == "deaf":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
burn = "import time\\nwhile time.process_time() < 0.8: pass"
for _ in range(3):
    subprocess.run([sys.executable, "-c", burn])
"""


@pytest.mark.parametrize("waits", ["deaf", "waits"])
def test_the_tally_has_each_process_once_whether_its_parent_waits_or_not(waits: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", DAEMON, waits])
    tally, told = peers.Tally(child.pid), [0.0]
    while child.poll() is None:
        told.append(tally())
        time.sleep(0.02)
    # Law: three workers of 0.8 CPU-seconds, and the daemon's own start.
    assert 2.2 < max(told) < 4.4
    # Law: what is spent stays spent.
    assert all(later > before - 0.1 for before, later in itertools.pairwise(told[:-1]))


class Kernel:
    """What the kernel would say of processes: parent, own CPU-seconds, those it has waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **table: tuple[int, float, float]) -> None:
        self.table = table
        monkeypatch.setattr(processes, "tree", lambda pid: [int(name[1:]) for name in self.table])
        monkeypatch.setattr(processes, "own_and_waited", lambda pid: self._of(pid)[1:])
        monkeypatch.setattr(processes, "parent", lambda pid: self._of(pid)[0])

    def _of(self, pid: int) -> tuple[int, float, float]:
        return self.table[f"p{pid}"]


GONE = (0, 0.0, 0.0)  # what the kernel has of a process that ends before it is read


def test_the_tally_keeps_what_ends_between_listing_and_reading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = Kernel(monkeypatch, p1=(9, 0.1, 0.0), p2=(1, 0.8, 0.0))
    tally = peers.Tally(1)
    assert tally() == pytest.approx(0.9)
    kernel.table["p2"] = GONE
    assert tally() == pytest.approx(0.9)
    assert tally() == pytest.approx(0.9)


def test_the_tally_counts_a_family_that_ends_at_once_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # A shell without a tick of its own, between a program and its child.
    kernel = Kernel(monkeypatch, p1=(9, 0.1, 0.0), p2=(1, 0.0, 0.0), p3=(2, 0.8, 0.0))
    tally = peers.Tally(1)
    assert tally() == pytest.approx(0.9)
    kernel.table = {"p1": (9, 0.1, 0.8)}  # both were waited for
    assert tally() == pytest.approx(0.9)


def test_the_tally_sees_what_is_lost_beside_what_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family = {"p1": (9, 0.1, 0.0), "p2": (1, 0.2, 0.0), "p3": (2, 0.7, 0.0)}
    kernel = Kernel(monkeypatch, **family)
    tally = peers.Tally(1)
    assert tally() == pytest.approx(1.0)
    # A child that was never seen has ended, and 1 has waited for it; 2 is deaf, and 3 is lost.
    kernel.table = {"p1": (9, 0.1, 5.0), "p2": (1, 0.2, 0.0)}
    assert tally() == pytest.approx(6.0)


@pytest.mark.parametrize("model", ["knn", "cnn"])
def test_what_an_arm_finds_is_written_down_as_it_is_found(
    model: str,
    data_options: dict[str, Any],
    tmp_path: Path,
    store: mlflow.MlflowClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if model == "cnn":
        from pipeline.models import _keras

        monkeypatch.setattr(_keras, "_answers", _keras._answers)  # an objective changes it
    options = data_options | {name: str(data_options[name]) for name in ("archive", "data_dir")}
    root = str(prep.ensure(**options).root)
    objective = arms.Objective(model, root, 0, True, "float32", str(tmp_path))
    seen: list[float] = []
    values = [objective({}, 3, lambda step, value: bool(seen.append(value))) for _ in range(2)]
    lines = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    fits, notes = [[one for one in lines if bool(one["fit"]) is fit] for fit in (True, False)]
    # Law: a line for each fit, with what it ended with.
    assert [one["val"] for one in fits] == values
    # Law: each new best has its accuracy on test, which the watchdog does not count.
    best = list(dict.fromkeys(np.maximum.accumulate(seen if model == "cnn" else values)))
    assert [one["val"] for one in notes] == [value for value in best if value > 0]
    assert all(0 <= one["test"] <= 1 and one["uncounted"] > 0 for one in notes)
    # Law: what a sweep does with its grant alone no tuner searches.
    assert not {"epochs", "n_letters", "late_letters", "tta", "dtype_policy"} & set(objective.space)


@pytest.mark.parametrize("given", ["1.5", "-1", "three"])
def test_a_seed_that_is_none_is_refused(
    given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["peers", "--archive", "a.zip", "--seeds", given])
    with pytest.raises(SystemExit):
        peers.main()
    rule = f"argument --seeds: must be 0 or more, but has '{given}': pass 0 1 2"
    assert rule in capsys.readouterr().err


def test_epochs_of_a_checkpoint_are_done_again_but_not_counted(
    data_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.models import _keras

    monkeypatch.setattr(_keras, "_answers", _keras._answers)  # an objective changes it
    options = data_options | {name: str(data_options[name]) for name in ("archive", "data_dir")}
    root = str(prep.ensure(**options).root)
    objective = arms.Objective("cnn", root, 0, True, "float32", str(tmp_path))
    short = objective({}, 2)
    counted = objective.uncounted
    values: list[float] = []
    objective({}, 4, lambda step, value: bool(values.append(value)), paid=2)
    # Law: it is the same fit that goes on.
    assert values[1] == pytest.approx(short, abs=0.05)
    lines = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    first, second = (number for number, one in enumerate(lines) if one["fit"])
    again = [one for one in lines[first + 1 : second] if not one["val"]]
    assert len(again) == 2
    # Law: what is done again is taken off, once, from the budget and from the fit.
    assert all(one["uncounted"] > 0 for one in again)
    assert objective.uncounted == pytest.approx(sum(one["uncounted"] for one in lines))
    assert objective.uncounted > counted


def test_a_tuner_that_knows_no_budget_runs_once_for_all(tmp_path: Path) -> None:
    given = {"models": ["cnn"], "budgets": [300, 900], "seeds": [1, 2], "arms": None}
    jobs = list(peers.planned(argparse.Namespace(**given, comparisons=["search", "whole"])))
    keys = [key for job in jobs for key in job.keys()]
    # Law: each row once, whoever makes it.
    assert len(set(keys)) == len(keys) == 2 * 2 * 2 * len(["ours", *arms.ARMS])
    for job in jobs:
        assert len(job.budgets) == (1 if job.arm in ("ours", "random_top") else 2)
        assert len(job.comparisons) == (2 if job.arm == "deck" else 1)


def test_our_sweep_is_an_arm_whose_steps_and_choice_are_told(
    data_options: dict[str, Any],
    tmp_path: Path,
    store: mlflow.MlflowClient,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = data_options | {name: str(data_options[name]) for name in ("archive", "data_dir")}
    root = prep.ensure(**options).root.absolute()
    monkeypatch.setattr(prep, "ensure", prep.ensure)  # an arm has a process of its own, else
    monkeypatch.setattr(Referee, "__call__", Referee.__call__)
    monkeypatch.setattr(Engine, "left", left_until(2))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    arms.ours("ours", "knn", root, 0, own_cpu_seconds() + 240, whole=True)
    arms.told(str(root))
    trials = json.loads(capsys.readouterr().out.splitlines()[-1])
    lines = [json.loads(line) for line in Path("found.jsonl").read_text().splitlines()]
    # Law: the watchdog sees each step of each trial, and none as a whole fit.
    assert len(lines) >= len(trials) == 2
    assert {one["val"] for one in trials} <= {one["val"] for one in lines}
    assert {(one["fit"], one["test"], one["uncounted"]) for one in lines} == {(0.0, None, 0.0)}
    # Law: one of the trials is what it chose, and that one's accuracy on test is known.
    (chosen,) = [one for one in trials if one["chosen"]]
    assert 0 <= chosen["test"] <= 1
    assert [one["test"] for one in trials if not one["chosen"]] == [None]
    assert all(0 < one["fit"] < one["cpu"] for one in trials)


def test_an_environment_without_bytecode_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "compiled_or_not" / "__init__.py"
    package.parent.mkdir()
    package.write_text("x = 1")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit, match="must have their bytecode, but that of compiled_or_not"):
        peers.check_bytecode(["compiled_or_not"])
    py_compile.compile(str(package), invalidation_mode=py_compile.PycInvalidationMode.TIMESTAMP)
    peers.check_bytecode(["compiled_or_not"])
    os.utime(package, (0, 0))  # as in a copy
    with pytest.raises(SystemExit, match="call `env -u PYTHONDONTWRITEBYTECODE .* -m compileall"):
        peers.check_bytecode(["compiled_or_not"])


@pytest.mark.parametrize(
    ("model", "fixed"),
    [
        ("cnn", {"schedule": "cosine", "average": 0.0, "late_letters": 0}),
        ("lstm", {"schedule": "cosine", "average": 0.0, "late_letters": 0}),
        ("knn", {"n_neighbors": 0, "weights": "best"}),
    ],
)
def test_our_search_alone_has_no_priors_and_its_method(
    model: str, fixed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = registry.load(models, model)
    for name in ("PRIORS", "FIXED", "LATE"):
        monkeypatch.setattr(member, name, getattr(member, name, ()), raising=False)
    monkeypatch.setattr(prep, "ensure", prep.ensure)
    monkeypatch.setattr(Referee, "__call__", Referee.__call__)
    given: list[str] = []
    monkeypatch.setattr(sweep, "main", given.extend)
    arms.ours("ours", model, tmp_path, 0, 300, whole=False)
    assert given[given.index("--cpu_minutes") + 1] == "5.0"
    assert (member.PRIORS, member.FIXED, member.LATE) == ([], fixed, ())
    # Law: where all are to have the same, nobody's answers are averaged over copies.
    assert search.whole(member).get("tta", 1) == 1


@pytest.mark.parametrize("part", ["without_screen", "without_phases"])
@pytest.mark.parametrize("model", ["cnn", "knn"])
def test_our_sweep_without_one_of_its_parts(
    part: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    member, halving = registry.load(models, model), search.Halving
    priors, short = search.known(member)[1:], search.short_fit(member)
    for name in ("SCREEN", "STEPS", "FIXED", "LATE"):
        if hasattr(member, name):
            monkeypatch.setattr(member, name, getattr(member, name))
    monkeypatch.setattr(phases, "SCREEN_SHARE", phases.SCREEN_SHARE)
    monkeypatch.setattr(search, "screened", search.screened)
    monkeypatch.setattr(search, "Halving", halving)
    monkeypatch.setattr(prep, "ensure", prep.ensure)
    monkeypatch.setattr(Referee, "__call__", Referee.__call__)
    monkeypatch.setattr(sweep, "main", lambda words: None)
    arms.ours(part, model, tmp_path, 0, 300, whole=True)
    # Law: a fit is on all letters, or the only short one is the first prior's.
    if (part, model) == ("without_screen", "cnn"):
        assert search.screened(member, 0) == priors[0] | short
        assert phases.SCREEN_SHARE < 1e-6
    else:
        n_short = search.short_fit(member).get("n_letters") or 40_000
        assert not phases.screens(member, phases.Growth(40_000, n_short, 0.0))
        assert member.FIXED["n_letters"] == 0
    # Law: without phases nothing that a short fit tells nothing about is a prior's.
    late = set(cnn.LATE) if (part, model) == ("without_screen", "cnn") else set()
    assert search.screened(member, 9).keys() & set(cnn.LATE) == late
    # Law: what stops a fit is the other tuners' rule without phases, else ours.
    assert (search.Halving is halving) == (part == "without_screen")


def test_a_row_is_what_was_found_within_its_budget() -> None:
    found = [
        {"val": 0.7, "test": 0.6, "cpu": 100.0, "fit": 0.0},
        {"val": 0.7, "test": None, "cpu": 100.0, "fit": 75.0},
        {"val": 0.91, "test": 0.9, "cpu": 400.0, "fit": 0.0},
        {"val": 0.91, "test": None, "cpu": 400.0, "fit": 285.0},
    ]
    early, late = (
        peers._row(("whole", "cnn", budget, "random", 0), found, 902.0, budget < 900)
        for budget in (300, 900)
    )
    assert (early["test_accuracy"], late["test_accuracy"]) == (0.6, 0.9)
    assert (early["n_fits"], late["n_fits"]) == (1, 2)
    assert np.isnan(early["reached_deck_at"])
    assert late["reached_deck_at"] == 400.0
    # It was not stopped at the first budget, so nobody knows by how much it would have overrun it.
    assert np.isnan(early["overrun"])
    assert late["overrun"] == pytest.approx(2 / 900)
    assert early["overhead_share"] == pytest.approx(0.25)
    assert late["overhead_share"] == pytest.approx(0.1)
    # Be it by little, as one that ends soon after it.
    soon = peers._row(("whole", "cnn", 300, "deck", 0), found, 301.0, larger=True)
    assert soon["cpu_seconds"] == 300
    assert np.isnan(soon["overrun"])
    nothing = peers._row(("whole", "cnn", 300, "random", 0), [], 301.0)
    assert nothing["test_accuracy"] == pytest.approx(1 / 26)
    assert np.isnan(nothing["overhead_share"])


def test_the_area_under_what_was_best_so_far() -> None:
    early = [{"val": 0.9, "cpu": 10.0}, {"val": 0.8, "cpu": 20.0}]
    assert peers._anytime([{"val": 0.9, "cpu": 0.0}], 100.0) == pytest.approx(0.9)
    # A tenth of the budget is the middle of 1 % to 100 %, on a logarithmic axis.
    assert peers._anytime(early, 100.0) == pytest.approx((0.9 + 1 / 26) / 2, abs=0.01)
    assert peers._anytime([], 100.0) == pytest.approx(1 / 26)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_drawn_lies_in_the_space(seed: int) -> None:
    space = {name: param.distribution for name, param in cnn.PARAMS.items()}
    params = arms.drawn(space, np.random.default_rng(seed))
    assert set(params) == set(space)
    for name, value in params.items():
        assert space[name]._contains(space[name].to_internal_repr(value))
        assert arms._value(space[name], arms._place(space[name], value)) == value


def test_each_place_of_a_space_with_steps_is_another_value_of_it() -> None:
    for member in (cnn, knn):
        for space in (param.distribution for param in member.PARAMS.values()):
            if getattr(space, "step", None):
                places = range(arms._place(space, space.high) + 1)
                values = [arms._value(space, place) for place in places]
                assert all(map(space._contains, values))
                assert len(set(values)) == len(values) == 1 + (values[-1] - space.low) / space.step
                assert (values[0], values[-1]) == (space.low, space.high)


def test_numbers_of_another_tuner_come_as_those_of_python() -> None:
    """A network's graph knows no others."""
    space = cnn.PARAMS
    drawn = {"filters": np.int64(1), "weight_decay": np.float64(0.1), "separable": True}
    values = {name: arms._value(space[name].distribution, it) for name, it in drawn.items()}
    assert values == {"filters": 32, "weight_decay": 0.1, "separable": True}
    assert [type(value) for value in values.values()] == [int, float, bool]


FIGURES = dict.fromkeys(("n_fits", "anytime", "overrun", "overhead_share"), 0.5)
FIGURES |= {"reached_deck_at": np.nan}
BASES = dict(zip([*peers.FEW, "ours"], (0.8, 0.84, 0.86, 0.88, 0.9), strict=True))


def block(processor: str, seed: int, gain: float = 0.0, budget: int = 300) -> pd.DataFrame:
    """What all arms of the KNN have on a processor by a seed, with a ``gain`` for all of them."""
    same = {"processor": processor, "comparison": "whole", "model": "knn", "budget": budget}
    same |= {"seed": seed} | FIGURES
    return pd.DataFrame(
        [same | {"arm": arm, "test_accuracy": base + gain} for arm, base in BASES.items()]
    )


def test_a_table_has_a_row_for_each_arm_the_best_first() -> None:
    table = peers.table(pd.concat([block("Abacus", seed, 0.01 * seed) for seed in range(3)]))
    assert list(table["arm"]) == ["ours", *reversed(peers.FEW)]
    assert list(table["n_blocks"]) == 5 * [3]
    assert list(table["test_accuracy"]) == pytest.approx([0.91, 0.89, 0.87, 0.85, 0.81])
    assert list(table["test_std"]) == pytest.approx(5 * [0.01])
    assert list(table["behind"]) == pytest.approx([0.0, 0.02, 0.04, 0.06, 0.1])


def test_arms_are_compared_in_blocks_that_have_all_of_them() -> None:
    first, second = block("Abacus", 0), block("Pascaline", 1, 0.02)
    lacking = block("Abacus", 2, 0.05).query("arm != 'random'")
    part = first.head(1).assign(arm="without_screen", test_accuracy=0.5)
    whole = peers.complete(pd.concat([first, lacking, second, part]))
    # Law: no arm's mean is of another processor or seed than that of another one.
    pd.testing.assert_frame_equal(whole, pd.concat([first, second]))
    table = peers.table(whole)
    assert list(table["n_blocks"]) == 5 * [2]
    assert list(table["test_accuracy"]) == pytest.approx([0.91, 0.89, 0.87, 0.85, 0.81])
    # Nor is it where blocks are not complete: those of one processor are not of another.
    alone = peers.table(pd.concat([first, second]), ["processor", *peers.SET])
    assert list(alone["n_blocks"]) == 10 * [1]
    assert len(peers.complete(lacking)) == 0


def test_a_picture_of_peers_has_a_panel_for_each_set() -> None:
    blocks = [block("Abacus", 0), block("Pascaline", 1, 0.02), block("Abacus", 0, 0.03, 900)]
    two, one = peers.picture(pd.concat(blocks)).axes
    assert two.get_title(loc="left") == "KNN, whole, 300 CPU-s (2 seeds)"
    assert one.get_title(loc="left") == "KNN, whole, 900 CPU-s (1 seed)"
    # Law: each arm has a point for each seed, and its mean; the best is at the top.
    assert [label.get_text() for label in two.get_yticklabels()] == [*peers.FEW, "ours"]
    ours = [list(line.get_xdata()) for line in two.lines if line.get_ydata()[0] == "ours"]
    assert ours == [pytest.approx([90, 92]), pytest.approx([91])]
    assert [text.get_text() for text in two.texts] == ["81.0", "85.0", "87.0", "89.0", "91.0"]


def test_rows_of_another_processor_are_not_there(tmp_path: Path) -> None:
    rows = pd.concat([block("Abacus", 0), block("Pascaline", 1)])
    path = tmp_path / "peers.csv"
    assert peers.rows_of(path, "Abacus") == set()
    rows.to_csv(path, index=False)
    assert peers.rows_of(path, "Abacus") == {("whole", "knn", 300, arm, 0) for arm in BASES}
    assert peers.rows_of(path, "Arithmometer") == set()


def test_a_synthesised_archive_is_one_of_drawn_letters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "N_DRAWN", 104)
    scale.synthesise(tmp_path / "drawn.zip", 1_300)
    data = prep.prepare("emnist_letters", str(tmp_path / "drawn.zip"), None, str(tmp_path))
    assert sum(data.facts["counts"].values()) == 1_300
    images = data.part("train").images
    # Law: copies are not the same letter again.
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) > 0.95 * len(images)


def test_a_picture_of_scale_has_a_line_for_each_work() -> None:
    works = ["cnn", "lstm", "knn, LDA", "knn, pixels", "prep"]
    table = pd.DataFrame(
        [
            {"work": work, "n_train": n, "cpu_seconds": n / 1e3, "peak_anon_mb": n / 1e2}
            for work in works
            for n in (1_000, 10_000)
        ]
    )
    figure = scale.picture(table)
    for axes, column in zip(figure.axes, ("cpu_seconds", "peak_anon_mb"), strict=True):
        assert {line.get_label() for line in axes.lines} == set(works)
        for line in axes.lines:
            rows = table[table["work"] == line.get_label()]
            assert list(line.get_ydata()) == list(rows[column])
