"""A rate, an amount and a period, and the notation people write it in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from quotalimit.errors import InvalidLimit

SECOND: Final = 1_000_000
"""Microseconds: the unit of all time in quotalimit."""

UNITS: Final[dict[str, int | None]] = {
    "second": SECOND,
    "minute": 60 * SECOND,
    "hour": 3_600 * SECOND,
    "day": 86_400 * SECOND,
    "week": 7 * 86_400 * SECOND,
    "month": None,
    "year": None,
}
"""The length of each unit in microseconds; None where it depends on the calendar."""

MAX_AMOUNT: Final = 2**53 - 1
"""The largest amount, and the longest period in microseconds: what every store can count in exactly."""

_ABBREVIATIONS: Final = {"s": "second", "m": "minute", "h": "hour", "d": "day", "w": "week"}
_SUFFIXES: Final = {"k": 1_000, "K": 1_000, "M": 1_000_000}
_NOTATION: Final = re.compile(
    r"""\s* (?P<digits> [0-9]{1,3}(?:,[0-9]{3})+ | [0-9]+(?:_[0-9]+)* ) \s? (?P<suffix> [kKM] )?
        \s* (?: / | \b(?i:per)\b ) \s*
        (?: (?P<count> [0-9]+ ) \s* )? (?P<unit> [A-Za-z]+ ) \s*""",
    re.VERBOSE,
)
_MAX_LENGTH: Final = 100


@dataclass(frozen=True, slots=True)
class Rate:
    """An amount of units in a period: `Rate(20, "minute")`, `Rate.parse("100 per 5 minutes")`.

    `amount` and `count` are positive whole numbers; `unit` is second, minute, hour, day, week, month or year.
    Raises `InvalidLimit` for anything else.
    """

    amount: int
    unit: str
    count: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.unit, str) or self.unit not in UNITS:
            raise InvalidLimit(f"unknown unit {self.unit!r}: use one of {', '.join(UNITS)}")
        for what, number in (("amount", self.amount), ("number of periods", self.count)):
            if type(number) is not int or not 0 < number <= MAX_AMOUNT:
                raise InvalidLimit(
                    f"the {what} of a rate must be a whole number from 1 to {MAX_AMOUNT}, not {_shown(number)}"
                )
        if self.period is not None and self.period > MAX_AMOUNT:
            raise InvalidLimit(f"a period of {self.count} {self.unit}s is longer than 285 years: shorten it")

    @classmethod
    def parse(cls, text: str) -> Rate:
        """Read `AMOUNT ("/" | "per") [COUNT] UNIT`: "20/minute", "10_000/day", "1M/month", "3/10 seconds".

        Amounts may hold `_` or `,` and end in `k` (thousand) or `M` (million). Units may be plural or one of
        `s m h d w`. Raises `InvalidLimit` that names what could not be read.
        """
        if not isinstance(text, str):
            raise InvalidLimit(f'a rate is written as text, such as "20/minute", not {text!r}')
        match = _NOTATION.fullmatch(text) if len(text) <= _MAX_LENGTH else None
        if match is None:
            raise _unreadable(text, "it is not of the form AMOUNT/UNIT or AMOUNT per COUNT UNITS")
        unit = _unit_named(match["unit"])
        if unit is None:
            raise _unreadable(text, f"{match['unit']!r} is not a unit of time ({', '.join(UNITS)}, s m h d w)")
        amount = int(match["digits"].replace("_", "").replace(",", "")) * _SUFFIXES.get(match["suffix"], 1)
        count = int(match["count"] or 1)
        try:
            return cls(amount, unit, count)
        except InvalidLimit as error:
            raise _unreadable(text, str(error)) from None

    @property
    def period(self) -> int | None:
        """The period in microseconds; None for months and years, which differ in length."""
        length = UNITS[self.unit]
        return None if length is None else length * self.count

    def __str__(self) -> str:
        return f"{self.amount}/{self.unit}" if self.count == 1 else f"{self.amount}/{self.count} {self.unit}s"


def _unit_named(word: str) -> str | None:
    """The unit that a word means. Case matters only for M, which is a million and never a minute."""
    if len(word) == 1:
        return None if word == "M" else _ABBREVIATIONS.get(word.lower())
    singular = word.lower().removesuffix("s")
    return singular if singular in UNITS else None


def _shown(number: object) -> str:
    return "a far larger one" if isinstance(number, int) and number > 10**100 else repr(number)


def _unreadable(text: str, why: str) -> InvalidLimit:
    shown = text if len(text) <= _MAX_LENGTH else text[:_MAX_LENGTH] + "…"
    return InvalidLimit(f'cannot read the rate {shown!r}: {why}. Write it like "20/minute" or "100 per 5 minutes"')
