"""The token bucket: bursts up to its size, refilled at an even rate."""

from __future__ import annotations

from quotalimit.algorithms.base import NEVER, Algorithm, Mark, State, dump_numbers, load_numbers
from quotalimit.errors import InvalidLimit
from quotalimit.rate import MAX_AMOUNT, Rate


class TokenBucket(Algorithm):
    """A bucket of `burst` units that refills evenly at the rate: `TokenBucket("20/minute", burst=5)`.

    In any T seconds at most burst + rate * T units are admitted. `burst` is a positive whole number, by default the
    amount of the rate.

    The state is (missing, time, shift): what the bucket lacked at a time, in units * period so that refilling
    `amount` of them each microsecond is exact, and by how much the clock has stepped back so far. A mark is the
    time of the charge plus that shift: time on a line that never runs back.
    """

    __slots__ = ("_amount", "_period", "burst")

    kind = "bucket"

    def __init__(self, rate: Rate | str, *, burst: int | None = None) -> None:
        super().__init__(rate)
        self._period = self._needs_fixed_period()
        self._amount = self.rate.amount
        if burst is not None and (type(burst) is not int or not 0 < burst <= MAX_AMOUNT):
            raise InvalidLimit(f"burst must be a whole number from 1 to {MAX_AMOUNT}, not {burst!r}")
        self.capacity = self.burst = self._amount if burst is None else burst

    @property
    def period(self) -> int:
        return self._period

    def fits(self, state: State, need: int, now: int) -> int:
        if need > self.burst:
            return NEVER
        over = self._missing(state, now) - (self.burst - need) * self._period
        return min(-(-over // self._amount), NEVER - 1) if over > 0 else 0

    def take(self, state: State, cost: int, now: int) -> tuple[State, Mark]:
        shift = state[2] if state else 0
        return (self._missing(state, now) + cost * self._period, now, shift), now + shift

    def adjust(self, state: State, mark: Mark, delta: int, now: int) -> State:
        shift = state[2] if state else 0
        change = delta * self._period
        if delta < 0:  # what has refilled since is there already, or overflowed: it is not given back twice
            refilled = self._amount * max(0, now + shift - mark)
            change = min(0, change + refilled)
        return max(0, self._missing(state, now) + change), now, shift

    def redate(self, state: State, now: int) -> State:
        if state is None or state[1] <= now:
            return state
        missing, time, shift = state
        return missing, now, shift + time - now

    def used(self, state: State, now: int) -> int:
        return -(-self._missing(state, now) // self._period)

    def whole_at(self, state: State, now: int) -> int:
        return now - (-self._missing(state, now) // self._amount)

    def matters(self, state: State, now: int) -> bool:
        missing, time, _ = state
        return bool(self._amount * (now - time) < missing)

    def dump(self, state: State) -> bytes:
        return dump_numbers(b"b1:", *state)

    def load(self, data: bytes) -> State:
        missing, time, shift = load_numbers(b"b1:", data, 3)
        if missing < 0:
            raise ValueError(f"not the state of a bucket: {data!r}")
        return missing, time, shift

    def _missing(self, state: State, now: int) -> int:
        """What the bucket lacks now, in units * period."""
        return max(0, state[0] - self._amount * (now - state[1])) if state else 0

    def _key(self) -> tuple[object, ...]:
        return (*super()._key(), self.burst)

    def __repr__(self) -> str:
        return f"TokenBucket({str(self.rate)!r}, burst={self.burst})"
