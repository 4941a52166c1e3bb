import os
import subprocess
import sys
from pathlib import Path

import pandas as pd

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
