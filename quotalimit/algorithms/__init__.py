"""The algorithms: what a rate means over time. Each has a file of its own."""

from quotalimit.algorithms.base import NEVER, Algorithm, Mark, State
from quotalimit.algorithms.calendar_window import CalendarWindow
from quotalimit.algorithms.sliding_window import SlidingWindow
from quotalimit.algorithms.token_bucket import TokenBucket

__all__ = ["NEVER", "Algorithm", "CalendarWindow", "Mark", "SlidingWindow", "State", "TokenBucket"]
