"""Two sweeps at once at one real server, and what the benchmark of load makes of them."""

from pathlib import Path

import mlflow
import pytest
from servers import Server
from stores import CODE

from benchmarks import load
from pipeline import models

N_SWEEPS, N_TRIALS = 2, 20


@pytest.mark.timeout(600)  # a server and two sweeps have to load
def test_no_run_is_lost_or_doubled_and_a_benchmark_would_see_it(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "__path__", list(models.__path__))  # the benchmark adds to it
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", load.EXPERIMENT)
    monkeypatch.setenv("PYTHONPATH", CODE)
    assert server.process is not None
    pids = {"server": server.process.pid}
    table, faults = load.load(pids, N_SWEEPS, N_TRIALS, tmp_path, n_alone=2)
    assert faults == []
    # A row before and after, and one for each twentieth of the runs.
    assert list(table["alone"]) == [True, True] + load.N_BINS * [False]
    assert list(table["n_runs"][2:]) == list(range(2, 41, 2))
    assert (table.loc[:1, "server_cpu_ms"] > 0).all()
    assert (table[["create_ms", "log_batch_ms", "log_model_ms"]] > 0).all(axis=None)
    assert load.ratios(table).notna().any(axis=None)
    # The same questions, of a store where something is wrong.
    client = mlflow.MlflowClient(server.uri)
    found = load.Found(client, tmp_path)
    sweep = found.sweeps[0]
    name = sweep.info.run_name
    mine = [r for r in found.children if r.data.tags["mlflow.parentRunId"] == sweep.info.run_id]
    mine.sort(key=lambda run: int(run.data.tags["trial"]))
    client.delete_run(mine[3].info.run_id)
    client.create_run(found.home, tags=mine[5].data.tags)
    client.log_metric(mine[7].info.run_id, "val_accuracy", 0.5, step=99)
    client.log_metric(mine[8].info.run_id, "cpu_seconds", 0.5, step=99)
    client.update_run(mine[9].info.run_id, status="RUNNING")
    client.delete_logged_model(mine[11].data.tags["model_uri"].removeprefix("models:/"))
    told = load.faults(load.Found(client, tmp_path), N_SWEEPS, N_TRIALS)
    for fault in (
        "child runs lack [3]",
        "child runs have [5] more than once",
        "trial 7: val_accuracy is not, step by step, what the study has",
        "trial 8: its bill is not that of the ledger",
        "trial 9: is RUNNING, as ",
        "trial 11: it has 0 models",
    ):
        assert any(one.startswith(f"{name}: {fault}") for one in told), (fault, told)
    assert load.faults(found, N_SWEEPS + 1, N_TRIALS)[0] == "2 sweeps"
