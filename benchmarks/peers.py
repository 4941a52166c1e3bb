"""Accuracy for the same CPU-seconds: this project's sweep beside the tuners people would pick.

    python -m benchmarks.peers --archive letters-emnist-layout.zip --models cnn --budgets 300

Two comparisons: ``search`` (all have the project's space and its train function; our sweep has no
priors, but does not search ``arms.METHOD``, as the others do) and ``whole`` (each tuner as its
documentation shows it on the deck's network, and our sweep as it is). Every arm is a process of its
own on one worker. A watchdog adds up CPU-seconds, of it and of all its children, imports included,
and kills it at the budget; its result is what had the best accuracy on ``val`` by then, after any
epoch of any of its fits. A tuner that does not know its budget runs once, to the largest, and is
looked at at each. Rows that are in ``results/peers.csv`` already are not run again, but for those
of another processor: a CPU-second is worth another amount of work there. So arms are compared in
blocks, of one processor and one seed each, and a mean over blocks is of those that have all arms.
The tuners' packages are in ``benchmarks/requirements.txt``. ``--arms`` with those of ``arms.OURS``
in ``whole`` shows what each part of the sweep is good for.
"""

import argparse
import importlib.util
import itertools
import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks import arms
from pipeline import models as all_models
from pipeline import plots, precision, prep, registry, tracking
from sweeps import processes
from sweeps.nursery import ONE_THREAD

RESULTS = Path(__file__).parent / "results"
KEYS = ["comparison", "model", "budget", "arm", "seed"]
SET = ["comparison", "model", "budget"]  # within which arms are compared
BLOCK = ["processor", "seed"]  # and, as conditions differ between these, within which of a set
AWARE = (*arms.OURS, "random_top")  # arms that know their budget
FEW = ("deck", "random", "random_top", "optuna_median")  # the arms for other models than the CNN
LEVELS = {"cnn": 0.907, "lstm": 0.887, "knn": 0.812}  # the deck's models', here
POLL_SECONDS = 0.2
OVERTIME = 1.05  # of the budget: ours ends itself, and is killed only if it does not


class Job(NamedTuple):
    """One process, and the rows that it gives: one for each comparison and budget."""

    comparisons: tuple[str, ...]
    model: str
    budgets: tuple[int, ...]
    arm: str
    seed: int

    def keys(self) -> list[tuple[str, str, int, str, int]]:
        return [
            (comparison, self.model, budget, self.arm, self.seed)
            for comparison, budget in itertools.product(self.comparisons, self.budgets)
        ]


class Seen(NamedTuple):
    """A process, as it was when it was looked at last, with CPU-seconds."""

    parent: int
    own: float
    waited: float  # of the children that it has waited for


class Tally:
    """CPU-seconds of a process and all that descend from it.

    The kernel adds a child's to those of the parent that waits for it. Ray's daemon, for one, waits
    for none (it ignores SIGCHLD): what such a child had when it was seen last is added here.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.seen: dict[int, Seen] = {}
        # Of each process: what those of its children had that are gone, and what it has waited for.
        self.gone: defaultdict[int, float] = defaultdict(float)
        self.waited: defaultdict[int, float] = defaultdict(float)

    def __call__(self) -> float:
        now: dict[int, Seen] = {}
        for pid in processes.tree(self.pid):
            times = processes.own_and_waited(pid)
            if parent := processes.parent(pid):  # none where it has just gone, and its times too
                now[pid] = Seen(parent, *times)
        for pid, one in now.items():
            before = self.seen[pid].waited if pid in self.seen else 0.0
            self.waited[pid] += one.waited - before
        for pid, one in reversed(self.seen.items()):  # children before their parents
            if pid not in now:
                self.gone[one.parent] += one.own + one.waited + self._lost(pid)
                self.gone.pop(pid, None)
                self.waited.pop(pid, None)
        self.seen = now
        counted = sum(one.own + one.waited for one in now.values())
        return counted + sum(map(self._lost, self.gone))

    def _lost(self, pid: int) -> float:
        """CPU-seconds of a process's children that are gone, and for which it has not waited."""
        return max(0.0, self.gone[pid] - self.waited[pid])


