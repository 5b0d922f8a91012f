"""Layers with `enforce=False`: asked as all others are, but what they refuse is only told.

They are asked together, once those that are enforced have admitted the call. If they refuse, the call goes on and is
charged on none of them, as if it had not been made: so, by themselves, they refuse what they would if enforced.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Final

from quotalimit._calls import Call
from quotalimit._fast_path import never
from quotalimit._guard import Asked, Entry, Guard, admit, admit_async
from quotalimit._layers import Layer
from quotalimit.errors import LimitExceeded, StoreError

log: Final = logging.getLogger("quotalimit")


def guard_of(layers: Sequence[Layer]) -> Guard:
    """The guard for the layers of a function."""
    return Guard(layers) if all(layer.enforced for layer in layers) else TrialGuard(layers)


class Trial(Asked):
    """What the layers that are not enforced ask about one call. Only listeners hear of the answer."""

    __slots__ = ()

    enforced: ClassVar[bool] = False


class TrialGuard(Guard):
    """The layers of one function of which some are not enforced. It has no fast path."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__(layers)
        self.gated = None
        self.admit_at_once = never
        self._tried = [layer for layer in layers if not layer.enforced]
        tried, self._enforced = Guard(self._tried), Guard([layer for layer in layers if layer.enforced])
        self.questions = [*tried.questions, *self._enforced.questions]
        self._rest = len(tried.questions)
        """Where the answers for the layers that are enforced begin."""
        self._has_failed = False

    def enter(self, answers: Sequence[Any], arguments: Sequence[object]) -> Call | None:
        """Admit a call, or raise `LimitExceeded` for a layer that is enforced."""
        trial = Trial(self._tried, answers, arguments)
        call = self._enforced.enter(answers[self._rest :], arguments)
        try:
            return _joined(call, admit(trial))
        except BaseException as error:
            return self._go_on(call, trial, error)

    async def enter_async(self, answers: Sequence[Any], arguments: Sequence[object]) -> Call | None:
        """The twin of `enter`."""
        trial = Trial(self._tried, answers, arguments)
        call = await self._enforced.enter_async(answers[self._rest :], arguments)
        try:
            return _joined(call, await admit_async(trial))
        except BaseException as error:
            return self._go_on(call, trial, error)

    def enter_now_or_later(self, answers: Sequence[Any], arguments: Sequence[object]) -> Entry:
        """Admit a call now, or know how to admit it later: also if only a layer that is not enforced waits for I/O."""
        trial = Trial(self._tried, answers, arguments)
        if trial.store is not None and trial.store.blocking:
            return None, partial(self.enter_async, answers, arguments)
        call, enter_later = self._enforced.enter_now_or_later(answers[self._rest :], arguments)
        if enter_later is not None:
            return None, partial(self.enter_async, answers, arguments)
        try:
            return _joined(call, admit(trial)), None
        except BaseException as error:
            return self._go_on(call, trial, error), None

    def _go_on(self, call: Call | None, trial: Trial, error: BaseException) -> Call | None:
        """Let a call go on that only a trial stands in the way of. Raises what comes from elsewhere."""
        if isinstance(error, StoreError) and not self._has_failed:
            self._has_failed = True
            log.warning("a limit that is not enforced could not be checked (said once for each function): %s", error)
        if not isinstance(error, (LimitExceeded, StoreError)):
            trial.give_back()
            if call is not None:
                call.release()
            raise error
        return call


def _joined(call: Call | None, tried: Call | None) -> Call | None:
    """What the layers that are enforced hold, and the others, as one call."""
    if call is None or tried is None:
        return call or tried
    call.join(tried)
    return call
