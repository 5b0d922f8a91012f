"""What a fork asks for in the child, where the other threads of the parent are no more."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def in_child(do: Callable[[], None]) -> None:
    """Do something in the child of each fork, before anything else runs there."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=do)


def let_go(lock: Any) -> None:
    """Free a lock that a thread of the parent may have held, and would never let go of."""
    lock._at_fork_reinit()
