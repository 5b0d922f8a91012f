"""The one place where quotalimit reads the time."""

import time


def now() -> int:
    """The present, in whole microseconds since the Unix epoch.

    `time.time` is looked up at each call, so that freezegun and time-machine work as they are.
    """
    return (time.time() * 1e6).__round__()  # what `round` calls, in half the time


def monotonic() -> float:
    """Seconds on a clock that is never set: for time-outs, which no limit depends on."""
    return time.monotonic()
