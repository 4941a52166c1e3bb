"""What a comparison says, on guesses that are small enough to count by hand."""

import dataclasses

import numpy as np
import pytest
from entries import entry, predictions, trials
from scipy.stats import binomtest

from pipeline import findings

# Truth:            I    I    L    G    Q    A
CNN = entry("CNN", guesses=predictions("IILGQA", "ILLGQA"))
KNN = entry("KNN", guesses=predictions("IILGQA", "IIIGGA", 0.6))
LSTM = entry("LSTM", guesses=predictions("IILGQA", "LLLQGB", 0.7))
THREE = [CNN, KNN, LSTM]


def test_a_model_that_is_there_twice_is_told_by_its_run() -> None:
    names = findings.labels(["cnn", "knn", "cnn"], ["aaaaaa11", "bbbbbb22", "cccccc33"])
    assert names == ["CNN aaaaaa", "KNN", "CNN cccccc"]


def test_best_by_cost_never_falls_and_counts_failures() -> None:
    curve = findings.best_by_cost(trials([0.5, None, 0.4, 0.7, None]))
    # Law: only logged models count, the best stays the best, and the end is the sweep's.
    assert curve.to_numpy().tolist() == [[10, 0.5], [30, 0.5], [40, 0.7], [50, 0.7]]


def test_best_by_cost_of_a_sweep_without_a_model_is_empty() -> None:
    assert findings.best_by_cost(trials([None, None])).empty


@pytest.mark.parametrize(
    ("cost", "accuracy", "front"),
    [
        ([1, 2, 3], [0.7, 0.8, 0.9], [True, True, True]),
        ([1, 2, 3], [0.9, 0.8, 0.95], [True, False, True]),
        ([1, 1, 2], [0.8, 0.9, 0.9], [False, True, False]),
        ([1, 1], [0.9, 0.9], [True, True]),  # equals do not beat each other
        ([5], [0.1], [True]),
    ],
)
def test_on_front(cost: list[float], accuracy: list[float], front: list[bool]) -> None:
    assert findings.on_front(cost, accuracy).tolist() == front


def test_counts_have_all_letters() -> None:
    counts = findings.counts(KNN)
    assert counts.shape == (26, 26)
    # Truth down, guesses across: the L is guessed to be an I, the Q a G.
    assert counts[11, 8] == 1
    assert counts[8, 11] == 0
    assert counts[16, 6] == 1
    assert counts.sum() == 6


def test_recall_is_of_the_letters_that_are_there() -> None:
    recall = findings.recall(THREE)
    assert list(recall.index) == ["A", "G", "I", "L", "Q"]
    assert recall["CNN"].tolist() == [1, 1, 0.5, 1, 1]
    assert recall["KNN"].tolist() == [1, 1, 1, 0, 0]


def test_confusions_are_ranked_over_all_entries() -> None:
    frame = findings.confusions(THREE, 2)
    assert frame.to_numpy().tolist() == [["I", "L", 1, 0, 2], ["Q", "G", 0, 1, 1]]
    right = entry("RIGHT", guesses=predictions("AB", "AB"))
    assert findings.confusions([right], 9).empty


def test_pair_calls_out_what_two_letters_cost() -> None:
    figures = findings.pair(CNN, ("I", "L"))
    assert figures["recall_I"] == 0.5
    assert figures["I_for_L"] == 1
    assert figures["recall_L"] == 1
    assert figures["L_for_I"] == 0
    # Law: with both as one letter, only what is wrong otherwise is wrong.
    assert figures["merged_accuracy"] == 1
    assert findings.pair(LSTM, ("G", "Q"))["merged_accuracy"] == pytest.approx(3 / 6)
    assert np.isnan(findings.pair(CNN, ("X", "Y"))["recall_X"])


def test_duels_are_mcnemars() -> None:
    one, *_ = findings.duels(THREE).to_dict("records")
    # CNN alone is right on L and Q, KNN alone on the second I.
    assert (one["one_alone_right"], one["other_alone_right"]) == (2, 1)
    assert one["p_value"] == binomtest(2, 3).pvalue
    (same,) = findings.duels([CNN, CNN]).to_dict("records")
    assert same["p_value"] == 1


