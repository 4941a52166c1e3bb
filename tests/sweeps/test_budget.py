import json
from contextlib import closing
from pathlib import Path

import pytest

from sweeps.budget import Busy, Ledger, Opening, last_opening


def _ledger(path: Path, cpu_seconds: float = 100.0, key: str = "a") -> Ledger:
    return Ledger(path, cpu_seconds, key, "run")


def _reopened(path: Path, key: str = "a") -> tuple[float, float]:
    """Budget and past spending, as the next driver of a command with 100 CPU-seconds finds them."""
    with closing(_ledger(path, key=key)) as ledger:
        return ledger.total, sum(ledger.past.values())


def test_what_was_booked_outlives_its_driver(tmp_path: Path) -> None:
    ledger = _ledger(tmp_path / "ledger.jsonl")
    assert (ledger.total, ledger.past) == (100.0, {})
    ledger.grant(0, 30.0)
    ledger.beat({"import": 5.0}, {0: 10.0})
    ledger.debit(0, {"fit": 11.0, "tracing": 1.0})
    ledger.beat({"import": 5.0, "engine": 2.0}, {})
    ledger.close()
    # The driver's last beat, and the trial's bill, by cause.
    again = _ledger(tmp_path / "ledger.jsonl")
    assert again.past == {"import": 5.0, "engine": 2.0, "fit": 11.0, "tracing": 1.0}
    again.close()


def test_a_command_brings_its_budget_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    assert last_opening(_touched(path)) is None
    _ledger(path).close()
    # It was interrupted: typed again it goes on with the same budget, however often.
    assert last_opening(path) == Opening("a", "run")
    assert _reopened(path) == (100.0, 0.0)
    assert _reopened(path) == (100.0, 0.0)
    # Its search came to its end, and then it was interrupted: there is none to go on with.
    ledger = _ledger(path)
    assert not ledger.searched
    ledger.search_ends({})
    ledger.close()
    for _ in range(2):
        with closing(_ledger(path)) as ledger:
            assert ledger.searched
    # Another command brings more.
    ledger = _ledger(path, 50.0, "b")
    assert (ledger.total, ledger.searched) == (150.0, False)
    ledger.end({"search": 3.0})
    ledger.close()
    # It has ended: typed again it brings as much again.
    assert last_opening(path) == Opening("b", "run", ended=True)
    assert _reopened(path, "b") == (250.0, 3.0)


def test_a_command_that_is_refused_takes_its_budget_back(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with closing(_ledger(path)) as ledger:
        ledger.end({"import": 3.0})
    with closing(_ledger(path, 3600.0, "b")) as ledger:
        ledger.refuse()
    assert last_opening(path) == Opening("a", "run", ended=True)
    # One that was interrupted is not done with: mended, it goes on with what it has.
    with closing(_ledger(path, 50.0, "c")) as ledger:
        assert (ledger.total, ledger.past) == (150.0, {"import": 3.0})
    with closing(_ledger(path, 50.0, "c")) as ledger:
        ledger.refuse()
    assert last_opening(path) == Opening("c", "run")
    # Nor does another one that is refused hide it.
    with closing(_ledger(path, 3600.0, "d")) as ledger:
        ledger.refuse()
    assert last_opening(path) == Opening("c", "run")
    with closing(_ledger(path, 50.0, "c")) as ledger:
        assert ledger.total == 150.0


def _touched(path: Path) -> Path:
    path.touch()
    return path


@pytest.mark.parametrize(
    ("beats", "spent"), [([], 30.0), ([{0: 4.0}, {0: 9.0}], 10.0), ([{0: 29.5}], 30.0)]
)
def test_a_grant_without_debit_counts_at_its_last_beat_or_in_full(
    beats: list[dict[int, float]], spent: float, tmp_path: Path
) -> None:
    ledger = _ledger(tmp_path / "ledger.jsonl")
    ledger.grant(0, 30.0)
    for trials in beats:
        ledger.beat({}, trials)
    ledger.close()
    assert _reopened(tmp_path / "ledger.jsonl") == (100.0, spent)


def test_grants_and_debits_are_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = _ledger(path)
    ledger.grant(3, 30.0)
    assert json.loads(path.read_text().splitlines()[-1])["kind"] == "grant"
    ledger.debit(3, {"fit": 29.0})
    assert json.loads(path.read_text().splitlines()[-1])["kind"] == "debit"
    ledger.close()


def test_a_torn_line_costs_that_line_only(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = _ledger(path)
    ledger.beat({"import": 5.0}, {})
    ledger.close()
    with path.open("a") as file:
        file.write('{"kind": "beat", "ow')
    again = _ledger(path)
    assert again.past == {"import": 5.0}
    again.beat({"import": 2.0}, {})
    again.close()
    assert _reopened(path) == (100.0, 7.0)


def test_a_ledger_has_one_driver(tmp_path: Path) -> None:
    ledger = _ledger(tmp_path / "ledger.jsonl")
    with pytest.raises(Busy):
        _ledger(tmp_path / "ledger.jsonl")
    with pytest.raises(Busy):
        last_opening(tmp_path / "ledger.jsonl")
    ledger.close()
    _ledger(tmp_path / "ledger.jsonl").close()
