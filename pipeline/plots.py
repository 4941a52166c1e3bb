"""Arrays and frames in, matplotlib figures out. Nothing here reads or writes a file."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from pipeline.bill import OVERHEAD
from pipeline.spec import LETTERS, SIDE, Images, Part

if TYPE_CHECKING:  # a sweep, which draws too, has no use for what reads pictures
    from pipeline.scan import Seen

Counts = npt.NDArray[np.int64]
BLUE, GREY, RED = "#1f5fa8", "#9aa5b1", "#c0392b"
# Of models side by side: each is told from white and from near-black paper, and by its mark.
COLOURS = ("#2f7fc1", "#d9622b", "#169b74", "#a06ac4", "#9a8424", "#c8557f")
MARKS = "os^Dv"  # one less than colours, so that thirty models differ
# From any paper to blue; the first step is the largest, so that what is rare is seen.
FADE = LinearSegmentedColormap.from_list(
    "fade", [(0.0, f"{COLOURS[0]}00"), (0.04, f"{COLOURS[0]}28"), (1.0, f"{COLOURS[0]}ff")]
)
CARD = 5.2  # inches: wide enough for half of a page, and for a phone


def contact_sheet(part: Part, title: str, columns: int = 30) -> Figure:
    """A row of letters for each label, so that an eye sees whether both belong together."""
    sheet = np.zeros((len(LETTERS) * SIDE, columns * SIDE), np.uint8)
    for label in range(len(LETTERS)):
        rows = np.flatnonzero(part.labels == label)[:columns]
        strip = part.images[rows].transpose(1, 0, 2).reshape(SIDE, -1)
        sheet[label * SIDE : (label + 1) * SIDE, : strip.shape[1]] = strip
    figure = Figure(figsize=(columns * 0.3, len(LETTERS) * 0.3 + 0.6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(255 - sheet, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_yticks(np.arange(len(LETTERS)) * SIDE + SIDE / 2, list(LETTERS))
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left")
    return figure


def letters(images: Images, captions: Sequence[str], title: str, columns: int = 10) -> Figure:
    """Letters (n, 28, 28) on a grid, a caption under each."""
    rows = max(1, -(-len(images) // columns))
    figure = Figure(figsize=(columns * 0.95, rows * 1.25 + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, image, caption in zip(grid, images, captions, strict=False):
        axes.imshow(255 - image, cmap="gray", vmin=0, vmax=255)
        axes.set_title(caption, fontsize=8, y=-0.28)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def seen(found: "Seen", guesses: Mapping[str, float], title: str) -> Figure:
    """The picture with a box around its letter, the letter as a model sees it, and its guesses."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    whole, small, bars = figure.subplots(1, 3, width_ratios=(1.4, 1, 0.9))
    whole.imshow(found.picture, cmap="gray", vmin=0, vmax=1)
    left, top, right, bottom = found.box
    place = (left - 0.5, top - 0.5)
    whole.add_patch(Rectangle(place, right - left, bottom - top, fill=False, edgecolor=RED, lw=1.5))
    whole.set_title("the picture, and where the ink is", fontsize=9)
    small.imshow(found.letter, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    small.set_title("what the model saw", fontsize=9)
    whole.set_axis_off()
    small.set_axis_off()
    bars.barh(list(guesses), list(guesses.values()), color=BLUE)
    bars.invert_yaxis()
    bars.set_xlim(0, 1)
    bars.spines[["top", "right"]].set_visible(False)
    bars.set_title("probability", fontsize=9)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def learning_curve(curve: Mapping[int, float], title: str) -> Figure:
    """Validation accuracy by step."""
    figure, axes = _axes(title, "step", "val_accuracy")
    axes.plot(list(curve), list(curve.values()), marker="o", color=BLUE)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def confusion_matrix(counts: npt.NDArray[np.int64], title: str) -> Figure:
    """Counts (26, 26), true letters down, guesses across; shares of each row are coloured."""
    figure = Figure(figsize=(6.6, 6.6), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # The root makes the rare confusions visible, which are what one looks for.
    axes.imshow(np.sqrt(shares), cmap=FADE, vmin=0, vmax=1, interpolation="none")
    for row, column in zip(*np.nonzero(counts), strict=True):
        dark = shares[row, column] > 0.3
        axes.text(
            column, row, str(counts[row, column]), ha="center", va="center", fontsize=5.5,
            color="white" if dark else "black",
        )  # fmt: skip
    axes.set_xticks(range(len(LETTERS)), list(LETTERS))
    axes.set_yticks(range(len(LETTERS)), list(LETTERS))
    axes.tick_params(length=0, labelsize=8)
    axes.set_xlabel("guess")
    axes.set_ylabel("letter")
    axes.set_title(title, loc="left")
    axes.spines[:].set_color(GREY)
    return figure


def reliability(bins: pd.DataFrame, title: str) -> Figure:
    """Accuracy against confidence; columns confidence, accuracy, n_letters, a row for each bin."""
    figure, axes = _axes(title, "confidence", "accuracy")
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", label="perfectly calibrated")
    axes.plot(bins["confidence"], bins["accuracy"], marker="o", color=BLUE, label="this model")
    axes.legend(frameon=False)
    return figure


def comparison(table: pd.DataFrame) -> Figure:
    """Test accuracy of each model with its interval, the deck's on EMNIST as hollow marks.

    Columns: label, test_accuracy, test_accuracy_low, test_accuracy_high, deck_accuracy.
    """
    figure, axes = _card(1.2 + 0.45 * len(table), "test accuracy (%)")
    rows = range(len(table))
    accuracy = 100 * table["test_accuracy"]
    for row in rows:
        style = _style(row)
        axes.errorbar(accuracy[row], row, xerr=_error(table, row), capsize=4, **style)
        axes.annotate(
            f"{accuracy[row]:.2f}", (accuracy[row], row), (0, 7), textcoords="offset points",
            ha="center",
        )  # fmt: skip
    deck = 100 * table["deck_accuracy"]
    if deck.notna().any():
        hollow = {"facecolor": "none", "edgecolor": GREY, "marker": "D", "linewidth": 1.5}
        axes.scatter(deck, rows, label="the deck, on EMNIST", **hollow)
        figure.legend(frameon=False, loc="outside lower right")
    axes.set_yticks(rows, table["label"])
    axes.set_ylim(len(table) - 0.5, -0.7)
    axes.margins(x=0.08)
    return figure


def best_by_cost(curves: Mapping[str, pd.DataFrame]) -> Figure:
    """Best accuracy on val against the CPU-seconds that each sweep had spent by then.

    ``curves``: by label, columns spent_cpu_seconds and val_accuracy, which never falls; a model
    that has none keeps its place, and so the others their looks.
    """
    figure, axes = _card(3.6, "CPU-seconds of the sweep", "best val accuracy so far (%)")
    for i, (label, curve) in enumerate(curves.items()):
        if curve.empty:
            continue
        x, y = curve["spent_cpu_seconds"].to_numpy(), 100 * curve["val_accuracy"].to_numpy()
        axes.step(x, y, where="post", color=COLOURS[i % len(COLOURS)], linewidth=1.8)
        # Its marks are where it rose, and where it ended.
        rises = np.flatnonzero(np.diff(y, prepend=-1.0) > 0)
        shown = np.union1d(rises, [len(x) - 1])
        axes.plot(x[shown], y[shown], **_style(i) | {"linestyle": "", "label": label})
    _log(axes, np.concatenate([curve["spent_cpu_seconds"] for curve in curves.values()]))
    axes.legend(frameon=False, loc="lower right")
    return figure


def trade_off(table: pd.DataFrame, cost: str, x: str) -> Figure:
    """Test accuracy with its interval against a cost, the Pareto front dashed.

    Columns: label, test_accuracy, test_accuracy_low, test_accuracy_high, the cost, and
    ``on_front``, which says whether no other model is as cheap and as good.
    """
    figure, axes = _card(3.4, x, "test accuracy (%)")
    for i, row in enumerate(table.to_dict("records")):
        point = (row[cost], 100 * row["test_accuracy"])
        axes.errorbar(
            *point, yerr=_error(table, i), capsize=4, linestyle="", label=row["label"], **_style(i)
        )
    front = table[table["on_front"]].sort_values(cost)
    axes.step(front[cost], 100 * front["test_accuracy"], "--", where="post", color=GREY, zorder=1)
    _log(axes, table[cost].to_numpy())
    figure.legend(frameon=False, loc="outside upper center", ncols=3)
    return figure


def recall_by_letter(recall: pd.DataFrame, called_out: Collection[str]) -> Figure:
    """Recall of each letter (rows A to Z) by each model (columns), the hardest letter on top.

    The letters ``called_out`` lie on a band.
    """
    figure, axes = _card(6.6, "recall (%)")
    ordered = 100 * recall.loc[recall.mean(axis=1).sort_values(kind="stable").index]
    rows = np.arange(len(ordered))
    axes.hlines(rows, ordered.min(axis=1), ordered.max(axis=1), color=GREY, linewidth=1.2)
    for i, label in enumerate(ordered.columns):
        axes.plot(ordered[label], rows, **_style(i) | {"linestyle": "", "label": label})
    for row, letter in enumerate(ordered.index):
        if letter in called_out:
            axes.axhspan(row - 0.5, row + 0.5, color=GREY, alpha=0.28, linewidth=0)
    axes.set_yticks(rows, ordered.index)
    axes.set_ylim(len(ordered) - 0.5, -0.5)
    figure.legend(frameon=False, loc="outside upper center", ncols=3)
    return figure


def bills(spent: pd.DataFrame) -> Figure:
    """What each sweep's CPU-seconds were spent on: a row for each, a column for each cause."""
    figure, axes = _card(1.6 + 0.4 * len(spent), "CPU-seconds")
    left = np.zeros(len(spent))
    for i, cause in enumerate(spent.columns):
        colour = GREY if cause == "fit" else COLOURS[i % len(COLOURS)]
        hatch = "//" if i > len(COLOURS) else None  # colours begin anew
        width = spent[cause].clip(lower=0).to_numpy()
        axes.barh(spent.index, width, 0.6, left=left, color=colour, hatch=hatch, label=cause)
        left += width
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02 * max(left.max(), 1e-9))
    axes.grid(visible=False, axis="y")
    figure.legend(frameon=False, loc="outside lower center", ncols=4)
    return figure


def won_and_lost(won: Counts, lost: Counts, title: str) -> Figure:
    """Letters that only one of two models reads right: ``won`` and ``lost`` (26,), A to Z."""
    figure, axes = _axes(title, "", "letters of gate")
    x = np.arange(len(LETTERS))
    axes.bar(x, won, color=BLUE, label=f"right by the challenger alone: {won.sum()}")
    axes.bar(x, -lost, color=RED, label=f"right by the champion alone: {lost.sum()}")
    axes.scatter(x, won - lost, color="black", marker="_", s=90, zorder=3, label="difference")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(x, list(LETTERS))
    axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    figure.legend(frameon=False, loc="outside lower right", ncols=3, fontsize=9)
    return figure


def best_so_far(trials: pd.DataFrame, title: str) -> Figure:
    """Accuracy of each trial against the CPU-seconds spent by then, and the best so far.

    Columns: spent_cpu_seconds, val_accuracy, phase, state. The worst trials may lie below: their
    number is told, and the others can be told apart.
    """
    values = trials["val_accuracy"].dropna()
    least, low, high = values.min(), values.quantile(0.2), values.max()
    bottom = low - 0.5 * (high - low)
    n_below = int((values < bottom).sum())
    below = f" ({n_below} of {len(values)} below)" if n_below else ""
    figure, axes = _axes(title, "CPU-seconds of the sweep", f"val_accuracy{below}")
    for (kind, rows), marker in zip(
        trials.groupby(["phase", "state"], sort=False), "oxs^vD*Pph<>", strict=False
    ):
        label = ", ".join(part for part in kind if part)
        axes.scatter(rows["spent_cpu_seconds"], rows["val_accuracy"], marker=marker, label=label)
    best = trials["val_accuracy"].cummax().ffill()  # no gap where a trial failed
    axes.step(trials["spent_cpu_seconds"], best, where="post", color=RED, label="best so far")
    if n_below and least < bottom < high:
        axes.set_ylim(bottom=bottom)
    axes.legend(frameon=False)
    return figure


def bill(spent: Sequence[Mapping[str, float]], title: str) -> Figure:
    """Where a sweep's CPU-seconds went beside fit, by cause, as it went on.

    ``spent`` has the CPU-seconds of the whole sweep by cause, at the end of each trial.
    """
    spent = [{}, *spent]  # a sweep begins at nothing
    x, last = [sum(one.values()) for one in spent], spent[-1]
    causes = [cause for cause in OVERHEAD if any(one.get(cause, 0.0) >= 0.05 for one in spent)]
    fit = f"fit {last.get('fit', 0.0):.0f} of {x[-1]:.0f} CPU-s, {last.get('fit', 0.0) / x[-1]:.1%}"
    figure, axes = _axes(f"{title}\n{fit}", "CPU-seconds of the sweep", "CPU-seconds of overhead")
    axes.stackplot(
        x,
        [[max(0.0, one.get(cause, 0.0)) for one in spent] for cause in causes],
        labels=[f"{cause} {last.get(cause, 0.0):.1f}" for cause in causes],
        colors=[f"C{i}" for i in range(len(causes))],
        alpha=0.85,
    )
    axes.set_xlim(0, x[-1])
    axes.legend(frameon=False, loc="upper left", reverse=True)
    return figure


def importance(shares: Mapping[str, float], title: str = "", width: float = 7.5) -> Figure:
    """Share of the variation in accuracy that each hyperparameter explains, largest on top."""
    figure, axes = _axes(title, "importance (PED-ANOVA)", "", (width, 1.2 + 0.27 * len(shares)))
    names = sorted(shares, key=lambda name: shares[name])
    bars = axes.barh(names, [shares[name] for name in names], color=COLOURS[0])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.margins(x=0.12)
    axes.grid(visible=False, axis="y")
    return figure


def parallel_coordinates(params: pd.DataFrame, values: pd.Series, title: str) -> Figure:
    """A line for each trial through its hyperparameters; the better the trial, the darker.

    ``params`` has a column for each hyperparameter and a row for each trial, ``values`` (rows,)
    its accuracy, NaN where it failed.
    """
    figure = Figure(figsize=(1.6 * (params.shape[1] + 1) + 1, 4.8), layout="constrained")
    axes = figure.subplots()
    columns = params.assign(val_accuracy=values)[values.notna()]
    order = columns["val_accuracy"].argsort()
    heights = np.column_stack([_spread(axes, x, columns[name]) for x, name in enumerate(columns)])
    colours = colormaps["viridis_r"](np.linspace(0, 0.95, len(columns)))
    for rank, row in enumerate(order):
        axes.plot(heights[row], color=colours[rank], alpha=0.8)  # the best are drawn last, on top
    axes.set_xticks(range(heights.shape[1]), list(columns))
    axes.set_yticks([])
    axes.set_xlim(-0.3, heights.shape[1] - 0.3)
    axes.spines[:].set_visible(False)
    axes.set_title(f"{title}; dark is better", loc="left")
    return figure


def _spread(axes: Any, x: int, column: pd.Series) -> npt.NDArray[np.float64]:
    """Heights 0 to 1 of a column's values on the axis at ``x``, which is drawn and labelled."""
    numeric = pd.api.types.is_numeric_dtype(column) and column.dtype != bool
    heights: npt.NDArray[np.float64]
    if numeric:
        low, high = float(column.min()), float(column.max())
        heights = (column.to_numpy(float) - low) / ((high - low) or 1)
        ticks = {0.0: f"{low:.3g}"} | ({1.0: f"{high:.3g}"} if high > low else {})
    else:
        labels = sorted(column.astype(str).unique())
        place = {label: i / max(len(labels) - 1, 1) for i, label in enumerate(labels)}
        heights = column.astype(str).map(place).to_numpy(float)
        ticks = {height: str(label) for label, height in place.items()}
    axes.axvline(x, color=GREY, linewidth=0.8, zorder=0)
    paper = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1}
    for height, label in ticks.items():
        axes.text(x + 0.03, height, label, va="center", fontsize=8, bbox=paper)
    return heights


def _axes(title: str, x: str, y: str, size: tuple[float, float] = (7.5, 4.6)) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    return figure, axes


def _card(height: float, x: str, y: str = "") -> tuple[Figure, Any]:
    """A figure of a report, whose words stand beside it; all lines of its grid help."""
    figure, axes = _axes("", x, y, (CARD, height))
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def _style(i: int) -> dict[str, Any]:
    """Colour and mark of the model at place ``i``, the same in all figures of a report."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKS[i % len(MARKS)], "markersize": 6}


def _error(table: pd.DataFrame, row: int) -> list[list[float]]:
    """Percent below and above the test accuracy of a row, as matplotlib wants an interval."""
    low, middle, high = (
        100 * table[f"test_accuracy{end}"].iloc[row] for end in ("_low", "", "_high")
    )
    return [[max(0.0, middle - low)], [max(0.0, high - middle)]]


def _log(axes: Any, x: npt.NDArray[np.float64]) -> None:
    """A logarithmic axis with room at its ends, so that it has a tick even for a single value."""
    axes.set_xscale("log")
    axes.set_xlim(x.min() / 1.5, x.max() * 1.5)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
