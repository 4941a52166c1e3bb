"""What models side by side have to say: frames out of their guesses, trials and bills.

Nothing here reads or writes a file. A *prediction* is a row of ``evaluate``'s predictions.csv.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import binomtest

from pipeline.bill import OVERHEAD
from pipeline.spec import LETTERS

# "Deep Learning with EMNIST" (2024): 40,000 letters of EMNIST, minimal tuning. The deck gives
# accuracies; on other letters than EMNIST they are a reminder, not a baseline.
DECK_ACCURACY = {"cnn": 0.92, "lstm": 0.79, "knn": 0.83}
PAIRS = (("I", "L"), ("G", "Q"))  # which look alike where upper and lower case are one
NONE = "none of them"


@dataclass(frozen=True)
class Entry:
    """A model that takes part in a comparison, and all that its runs say of it.

    Attributes:
        label: names it in tables and figures: CNN, or CNN 1a2b3c where there are two.
        model: cnn, lstm, knn.
        step: that logged the model: sweep, train or trial.
        metrics: of its run and of its evaluation on ``test``.
        tags: of its run.
        predictions: columns letter, guess, confidence; a row for each letter of ``test``.
        trials: a sweep's trials.csv; None where there is no sweep.
        importance: share of each hyperparameter, by name; empty where nothing could be said.
    """

    label: str
    model: str
    step: str
    run_id: str
    model_uri: str
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    predictions: pd.DataFrame
    trials: pd.DataFrame | None
    importance: Mapping[str, float]

    @property
    def budget(self) -> float | None:
        """CPU-seconds that the sweep was given; None where there was no sweep."""
        return self.metrics.get("budget_cpu_seconds")

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        """Whether each letter of ``test`` is guessed right, (n,)."""
        right = self.predictions["letter"] == self.predictions["guess"]
        return np.asarray(right, dtype=np.bool_)


def labels(models: Sequence[str], run_ids: Sequence[str]) -> list[str]:
    """Names for tables and figures; a model that is there twice is told by its run."""
    return [
        model.upper() if list(models).count(model) == 1 else f"{model.upper()} {run_id[:6]}"
        for model, run_id in zip(models, run_ids, strict=True)
    ]


def table(entries: Sequence[Entry]) -> pd.DataFrame:
    """A row for each entry: its figures on ``test``, what it cost, the deck's accuracy."""
    rows = []
    for entry in entries:
        own = {key: value for key, value in entry.metrics.items() if "/" not in key}
        named = {
            "deck_accuracy": DECK_ACCURACY.get(entry.model, np.nan),
            "n_trials": own.pop("n_trials", np.nan),
            "budget_cpu_seconds": own.pop("budget_cpu_seconds", np.nan),
            "confirmed_val_accuracy": own.pop("confirmed_val_accuracy", np.nan),
            "confirmed_val_accuracy_std": own.pop("confirmed_val_accuracy_std", np.nan),
            "n_seeds": own.pop("n_seeds", np.nan),
        }
        about = {"label": entry.label, "model": entry.model, "step": entry.step}
        rows.append(about | own | named | {"run_id": entry.run_id, "model_uri": entry.model_uri})
    return pd.DataFrame(rows)


def best_by_cost(trials: pd.DataFrame) -> pd.DataFrame:
    """The best val_accuracy of a logged model by the CPU-seconds spent; a row a trial's end."""
    logged = trials.dropna(subset=["model_uri", "val_accuracy"]).sort_values("spent_cpu_seconds")
    last = trials["spent_cpu_seconds"].max()
    curve = pd.DataFrame(
        {
            "spent_cpu_seconds": logged["spent_cpu_seconds"],
            "val_accuracy": logged["val_accuracy"].cummax(),
        }
    )
    if len(curve) and last > curve["spent_cpu_seconds"].iloc[-1]:  # trials that failed cost too
        end = {"spent_cpu_seconds": last, "val_accuracy": curve["val_accuracy"].iloc[-1]}
        curve = pd.concat([curve, pd.DataFrame([end])])
    return curve.reset_index(drop=True)


