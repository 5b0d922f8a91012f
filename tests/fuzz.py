"""Long fuzzing: the property tests alone, with many times their examples and another seed each time.

    python -m tests.fuzz --times 20 tests/test_machine.py

Without files, all of them. What it finds is printed, and kept in `.hypothesis` as the finds of other runs are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import pytest

SETTINGS = "_hypothesis_internal_use_settings"
"""Where hypothesis keeps the settings of a test that is a function."""


class Fuzz:
    """A pytest plugin that runs nothing but property tests, each with more examples."""

    def __init__(self, times: int) -> None:
        self._times = times

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        from hypothesis import is_hypothesis_test, settings  # pytest would warn of an import before its own

        items[:] = [item for item in items if is_hypothesis_test(item.obj) or hasattr(item.cls, "settings")]
        for holder, name in {self._settings_of(item) for item in items}:
            its = getattr(holder, name)
            setattr(holder, name, settings(its, max_examples=its.max_examples * self._times))

    @staticmethod
    def _settings_of(item: Any) -> tuple[Any, str]:
        if hasattr(item.cls, "settings"):  # of a state machine
            return item.cls, "settings"
        return getattr(item.obj, "__func__", item.obj), SETTINGS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tests. Returns pytest's exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=int, default=20, help="how many times the examples (default: 20)")
    parser.add_argument("tests", nargs="*", default=["tests"], help="files to look in (default: tests)")
    options = parser.parse_args(arguments)
    return pytest.main(["-q", "-p", "no:xdist", *options.tests], plugins=[Fuzz(options.times)])


if __name__ == "__main__":
    sys.exit(main())
