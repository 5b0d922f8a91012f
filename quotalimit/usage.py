"""What a call to a model used."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from typing import NamedTuple, TypeAlias


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens that a call processed, each counted once.

    `input_tokens` has all that was read, from and into caches too, of which `cache_read_tokens` and
    `cache_write_tokens` are parts. `output_tokens` has all that was written, of which `reasoning_tokens` are a part.
    `total_tokens` is what the provider reports, and at least input + output.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0
    total_tokens: int = 0

    def __post_init__(self) -> None:
        both = self.input_tokens + self.output_tokens
        if self.total_tokens < both:
            object.__setattr__(self, "total_tokens", both)

    @property
    def is_known(self) -> bool:
        """Whether every count is a whole number and none is negative: anything else is unknown usage."""
        counts = (self.input_tokens, self.output_tokens, self.cache_read_tokens, self.cache_write_tokens)
        return all(type(count) is int and count >= 0 for count in (*counts, self.reasoning_tokens, self.total_tokens))

    def __add__(self, other: Usage) -> Usage:
        """The usage of two calls."""
        return Usage(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))

    def __or__(self, other: Usage) -> Usage:
        """The usage of one call of which both are running totals: of each count the greater."""
        return Usage(*(max(mine, its) for mine, its in zip(astuple(self), astuple(other), strict=True)))


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
    count, for some items leave out what others have told; different responses add up.
    """

    __slots__ = ("_added", "_beside", "_response", "_running", "_units", "opened", "told")

    def __init__(self) -> None:
        self.told = False
        self.opened = False
        """Whether what was told last was told before the answer was written."""
        self._beside = False
        self._units: int | None = None
        self._added: Usage | None = None
        self._running: Usage | None = None
        self._response: str | None = None

    def add(self, report: Report | int, known: bool = False) -> None:
        """Add what a result or an item told; nothing if that is known from elsewhere."""
        self.told = True
        self.opened = isinstance(report, Report) and report.opens
        self._beside |= self.opened
        if known:
            return
        if isinstance(report, int):
            self._units = report + (self._units or 0)
        elif report.adds:
            self._added = self._added + report.usage if self._added else report.usage
        elif self._running is None or (report.response and self._response and report.response != self._response):
            if self._running is not None:
                self._added = self._added + self._running if self._added else self._running
            self._running, self._response = report.usage, report.response
        else:
            self._running = _beside(self._running, report.usage) if self._beside else self._running | report.usage
            self._response = report.response or self._response

    @property
    def readings(self) -> list[Reading]:
        """What was reported: at most one usage, and one number of units."""
        usages = [usage for usage in (self._added, self._running) if usage is not None]
        readings: list[Reading] = [usages[0] + usages[1] if len(usages) == 2 else usages[0]] if usages else []
        return readings if self._units is None else [*readings, self._units]


def _beside(mine: Usage, its: Usage) -> Usage:
    """Running totals of one call, of which each may leave out the input, or what of it went through a cache."""
    both = mine | its
    rest = max(usage.input_tokens - usage.cache_read_tokens - usage.cache_write_tokens for usage in (mine, its))
    return replace(both, input_tokens=rest + both.cache_read_tokens + both.cache_write_tokens, total_tokens=0)
