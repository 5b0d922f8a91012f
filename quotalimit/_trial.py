"""Layers with `enforce=False`: asked as all others are, but what they refuse is only told.

They are asked together, once those that are enforced have admitted the call. If they refuse, the call goes on and is
charged on none of them, as if it had not been made: so, by themselves, they refuse what they would if enforced.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Final

from quotalimit._arguments import compile_questions
from quotalimit._calls import Call
from quotalimit._guard import Asked, Entry, Guard, admit, admit_async
from quotalimit._layers import Layer
from quotalimit.errors import LimitExceeded, StoreError

log: Final = logging.getLogger("quotalimit")


def guard_of(function: Callable[..., Any], layers: Sequence[Layer]) -> Guard:
    """The guard for the layers of a function."""
    return Guard(function, layers) if all(layer.enforced for layer in layers) else TrialGuard(function, layers)


class Trial(Asked):
    """What the layers that are not enforced ask about one call. Only listeners hear of the answer."""

    __slots__ = ()

    enforced: ClassVar[bool] = False


class TrialGuard(Guard):
    """The layers of one function of which some are not enforced. It has no fast path."""

    def __init__(self, function: Callable[..., Any], layers: Sequence[Layer]) -> None:
        super().__init__(function, layers)
        self.common = None
        self._enforced = Guard(function, [layer for layer in layers if layer.enforced])
        self._tried = [layer for layer in layers if not layer.enforced]
        questions = [question for layer in self._tried for question in layer.questions.items()]
        self._answer_tried = compile_questions(function, questions)
        self._has_failed = False

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Admit a call, or raise `LimitExceeded` for a layer that is enforced."""
        trial = self._trial(args, kwargs)
        call = self._enforced.enter(args, kwargs)
        try:
            return _joined(call, admit(trial))
        except BaseException as error:
            return self._go_on(call, trial, error)

    async def enter_async(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """The twin of `enter`."""
        trial = self._trial(args, kwargs)
        call = await self._enforced.enter_async(args, kwargs)
        try:
            return _joined(call, await admit_async(trial))
        except BaseException as error:
            return self._go_on(call, trial, error)

    def enter_now_or_later(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entry:
        """Admit a call now, or know how to admit it later: also if only a layer that is not enforced waits for I/O."""
        trial = self._trial(args, kwargs)
        if trial.store is not None and trial.store.blocking:
            return None, partial(self.enter_async, args, kwargs)
        call, enter_later = self._enforced.enter_now_or_later(args, kwargs)
        if enter_later is not None:
            return None, partial(self.enter_async, args, kwargs)
        try:
            return _joined(call, admit(trial)), None
        except BaseException as error:
            return self._go_on(call, trial, error), None

    def _trial(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trial:
        return Trial(self._tried, self._answer_tried(*args, **kwargs), (*args, *kwargs.values()))

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
