"""How the caller gets what a function returned: settled, or on its way to be."""

from __future__ import annotations

from collections.abc import Coroutine, Generator
from functools import partial
from typing import Any, Final
from weakref import finalize

from quotalimit._bodies import drive_body, each_async
from quotalimit._calls import Call
from quotalimit._generators import later, run, run_async
from quotalimit._kinds import Delivery, class_seen, how_delivered, is_stream
from quotalimit._streams import watch

_STREAM_FIELDS: Final = ("stream", "completion", "responseStream", "body")


def deliver(call: Call, result: Any) -> Any:
    """What the caller gets of a call's result: the result itself, settled, or a stream of it that will be."""
    delivery = how_delivered(result)
    if delivery is None or delivery is Delivery.AS_IT_IS:
        call.finish(result)
    elif delivery is Delivery.DICT:
        _deliver_dict(call, result)
    elif delivery is Delivery.GENERATOR:
        return run(call, result)
    elif delivery is Delivery.ASYNC_GENERATOR:
        return run_async(call, result)
    elif delivery is Delivery.FUTURE:
        _deliver_future(call, result)
    elif delivery is Delivery.AWAITABLE:
        if issubclass(class_seen(result), Coroutine) or not watch(call, result):
            return later(call, result, deliver)
    elif delivery is Delivery.BODY:
        if not drive_body(call, result):
            call.finish(result)
    elif not watch(call, result):
        return _deliver_iterator(call, result)
    return result


def _deliver_iterator(call: Call, result: Any) -> Any:
    """A generator in place of an iterator whose class cannot be swapped, if it is nothing more: `map` and its like."""
    kind: Any = type(result)
    if call.records and not kind.__dictoffset__ and all(name.startswith("_") for name in dir(kind)):
        if hasattr(kind, "__anext__"):
            return run_async(call, each_async(result))
        if hasattr(kind, "__next__"):
            return run(call, _each(result))
    call.finish(result)
    return result


def _deliver_dict(call: Call, result: dict[str, Any]) -> None:
    """Settle a response off the wire, or watch the stream inside one of Bedrock's."""
    for name in _STREAM_FIELDS:
        stream = result.get(name)
        if stream is not None and is_stream(stream) and watch(call, stream):
            return
    call.finish(result)


def _deliver_future(call: Call, future: Any) -> None:
    try:
        future.add_done_callback(partial(_done, call))
    except Exception:  # a foreign future may refuse in its own way
        call.finish(future)
        return
    try:
        finalize(future, call.cut).atexit = False
    except TypeError:  # it knows no weak references
        pass


def _each(items: Any) -> Generator[Any]:
    yield from items


def _done(call: Call, future: Any) -> None:
    """Settle the call of a task or a future, which runs on though nobody awaits it."""
    try:
        result = future.result()
    except BaseException as error:
        call.fail(error)
    else:
        if not (is_stream(result) and watch(call, result)):  # it cannot be replaced: others hold the future
            call.finish(result)
