"""What the MLflow UI shows of an experiment: a description, and views with columns and charts.

A view is an experiment's tag, as the menu "Views" of MLflow 3.17's runs table writes it; the UI has
no other place for columns. Its content is the UI's own state: a filter, an order, columns, charts.
"""

import json
from collections.abc import Sequence
from typing import Any

DESCRIPTION = """\
**Letters**: a CNN, an LSTM and nearest neighbours, each tuned inside a budget of CPU-seconds. The \
menu *Views* has sweeps, trials, test figures and promotions.

Each *sweep* is the parent of its *trials*; *evaluate* has a model's figures on test, *compare* the
report on the sweeps of one data set, *promote* the evidence for a decision. Accuracies are shares,
sizes megabytes, and `cpu_seconds` is user and system time of all processes."""
PREFIX = "mlflow.sharedViewState."
MADE_AT = 1_767_225_600_000  # milliseconds since 1970; the UI wants one
CHARTS = "charts"  # the section of a view's own charts


def tags() -> dict[str, str]:
    """The experiment's tags that make its views, by key."""
    at_cost = {"xAxisKey": "metric", "selectedXAxisMetricKey": "cpu_seconds"}
    return dict(
        [
            _view(
                "sweeps",
                "Sweeps side by side",
                "tags.step = 'sweep'",
                metrics=["test_accuracy", "confirmed_val_accuracy", "cpu_seconds", "n_trials"],
                tags=["dataset_title"],
                charts=[
                    _line("val_accuracy", **at_cost),
                    _scatter("cpu_seconds", "test_accuracy"),
                    _bar("test_accuracy"),
                ],
            ),
            _view(
                "trials",
                "Trials, the best first",
                "tags.step = 'trial'",
                metrics=["val_accuracy", "cpu_seconds", "peak_rss_mb"],
                tags=["model", "phase", "state"],
                charts=[
                    _line("val_accuracy", xAxisKey="step", selectedXAxisMetricKey=""),
                    _scatter("cpu_seconds", "val_accuracy"),
                    _bar("cpu_seconds"),
                ],
                order="metrics.`val_accuracy`",
            ),
            _view(
                "evaluations",
                "Models on test",
                "tags.step = 'evaluate'",
                metrics=[
                    "test_accuracy",
                    "test_accuracy_low",
                    "test_accuracy_high",
                    "test_top2_accuracy",
                    "predict_us_per_letter",
                    "model_mb",
                ],
                tags=["model", "dataset_title"],
                charts=[
                    _bar("test_accuracy"),
                    _scatter("predict_us_per_letter", "test_accuracy"),
                    _scatter("model_mb", "test_accuracy"),
                ],
                order="metrics.`test_accuracy`",
            ),
            _view(
                "promotions",
                "Promotions",
                "tags.step = 'promote'",
                metrics=["gate_accuracy", "champion_gate_accuracy", "gain", "p_value"],
                tags=["decision", "reason", "decided_by"],
                charts=[
                    _bar("gain"),
                    _bar("gate_accuracy"),
                    _scatter("predict_us_per_letter", "gate_accuracy"),
                ],
            ),
        ]
    )


def address(experiment_id: str, view: str = "sweeps") -> str:
    """Path of a view in the MLflow UI, which opens on another page unless told so."""
    query = f"workflowType=machine_learning&viewStateShareKey={view}"
    return f"/#/experiments/{experiment_id}/runs?{query}"


def _view(
    key: str,
    name: str,
    which: str,
    metrics: Sequence[str],
    tags: Sequence[str],
    charts: Sequence[dict[str, Any]],
    order: str = "attributes.start_time",
) -> tuple[str, str]:
    columns = [f"metrics.`{one}`" for one in metrics] + [f"tags.`{one}`" for one in tags]
    # MLflow adds a chart for each further metric: those are folded.
    folded = ["Model metrics", "overhead", "System metrics"]
    state = {
        "searchFilter": which,
        "orderByKey": order,
        "orderByAsc": False,
        "selectedColumns": columns,
        "columnOrder": columns,
        "runsHiddenMode": "FIRST_20_RUNS",
        "isAccordionReordered": True,  # else the sections are sorted by name
        "compareRunCharts": [one | {"uuid": f"{key}-{i}"} for i, one in enumerate(charts)],
        "compareRunSections": [_section(CHARTS, name, bool(charts))]
        + [_section(one, one, False) for one in folded],
    }
    text = {"name": name, "createdAt": MADE_AT, "updatedAt": MADE_AT, "state": json.dumps(state)}
    return PREFIX + key, json.dumps(text)


def _section(key: str, name: str, shown: bool) -> dict[str, Any]:
    return {"uuid": key, "name": name, "display": shown, "isReordered": True}


def _chart(kind: str, **more: Any) -> dict[str, Any]:
    common = {"type": kind, "metricSectionId": CHARTS, "deleted": False, "isGenerated": False}
    return common | {"runsCountToCompare": 100} | more


def _bar(metric: str) -> dict[str, Any]:
    return _chart("BAR", metricKey=metric)


def _scatter(x: str, y: str) -> dict[str, Any]:
    axes = {"xaxis": {"key": x, "type": "METRIC"}, "yaxis": {"key": y, "type": "METRIC"}}
    return _chart("SCATTER", **axes)


def _line(metric: str, **x: Any) -> dict[str, Any]:
    return _chart(
        "LINE",
        metricKey=metric,
        selectedMetricKeys=[metric],
        lineSmoothness=0,
        scaleType="linear",
        xAxisScaleType="linear",
        range={},
        yAxisKey="metric",
        yAxisExpressions=[],
        ignoreOutliers=False,
        useGlobalXaxisKey=False,
        useGlobalLineSmoothing=False,
        **x,
    )
