"""The README's first command: `python -m quotalimit`."""

from __future__ import annotations

import subprocess
import sys


def test_each_breach_is_shown_as_its_exception_and_the_budgets_as_a_table() -> None:
    shown = subprocess.run([sys.executable, "-m", "quotalimit"], capture_output=True, text=True, check=True).stdout
    assert "alice: RateLimitExceeded: " in shown
    assert "bob: TokenBudgetExceeded: " in shown
    assert "by_ip: 100/minute exceeded" in shown
    rows = {
        line.split()[0]: line.split() for line in shown[shown.index("The budgets now") :].splitlines() if line.strip()
    }
    assert rows["alice"][1:5] == ["20", "5", "RateLimitExceeded", "160"]
    assert rows["bob"][1:5] == ["4", "2", "TokenBudgetExceeded", "12016"]
    assert sum(int(rows[f"bot-{number}"][1]) for number in range(1, 7)) == 100
