"""Arrays and frames in, matplotlib figures out. Nothing here reads or writes a file."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure

from pipeline.bill import OVERHEAD
from pipeline.spec import LETTERS, SIDE, Images, Part

Counts = npt.NDArray[np.int64]
BLUE, GREY, RED = "#1f5fa8", "#9aa5b1", "#c0392b"


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


def learning_curve(curve: Mapping[int, float], title: str) -> Figure:
    """Validation accuracy by step."""
    figure, axes = _axes(title, "step", "val_accuracy")
    axes.plot(list(curve), list(curve.values()), marker="o", color=BLUE)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def confusion_matrix(counts: npt.NDArray[np.int64], title: str) -> Figure:
    """Counts (26, 26), true letters down, guesses across; shares of each row are coloured."""
    figure = Figure(figsize=(9, 8.6), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # The root makes the rare confusions visible, which are what one looks for.
    image = axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1)
    for row, column in zip(*np.nonzero(counts), strict=True):
        dark = shares[row, column] > 0.3
        axes.text(
            column, row, str(counts[row, column]), ha="center", va="center", fontsize=6,
            color="white" if dark else "black",
        )  # fmt: skip
    axes.set_xticks(range(len(LETTERS)), list(LETTERS))
    axes.set_yticks(range(len(LETTERS)), list(LETTERS))
    axes.set_xlabel("guess")
    axes.set_ylabel("letter")
    axes.set_title(title, loc="left")
    bar = figure.colorbar(image, ax=axes, shrink=0.6, label="share of the letter")
    bar.set_ticks([0, 0.1, 0.1**0.5, 0.3**0.5, 1], labels=["0", "1 %", "10 %", "30 %", "100 %"])
    return figure


def reliability(bins: pd.DataFrame, title: str) -> Figure:
    """Accuracy against confidence; columns confidence, accuracy, n_letters, a row for each bin."""
    figure, axes = _axes(title, "confidence", "accuracy")
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", label="perfectly calibrated")
    axes.plot(bins["confidence"], bins["accuracy"], marker="o", color=BLUE, label="this model")
    axes.legend(frameon=False)
    return figure


def comparison(table: pd.DataFrame, title: str) -> Figure:
    """Test accuracy of each model with its interval, the deck's on EMNIST beside it.

    Columns: model, test_accuracy, test_accuracy_low, test_accuracy_high, deck_accuracy.
    """
    figure, axes = _axes(title, "", "test accuracy (%)")
    x = np.arange(len(table))
    accuracy = 100 * table["test_accuracy"]
    error = [
        accuracy - 100 * table["test_accuracy_low"],
        100 * table["test_accuracy_high"] - accuracy,
    ]
    bars = axes.bar(x - 0.2, accuracy, 0.36, yerr=error, capsize=4, color=BLUE, label="this study")
    axes.bar_label(bars, fmt="%.1f", padding=3)
    deck = axes.bar(
        x + 0.2, 100 * table["deck_accuracy"], 0.36, color=GREY, label="the deck, on EMNIST"
    )
    axes.bar_label(deck, fmt="%.0f", padding=3)
    axes.set_xticks(x, [str(name).upper() for name in table["model"]])
    axes.set_ylim(max(0, 10 * np.floor(np.nanmin(accuracy) / 10 - 2)), 104)
    figure.legend(frameon=False, loc="outside lower right", ncols=2)
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


def importance(shares: Mapping[str, float], title: str) -> Figure:
    """Share of the variation in accuracy that each hyperparameter explains, largest on top."""
    figure, axes = _axes(title, "importance (PED-ANOVA)", "")
    names = sorted(shares, key=lambda name: shares[name])
    bars = axes.barh(names, [shares[name] for name in names], color=BLUE)
    axes.bar_label(bars, fmt="%.2f", padding=3)
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


def _axes(title: str, x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    return figure, axes
