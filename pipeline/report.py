"""A comparison as one HTML file: findings and figures in, text out. Only its template is read.

The file has no script and no address outside: its figures are SVG that matplotlib has drawn, inside
of it, in the reader's own ink, so that they follow light and dark.
"""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib
import numpy as np
import numpy.typing as npt
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from pipeline import findings, plots
from pipeline.bill import OVERHEAD
from pipeline.findings import PAIRS, Entry
from pipeline.spec import Images

NAME = "report.html"
TEMPLATE = Path(__file__).with_name("report.html.j2")
N_CONFUSIONS, N_PICTURES = 12, 28


class Table(NamedTuple):
    """Cells as text; the first of each row is its heading. Words stand left, figures right."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = ()


class Chart(NamedTuple):
    """A figure, the words under it, and what it shows where it cannot be seen."""

    name: str
    figure: Figure
    caption: str
    label: str
    wide: bool = False  # too fine for a phone: scrolls in a box of its own

    @property
    def svg(self) -> Markup:
        return svg(self.figure, self.name, self.label)


class Picture(NamedTuple):
    """A letter of ``test``: a PNG as a data URI, what it is, and what each model takes it for."""

    uri: str
    letter: str
    guesses: Sequence[tuple[str, str, str, bool]]  # label, guess, confidence, whether it is right


class Section(NamedTuple):
    """A part of the report. ``missing`` says in a sentence why something is not there."""

    id: str
    title: str
    text: str = ""
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    lead: Sequence[Table] = ()  # across the page, above the figures
    folded: Sequence[Table] = ()
    groups: Mapping[str, Sequence[Picture]] = {}
    missing: str = ""


class Facts(NamedTuple):
    """What a report is of: the data set, the run that made it, and when."""

    title: str
    digest: str
    official: bool
    run_id: str
    time: str


def sections(entries: Sequence[Entry], images: Images, shown: pd.DataFrame) -> list[Section]:
    """All of the report; ``images`` are the letters of the rows of ``shown`` disagreements."""
    return [
        the_table(entries),
        best_so_far(entries),
        trade_offs(entries),
        letters(entries),
        confusion(entries),
        disagreement(entries, images, shown),
        importance(entries),
        bill(entries),
        provenance(entries),
    ]


def the_table(entries: Sequence[Entry]) -> Section:
    frame = findings.table(entries)
    chart = Chart(
        "comparison",
        plots.comparison(frame),
        "Share of the test letters that are read right, with 95 % intervals (Wilson). The deck's "
        "figures are on EMNIST.",
        "Test accuracy of each model with its interval: " + _each(entries, "test_accuracy"),
    )
    duels = [
        [
            f"{one} and {other}",
            f"{first:,}",
            f"{second:,}",
            "< 0.001" if p < 0.001 else f"{p:.3f}",
        ]
        for one, other, first, second, p in findings.duels(entries).itertuples(index=False)
    ]
    pairwise = Table(
        "Two models on the same letters: how often one alone is right, and how likely a "
        "difference as large is by chance (McNemar's exact test).",
        ["Models", "only the first", "only the second", "p"],
        duels,
    )
    columns, rows = figures(frame)
    main = Table("Accuracy, mean recall and mean precision are on test.", columns, rows)
    return Section(
        "table",
        "The models side by side",
        charts=[chart],
        tables=[pairwise] if duels else [],
        lead=[main],
    )


def figures(frame: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """The deck's columns, then the deck's own accuracy, what was confirmed on val, cost and size.

    ``frame`` is ``findings.table``'s; gives column names and cells.
    """
    columns = [
        "Model", "Accuracy", "95 % interval", "Mean Recall", "Mean Precision", "Deck, on EMNIST",
        "Confirmed on val", "Trials", "CPU-s", "Budget", "Model MB", "µs a letter",
    ]  # fmt: skip
    rows = [
        [
            row.label,
            f"{row.test_accuracy:.2%}",
            f"{100 * row.test_accuracy_low:.1f} to {100 * row.test_accuracy_high:.1f}",
            f"{row.test_mean_recall:.2%}",
            f"{row.test_mean_precision:.2%}",
            _number(row.deck_accuracy, ".0%"),
            _confirmed(row.confirmed_val_accuracy, row.confirmed_val_accuracy_std, row.n_seeds),
            _number(row.n_trials, ".0f"),
            f"{row.cpu_seconds:.0f}",
            _number(row.budget_cpu_seconds, ".0f"),
            f"{row.model_mb:.1f}",
            f"{row.predict_us_per_letter:.0f}",
        ]
        for row in frame.itertuples()
    ]
    return columns, rows


def _number(value: float, form: str) -> str:
    return "–" if np.isnan(value) else format(value, form)


def _confirmed(mean: float, deviation: float, n_seeds: float) -> str:
    if np.isnan(n_seeds):
        return "–"
    if np.isnan(deviation):
        return f"{mean:.2%}, one seed"
    return f"{mean:.2%} ± {100 * deviation:.2f}, {n_seeds:.0f} seeds"


def best_so_far(entries: Sequence[Entry]) -> Section:
    none = pd.DataFrame(columns=["spent_cpu_seconds", "val_accuracy"], dtype=float)
    curves = {
        entry.label: none if entry.trials is None else findings.best_by_cost(entry.trials)
        for entry in entries
    }
    without = [entry.label for entry in entries if entry.trials is None]
    missing = f"No curve for {findings.listed(without)}: it has no trials of a sweep." * bool(
        without
    )
    if len(without) == len(entries):
        return Section("search", "Best so far, by cost", missing=missing)
    rows = [
        [
            label,
            *(
                _reached(curve, share * curve["spent_cpu_seconds"].iloc[-1])
                for share in (0.1, 0.25, 0.5, 1.0)
            ),
            f"{curve['spent_cpu_seconds'].iloc[-1]:,.0f}",
        ]
        for label, curve in curves.items()
        if len(curve)
    ]
    chart = Chart(
        "best_so_far",
        plots.best_by_cost(curves),
        "The best accuracy on val of a model that was logged by then, against all CPU-seconds of "
        "the sweep. Every process counts, and so does the time in which nearest neighbours are "
        "looked up to answer val: a fit that is cheap and a prediction that is dear stand on one "
        "axis with the networks. Marks are where the best rose, and the end.",
        "Best validation accuracy against CPU-seconds, a line a sweep; the table has its values",
    )
    table = Table(
        "Best accuracy on val when so much of a sweep's CPU-seconds was spent.",
        ["Model", "a tenth", "a quarter", "half", "all", "CPU-s"],
        rows,
    )
    return Section(
        "search", "Best so far, by cost", charts=[chart], tables=[table], missing=missing
    )


def _reached(curve: pd.DataFrame, spent: float) -> str:
    before = curve[curve["spent_cpu_seconds"] <= spent]
    return f"{before['val_accuracy'].iloc[-1]:.2%}" if len(before) else "nothing yet"


def trade_offs(entries: Sequence[Entry]) -> Section:
    frame = findings.table(entries)
    charts, fronts = [], {}
    for cost, name, x in (
        ("predict_us_per_letter", "latency", "microseconds a letter"),
        ("model_mb", "size", "megabytes of the logged model"),
    ):
        frame["on_front"] = fronts[name] = findings.on_front(frame[cost], frame["test_accuracy"])
        front = findings.listed(list(frame["label"][frame["on_front"]]))
        charts.append(
            Chart(
                f"accuracy_by_{name}",
                plots.trade_off(frame, cost, x),
                f"Accuracy on test against {name}, with 95 % intervals. On the Pareto front "
                f"(dashed), where nothing else is as cheap and as good: {front}."
                + " Wall time through MLflow's predict in batches of 256."
                * (name == "latency"),
                f"Test accuracy against {name}; on the Pareto front: {front}",
            )
        )
    rows = [
        [
            row["label"],
            f"{row['predict_us_per_letter']:,.0f}",
            f"{row['predict_us_one_letter']:,.0f}",
            f"{row['model_mb']:.2f}",
            " and ".join(name for name, front in fronts.items() if front[i]) or "neither",
        ]
        for i, row in enumerate(frame.to_dict("records"))
    ]
    table = Table(
        "What an answer and a model cost, and on which fronts it lies.",
        ["Model", "µs a letter, of 256", "µs a letter, alone", "MB", "on the front of"],
        rows,
        [4],
    )
    return Section("costs", "Accuracy against latency and size", charts=charts, tables=[table])


def letters(entries: Sequence[Entry]) -> Section:
    recall = findings.recall(entries)
    called_out = " and ".join("/".join(pair) for pair in PAIRS)
    hardest = ", ".join(recall.mean(axis=1).sort_values(kind="stable").index[:3])
    chart = Chart(
        "recall_by_letter",
        plots.recall_by_letter(recall, {letter for pair in PAIRS for letter in pair}),
        f"Recall of each letter by each model, the hardest on top. The pairs {called_out}, which "
        "look alike where upper and lower case are one letter, lie on a band.",
        f"Recall of each letter by each model; the hardest are {hardest}; the table has all values",
    )
    pairs = []
    for one, other in PAIRS:
        found = [findings.pair(entry, (one, other)) for entry in entries]
        rows = [
            [words, *(_number(pair[figure], form) for pair in found)]
            for words, figure, form in (
                (f"recall of {one}", f"recall_{one}", ".1%"),
                (f"{one} taken for {other}", f"{one}_for_{other}", ".0f"),
                (f"recall of {other}", f"recall_{other}", ".1%"),
                (f"{other} taken for {one}", f"{other}_for_{one}", ".0f"),
                ("accuracy if they were one letter", "merged_accuracy", ".2%"),
            )
        ]
        pairs.append(Table(f"The pair {one} and {other}.", ["", *recall.columns], rows))
    each = Table(
        "Recall of each letter",
        ["Letter", *recall.columns],
        [[letter, *(f"{value:.1%}" for value in row)] for letter, *row in recall.itertuples()],
    )
    return Section("letters", "Letter by letter", charts=[chart], tables=pairs, folded=[each])


def confusion(entries: Sequence[Entry]) -> Section:
    charts = [
        Chart(
            f"confusion_{_slug(entry.label)}",
            plots.confusion_matrix(findings.counts(entry), entry.label),
            f"{entry.label}: letters down, guesses across; the stronger the blue, the larger "
            "the share of the letter.",
            f"Confusion matrix of {entry.label}; the table has the commonest confusions",
            wide=True,
        )
        for entry in entries
    ]
    commonest = findings.confusions(entries, N_CONFUSIONS)
    rows = [
        [f"{letter} for {guess}", *(str(n) for n in ns)]
        for letter, guess, *ns in commonest.itertuples(index=False)
    ]
    table = Table(
        "The commonest confusions: how often the first letter was taken for the second.",
        ["Taken", *(entry.label for entry in entries)],
        rows,
    )
    missing = "" if rows else "No letter was taken for another one."
    return Section(
        "confusions",
        "What is taken for what",
        charts=charts,
        tables=[table] if rows else [],
        missing=missing,
    )


def disagreement(entries: Sequence[Entry], images: Images, shown: pd.DataFrame) -> Section:
    about = ("disagreements", "Where they disagree")
    if len(entries) == 1:
        return Section(*about, missing="One model alone has nobody to disagree with.")
    every = findings.disagreements(entries)
    if every.empty:
        return Section(*about, missing="All models guess all letters the same.")
    sizes = every["right"].value_counts()
    groups: dict[str, list[Picture]] = {}
    for row, image in zip(shown.to_dict("records"), images, strict=True):
        guesses = [
            (
                entry.label,
                row[f"guess {entry.label}"],
                f"{row[f'confidence {entry.label}']:.0%}",
                row[f"guess {entry.label}"] == row["letter"],
            )
            for entry in entries
        ]
        heading = f"Right: {row['right']} ({sizes[row['right']]:,} letters)"
        groups.setdefault(heading, []).append(Picture(_png(image), row["letter"], guesses))
    text = (
        f"{len(every):,} of {len(entries[0].predictions):,} letters are not guessed the same by "
        f"all. These {len(shown)} show how, in groups by who is right: under each its label, then "
        "everyone's guess and confidence. Those come first where all are sure."
    )
    return Section(*about, text, groups=groups)


def importance(entries: Sequence[Entry]) -> Section:
    charts, tables, without = [], [], []
    for entry in entries:
        if not entry.importance:
            why = "it was no sweep" if entry.trials is None else "too few trials were proposed"
            without.append(f"{entry.label} ({why})")
            continue
        ranked = sorted(entry.importance.items(), key=lambda item: -item[1])
        charts.append(
            Chart(
                f"importance_{_slug(entry.label)}",
                plots.importance(entry.importance, width=plots.CARD),
                f"{entry.label}: share of the variation among proposed trials that each "
                "hyperparameter explains.",
                f"Hyperparameter importance of {entry.label}: "
                + ", ".join(f"{name} {share:.2f}" for name, share in ranked[:3]),
            )
        )
        rows = [[name, f"{share:.3f}"] for name, share in ranked]
        tables.append(Table(f"Importance, {entry.label}", ["Hyperparameter", "share"], rows))
    missing = f"Nothing can be said of {findings.listed(without)}." * bool(without)
    text = (
        "By PED-ANOVA, of the trials that the sampler proposed, all of one length. Few trials make "
        "it a hint, not a measurement."
    )
    return Section(
        "importance",
        "Which hyperparameters mattered",
        text * bool(charts),
        charts,
        folded=tables,
        missing=missing,
    )


def bill(entries: Sequence[Entry]) -> Section:
    frame = findings.bills(entries)
    chart = Chart(
        "bills",
        plots.bills(frame),
        "What each run's CPU-seconds were spent on; fit is training and validation.",
        "CPU-seconds by cause, a bar a model; the table has all values",
    )
    causes = {"fit": "training and validation"} | OVERHEAD
    rows = [
        [f"{cause}: {causes[cause]}", *(f"{value:,.1f}" for value in frame[cause])]
        for cause in frame.columns
    ]
    total = frame.sum(axis=1)
    budgets = findings.table(entries)["budget_cpu_seconds"]
    rows.append(["all", *(f"{value:,.1f}" for value in total)])
    rows.append(["budget", *(_number(value, ",.0f") for value in budgets)])
    rows.append(["fit, of all", *(f"{share:.1%}" for share in frame["fit"] / total)])
    table = Table("CPU-seconds by cause.", ["Spent on", *frame.index], rows)
    return Section("bill", "The bill of each sweep", charts=[chart], tables=[table])


def provenance(entries: Sequence[Entry]) -> Section:
    facts = [
        ("step", [entry.step for entry in entries]),
        ("run", [entry.run_id for entry in entries]),
        ("model", [entry.model_uri for entry in entries]),
    ]
    facts += [
        (name, [entry.tags.get(tag, "–") for entry in entries])
        for name, tag in (
            ("precision", "precision"),
            ("code", "git_commit"),
            ("with changes", "git_dirty"),
            ("processor", "cpu_model"),
            ("versions", "versions"),
        )
    ]
    labels = [entry.label for entry in entries]
    rows = [[name, *values] for name, values in facts]
    words = range(1, len(entries) + 1)
    table = Table("The runs that this report is made of.", ["", *labels], rows, words)
    return Section("runs", "Where the figures come from", lead=[table])


def render(
    facts: Facts, entries: Sequence[Entry], remarks: Sequence[str], parts: Sequence[Section]
) -> str:
    """The report as one HTML file."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(TEMPLATE.read_text()).render(
        title=f"{findings.listed([entry.label for entry in entries])} on {facts.title}",
        facts=facts,
        n_letters=f"{len(entries[0].predictions):,}",
        headline=findings.headline(entries),
        remarks=remarks,
        sections=parts,
    )


def svg(figure: Figure, name: str, label: str) -> Markup:
    """A figure as inline SVG that scales with the page; its black is the reader's ink.

    ``name`` must be unique in the page: references inside of the figure carry it.
    """
    out = io.StringIO()
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.sans-serif": ["DejaVu Sans"]}
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(style):
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="[^"]+"', head)
    assert box is not None
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", body)
    body = body.replace("#000000", "currentColor").replace("\n", " ")
    body = body.replace("font-family: 'DejaVu Sans', sans-serif; ", "")  # as the page has it
    return Markup('<svg role="img" aria-label="{}" {}>').format(
        label, Markup(box.group())
    ) + Markup(re.sub(r" {2,}", " ", body))


def _png(image: npt.NDArray[np.uint8]) -> str:
    """A letter, ink dark on white, as a data URI."""
    out = io.BytesIO()
    Image.fromarray(255 - image).save(out, format="png")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _each(entries: Sequence[Entry], metric: str) -> str:
    return ", ".join(f"{entry.label} {entry.metrics[metric]:.2%}" for entry in entries)


def _slug(label: str) -> str:
    """A label as part of a file's name."""
    return re.sub(r"\W+", "_", label.lower())