def on_front(cost: npt.ArrayLike, accuracy: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Whether no other model is as cheap and as good, and better in one of both; (n,)."""
    x, y = np.asarray(cost, float), np.asarray(accuracy, float)
    at_least = (x[None] <= x[:, None]) & (y[None] >= y[:, None])  # (n, others)
    better = (x[None] < x[:, None]) | (y[None] > y[:, None])
    beaten = (at_least & better).any(axis=1)
    return np.logical_not(np.asarray(beaten))


def counts(entry: Entry) -> npt.NDArray[np.int64]:
    """Confusions (26, 26), true letters down, guesses across."""
    crossed = pd.crosstab(entry.predictions["letter"], entry.predictions["guess"])
    full = crossed.reindex(index=list(LETTERS), columns=list(LETTERS), fill_value=0)
    return np.asarray(full, np.int64)


def recall(entries: Sequence[Entry]) -> pd.DataFrame:
    """Recall of each letter that ``test`` has (rows) by each entry (columns)."""
    letter = entries[0].predictions["letter"]
    columns = {entry.label: pd.Series(entry.right).groupby(letter).mean() for entry in entries}
    return pd.DataFrame(columns).sort_index()


def confusions(entries: Sequence[Entry], n: int) -> pd.DataFrame:
    """The commonest wrong guesses: letter, guess, and how often by each entry."""
    columns = {
        entry.label: entry.predictions[~entry.right].value_counts(["letter", "guess"])
        for entry in entries
    }
    frame = pd.DataFrame(columns).fillna(0).astype(int)
    order = (-frame.sum(axis=1)).sort_values(kind="stable").index[:n]
    return frame.loc[order].reset_index()


def pair(entry: Entry, letters: tuple[str, str]) -> dict[str, float]:
    """How an entry tells two letters apart.

    Gives the recall of both (``recall_I``), the times that one is taken for the other
    (``I_for_L`` when an I was guessed to be an L), and ``merged_accuracy``, the accuracy over all
    letters if the two were one.
    """
    one, other = letters
    truth, guess = entry.predictions["letter"], entry.predictions["guess"]
    figures: dict[str, float] = {}
    for letter, wrong in ((one, other), (other, one)):
        rows = truth == letter
        figures[f"recall_{letter}"] = float(entry.right[rows].mean()) if rows.any() else np.nan
        figures[f"{letter}_for_{wrong}"] = int((rows & (guess == wrong)).sum())
    swapped = figures[f"{one}_for_{other}"] + figures[f"{other}_for_{one}"]
    return figures | {"merged_accuracy": float((entry.right.sum() + swapped) / len(truth))}


def duels(entries: Sequence[Entry]) -> pd.DataFrame:
    """Every two entries on the same letters: how often one alone is right, McNemar's exact p."""
    rows = []
    for one, other in combinations(entries, 2):
        first, second = int((one.right & ~other.right).sum()), int((~one.right & other.right).sum())
        rows.append([one.label, other.label, first, second, mcnemar(first, second)])
    columns = ["one", "other", "one_alone_right", "other_alone_right", "p_value"]
    return pd.DataFrame(rows, columns=columns)


def mcnemar(won: int, lost: int) -> float:
    """p of McNemar's exact test, of the letters that one alone of two models reads right."""
    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def disagreements(entries: Sequence[Entry]) -> pd.DataFrame:
    """The letters of ``test`` that are not all guessed the same, with everyone's guess.

    Columns: row (in ``test``), letter, guess and confidence of each entry (``guess CNN``), and
    ``right``, the labels of those who are right, or "none of them".
    """
    guesses = pd.DataFrame(
        {f"guess {entry.label}": entry.predictions["guess"] for entry in entries}
    )
    sure = pd.DataFrame(
        {f"confidence {entry.label}": entry.predictions["confidence"] for entry in entries}
    )
    frame = pd.concat([entries[0].predictions[["letter"]], guesses, sure], axis=1)
    who = np.array([entry.right for entry in entries])  # (entries, n)
    frame["right"] = [
        " and ".join(entry.label for entry, hit in zip(entries, hits, strict=True) if hit) or NONE
        for hits in who.T
    ]
    frame.insert(0, "row", np.arange(len(frame)))
    return frame[guesses.nunique(axis=1) > 1].reset_index(drop=True)


def instructive(frame: pd.DataFrame, n: int) -> pd.DataFrame:
    """At most ``n`` of the disagreements that say most, in groups by who is right.

    The groups take turns. In each come first the letters where all are sure of different things,
    by the least sure of them; of the same letter with the same guesses only one is shown.
    """
    guesses = [name for name in frame.columns if name.startswith("guess ")]
    sure = [name for name in frame.columns if name.startswith("confidence ")]
    ranked = (
        frame.assign(surest=frame[sure].min(axis=1))
        .sort_values("surest", ascending=False, kind="stable")
        .drop_duplicates(["letter", *guesses])
    )
    ranked["turn"] = ranked.groupby("right").cumcount()
    chosen = ranked.sort_values("turn", kind="stable")[:n]
    return chosen.sort_values(["right", "turn"], kind="stable").drop(columns=["surest", "turn"])


def bills(entries: Sequence[Entry]) -> pd.DataFrame:
    """CPU-seconds by cause (columns) of each entry (rows), without what cost next to nothing.

    The column ``fit`` is always there.
    """
    rows = {
        entry.label: {"fit": entry.metrics["fit_cpu_seconds"]}
        | {cause: entry.metrics.get(f"overhead/{cause}_cpu_seconds", 0.0) for cause in OVERHEAD}
        for entry in entries
    }
    frame = pd.DataFrame(rows).T
    return frame.loc[:, (frame.abs().max() >= 0.05) | (frame.columns == "fit")]


def remarks(entries: Sequence[Entry]) -> list[str]:
    """Sentences on what makes the entries unequal; none where nothing does."""
    said = []
    budgets = {entry.label: entry.budget for entry in entries if entry.budget}
    if len({round(budget) for budget in budgets.values()}) > 1:
        each = ", ".join(f"{label} {budget:,.0f}" for label, budget in budgets.items())
        said.append(
            f"The budgets differ ({each} CPU-seconds): a model that was given more may be ahead "
            "for that alone."
        )
    unknown = [entry.label for entry in entries if entry.step == "sweep" and not entry.budget]
    if unknown:
        said.append(f"The budget of {listed(unknown)} was not recorded.")
    single = [entry.label for entry in entries if entry.step != "sweep"]
    if single:
        said.append(f"Not the winner of a sweep but a single fit: {listed(single)}.")
    for tag, what in (
        ("cpu_model", "on different processors, so that their CPU-seconds"),
        ("git_commit", "by different versions of the code, so that accuracies and costs"),
    ):
        values = {entry.tags.get(tag, "") for entry in entries}
        if len(values) > 1:
            said.append(f"These runs were made {what} compare less well.")
    return said


def listed(names: Sequence[str]) -> str:
    """CNN, KNN and LSTM."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def headline(entries: Sequence[Entry]) -> str:
    """What to remember: who is best, by how much, and whether that may be chance."""
    best = entries[0]
    low, high = (100 * best.metrics[f"test_accuracy_{end}"] for end in ("low", "high"))
    first = (
        f"{best.label} reads {best.metrics['test_accuracy']:.2%} of the test letters right "
        f"(95 % interval {low:.1f} to {high:.1f})."
    )
    if len(entries) == 1:
        return first
    (duel,) = duels(entries[:2]).to_dict("records")
    chance = "that may well be chance" if duel["p_value"] >= 0.05 else "that is hardly chance"
    return (
        f"{first} {best.label} alone is right on {duel['one_alone_right']:,} letters and "
        f"{duel['other']}, the next best, alone on {duel['other_alone_right']:,}: {chance}."
    )
