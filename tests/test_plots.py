"""Every figure can be drawn, of what a long study gives and of the little that a short one does."""

import inspect
from collections.abc import Callable
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from pipeline import plots
from pipeline.bill import OVERHEAD
from pipeline.scan import Seen
from pipeline.spec import LETTERS, Part

NAN = float("nan")
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (52, 28, 28), np.uint8)
LABELS = (np.arange(52) % 26).astype(np.uint8)
COUNTS = RNG.integers(0, 30, (26, 26)).astype(np.int64)
STATES = ["complete", "pruned", "failed", "killed", "over_budget"]
MIXED = pd.DataFrame(
    {
        "units": [64, 128, 64, 96, 64],
        "learning_rate": [1e-3, 2e-3, 5e-4, 1e-2, 3e-3],
        "bidirectional": [True, False, True, True, False],
        "weights": ["uniform", "distance", "uniform", "distance", "uniform"],
        "constant": [3, 3, 3, 3, 3],
    }
)


def bins(*rows: tuple[float, float, int]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["confidence", "accuracy", "n_letters"])


def table(*rows: tuple[str, float, float, float, float]) -> pd.DataFrame:
    names = ["test_accuracy", "test_accuracy_low", "test_accuracy_high", "deck_accuracy"]
    return pd.DataFrame(rows, columns=["label", *names])


def costs(*rows: tuple[float, float, bool]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["model_mb", "test_accuracy", "on_front"])
    low, high = frame["test_accuracy"] - 0.01, frame["test_accuracy"] + 0.01
    return frame.assign(label="CNN", test_accuracy_low=low, test_accuracy_high=high)


def curve(*points: tuple[float, float]) -> pd.DataFrame:
    return pd.DataFrame(points, columns=["spent_cpu_seconds", "val_accuracy"])


def recall(n_models: int) -> pd.DataFrame:
    columns = {f"model {i}": RNG.random(26) for i in range(n_models)}
    return pd.DataFrame(columns, index=list(LETTERS))


def causes(**spent: list[float]) -> pd.DataFrame:
    return pd.DataFrame(spent, index=[f"model {i}" for i in range(len(spent["fit"]))])


def trials(values: list[float], states: list[str]) -> pd.DataFrame:
    spent = 10.0 * np.arange(1, len(values) + 1)
    columns = {"spent_cpu_seconds": spent, "val_accuracy": values, "state": states}
    return pd.DataFrame(columns).assign(phase="screen")


def parallel(values: list[float]) -> Figure:
    return plots.parallel_coordinates(MIXED[: len(values)], pd.Series(values), "study")


def spent(n_trials: int) -> list[dict[str, float]]:
    causes = {"fit": 9.0, "import": 0.2, "tracing": 0.5, "engine": -0.001, "lost": 0.0}
    return [{cause: i * each for cause, each in causes.items()} for i in range(1, n_trials + 1)]


