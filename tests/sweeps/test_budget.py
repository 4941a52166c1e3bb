import subprocess
import sys
import time

import pytest

from sweeps.budget import GRANT_SHARE, RESERVE_CPU_SECONDS, Budget

BURN = "import time\nwhile time.process_time() < 0.3: pass"


def test_the_time_of_this_process_and_of_its_children_counts() -> None:
    budget = Budget(1.0)
    before, own = budget.spent(), time.process_time()
    subprocess.run([sys.executable, "-c", BURN], check=True)
    # The child burnt 0.3 CPU-seconds at least, and we had waited for it.
    assert budget.spent() - before >= 0.3 + (time.process_time() - own) - 0.1


def test_waiting_costs_nothing() -> None:
    budget = Budget(1.0)
    before = budget.spent()
    time.sleep(0.2)
    assert budget.spent() - before < 0.1


def test_a_grant_is_a_share_of_the_budget_or_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Budget(10.0)
    spent = 0.0
    monkeypatch.setattr(budget, "spent", lambda: spent)
    assert budget.grant() == GRANT_SHARE * 600
    spent = 590.0
    # The reserve for closing the sweep is never granted.
    assert budget.grant() == budget.left() == 10.0 - RESERVE_CPU_SECONDS
