import time

import pytest

from pipeline.bill import OVERHEAD, Meter, added, completed, metrics


def _burn(cpu_seconds: float) -> None:
    end = time.process_time() + cpu_seconds
    while time.process_time() < end:
        pass


def test_what_is_charged_inside_of_a_charge_is_taken_from_that_one() -> None:
    meter = Meter()
    meter.restart()
    began = time.process_time()
    _burn(0.05)  # charged to nothing
    with meter.charge("fit"):
        _burn(0.04)
        with meter.charge("tracing"):
            _burn(0.03)
        _burn(0.02)
    bill, total = meter.seconds(), time.process_time() - began
    assert set(bill) == {"fit", "tracing"}
    assert bill["fit"] == pytest.approx(0.06, abs=0.02)
    assert bill["tracing"] == pytest.approx(0.03, abs=0.02)
    # Law: what was charged to nothing is the engine's, and all sums up.
    whole = completed(bill, total)
    assert whole["engine"] == pytest.approx(0.05, abs=0.02)
    assert sum(whole.values()) == pytest.approx(total)


def test_a_charge_ends_where_an_error_leaves_it() -> None:
    meter = Meter()
    meter.restart()
    with pytest.raises(ArithmeticError), meter.charge("fit"), meter.charge("tracing"):
        raise ArithmeticError
    before = meter.seconds()
    _burn(0.02)
    assert meter.seconds() == before


def test_what_is_left_is_told_in_the_process_s_own_clock() -> None:
    meter = Meter()
    meter.restart()
    assert meter.left() == float("inf")
    meter.restart(until=time.process_time() + 5)
    before = meter.left()
    _burn(0.02)
    assert meter.left() < before - 0.01 < 5


def test_all_before_a_process_is_loaded_is_import() -> None:
    meter = Meter()
    meter.loaded()
    _burn(0.02)
    bill = meter.seconds()
    assert set(bill) == {"import"}
    # Law: the meter has the process's own clock, from its start.
    assert 0 < bill["import"] <= time.process_time() - 0.02


def test_metrics_of_a_bill_sum_up() -> None:
    bill = added({"fit": 90.0, "tracing": 4.0}, {"tracing": 1.0, "engine": 5.0})
    found = metrics(bill)
    assert found == {
        "cpu_seconds": 100.0,
        "fit_cpu_seconds": 90.0,
        "overhead_cpu_seconds": 10.0,
        "overhead/tracing_cpu_seconds": 5.0,
        "overhead/engine_cpu_seconds": 5.0,
    }
    assert {"tracing", "engine"} <= set(OVERHEAD)