# (function, case): its figure
FIGURES: dict[tuple[str, str], Callable[[], Figure]] = {
    ("bill", "many"): lambda: plots.bill(spent(20), "study"),
    ("bill", "one"): lambda: plots.bill(spent(1), "study"),
    ("won_and_lost", "many"): lambda: plots.won_and_lost(COUNTS[0], COUNTS[1], "two models"),
    ("won_and_lost", "none"): lambda: plots.won_and_lost(0 * COUNTS[0], 0 * COUNTS[1], "the same"),
    ("contact_sheet", "all"): lambda: plots.contact_sheet(Part(IMAGES, LABELS), "data"),
    ("contact_sheet", "letters missing"): lambda: plots.contact_sheet(
        Part(IMAGES[:3], LABELS[:3]), "data"
    ),
    ("contact_sheet", "more than fit"): lambda: plots.contact_sheet(
        Part(IMAGES, np.zeros_like(LABELS)), "data"
    ),
    ("letters", "all"): lambda: plots.letters(IMAGES[:26], list(LETTERS), "two\nlines"),
    ("letters", "one"): lambda: plots.letters(IMAGES[:1], ["A"], "data"),
    ("letters", "none"): lambda: plots.letters(IMAGES[:0], [], "no mistakes"),
    ("learning_curve", "many"): lambda: plots.learning_curve({1: 0.5, 2: 0.7, 3: 0.8}, "cnn"),
    ("learning_curve", "one step"): lambda: plots.learning_curve({1: 0.5}, "cnn"),
    ("confusion_matrix", "mixed"): lambda: plots.confusion_matrix(COUNTS, "knn"),
    ("confusion_matrix", "all right"): lambda: plots.confusion_matrix(np.diag(COUNTS[0]), "knn"),
    ("confusion_matrix", "nothing"): lambda: plots.confusion_matrix(0 * COUNTS, "knn"),
    ("reliability", "many"): lambda: plots.reliability(bins((0.5, 0.4, 9), (0.9, 1, 9)), "knn"),
    ("reliability", "one bin"): lambda: plots.reliability(bins((1.0, 0.5, 9)), "knn"),
    ("comparison", "many"): lambda: plots.comparison(
        table(("CNN", 0.9, 0.88, 0.92, 0.92), ("TOY", 0.1, 0.08, 0.13, NAN))
    ),
    ("comparison", "one, all right"): lambda: plots.comparison(table(("CNN", 1, 0.99, 1, 0.92))),
    ("comparison", "no deck, all wrong"): lambda: plots.comparison(table(("TOY", 0, 0, 0.01, NAN))),
    ("best_by_cost", "many"): lambda: plots.best_by_cost(
        {f"model {i}": curve((9 + i, 0.5), (20, 0.6), (30, 0.6)) for i in range(9)}
    ),
    ("best_by_cost", "one without"): lambda: plots.best_by_cost(
        {"TRAIN": curve(), "CNN": curve((9, 0.5))}
    ),
    ("best_by_cost", "one point"): lambda: plots.best_by_cost({"CNN": curve((9, 0.5))}),
    ("trade_off", "many"): lambda: plots.trade_off(
        costs((1, 0.9, True), (2, 0.95, True), (900, 0.9, False)), "model_mb", "MB"
    ),
    ("trade_off", "one"): lambda: plots.trade_off(costs((1, 0.9, True)), "model_mb", "MB"),
    ("recall_by_letter", "many"): lambda: plots.recall_by_letter(recall(7), "ILGQ"),
    ("recall_by_letter", "few letters"): lambda: plots.recall_by_letter(recall(1)[:2], "ILGQ"),
    ("bills", "many causes"): lambda: plots.bills(
        causes(fit=[9.0, 5.0], **{name: [0.5, -0.01] for name in OVERHEAD})
    ),
    ("bills", "one that is fit alone"): lambda: plots.bills(causes(fit=[9.0])),
    ("best_so_far", "all states"): lambda: plots.best_so_far(
        trials([0.5, 0.4, NAN, NAN, 0.6], STATES), "study"
    ),
    ("best_so_far", "one"): lambda: plots.best_so_far(trials([0.5], ["complete"]), "study"),
    ("best_so_far", "one that failed"): lambda: plots.best_so_far(trials([NAN], ["failed"]), "s"),
    ("seen", "a letter"): lambda: plots.seen(
        Seen(np.eye(40), (3, 4, 30, 36), np.eye(28, dtype=np.uint8)), {"A": 0.8, "B": 0.1}, "A"
    ),
    ("importance", "many"): lambda: plots.importance({"units": 0.7, "dropout": 0.3}, "study"),
    ("importance", "one"): lambda: plots.importance({"units": 1.0}, "study"),
    ("importance", "nothing matters"): lambda: plots.importance({"units": 0, "blur": 0}, "study"),
    ("parallel_coordinates", "many"): lambda: parallel([0.5, 0.4, NAN, 0.7, 0.6]),
    ("parallel_coordinates", "one"): lambda: parallel([0.5]),
    ("parallel_coordinates", "all failed but one"): lambda: parallel([NAN, NAN, 0.5, NAN, NAN]),
    ("parallel_coordinates", "all equal"): lambda: parallel([0.5] * 5),
}


