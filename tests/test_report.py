"""The report: one file with nothing outside, whole for many models and honest for few."""

import base64
import re

import pytest
from entries import entry
from pages import FACTS, THREE, Reader, page

from pipeline import plots, report
from pipeline.findings import Entry

SECTIONS = "table search costs letters confusions disagreements importance bill runs".split()


@pytest.fixture(scope="module")
def html() -> str:
    return page(THREE)


@pytest.fixture(scope="module")
def read(html: str) -> Reader:
    return Reader(html)


def test_nothing_lies_outside(html: str, read: Reader) -> None:
    # Law: no address, no script, and whatever is referred to is inside of the file.
    assert "://" not in html
    assert "script" not in read.tags
    assert "link" not in read.tags
    for place in read.references:
        assert place.startswith("data:image/png;base64,") or place[1:] in read.ids, place
    assert "@import" not in html
    for place in re.findall(r"url\(([^)]+)\)", html):
        assert place.strip("\"'")[1:] in read.ids


def test_ids_are_unique_though_there_are_many_figures(read: Reader) -> None:
    assert read.tags["svg"] >= 9
    assert len(set(read.ids)) == len(read.ids)


def test_it_is_small(html: str) -> None:
    assert len(html.encode()) < 2_000_000


def test_every_part_is_there(read: Reader) -> None:
    ids = [given["id"] for tag, given in read.attributes if tag == "section"]
    assert ids == SECTIONS
    # No links: the MLflow UI shows the file in a sandbox where they do nothing.
    assert "a" not in read.tags


def test_every_figure_has_a_name_and_a_caption(read: Reader) -> None:
    figures = [given for tag, given in read.attributes if tag == "svg"]
    assert all(given["role"] == "img" and given["aria-label"] for given in figures)
    assert len({given["aria-label"] for given in figures}) == len(figures)
    assert read.tags["figcaption"] == read.tags["figure"] == read.tags["svg"]
    # It scales with the page: it has a box, and no size of its own.
    assert all("viewbox" in given and "width" not in given for given in figures)


def test_figures_are_in_the_readers_ink(html: str) -> None:
    body = html[html.index("<body>") :]
    assert "#000000" not in body
    assert "currentColor" in body


def test_the_table_has_the_decks_columns_and_ours(read: Reader) -> None:
    head = next(row for row in read.rows if "Mean Recall" in row)
    row = dict(zip(head, read.rows[read.rows.index(head) + 1], strict=True))
    metrics = THREE[0].metrics
    assert row == {
        "Model": "CNN",
        "Accuracy": f"{metrics['test_accuracy']:.2%}",
        "95 % interval": f"{100 * metrics['test_accuracy_low']:.1f} to "
        f"{100 * metrics['test_accuracy_high']:.1f}",
        "Mean Recall": f"{metrics['test_mean_recall']:.2%}",
        "Mean Precision": f"{metrics['test_mean_precision']:.2%}",
        "Deck, on EMNIST": "92%",
        "Confirmed on val": f"{metrics['test_accuracy']:.2%} ± 0.12, 3 seeds",
        "Trials": "4",
        "CPU-s": "110",
        "Budget": "120",
        "Model MB": "4.5",
        "µs a letter": "303",
    }


def test_the_words_that_matter_are_said(read: Reader) -> None:
    assert "The budgets differ (CNN 120, KNN 120, LSTM 300 CPU-seconds)" in read.text[""]
    assert "which is not EMNIST" in read.text[""]
    assert "nearest neighbours are looked up to answer val" in read.text["search"]
    assert "Pareto front" in read.text["costs"]
    assert "The pair I and L." in read.text["letters"]
    assert "The pair G and Q." in read.text["letters"]
    assert "PED-ANOVA" in read.text["importance"]
    assert "tracing: building a network's graphs" in read.text["bill"]
    for one in THREE:
        assert one.run_id in read.text["runs"]


def test_every_letter_has_its_recall_in_a_table(read: Reader) -> None:
    rows = {row[0]: row for row in read.rows if len(row) == 4}
    for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ":
        assert all(cell.endswith("%") for cell in rows[letter][1:])


def test_disagreements_are_pictures_with_names(read: Reader) -> None:
    pictures = [given for tag, given in read.attributes if tag == "img"]
    assert 20 <= len(pictures) <= report.N_PICTURES
    for given in pictures:
        assert re.fullmatch(r"A handwritten [A-Z]", str(given["alt"]))
        png = base64.b64decode(str(given["src"]).partition(",")[2])
        assert png.startswith(b"\x89PNG")


def test_emnist_itself_is_not_denied() -> None:
    official = FACTS._replace(official=True)
    assert "which is not EMNIST" not in page(THREE[:2], official)


def test_text_from_outside_is_text() -> None:
    html = page([entry("CNN")], FACTS._replace(title="<script>alert(1)</script> & co"))
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; co" in html


@pytest.mark.parametrize(
    ("entries", "section", "words", "n_figures"),
    [
        ([entry("CNN")], "disagreements", "nobody to disagree with", 0),
        ([entry("CNN", step="train")], "search", "it has no trials of a sweep", 0),
        ([entry("CNN", step="train")], "importance", "CNN (it was no sweep)", 0),
        ([entry("CNN", importance={})], "importance", "CNN (too few trials were proposed)", 0),
        ([entry("CNN"), entry("KNN", step="train")], "search", "No curve for KNN", 1),
        ([entry("CNN"), entry("KNN", importance={})], "importance", "KNN (too few", 1),
        ([entry("CNN", 1.0), entry("KNN", 1.0)], "disagreements", "guess all letters the same", 0),
        ([entry("CNN", 1.0)], "confusions", "No letter was taken for another one", 1),
    ],
)
def test_what_is_missing_is_a_sentence_and_no_empty_figure(
    entries: list[Entry], section: str, words: str, n_figures: int
) -> None:
    html = page(entries)
    assert words in Reader(html).text[section]
    part = html[html.index(f'<section id="{section}"') :]
    assert part[: part.index("</section>")].count("<figure") == n_figures


def test_what_a_single_fit_does_not_have_is_a_dash() -> None:
    rows = Reader(page([entry("TOY", step="train")])).rows
    head = next(row for row in rows if "Mean Recall" in row)
    row = dict(zip(head, rows[rows.index(head) + 1], strict=True))
    for column in ("Deck, on EMNIST", "Confirmed on val", "Trials", "Budget"):
        assert row[column] == "–"


def test_two_of_one_model_stand_side_by_side() -> None:
    read = Reader(page([entry("CNN aaaaaa", 0.9), entry("CNN bbbbbb", 0.8)]))
    assert len(set(read.ids)) == len(read.ids)
    assert "CNN aaaaaa and CNN bbbbbb" in read.text[""]


def test_references_inside_of_a_figure_carry_its_name() -> None:
    figure = plots.importance({"units": 0.7, "rate": 0.3})
    one, other = (Reader(report.svg(figure, name, "a label")) for name in ("one", "other"))
    assert set(one.ids).isdisjoint(other.ids)
    assert all(place[1:] in one.ids for place in one.references if place.startswith("#"))
    assert report.svg(figure, "one", "a label") == report.svg(figure, "one", "a label")