def test_disagreements_say_who_is_right() -> None:
    frame = findings.disagreements(THREE)
    # All letters here are guessed differently by somebody.
    assert frame["row"].tolist() == [0, 1, 2, 3, 4, 5]
    assert frame["right"].tolist() == [
        "CNN and KNN",
        "KNN",
        "CNN and LSTM",
        "CNN and KNN",
        "CNN",
        "CNN and KNN",
    ]
    assert frame.loc[4, ["guess CNN", "guess KNN", "guess LSTM"]].tolist() == ["Q", "G", "G"]
    assert findings.disagreements([CNN, CNN]).empty
    both_wrong = [
        entry("A", guesses=predictions("A", "B")),
        entry("B", guesses=predictions("A", "C")),
    ]
    assert findings.disagreements(both_wrong)["right"].tolist() == [findings.NONE]


def test_instructive_takes_turns_and_shows_nothing_twice() -> None:
    frame = findings.disagreements(
        [
            entry("A", guesses=predictions("EEEFFG", "EEEFXX")),
            entry("B", guesses=predictions("EEEFFG", "XXYXFZ")),
        ]
    )
    shown = findings.instructive(frame, 3)
    # Law: one of each group first; E taken for X is there twice and shown once.
    assert sorted(shown["right"]) == ["A", "B", findings.NONE]
    every = findings.instructive(frame, 99)
    assert len(every) == 5
    assert set(every["row"]) < {0, 1, 2, 3, 4, 5}


def test_the_surest_come_first() -> None:
    sure = predictions("EF", "EF")
    sure["confidence"] = [0.5, 0.99]
    frame = findings.disagreements(
        [entry("A", guesses=sure), entry("B", guesses=predictions("EF", "XX"))]
    )
    assert findings.instructive(frame, 1)["letter"].tolist() == ["F"]


def test_bills_leave_out_what_cost_nothing_and_sum_up() -> None:
    frame = findings.bills(THREE)
    assert list(frame.columns) == ["fit", "tracing", "engine"]
    assert frame.loc["KNN"].sum() == KNN.metrics["cpu_seconds"]
    # But for fit, which a report's last row divides by the whole.
    free = dataclasses.replace(KNN, metrics=KNN.metrics | {"fit_cpu_seconds": 0.0})
    assert list(findings.bills([free]).columns) == ["fit", "tracing", "engine"]


def test_remarks_are_silent_among_equals() -> None:
    assert findings.remarks(THREE) == []


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (entry("KNN", budget=300.0), "budgets differ (CNN 120, KNN 300 CPU-seconds)"),
        (entry("KNN", budget=None), "budget of KNN was not recorded"),
        (entry("KNN", step="train"), "a single fit: KNN"),
        (entry("KNN", cpu_model="another"), "different processors"),
        (entry("KNN", git_commit="fedc"), "different versions of the code"),
    ],
)
def test_remarks_name_what_is_unequal(other: findings.Entry, words: str) -> None:
    (sentence,) = findings.remarks([CNN, other])
    assert words in sentence


def test_headline_says_whether_it_may_be_chance() -> None:
    close = findings.headline([CNN, KNN])
    assert "CNN alone is right on 2 letters and KNN, the next best, alone on 1" in close
    assert close.endswith("that may well be chance.")
    right = entry("A", guesses=predictions("A" * 40, "A" * 40))
    wrong = entry("B", guesses=predictions("A" * 40, "B" * 40))
    assert "alone on 0: that is hardly chance" in findings.headline([right, wrong])
    assert "next best" not in findings.headline([CNN])


@pytest.mark.parametrize(
    ("names", "words"), [(["A"], "A"), (["A", "B"], "A and B"), (["A", "B", "C"], "A, B and C")]
)
def test_listed(names: list[str], words: str) -> None:
    assert findings.listed(names) == words