def arms_of(model: str) -> list[str]:
    """The arms for a model: our sweep and the other tuners."""
    return ["ours", *(arms.ARMS if model == "cnn" else FEW)]


def planned(args: argparse.Namespace) -> Iterator[Job]:
    for seed, model in itertools.product(args.seeds, args.models):
        wanted = args.arms or arms_of(model)
        if "deck" in wanted:  # the same in all comparisons
            yield Job(tuple(args.comparisons), model, tuple(args.budgets), "deck", seed)
        for comparison, arm in itertools.product(args.comparisons, wanted):
            if arm in AWARE:
                for budget in args.budgets:
                    yield Job((comparison,), model, (budget,), arm, seed)
            elif arm != "deck":
                yield Job((comparison,), model, tuple(args.budgets), arm, seed)


def run(job: Job, root: Path, policy: str) -> list[dict[str, Any]]:
    """An arm under the watchdog, and what it had found when each budget was spent."""
    arm, budget = job.arm, max(job.budgets)
    whole = arm == "deck" or "whole" in job.comparisons
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | ONE_THREAD
        environment |= {
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "RAY_USAGE_STATS_ENABLED": "0",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        code = (
            "from benchmarks.arms import run; "
            f"run({arm!r}, {job.model!r}, {str(root)!r}, {job.seed}, {budget}, {whole}, {policy!r})"
        )
        with (Path(folder) / "log").open("wb") as log:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            child = subprocess.Popen(
                [sys.executable, "-c", code], cwd=folder, env=environment, stdout=log, stderr=log
            )
            found, watched, ended = _watch(child, Path(folder) / "found.jsonl", budget, arm)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
        total = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        total = max(total, watched)  # the kernel's leaves out whom nobody has waited for
        if ended and child.returncode:
            text = (Path(folder) / "log").read_text(errors="replace")
            raise RuntimeError(f"{job} ended with {child.returncode}:\n{text[-3000:]}")
        if arm in arms.OURS:
            found, uncounted = found + _ours(folder, root, environment), 0.0
        else:
            uncounted = sum(one["uncounted"] for one in found)
    spent = total - uncounted
    return [
        dict(zip(KEYS, key, strict=True)) | _row(key, found, spent, key[2] < budget)
        for key in job.keys()
    ]


def _row(
    key: tuple[str, str, int, str, int],
    found: Sequence[dict[str, Any]],
    spent: float,
    larger: bool = False,
) -> dict[str, Any]:
    """Figures of an arm at one budget, of all that it found until it had spent so much.

    ``larger`` says that it was run to a larger one, so that what it has spent is no overrun.
    """
    _, model, budget, arm, _ = key
    later = larger and spent > budget
    within = [one for one in found if one["cpu"] <= budget]
    fits = [one for one in within if one["fit"] > 0]
    # Ours says which model it chose: the race's winner, not the luckiest trial.
    best = max(within, key=lambda one: (one.get("chosen", False), one["val"]), default=None)
    # A fit that was stopped is no overhead: a tuner is billed until its last whole one.
    billed = spent if arm in arms.OURS else max((one["cpu"] for one in fits), default=np.nan)
    return {
        "test_accuracy": best["test"] if best else 1 / 26,
        "val_accuracy": best["val"] if best else 1 / 26,
        # Ray kills the process of a trial that it stops: its fits are never written down.
        "n_fits": np.nan if arm == "ray_asha" else len(fits),
        "reached_deck_at": next(
            (one["cpu"] for one in within if one["val"] >= LEVELS[model]), np.nan
        ),
        "anytime": _anytime(within, budget),
        "cpu_seconds": budget if later else spent,
        "overrun": np.nan if later else max(0.0, spent / budget - 1),
        "overhead_share": 1 - sum(one["fit"] for one in fits) / billed,
    }


def _watch(
    child: subprocess.Popen[bytes], path: Path, budget: float, arm: str
) -> tuple[list[dict[str, Any]], float, bool]:
    """Let an arm run until it ends or has spent its budget.

    Gives what it found, and when; what it spent in all, as seen from here; whether it ended itself.
    """
    bystanders = set(processes.children(os.getpid())) - {child.pid}
    tally = Tally(child.pid)
    found: list[dict[str, Any]] = []
    limit = budget * (OVERTIME if arm in arms.OURS else 1.0)
    while True:
        time.sleep(POLL_SECONDS)
        spent = tally()
        # Before the file is read: what an arm writes last is then not missed.
        ended = child.poll() is not None
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines[len(found) :]:
            one = json.loads(line)
            earlier = sum(other["uncounted"] for other in found)
            found.append(one | {"cpu": spent - earlier - one["uncounted"]})
        uncounted = sum(one["uncounted"] for one in found)
        if ended or spent - uncounted > limit:
            processes.kill_tree(child.pid)
            child.wait()
            _reap(bystanders)
            return found, spent, ended


def _reap(bystanders: set[int]) -> None:
    """Kill and wait for what a killed arm has left: daemons come to us, who adopt orphans.

    ``bystanders`` are children of ours that were there before the arm.
    """
    while left := set(processes.children(os.getpid())) - bystanders:
        for pid in left:
            processes.kill_tree(pid)
            os.waitpid(pid, 0)


def _ours(folder: str, root: Path, environment: dict[str, str]) -> list[dict[str, Any]]:
    """What our sweep found: its trials as they ended, with its own choice's accuracy on test."""
    code = f"from benchmarks.arms import told; told({str(root)!r})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout.decode().splitlines()[-1])
    return found


def _anytime(found: Sequence[dict[str, Any]], budget: float) -> float:
    """Area under the best accuracy on val so far, over the logarithm of CPU-seconds, from 1 %."""
    grid = np.geomspace(budget / 100, budget, 200)
    best = [max((one["val"] for one in found if one["cpu"] <= at), default=1 / 26) for at in grid]
    return float(np.mean(best))


def complete(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of complete blocks: where a set has all its arms on one processor, by one seed."""
    here = rows[
        [arm in arms_of(model) for arm, model in zip(rows["arm"], rows["model"], strict=True)]
    ]
    return here.groupby([*SET, *BLOCK]).filter(
        lambda block: len(block) == len(arms_of(block["model"].iloc[0]))
    )


def table(rows: pd.DataFrame, by: Sequence[str] = SET) -> pd.DataFrame:
    """Mean over blocks of each arm, with the standard deviation of its accuracy on test.

    ``behind`` is how far it is behind our sweep on average, in the blocks that have both.
    """
    ours = rows[rows["arm"] == "ours"].set_index([*SET, *BLOCK])["test_accuracy"]
    there = rows.join(ours.rename("behind"), on=[*SET, *BLOCK])
    there["behind"] -= there["test_accuracy"]
    grouped = there.groupby([*by, "arm"], sort=False)
    figures = ["n_fits", "reached_deck_at", "anytime", "overrun", "overhead_share"]
    means = grouped[["test_accuracy", "behind", *figures]].mean()
    means.insert(1, "test_std", grouped["test_accuracy"].std())
    means.insert(0, "n_blocks", grouped.size())
    ascending = [True] * len(by) + [False]
    return means.reset_index().sort_values([*by, "test_accuracy"], ascending=ascending)


def picture(rows: pd.DataFrame) -> Figure:
    """Accuracy on test of each arm in each block, and the mean over them; a panel for each set.

    ``rows`` are those of ``complete`` blocks.
    """
    means = table(rows)
    models, columns = means["model"].unique(), means[["comparison", "budget"]].drop_duplicates()
    figure = Figure(figsize=(4.2 * len(columns), 3.2 * len(models)), layout="constrained")
    grid = figure.subplots(len(models), len(columns), squeeze=False)
    for axes in grid.ravel():
        axes.set_axis_off()
    for (comparison, model, budget), ordered in means.groupby(SET, sort=False):
        row = list(models).index(model)
        axes = grid[row, list(columns.itertuples(index=False)).index((comparison, budget))]
        axes.set_axis_on()
        ordered = ordered.iloc[::-1]  # the best at the top
        same = (rows[SET] == [comparison, model, budget]).all(axis=1)
        single = rows[same].set_index("arm")["test_accuracy"]
        # Points, not bars: the axis does not begin at 0.
        for arm, mean in zip(ordered["arm"], ordered["test_accuracy"], strict=True):
            colour = plots.GREY if arm in arms.ARMS else plots.BLUE
            each = 100 * single[[arm]]
            axes.plot(each, [arm] * len(each), "o", color=colour, alpha=0.4, markersize=4)
            axes.plot(100 * mean, arm, "|", color=colour, markersize=16, markeredgewidth=2.5)
            at_the_edge = axes.get_yaxis_transform()
            axes.text(1.02, arm, f"{100 * mean:.1f}", transform=at_the_edge, va="center")
        axes.grid(axis="x", alpha=0.3)
        n_blocks = ordered["n_blocks"].iloc[0]
        seeds = "1 seed" if n_blocks == 1 else f"{n_blocks} seeds"
        title = f"{model.upper()}, {comparison}, {budget} CPU-s ({seeds})"
        axes.set_title(title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("accuracy on test (%) of each seed, and their mean; this project in blue")
    return figure


def check_bytecode(names: Sequence[str]) -> None:
    """Refuse packages whose bytecode is missing or older than their files.

    So it is in an environment that was copied. Where Python may not write it anew either, each
    process compiles all that it loads: some 20 CPU-seconds with TensorFlow, and who has more
    processes pays more often.
    """
    for name in names:
        source = Path(importlib.util.find_spec(name).origin)
        compiled, found = Path(importlib.util.cache_from_source(source)), source.stat()
        header = struct.pack(
            "<4sIII", importlib.util.MAGIC_NUMBER, 0, int(found.st_mtime), found.st_size
        )
        if not compiled.exists() or compiled.read_bytes()[: len(header)] != header:
            sys.exit(
                f"error: the packages must have their bytecode, but that of {name} does not fit "
                f"{source}: call `env -u PYTHONDONTWRITEBYTECODE {sys.executable} -m compileall "
                f"-q {source.parents[1]}`"
            )


def rows_of(path: Path, processor: str) -> set[tuple[Any, ...]]:
    """The ``KEYS`` of the rows that were run on a processor; none where there is no file yet."""
    if not path.exists():
        return set()
    rows = pd.read_csv(path)
    here = rows[rows["processor"] == processor]
    return set(here[KEYS].itertuples(index=False, name=None))


def _seed(text: str) -> int:
    """A whole number of 0 or more, as an argument of the command line."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be 0 or more, but has {text!r}: pass 0 1 2")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--archive", required=True)
    parser.add_argument("--models", nargs="+", default=["cnn", "lstm", "knn"])
    parser.add_argument("--budgets", nargs="+", type=int, default=[300, 900])
    parser.add_argument("--seeds", nargs="+", type=_seed, default=[0, 1, 2])
    parser.add_argument("--comparisons", nargs="+", default=["search", "whole"])
    parser.add_argument("--arms", nargs="+", choices=[*arms.OURS, *arms.ARMS])
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th row from the i-th")
    parser.add_argument("--output", type=Path, default=RESULTS / "peers.csv")
    args = parser.parse_args()
    for name in args.models:
        registry.load(all_models, name)
    check_bytecode(("mlflow", "optuna", "sklearn", "tensorflow"))
    data = prep.ensure(
        dataset="emnist_letters", archive=args.archive, n_train=40_000, data_dir="data"
    )
    space = registry.load(all_models, "cnn").PARAMS
    policy = precision.POLICIES[precision.resolve(precision.AUTO, space)]
    processor = tracking.environment_tags()["cpu_model"]
    processes.adopt_orphans()
    shard, n_shards = map(int, args.shard.split("/"))
    for job in list(planned(args))[shard::n_shards]:
        there = rows_of(args.output, processor)
        if there.issuperset(job.keys()):
            continue
        new = run(job, data.root.absolute(), policy)
        found = pd.DataFrame([row for row in new if tuple(row[key] for key in KEYS) not in there])
        found.insert(0, "processor", processor)
        found.to_csv(args.output, mode="a", header=not args.output.exists(), index=False)
        print(found.to_string(index=False, header=False), flush=True)
    rows = pd.read_csv(args.output)
    print(table(rows, ["processor", *SET]).to_string(index=False))
    whole = complete(rows)
    if len(whole):
        picture(whole).savefig(args.output.with_suffix(".png"), dpi=110)
        print(f"complete blocks:\n{table(whole).to_string(index=False)}")
    else:
        print("no picture: no block has all arms yet")


if __name__ == "__main__":
    main()
