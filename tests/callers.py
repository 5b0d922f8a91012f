"""Calls that run in threads and in tasks, and wait no longer than a test lets them."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Semaphore, get_ident
from typing import Any
from unittest.mock import patch

from quotalimit import _waiting
from quotalimit._waiting import Lines, TaskBell, ThreadBell

HANGS = 20.0
"""Real seconds after which a call that neither waits nor ends is said to hang."""


class Caller(ABC):
    """A call that has begun. It runs until it waits or is over, and goes on when it is told to."""

    nap: float | None = None
    """The seconds for which it wants to sleep, while it does."""

    rang = False
    """Whether it was its bell that woke it last."""

    interrupted = False
    outcome: Any = None
    """What it returned or raised, once it is over."""

    @property
    def is_over(self) -> bool:
        return self.nap is None

    @property
    @abstractmethod
    def is_awake(self) -> bool:
        """Whether its bell has rung, or its nap is over."""

    @abstractmethod
    def go_on(self) -> None:
        """Let a call that is awake run until it waits again or is over."""

    @abstractmethod
    def interrupt(self) -> None:
        """Let a call that waits end with what ends it from outside: Ctrl-C in a thread, the cancellation of a task."""


class ThreadCaller(Caller):
    """A call in a thread."""

    def __init__(self, callers: Callers, call: Callable[[], Any]) -> None:
        self._callers = callers
        self._bell: ThreadBell | None = None
        self._wakes = 0
        self._pauses, self._goes_on = Semaphore(0), Semaphore(0)
        callers.threads.submit(self._run, call)
        self._pauses_soon()

    def _run(self, call: Callable[[], Any]) -> None:
        self._callers.of_thread[get_ident()] = self
        try:
            self.outcome = call()
        except BaseException as error:
            self.outcome = error
        finally:
            del self._callers.of_thread[get_ident()]
            self.nap = None
            self._pauses.release()

    def sleep(self, bell: ThreadBell, seconds: float) -> bool:
        self._bell, self.nap, self._wakes = bell, seconds, self._callers.now + round(seconds * 1e6)
        self._pauses.release()
        self._goes_on.acquire()
        if self.interrupted:
            raise KeyboardInterrupt
        return self.rang

    @property
    def is_awake(self) -> bool:
        assert self._bell is not None
        return self._callers.now >= self._wakes or not self._bell._silent.locked()

    def go_on(self) -> None:
        assert self._bell is not None
        self.rang = self._callers.really_wait(self._bell, 0)
        self._goes_on.release()
        self._pauses_soon()

    def interrupt(self) -> None:
        self.interrupted = True
        self.go_on()

    def _pauses_soon(self) -> None:
        assert self._pauses.acquire(timeout=HANGS), "it hangs"


class TaskCaller(Caller):
    """A call in a task, which sleeps as tasks do, on the event loop's time, and then waits to be told to go on."""

    is_running = True

    def __init__(self, callers: Callers, call: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        self._callers = callers
        self._turn: asyncio.Future[None] | None = None
        self._task = callers.loop.create_task(self._run(call))
        callers.of_task[self._task] = self
        callers.let_tasks_run()

    async def _run(self, call: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        try:
            self.outcome = await call()
        except (Exception, asyncio.CancelledError) as error:
            self.outcome = error
        finally:
            del self._callers.of_task[self._task]
            self.nap, self.is_running = None, False

    async def sleep(self, bell: TaskBell, seconds: float) -> bool:
        self.nap, self.is_running = seconds, False
        try:
            self.rang = await self._callers.really_wait_async(bell, seconds)
            self._turn = self._callers.loop.create_future()
            await self._turn
        finally:
            self._turn, self.is_running = None, True
        return self.rang

    @property
    def is_awake(self) -> bool:
        return self._turn is not None

    def go_on(self) -> None:
        assert self._turn is not None
        self._turn.set_result(None)
        self.is_running = True
        self._callers.let_tasks_run()

    def interrupt(self) -> None:
        self.interrupted = True
        self._task.cancel()
        self.is_running = True
        self._callers.let_tasks_run()


class Callers:
    """Threads and an event loop, for both of which time passes when it is moved, and only forward."""

    def __init__(self) -> None:
        self.now = 0
        self.threads = ThreadPoolExecutor(8)
        self.loop = asyncio.new_event_loop()
        self.loop.time = lambda: self.now / 1e6  # type: ignore[method-assign]
        self.of_thread: dict[int, ThreadCaller] = {}
        self.of_task: dict[asyncio.Task[Any] | None, TaskCaller] = {}
        self.really_wait = ThreadBell.wait
        self.really_wait_async = TaskBell.wait

    @contextmanager
    def waiting(self) -> Iterator[Callers]:
        """Have all waits pass as the callers do. What a store does in threads of its own waits as ever."""

        def wait(bell: ThreadBell, seconds: float) -> bool:
            caller = self.of_thread.get(get_ident())
            return self.really_wait(bell, seconds) if caller is None else caller.sleep(bell, seconds)

        async def wait_async(bell: TaskBell, seconds: float) -> bool:
            return await self.of_task[asyncio.current_task()].sleep(bell, seconds)

        with (
            patch.object(ThreadBell, "wait", wait),
            patch.object(TaskBell, "wait", wait_async),
            patch.object(Lines, "_can_start", lambda _lines, _waiter: True),  # the loop stands for one that runs,
            patch.object(_waiting, "_LOOK_AGAIN", _waiting.FOREVER),  # though it rests between the tasks' turns
        ):
            try:
                yield self
            finally:
                self._close()

    def call(
        self,
        function: Callable[..., Any],
        twin: Callable[..., Coroutine[Any, Any, Any]],
        in_a_task: bool,
        *args: Any,
        **kwargs: Any,
    ) -> Caller:
        """Begin a call of a function in a thread, or of its twin in a task."""
        if in_a_task:
            return TaskCaller(self, lambda: twin(*args, **kwargs))
        return ThreadCaller(self, lambda: function(*args, **kwargs))

    def let_tasks_run(self) -> None:
        """Let all tasks run until they sleep or are over."""
        if self.of_task:
            self.loop.run_until_complete(self._tasks_have_run())

    async def _tasks_have_run(self) -> None:
        """The loop is never idle meanwhile, so that it never waits for a time that does not come."""
        idle, hangs = 0, time.monotonic() + HANGS
        while idle < 5:  # turns, which is what it takes a bell to wake a task
            await asyncio.sleep(0)
            idle = 0 if any(caller.is_running for caller in self.of_task.values()) else idle + 1
            assert time.monotonic() < hangs, "it hangs"

    def _close(self) -> None:
        for task in list(self.of_task):
            assert task is not None
            task.cancel()
        for caller in list(self.of_thread.values()):
            caller.interrupt()
        self.threads.shutdown()
        self.let_tasks_run()
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