@pytest.mark.parametrize("draw", FIGURES.values(), ids=map(": ".join, FIGURES))
def test_can_be_drawn(draw: Callable[[], Figure]) -> None:
    png = BytesIO()
    draw().savefig(png, format="png", dpi=50)
    # Law: a figure becomes a picture, without a warning.
    assert png.getvalue().startswith(b"\x89PNG\r\n\x1a\n")


def test_none_is_left_out() -> None:
    functions = inspect.getmembers(plots, inspect.isfunction)
    public = {name for name, _ in functions if not name.startswith("_")}
    # Law: each public function of the module is drawn above.
    assert public == {name for name, _ in FIGURES}


def test_contact_sheet_shows_letters_by_label() -> None:
    (axes,) = plots.contact_sheet(Part(IMAGES, LABELS), "data", columns=3).axes
    sheet = 255 - np.asarray(axes.images[0].get_array())
    # Law: in the row of a label are its letters in their order, and then paper.
    np.testing.assert_array_equal(sheet[28:56, :28], IMAGES[1])
    np.testing.assert_array_equal(sheet[28:56, 28:56], IMAGES[27])
    assert sheet[:, 56:].max() == 0


def test_best_so_far_passes_over_failures() -> None:
    frame = trials([0.5, NAN, 0.4, NAN, 0.6], ["complete", "failed"] * 2 + ["complete"])
    (axes,) = plots.best_so_far(frame, "study").axes
    # Law: the best so far stays the best while trials fail: its line has no gap.
    assert np.asarray(axes.lines[-1].get_ydata()).tolist() == [0.5, 0.5, 0.5, 0.5, 0.6]


def test_a_very_bad_trial_does_not_hide_how_the_others_differ() -> None:
    values = [0.1, 0.9, 0.91, 0.92, 0.93, 0.94, 0.95]
    (axes,) = plots.best_so_far(trials(values, ["complete"] * 7), "study").axes
    assert 0.85 < axes.get_ylim()[0] < 0.9
    assert axes.get_ylabel() == "val_accuracy (1 of 7 below)"
    (axes,) = plots.best_so_far(trials(values[1:], ["complete"] * 6), "study").axes
    assert axes.get_ylabel() == "val_accuracy"


def test_parallel_coordinates_orders_and_scales() -> None:
    (axes,) = parallel([0.5, 0.9, NAN, 0.7, 0.6]).axes
    lines = [np.asarray(line.get_ydata()) for line in axes.lines if np.size(line.get_xdata()) == 6]
    # Law: a line for each trial that has a value, the best drawn last; highest is on top.
    assert [line[-1] for line in lines] == pytest.approx([0, 0.25, 0.5, 1])
    # Law: the best trial's line goes through its own params, highest value or last word on top.
    assert lines[-1][:5] == pytest.approx([1, 1 / 9, 0, 0, 0])


def test_a_model_has_one_colour_and_mark_in_all_figures() -> None:
    (by_cost,) = plots.best_by_cost({"CNN": curve((9, 0.5)), "KNN": curve((9, 0.6))}).axes
    (by_letter,) = plots.recall_by_letter(recall(2), "ILGQ").axes
    marks = [
        [
            (line.get_color(), line.get_marker())
            for line in axes.lines
            if line.get_marker() != "None"
        ]
        for axes in (by_cost, by_letter)
    ]
    # Law: the second model looks the same here and there, and other than the first.
    assert marks[0] == marks[1]
    assert len(set(marks[0])) == 2
    # Law: also where the first has no curve.
    (alone,) = plots.best_by_cost({"CNN": curve(), "KNN": curve((9, 0.6))}).axes
    assert marks[0][1] in [(line.get_color(), line.get_marker()) for line in alone.lines]
    # Law: thirty models can be told apart.
    styles = [plots._style(i) for i in range(30)]
    assert len({(style["color"], style["marker"]) for style in styles}) == 30


def test_the_hardest_letter_is_on_top() -> None:
    frame = pd.DataFrame({"CNN": [0.9, 0.5, 0.7]}, index=list("ABC"))
    (axes,) = plots.recall_by_letter(frame, "ILGQ").axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["B", "C", "A"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
