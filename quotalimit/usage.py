"""What a call to a model used."""

from __future__ import annotations

from collections.abc import Sequence
from operator import add
from typing import NamedTuple, TypeAlias

from quotalimit.amounts import MAX_UNITS


class _Counts(NamedTuple):
    input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int
    reasoning_tokens: int
    total_tokens: int


class Usage(_Counts):
    """The tokens that a call processed, each counted once.

    `input_tokens` has all that was read, from and into caches too, of which `cache_read_tokens` and
    `cache_write_tokens` are parts. `output_tokens` has all that was written, of which `reasoning_tokens` are a part.
    `total_tokens` is what the provider reports, and at least input + output.
    """

    __slots__ = ()

    def __new__(
        cls,
        input_tokens: int = 0,
        output_tokens: int = 0,
        cache_read_tokens: int = 0,
        cache_write_tokens: int = 0,
        reasoning_tokens: int = 0,
        total_tokens: int = 0,
    ) -> Usage:
        both = input_tokens + output_tokens
        total = both if total_tokens < both else total_tokens
        counts = (input_tokens, output_tokens, cache_read_tokens, cache_write_tokens, reasoning_tokens, total)
        return tuple.__new__(cls, counts)

    @property
    def is_known(self) -> bool:
        """Whether every count is a whole number that can be counted: anything else is unknown usage."""
        return all(type(count) is int and 0 <= count <= MAX_UNITS for count in self)

    def __add__(self, other: Usage) -> Usage:  # type: ignore[override]
        """The usage of two calls."""
        return Usage(*map(add, self, other)) if isinstance(other, Usage) else NotImplemented

    def __or__(self, other: Usage) -> Usage:
        """The usage of one call of which both are running totals: of each count the greater."""
        return Usage(*map(max, self, other)) if isinstance(other, Usage) else NotImplemented


Reading: TypeAlias = Usage | int
"""Known usage: as a provider reports it, or units to charge as they are."""


class Report(NamedTuple):
    """Usage as one response, or one item of a stream, reports it."""

    usage: Usage
    response: str | None = None
    """What tells the response from others in the same stream; None if nothing does."""

    adds: bool = False
    """Whether the items of a stream add up. Otherwise each is a running total of its response."""

    opens: bool = False
    """Whether it is told before the answer is written: Anthropic's, whose caches are beside the rest of the input."""


class Fold:
    """The usage of one call, of a result or of all items of a stream, folded as its provider means it.

    Numbers add up, and so do reports that say so. Of the running totals of one response the greatest counts, count by
    count, for some items leave out what others have told; different responses add up. Of responses that do not say
    which they are, another begins where the output that was told falls.
    """

    opened = False
    """Whether what was told last was told before the answer was written."""

    _beside = False
    _units: int | None = None
    _added: Usage | None = None
    _running: Usage | None = None
    _response: str | None = None

    def add(self, report: Report | int, known: bool) -> None:
        """Add what a result or an item told; nothing if that is known from elsewhere."""
        if isinstance(report, int):
            self.opened = False
            if not known:
                self._units = report + (self._units or 0)
            return
        usage, response, adds, self.opened = report
        self._beside = self._beside or self.opened
        if known:
            return
        running = self._running
        if adds:
            self._add(usage)
        elif running is None or self._is_another(running, usage, response):
            if running is not None:
                self._add(running)
            self._running, self._response = usage, response
        else:
            self._running = _beside(running, usage) if self._beside else running | usage
            self._response = response or self._response

    def _is_another(self, running: Usage, usage: Usage, response: str | None) -> bool:
        """Whether a running total is that of another response. Where they do not say, it is if less was written."""
        if response or self._response:
            return bool(response and self._response) and response != self._response
        return 0 < usage.output_tokens < running.output_tokens

    def _add(self, usage: Usage) -> None:
        self._added = usage if self._added is None else self._added + usage

    @property
    def readings(self) -> list[Reading]:
        """What was reported: at most one usage, and one number of units."""
        if self._added is None or self._running is None:
            usage = self._added or self._running
        else:
            usage = self._added + self._running
        readings: list[Reading] = [] if usage is None else [usage]
        if self._units is not None:
            readings.append(self._units)
        return readings


def _beside(mine: Usage, its: Usage) -> Usage:
    """Running totals of one call, of which each may leave out the input, or what of it went through a cache."""
    both = mine | its
    cached = both.cache_read_tokens + both.cache_write_tokens
    rest = max(usage.input_tokens - usage.cache_read_tokens - usage.cache_write_tokens for usage in (mine, its))
    return Usage(
        rest + cached, both.output_tokens, both.cache_read_tokens, both.cache_write_tokens, both.reasoning_tokens
    )


def without(readings: Sequence[Reading], others: Sequence[Reading]) -> list[Reading]:
    """What readings tell beyond others, of which they are the whole; nothing where that is nothing."""
    left: list[Reading] = []
    for reading in readings:
        rest = reading
        for other in others:
            if isinstance(rest, Usage) and isinstance(other, Usage):
                rest = Usage(*(max(0, mine - its) for mine, its in zip(rest, other, strict=True)))
            elif isinstance(rest, int) and isinstance(other, int):
                rest = max(0, rest - other)
        if rest.total_tokens if isinstance(rest, Usage) else rest:
            left.append(rest)
    return left
