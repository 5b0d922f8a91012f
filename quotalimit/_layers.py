"""A layer: one limiter on one function, with its key and its cost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Final

from quotalimit._arguments import Question
from quotalimit.amounts import units_or_none, whole
from quotalimit.errors import InvalidKey
from quotalimit.failures import KEEP, Failure, Verdict, read_error
from quotalimit.keys import Identity, identify
from quotalimit.limiters import Binding, Limiter, Places
from quotalimit.providers import read_report, read_usage, responses_in, sources_of
from quotalimit.usage import Reading, Report, Usage

log: Final = logging.getLogger("quotalimit")


class Layer:
    """One limiter on one function: whose call it is, what it costs, how long it may wait."""

    amount_is: ClassVar[str]
    """What the units of a call are called where they are given."""

    holds: bool
    """Whether a charge of this layer may be adjusted when the call ends."""

    enforced = True
    """Whether a call is refused for this layer, or it is only told that it would have been."""

    borrows: bool
    """Whether a nested call draws on the charges of those that it runs in."""

    def __init__(
        self, limiter: Limiter, key: Question, patience: int, amount: float | Callable[..., float] | None
    ) -> None:
        self.limiter = limiter
        self.key = key
        self.patience = patience
        self.amount = amount
        self.asks = callable(amount) or limiter.tiers is not None
        """Whether more is asked about a call than its key."""
        self.amounts = (0, 0) if callable(amount) else self._amounts(amount)
        """The units that a call needs and takes, where they are not asked for."""

    @property
    def questions(self) -> dict[str, Question]:
        """What the layer wants to know about a call, by what it is for."""
        asked: dict[str, Question] = {"key": self.key}
        if self.limiter.tiers is not None:
            asked["limit"] = self.limiter.tiers
        if callable(self.amount):
            asked[self.amount_is] = self.amount
        return asked

    def stop_enforcing(self) -> None:
        """From now on, refuse and delay nobody."""
        self.enforced = False
        self.patience = 0

    def identify(self, key: object) -> Identity:
        """The identity of a key. Raises `InvalidKey` that names the limiter."""
        try:
            return identify(key)
        except InvalidKey as error:
            raise InvalidKey(f"{self.limiter.name}: {error}") from None

    def hear(self, binding: Binding, answers: Iterator[Any]) -> tuple[Places, tuple[int, int]]:
        """The answers to the layer's questions but for the key: its limits, and the units needed and taken."""
        places = binding.places if self.limiter.tiers is None else binding.places_for(next(answers))
        if not callable(self.amount):
            return places, self.amounts
        try:
            return places, self._amounts(next(answers))
        except ValueError as error:
            raise ValueError(f"{self.limiter.name}: {error}") from None

    def _amounts(self, amount: object) -> tuple[int, int]:
        """The units that a call needs and takes. Without an amount, it is admitted while anything is left."""
        if amount is None and self.amount is None:
            return 1, 0
        units = whole(amount, self.amount_is)
        return units, units


class RateLayer(Layer):
    """A rate limiter on a function."""

    amount_is = "cost"
    borrows = False

    def __init__(
        self,
        limiter: Limiter,
        key: Question,
        patience: int,
        cost: float | Callable[..., float],
        refund_on: tuple[type[BaseException], ...],
    ) -> None:
        super().__init__(limiter, key, patience, cost)
        self.refund_on = refund_on
        self.holds = bool(refund_on)


class TokenLayer(Layer):
    """A token budget on a function."""

    amount_is = "reserve"
    holds = True
    borrows = True

    def __init__(
        self,
        limiter: Limiter,
        key: Question,
        patience: int,
        reserve: float | Callable[..., float] | None,
        usage: Callable[[Any], Usage | float | None],
        weigh: Callable[[Usage], float] | None,
        on_error: Callable[[BaseException], Failure],
    ) -> None:
        super().__init__(limiter, key, patience, reserve)
        self._has_warned = False
        self._usage = usage
        self._weigh = weigh
        self._on_error = on_error

    @property
    def reserves(self) -> bool:
        """Whether the layer holds what a call is expected to use."""
        return self.amount is not None

    def read(self, result: object) -> Reading | None:
        """The usage that a result reports to the caller's own reader, or to ours; None if it is unknown."""
        return read_usage(result) if self._usage is read_usage else self._read_own(result)

    def read_each(
        self, answer: object, *, whole: bool, streaming: bool
    ) -> Iterator[tuple[Report | Reading, tuple[object, ...]]]:
        """The same of each response in a result or an item of a stream, and the objects that it is recognised by.

        Of what is not the whole result it says how it goes with the others.
        """
        if self._usage is read_usage:
            responses = responses_in(answer)
            if whole and len(responses) > 1 and read_usage(answer) is None:  # together more than can be counted
                return
            for response, sources in responses:
                report = read_usage(response) if whole else read_report(response, streaming=streaming)
                if report is not None:
                    yield report, sources
        else:
            reading = self._read_own(answer)
            if reading is not None:
                yield reading, sources_of(answer)

    def _read_own(self, result: object) -> Reading | None:
        try:
            return _known(self._usage(result))
        except Exception:  # the call has been paid for: its result is not lost because it cannot be read
            log.exception("%s: %r raised; the usage is unknown", self.limiter.name, self._usage)
            return None

    def read_failure(self, error: BaseException, *, begun: bool) -> Reading | Verdict:
        """What an exception of the call says of its usage, or what becomes of the hold.

        By our own reader, a stream that has begun to answer keeps its hold: the provider bills what it wrote.
        """
        try:
            outcome = None if self._on_error is read_error else self._on_error(error)
            is_ours = outcome is None
            if outcome is None:
                outcome = read_error(error)
        except Exception:
            log.exception("%s: on_error raised; the hold is kept", self.limiter.name)
            return KEEP
        if isinstance(outcome, Verdict):
            return KEEP if begun and is_ours else outcome
        reading = _known(outcome)
        return KEEP if reading is None else reading

    def weigh(self, reading: Reading) -> int | None:
        """What a reading is charged; None if the caller's own weights make no sense of it."""
        if isinstance(reading, int):
            return reading
        if self._weigh is None:
            return reading.total_tokens
        try:
            return units_or_none(self._weigh(reading))
        except Exception:
            log.exception("%s: %r raised; the usage is unknown", self.limiter.name, self._weigh)
            return None

    def warn_of_estimate(self, estimate: int) -> None:
        """Log, once for each function, that usage had to be estimated."""
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "%s: a call reported no usage and had no reserve, so %d tokens were estimated from its text; "
                "give token_budget a usage= or a reserve=, or call record_usage (said once for each function)",
                self.limiter.name,
                estimate,
            )


def _known(outcome: object) -> Reading | None:
    """A reading that makes sense: negative, boolean or infinite ones do not."""
    if isinstance(outcome, Usage):
        return outcome if outcome.is_known else None
    return units_or_none(outcome)
