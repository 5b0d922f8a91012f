"""What an algorithm is: one pure question about a state, and three changes of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Any, ClassVar, Final, TypeAlias

from quotalimit.errors import InvalidLimit
from quotalimit.rate import Rate

NEVER: Final = 1 << 62
"""The wait, in microseconds, of what is too large ever to fit."""

State: TypeAlias = Any
"""What an algorithm keeps for one identity; None before its first call. Only the algorithm looks inside."""

Mark: TypeAlias = int
"""Names the moment at which a charge was taken, for a later `adjust`. It survives re-dating."""


class Algorithm(ABC):
    """What a rate means over time. An algorithm holding its rate is a limit.

    An algorithm knows no clock and no store: `now` is an argument, in microseconds, and never older than the state
    it comes with (`redate` sees to that). Units are whole numbers. A method that returns a state may change the one
    that it was given: keep what it returns, and pass a copy (`copy.copy`) to try something out.
    """

    __slots__ = ("capacity", "rate")

    kind: ClassVar[str]
    """The algorithm's name in the identity of a count."""

    def __init__(self, rate: Rate | str) -> None:
        self.rate: Rate = rate if isinstance(rate, Rate) else Rate.parse(rate)
        self.capacity: int = self.rate.amount
        """The most units that can be in use at once."""

    @property
    @abstractmethod
    def period(self) -> int:
        """How long a charge can matter, in microseconds; for calendar windows, at most."""

    @property
    def count_id(self) -> Hashable:
        """What of this limit a count belongs to: amounts may change and keep it."""
        return (self.kind, self.period)

    @abstractmethod
    def fits(self, state: State, need: int, now: int) -> int:
        """Microseconds to wait until `need` more units fit: 0 is now, `NEVER` is too large. Changes nothing."""

    @abstractmethod
    def take(self, state: State, cost: int, now: int) -> tuple[State, Mark]:
        """Charge `cost` units now, whether they fit or not."""

    def admit(self, state: State, now: int) -> State | None:
        """Charge one unit if it fits, else return None and change nothing: `fits` and `take` in one step.

        An algorithm may do that faster than the two.
        """
        return None if self.fits(state, 1, now) else self.take(state, 1, now)[0]

    @abstractmethod
    def adjust(self, state: State, mark: Mark, delta: int, now: int) -> State:
        """Add `delta` units to the charge taken at `mark`, or give some back; nothing once its window is gone."""

    @abstractmethod
    def redate(self, state: State, now: int) -> State:
        """The state itself, unless it is newer than now: then as if its newest charge were of now.

        Charges keep their distances, so that after a step back of the clock nobody is refused for longer than one
        period and nobody gains one.
        """

    @abstractmethod
    def used(self, state: State, now: int) -> int:
        """Units in use; more than the capacity where calls used more than they held."""

    @abstractmethod
    def whole_at(self, state: State, now: int) -> int:
        """When nothing will be in use if nobody calls, in microseconds; now if nothing is."""

    @abstractmethod
    def matters(self, state: State, now: int) -> bool:
        """Whether the state says any more than None does, but for the marks of charges that are still open."""

    @abstractmethod
    def dump(self, state: State) -> bytes:
        """A state, not None, as bytes for a store outside of this process."""

    @abstractmethod
    def load(self, data: bytes) -> State:
        """The state that `dump` wrote. Raises `ValueError` for anything else."""

    def _needs_fixed_period(self) -> int:
        """The rate's period; refuses months and years."""
        period = self.rate.period
        if period is None:
            calendar = f"{self.rate.amount}/{self.rate.unit}"
            raise InvalidLimit(
                f"a {self.rate.unit} has no fixed length, so {type(self).__name__} cannot count {str(self.rate)!r}: "
                f"use CalendarWindow({calendar!r}), or days"
            )
        return period

    def _key(self) -> tuple[Hashable, ...]:
        return (type(self), self.rate)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Algorithm) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.rate)!r})"


def dump_numbers(version: bytes, *numbers: int) -> bytes:
    """A few whole numbers of any size as bytes, behind what says how they are meant."""
    return version + b",".join(b"%d" % number for number in numbers)


def load_numbers(version: bytes, data: bytes, count: int) -> list[int]:
    """The numbers that `dump_numbers` wrote. Raises `ValueError` for anything else."""
    numbers = data[len(version) :].split(b",")
    if not data.startswith(version) or len(numbers) != count:
        raise ValueError(f"not a state: {data[:40]!r}")
    return [int(number) for number in numbers]
