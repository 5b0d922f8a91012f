"""What a call was charged in the end, and how that is known."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

Source: TypeAlias = Literal["reported", "recorded", "reserved", "estimated", "released"]
"""How the usage of a call is known.

`"reported"`: its result or exception said so. `"recorded"`: `record_usage` or a nested call did. `"reserved"`: nothing
did, and its `reserve` was charged. `"estimated"`: from its text. `"released"`: it failed, and nothing was charged.
"""


class Settlement(NamedTuple):
    """What one call was charged on one token budget, in units.

    `used` is what the call used, `charged` what of that was charged here and not already inside, by nested calls on
    the same budget and key; `held` is what was taken when it began.
    """

    name: str
    used: int
    charged: int
    held: int
    source: Source

    @property
    def overrun(self) -> int:
        """Units by which the call passed its hold; 0 if it kept within it."""
        return max(0, self.charged - self.held)
