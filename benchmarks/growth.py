"""What the thousandth trial of a study costs, against the tenth, and the driver's memory meanwhile.

    python -m benchmarks.growth

A sweep of a trivial model: all that it spends is the engine's own cost, a logged model and a run
for each trial included.
"""

import argparse
import os
import tempfile
from pathlib import Path

import pandas as pd

from pipeline import models, prep, tracking
from pipeline.bill import METER
from pipeline.train import peak_rss_mb
from sweeps import sweep
from sweeps.engine import Engine
from sweeps.trial import Outcome

HERE = Path(__file__).parent
WINDOW = 20  # trials around the tenth, and up to the last, that a figure is the mean of
models.__path__ = [*models.__path__, str(HERE / "models")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n_trials", type=int, default=1000)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    given = parser.parse_args()
    n_trials, results = given.n_trials, given.results.absolute()
    METER.loaded()
    rows: list[dict[str, float]] = []
    real_left, real_show = Engine.left, sweep.Progress.__call__

    def left(engine: Engine) -> float:
        return real_left(engine) if len(engine.live) + len(rows) < n_trials else 0.0

    def show(progress: sweep.Progress, outcome: Outcome) -> None:
        overhead = {cause: spent for cause, spent in outcome.spent.items() if cause != "fit"}
        rows.append(overhead | {"overhead": sum(overhead.values()), "rss_mb": _rss_mb()})
        if len(rows) % 100 == 0:
            real_show(progress, outcome)

    Engine.left = left  # type: ignore[method-assign]
    sweep.Progress.__call__ = show  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        os.environ["PYTHONPATH"] = str(HERE.parent)
        data = f"{folder}/data"
        prep.prepare("strokes", "default", 520, data)
        os.chdir(folder)
        options = "--model trivial --dataset strokes --archive default --n_train 520 --seed 0 "
        options += f"--data_dir {data} --cpu_minutes 600 --workers auto --scheduler local "
        options += "--precision auto --study auto --plan false"
        sweep.main(options.split())
    table = pd.DataFrame(rows)
    each = table.drop(columns="rss_mb").diff()
    tenth, last = each[10 : 10 + WINDOW].mean(), each[-WINDOW:].mean()
    result = pd.DataFrame({"tenth": tenth, "last": last, "ratio": last / tenth}).round(4)
    print(result.to_string())
    rss = table["rss_mb"]
    print(f"driver: {rss[10]:.0f} MB at the tenth trial, {rss.iloc[-1]:.0f} MB at the last,")
    print(f"{peak_rss_mb():.0f} MB at most; {tracking.environment_tags()}")
    results.mkdir(exist_ok=True)
    table.iloc[:: max(1, n_trials // 100)].round(3).to_csv(results / "growth.csv")


def _rss_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    main()
