import json
from contextlib import closing
from pathlib import Path

import pytest

from sweeps.budget import Busy, Ledger


def _reopened(path: Path, more: float = 0.0) -> tuple[float, float]:
    """Budget and past spending, as the next driver finds them."""
    with closing(Ledger(path, more)) as ledger:
        return ledger.total, ledger.past


def test_what_was_booked_outlives_its_driver(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", 100.0)
    assert (ledger.total, ledger.past) == (100.0, 0.0)
    ledger.grant(0, 30.0)
    ledger.beat(5.0, {0: 10.0})
    ledger.debit(0, 12.0)
    ledger.beat(7.0, {})
    ledger.close()
    # The driver's last beat, and the trial's bill; a continued sweep has the same budget.
    assert _reopened(tmp_path / "ledger.jsonl") == (100.0, 19.0)
    # A third driver counts what the first two spent, and may bring more.
    assert _reopened(tmp_path / "ledger.jsonl", more=50.0) == (150.0, 19.0)


@pytest.mark.parametrize(
    ("beats", "spent"), [([], 30.0), ([{0: 4.0}, {0: 9.0}], 10.0), ([{0: 29.5}], 30.0)]
)
def test_a_grant_without_debit_counts_at_its_last_beat_or_in_full(
    beats: list[dict[int, float]], spent: float, tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", 100.0)
    ledger.grant(0, 30.0)
    for trials in beats:
        ledger.beat(0.0, trials)
    ledger.close()
    assert _reopened(tmp_path / "ledger.jsonl") == (100.0, spent)


def test_grants_and_debits_are_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, 100.0)
    ledger.grant(3, 30.0)
    assert json.loads(path.read_text().splitlines()[-1])["kind"] == "grant"
    ledger.debit(3, 29.0)
    assert json.loads(path.read_text().splitlines()[-1])["kind"] == "debit"
    ledger.close()


def test_a_torn_line_costs_that_line_only(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, 100.0)
    ledger.beat(5.0, {})
    ledger.close()
    with path.open("a") as file:
        file.write('{"kind": "beat", "ow')
    again = Ledger(path, 0.0)
    assert again.past == 5.0
    again.beat(2.0, {})
    again.close()
    assert _reopened(path) == (100.0, 7.0)


def test_a_ledger_has_one_driver(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", 100.0)
    with pytest.raises(Busy):
        Ledger(tmp_path / "ledger.jsonl", 0.0)
    ledger.close()
    Ledger(tmp_path / "ledger.jsonl", 0.0).close()
