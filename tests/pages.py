"""Reports of made-up models, and what a reader of HTML finds in them."""

from collections import Counter
from collections.abc import Sequence
from html.parser import HTMLParser

import numpy as np
from entries import entry

from pipeline import findings, report
from pipeline.findings import Entry

VOID = {"meta", "img", "br", "hr", "link", "input"}
THREE = [entry("CNN", 0.95), entry("KNN", 0.9), entry("LSTM", 0.85, budget=300.0)]
FACTS = report.Facts("tiny.zip (EMNIST's layout, not EMNIST)", "abc123", False, "run0", "today")


def page(entries: Sequence[Entry], facts: report.Facts = FACTS) -> str:
    """The report of these entries, with pictures of noise."""
    shown = findings.instructive(findings.disagreements(entries), report.N_PICTURES)
    images = np.random.default_rng(0).integers(0, 256, (len(shown), 28, 28), np.uint8)
    parts = report.sections(entries, images, shown)
    return report.render(facts, entries, findings.remarks(entries), parts)


class Reader(HTMLParser):
    """Tags, ids, references, text by section and cells by table; every tag must be closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self.rows: list[list[str]] = []
        self.section = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags[tag] += 1
        self.attributes.append((tag, given))
        self.ids += [str(value) for name, value in attrs if name == "id"]
        self.references += [
            str(value) for name, value in attrs if name in ("href", "src", "xlink:href")
        ]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = str(given["id"])
        if tag == "tr":
            self.rows.append([])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "section":
            self.section = ""

    def handle_data(self, data: str) -> None:
        self.text[self.section] = self.text.get(self.section, "") + data
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1].append(data)
