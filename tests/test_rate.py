"""The notation of rates: what is right, what is wrong and how it is said, and which algorithm takes which rate."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quotalimit import CalendarWindow, InvalidLimit, Rate, SlidingWindow, TokenBucket
from quotalimit.algorithms import Algorithm
from quotalimit.rate import MAX_AMOUNT, UNITS

RIGHT = [
    ("20/minute", 20, "minute", 1),
    ("20 / minute", 20, "minute", 1),
    ("  20/minute\n", 20, "minute", 1),
    ("20 per minute", 20, "minute", 1),
    ("20 PER Minute", 20, "minute", 1),
    ("100 per 5 minutes", 100, "minute", 5),
    ("3/10 seconds", 3, "second", 10),
    ("3/10seconds", 3, "second", 10),
    ("3/10s", 3, "second", 10),
    ("3/1 second", 3, "second", 1),
    ("1/second", 1, "second", 1),
    ("1/seconds", 1, "second", 1),
    ("1/hour", 1, "hour", 1),
    ("1/2 hours", 1, "hour", 2),
    ("1/day", 1, "day", 1),
    ("1/30 days", 1, "day", 30),
    ("1/week", 1, "week", 1),
    ("1/2 weeks", 1, "week", 2),
    ("1/month", 1, "month", 1),
    ("1/months", 1, "month", 1),
    ("1/year", 1, "year", 1),
    ("1/years", 1, "year", 1),
    ("5/s", 5, "second", 1),
    ("5/m", 5, "minute", 1),
    ("5/h", 5, "hour", 1),
    ("5/d", 5, "day", 1),
    ("5/w", 5, "week", 1),
    ("5/S", 5, "second", 1),
    ("5/H", 5, "hour", 1),
    ("5/DAY", 5, "day", 1),
    ("10_000/day", 10_000, "day", 1),
    ("1_0/day", 10, "day", 1),
    ("10,000/day", 10_000, "day", 1),
    ("1,234,567/day", 1_234_567, "day", 1),
    ("10k/day", 10_000, "day", 1),
    ("10K/day", 10_000, "day", 1),
    ("10 k / day", 10_000, "day", 1),
    ("10k per day", 10_000, "day", 1),
    ("1M/month", 1_000_000, "month", 1),
    ("2 M per 2 m", 2_000_000, "minute", 2),
    ("1_000k/day", 1_000_000, "day", 1),
    (f"{2**53 - 1}/day", 2**53 - 1, "day", 1),
]


@pytest.mark.parametrize(("text", "amount", "unit", "count"), RIGHT)
def test_right_notation(text: str, amount: int, unit: str, count: int) -> None:
    """Notation: AMOUNT ("/" | "per") [COUNT] UNIT is read as it is meant."""
    assert Rate.parse(text) == Rate(amount, unit, count)


@pytest.mark.parametrize(
    ("text", "microseconds"),
    [
        ("1/s", 1_000_000),
        ("1/10 s", 10_000_000),
        ("1/m", 60_000_000),
        ("1/h", 3_600_000_000),
        ("1/d", 86_400_000_000),
        ("1/2 w", 1_209_600_000_000),
        ("1/month", None),
        ("1/year", None),
    ],
)
def test_periods(text: str, microseconds: int | None) -> None:
    """A period is in microseconds; months and years have none."""
    assert Rate.parse(text).period == microseconds


WRONG = [
    ("", "''"),
    (" ", "' '"),
    ("5", "'5'"),
    ("minute", "'minute'"),
    ("/minute", "'/minute'"),
    ("5/", "'5/'"),
    ("5 minute", "'5 minute'"),
    ("5//minute", "'5//minute'"),
    ("5/minute/user", "'5/minute/user'"),
    ("5/minute, 9/day", "'5/minute, 9/day'"),
    ("5perminute", "'5perminute'"),
    ("5 perminute", "'5 perminute'"),
    ("five/minute", "'five/minute'"),
    ("5/mniute", "'mniute'"),
    ("5/minutess", "'minutess'"),
    ("5/ss", "'ss'"),
    ("5/fortnight", "'fortnight'"),
    ("5/M", "'M'"),
    ("5/10 M", "'M'"),
    ("5m/day", "'5m/day'"),
    ("5G/day", "'5G/day'"),
    ("5kk/day", "'5kk/day'"),
    ("k/day", "'k/day'"),
    ("1.5k/day", "'1.5k/day'"),
    ("1.0/day", "'1.0/day'"),
    ("1e3/day", "'1e3/day'"),
    ("0x10/day", "'0x10/day'"),
    ("1,5/day", "'1,5/day'"),
    ("1,0000/day", "'1,0000/day'"),
    ("1000,000/day", "'1000,000/day'"),
    (",100/day", "',100/day'"),
    ("1_000,000/day", "'1_000,000/day'"),
    ("1__0/day", "'1__0/day'"),
    ("_1/day", "'_1/day'"),
    ("1_/day", "'1_/day'"),
    ("-1/minute", "'-1/minute'"),
    ("+1/minute", "'+1/minute'"),
    ("0/minute", "not 0"),
    ("0k/minute", "not 0"),
    ("10/0 seconds", "not 0"),
    ("10/-1 seconds", "'10/-1 seconds'"),
    ("10/1.5 seconds", "'10/1.5 seconds'"),
    ("٣/minute", "'٣/minute'"),
    ("３/minute", "'３/minute'"),
    ("5/1０ seconds", "'5/1０ seconds'"),
    ("5\u212a/day", "'5\u212a/day'"),
    ("5/\u017fecond", "'5/\u017fecond'"),
    ("5/minute\x00", r"'5/minute\x00'"),
    (f"{2**53}/day", str(2**53)),
    ("9007199254740991M/day", "9007199254740991000000"),
    (f"1/{2**53} seconds", str(2**53)),
    ("1/9999999999 days", "9999999999 days"),
]


@pytest.mark.parametrize(("text", "named"), WRONG)
def test_wrong_notation(text: str, named: str) -> None:
    """Notation: what cannot be read raises InvalidLimit, which names it and shows a right one."""
    with pytest.raises(InvalidLimit) as caught:
        Rate.parse(text)
    message = str(caught.value)
    assert repr(text) in message
    assert named in message
    assert '"20/minute"' in message


@pytest.mark.parametrize(
    "text", ["9" * 10_000 + "/day", "x" * 1_000_000, " " * 1_000_000 + "5", "1_" * 500_000 + "/day", "5/" + "m" * 10**6]
)
def test_huge_texts_are_refused_briefly(text: str) -> None:
    """Notation: a text of any length is refused by a message that one can read."""
    with pytest.raises(InvalidLimit) as caught:
        Rate.parse(text)
    assert '"20/minute"' in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("value", [None, 20, 20.5, True, b"20/minute", ("20/minute",), ["20/minute"], object()])
@pytest.mark.parametrize("read", [Rate.parse, SlidingWindow, CalendarWindow, TokenBucket])
def test_what_is_not_text_is_refused(read: Any, value: object) -> None:
    """Notation: what is not text is refused by a message that names it and shows a right one."""
    with pytest.raises(InvalidLimit) as caught:
        read(value)
    assert repr(value) in str(caught.value)
    assert '"20/minute"' in str(caught.value)


@given(st.text(max_size=40) | st.text("0123456789_,.kM/ perminutsdayhw", max_size=20))
@settings(deadline=None, max_examples=150)
def test_any_text_is_a_rate_or_an_invalid_limit(text: str) -> None:
    """Notation: a text is read, or raises InvalidLimit and nothing else."""
    try:
        rate = Rate.parse(text)
    except InvalidLimit:
        return
    assert Rate.parse(str(rate)) == rate


@given(st.integers(1, MAX_AMOUNT), st.sampled_from(sorted(UNITS)), st.integers(1, 10_000))
@settings(deadline=None, max_examples=150)
def test_a_rate_reads_what_it_writes(amount: int, unit: str, count: int) -> None:
    """Notation: `Rate.parse(str(rate))` is the rate."""
    rate = Rate(amount, unit, count)
    assert Rate.parse(str(rate)) == rate
    assert hash(Rate.parse(str(rate))) == hash(rate)


@pytest.mark.parametrize(
    "arguments",
    [
        (0, "minute"),
        (-1, "minute"),
        (True, "minute"),
        (1.0, "minute"),
        ("1", "minute"),
        (None, "minute"),
        (2**53, "minute"),
        (1, "minutes"),
        (1, "m"),
        (1, ""),
        (1, None),
        (1, []),
        (1, "minute", 0),
        (1, "minute", -1),
        (1, "minute", True),
        (1, "minute", 1.5),
        (1, "week", 2**40),
    ],
)
def test_a_rate_made_of_wrong_parts_is_refused(arguments: tuple[Any, ...]) -> None:
    """A Rate that is no rate raises InvalidLimit, however it is made."""
    with pytest.raises(InvalidLimit):
        Rate(*arguments)


@pytest.mark.parametrize("text", ["1/month", "1/year", "5/months", "1/2 months", "3/3 years"])
@pytest.mark.parametrize("algorithm", [SlidingWindow, TokenBucket])
def test_months_and_years_only_in_calendar_windows(algorithm: type[Algorithm], text: str) -> None:
    """Notation: months and years are refused outside of CalendarWindow, by the text and by the Rate."""
    for rate in (text, Rate.parse(text)):
        with pytest.raises(InvalidLimit, match=str(Rate.parse(text))):
            algorithm(rate)


@pytest.mark.parametrize("text", ["1/2 minutes", "3/10 seconds", "1/2 days", "1/2 months", "3/3 years", "1/second"])
def test_single_units_only_in_calendar_windows(text: str) -> None:
    """Rule 20: calendar windows are single minutes, hours, days, weeks, months and years."""
    for rate in (text, Rate.parse(text)):
        with pytest.raises(InvalidLimit, match=str(Rate.parse(text))):
            CalendarWindow(rate)


@pytest.mark.parametrize(
    ("algorithm", "text"),
    [
        (algorithm, text)
        for algorithm, texts in (
            (SlidingWindow, ["1/month", "1/2 months", "3/3 years"]),
            (TokenBucket, ["1/month", "1/2 months", "3/3 years"]),
            (CalendarWindow, ["1/2 months", "3/3 years", "1/2 days", "3/10 seconds", "5/second"]),
        )
        for text in texts
    ],
)
def test_what_a_refusal_proposes_is_right(algorithm: type[Algorithm], text: str) -> None:
    """Notation: the message of a refusal shows a limit that can be made."""
    with pytest.raises(InvalidLimit) as caught:
        algorithm(text)
    makers = {"SlidingWindow": SlidingWindow, "CalendarWindow": CalendarWindow, "TokenBucket": TokenBucket}
    proposals = re.findall(r"(\w+)\('([^']+)'\)", str(caught.value))
    assert proposals
    for name, proposal in proposals:
        makers[name](proposal)


@pytest.mark.parametrize("text", ["1/minute", "1/hour", "1/day", "1/week", "1/month", "1/year", "1/1 day"])
def test_every_single_unit_has_a_calendar_window(text: str) -> None:
    """Rule 20: each unit from the minute on is a calendar window."""
    assert CalendarWindow(text).capacity == 1


@pytest.mark.parametrize("burst", [0, -1, True, 1.5, "5", 2**53])
def test_a_burst_is_a_positive_whole_number(burst: Any) -> None:
    """A bucket of any other size raises InvalidLimit."""
    with pytest.raises(InvalidLimit, match="burst"):
        TokenBucket("20/minute", burst=burst)


def test_equal_limits_are_equal() -> None:
    """Limits of one kind, rate, zone and burst are equal; a count does not depend on its amount (rule 21)."""
    assert SlidingWindow("60/minute") == SlidingWindow(Rate(60, "minute")) != CalendarWindow("60/minute")
    assert CalendarWindow("1/day") != CalendarWindow("1/day", tz="Europe/Paris")
    assert TokenBucket("1/day") == TokenBucket("1/day", burst=1) != TokenBucket("1/day", burst=2)
    assert SlidingWindow("1/minute").count_id == SlidingWindow("9/60 seconds").count_id
    assert SlidingWindow("1/minute").count_id != TokenBucket("1/minute").count_id
    assert CalendarWindow("1/day").count_id != CalendarWindow("1/day", tz="Europe/Paris").count_id
    assert CalendarWindow("1/day").count_id == CalendarWindow("2/day").count_id != CalendarWindow("2/week").count_id
    assert TokenBucket("1/day", burst=5).count_id == TokenBucket("2/day").count_id
