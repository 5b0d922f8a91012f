"""What counts as an amount of units: a cost, a reserve, a number of tokens."""

from __future__ import annotations

import math
from numbers import Integral
from operator import index
from typing import Final

MAX_UNITS: Final = 2**53 - 1
"""The most units of one call: what every store can count in exactly."""


def whole(value: object, what: str) -> int:
    """A cost as whole units, rounded up. Raises `ValueError`, naming `what`, if it is negative, NaN or no number."""
    units = units_or_none(value)
    if units is None:
        shown = "more" if isinstance(value, int) and value > MAX_UNITS else repr(value)
        raise ValueError(f"{what} must be a number from 0 to {MAX_UNITS}, not {shown}")
    return units


def units_or_none(value: object) -> int | None:
    """A number as whole units, rounded up; None for what is negative, boolean, not finite or no number."""
    if type(value) is not int:
        try:
            if isinstance(value, bool):
                return None
            if isinstance(value, float):
                if not math.isfinite(value):
                    return None
                value = math.ceil(value) if value >= 0 else -1
            elif isinstance(value, Integral):  # numpy's too; a mock that can be an index is no number
                value = index(value)
            else:
                return None
        except Exception:  # a foreign object may do anything, also when asked for its class
            return None
    return value if 0 <= value <= MAX_UNITS else None
