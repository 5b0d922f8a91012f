"""Rules 15 and 16: what a decorated function still looks like, when it is checked, and how decorators stack."""

from __future__ import annotations

import abc
import asyncio
import copy
import dataclasses
import functools
import inspect
import pickle
import types
import typing
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime
from typing import Any, Protocol, runtime_checkable
from unittest import mock

import pytest
import time_machine
import wrapt

from quotalimit import (
    InvalidKey,
    InvalidLimit,
    LimitExceeded,
    MemoryStore,
    RateLimiter,
    RateLimitExceeded,
    SlidingWindow,
    TokenBucket,
    TokenBudget,
    TokenBudgetExceeded,
    everyone,
    limiters_of,
    rate_limited,
    token_budget,
)

from .helpers import shown

Decorator = Callable[[Any], Any]


@pytest.fixture(autouse=True)
def standing_clock() -> Iterator[None]:
    """The clock stands still, so that no window ends in the middle of a test."""
    with time_machine.travel(datetime(2026, 3, 4, 12, 0, tzinfo=UTC), tick=False):
        yield


def two_calls(key: Any = "user") -> Decorator:
    """A rate limit of two calls."""
    return rate_limited("2/day", key=key)


def two_tokens(key: Any = "user") -> Decorator:
    """A token budget of two calls: results that report no usage are charged their reserve."""
    return token_budget("2/day", key=key, reserve=1)


BOTH = pytest.mark.parametrize("limit", [two_calls, two_tokens])


def plainly(function: Any) -> Any:
    """The decorator that does nothing, for comparison."""
    return function


async def _drained(result: Any) -> Any:
    if inspect.isasyncgen(result):
        return [item async for item in result]
    if inspect.isawaitable(result):
        return await result
    return list(result) if inspect.isgenerator(result) else result


def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function of any kind and take all that it gives."""

    async def main() -> Any:
        return await _drained(function(*args, **kwargs))

    return asyncio.run(main())


def admitted(function: Callable[..., Any], *args: Any) -> int:
    """How many calls are admitted before the first refusal."""
    for calls in range(10):
        try:
            run(function, *args)
        except LimitExceeded:
            return calls
    raise AssertionError("never refused")


# The shapes that a call can have. Each is made with the decorator that it is given.


def a_function(decorate: Decorator) -> Any:
    @decorate
    def chat(user: str, prompt: str = "hello") -> str:
        """Answer a prompt."""
        return f"{user}: {prompt}"

    return chat


def a_coroutine_function(decorate: Decorator) -> Any:
    @decorate
    async def chat(user: str, prompt: str = "hello") -> str:
        """Answer a prompt."""
        await asyncio.sleep(0)
        return f"{user}: {prompt}"

    return chat


def a_generator(decorate: Decorator) -> Any:
    @decorate
    def chat(user: str, prompt: str = "hello") -> Iterator[str]:
        """Stream the answer to a prompt."""
        yield user
        yield prompt

    return chat


def an_async_generator(decorate: Decorator) -> Any:
    @decorate
    async def chat(user: str, prompt: str = "hello") -> AsyncIterator[str]:
        """Stream the answer to a prompt."""
        yield user
        await asyncio.sleep(0)
        yield prompt

    return chat


def a_lambda(decorate: Decorator) -> Any:
    return decorate(lambda user, prompt="hello": f"{user}: {prompt}")


def a_method(decorate: Decorator) -> Any:
    class Bot:
        @decorate
        def chat(self, user: str, prompt: str = "hello") -> str:
            """Answer a prompt."""
            return f"{type(self).__name__} {user}: {prompt}"

    return Bot().chat


def an_async_method(decorate: Decorator) -> Any:
    class Bot:
        @decorate
        async def chat(self, user: str, prompt: str = "hello") -> str:
            """Answer a prompt."""
            return f"{type(self).__name__} {user}: {prompt}"

    return Bot().chat


def a_method_of_the_class(decorate: Decorator) -> Any:
    class Bot:
        @decorate
        def chat(self, user: str, prompt: str = "hello") -> str:
            """Answer a prompt."""
            return f"{type(self).__name__} {user}: {prompt}"

    return functools.partial(Bot.chat, Bot())


def a_classmethod_decorated_above(decorate: Decorator) -> Any:
    class Bot:
        @decorate
        @classmethod
        def chat(cls, user: str, prompt: str = "hello") -> str:
            """Answer a prompt."""
            return f"{cls.__name__} {user}: {prompt}"

    return Bot.chat


def a_classmethod_decorated_below(decorate: Decorator) -> Any:
    class Bot:
        @classmethod
        @decorate
        def chat(cls, user: str, prompt: str = "hello") -> str:
            """Answer a prompt."""
            return f"{cls.__name__} {user}: {prompt}"

    return Bot().chat


def a_staticmethod_decorated_above(decorate: Decorator) -> Any:
    class Bot:
        @decorate
        @staticmethod
        def chat(user: str, prompt: str = "hello") -> str:
            """Answer a prompt."""
            return f"{user}: {prompt}"

    return Bot().chat


def a_staticmethod_decorated_below(decorate: Decorator) -> Any:
    class Bot:
        @staticmethod
        @decorate
        async def chat(user: str, prompt: str = "hello") -> str:
            """Answer a prompt."""
            return f"{user}: {prompt}"

    return Bot.chat


def a_callable_object(decorate: Decorator) -> Any:
    class Bot:
        """A bot."""

        def __call__(self, user: str, prompt: str = "hello") -> str:
            return f"{user}: {prompt}"

    return decorate(Bot())


def an_async_callable_object(decorate: Decorator) -> Any:
    class Bot:
        async def __call__(self, user: str, prompt: str = "hello") -> str:
            return f"{user}: {prompt}"

    return decorate(Bot())


def a_streaming_callable_object(decorate: Decorator) -> Any:
    class Bot:
        async def __call__(self, user: str, prompt: str = "hello") -> AsyncIterator[str]:
            yield user
            yield prompt

    return decorate(Bot())


def a_partial(decorate: Decorator) -> Any:
    return decorate(functools.partial(a_function(plainly), prompt="bye"))


def a_partial_of_a_coroutine_function(decorate: Decorator) -> Any:
    return decorate(functools.partial(a_coroutine_function(plainly), prompt="bye"))


def a_bound_method(decorate: Decorator) -> Any:
    return decorate(a_method(plainly))


def a_wrapt_function(decorate: Decorator) -> Any:
    return decorate(_loud(a_function(plainly)))


def a_wrapt_coroutine_function(decorate: Decorator) -> Any:
    return decorate(_whispered(a_coroutine_function(plainly)))


def a_wrapt_method(decorate: Decorator) -> Any:
    class Bot:
        @decorate
        @_loud
        def chat(self, user: str, prompt: str = "hello") -> str:
            """Answer a prompt."""
            return f"{type(self).__name__} {user}: {prompt}"

    return Bot().chat


def a_wrapt_async_method(decorate: Decorator) -> Any:
    class Bot:
        @decorate
        @_whispered
        async def chat(self, user: str, prompt: str = "hello") -> str:
            """Answer a prompt."""
            await asyncio.sleep(0)
            return f"{type(self).__name__} {user}: {prompt}"

    return Bot().chat


def a_wrapt_generator_method(decorate: Decorator) -> Any:
    class Bot:
        @decorate
        @_whispered
        def chat(self, user: str, prompt: str = "hello") -> Iterator[str]:
            """Stream the answer to a prompt."""
            yield user
            yield prompt

    return Bot().chat


def a_wrapt_classmethod(decorate: Decorator) -> Any:
    class Bot:
        @decorate
        @_loud
        @classmethod
        def chat(cls, user: str, prompt: str = "hello") -> str:
            """Answer a prompt."""
            return f"{cls.__name__} {user}: {prompt}"

    return Bot().chat


@wrapt.decorator
def _loud(wrapped: Any, _instance: Any, args: Any, kwargs: Any) -> Any:
    return wrapped(*args, **kwargs).upper()


@wrapt.decorator
def _whispered(wrapped: Any, _instance: Any, args: Any, kwargs: Any) -> Any:
    return wrapped(*args, **kwargs)


SHAPES = [
    a_function,
    a_coroutine_function,
    a_generator,
    an_async_generator,
    a_lambda,
    a_method,
    an_async_method,
    a_method_of_the_class,
    a_classmethod_decorated_above,
    a_classmethod_decorated_below,
    a_staticmethod_decorated_above,
    a_staticmethod_decorated_below,
    a_callable_object,
    an_async_callable_object,
    a_streaming_callable_object,
    a_partial,
    a_partial_of_a_coroutine_function,
    a_bound_method,
    a_wrapt_function,
    a_wrapt_coroutine_function,
    a_wrapt_method,
    a_wrapt_async_method,
    a_wrapt_generator_method,
    a_wrapt_classmethod,
]
KINDS: list[Callable[[Any], bool]] = [
    callable,
    inspect.isfunction,
    inspect.ismethod,
    inspect.isroutine,
    inspect.isbuiltin,
    inspect.iscoroutinefunction,
    inspect.isgeneratorfunction,
    inspect.isasyncgenfunction,
    lambda function: inspect.iscoroutinefunction(function.__call__),  # how Starlette sees callable objects
    lambda function: inspect.isasyncgenfunction(function.__call__),
]
RESULT_KINDS: list[Callable[[Any], bool]] = [inspect.isgenerator, inspect.isasyncgen, inspect.iscoroutine]


@BOTH
@pytest.mark.parametrize("shape", SHAPES)
class TestEveryShape:
    """Rule 15: each kind of callable is limited and stays what it was."""

    def test_it_is_limited_for_each_user_and_answers_as_before(self, shape: Any, limit: Any) -> None:
        plain, decorated = shape(plainly), shape(limit())
        assert run(decorated, "alice") == run(plain, "alice")
        assert run(decorated, "alice", prompt="bye" if "partial" in shape.__name__ else "again")
        with pytest.raises(LimitExceeded) as caught:
            run(decorated, "alice")
        assert caught.value.key == "alice"
        assert run(decorated, user="bob") == run(plain, user="bob")

    def test_it_looks_the_same(self, shape: Any, limit: Any) -> None:
        plain, decorated = shape(plainly), shape(limit())
        for attribute in ("__name__", "__qualname__", "__module__", "__doc__", "__annotations__", "__defaults__"):
            assert getattr(decorated, attribute, None) == getattr(plain, attribute, None)
        assert decorated.__class__.__qualname__ == plain.__class__.__qualname__
        assert inspect.signature(decorated) == inspect.signature(plain)
        assert [kind(decorated) for kind in KINDS] == [kind(plain) for kind in KINDS]

    def test_its_result_is_of_the_same_kind(self, shape: Any, limit: Any) -> None:
        async def kinds(function: Any) -> list[bool]:
            result = function("alice")
            seen = [kind(result) for kind in RESULT_KINDS]
            await _drained(result)
            return seen

        assert asyncio.run(kinds(shape(limit()))) == asyncio.run(kinds(shape(plainly)))

    def test_its_limiter_can_be_found(self, shape: Any, limit: Any) -> None:
        decorated = shape(limit())
        (limiter,) = limiters_of(decorated)
        run(decorated, "alice")
        assert limiter.peek("alice").remaining == 1


@BOTH
def test_rule_15_a_builtin_is_limited(limit: Any) -> None:
    measure = limit(key=lambda obj: obj)(len)
    assert measure("alice") == 5
    assert inspect.isbuiltin(measure)
    assert measure.__name__ == "len"
    assert admitted(measure, "alice") == 1
    assert admitted(measure, "bob") == 2


@BOTH
def test_rule_15_a_builtin_without_a_signature_is_limited(limit: Any) -> None:
    with pytest.raises(ValueError, match="signature"):
        inspect.signature(max)
    assert admitted(limit(key=everyone)(max), "alice", "bob") == 2


@BOTH
def test_rule_15_a_method_descriptor_is_bound_like_itself(limit: Any) -> None:
    class Name(str):
        shout = limit(key=lambda self: str(self))(str.upper)

    assert Name("alice").shout() == "ALICE"
    assert Name.shout(Name("alice")) == "ALICE"
    with pytest.raises(LimitExceeded):
        Name("alice").shout()
    assert Name("bob").shout() == "BOB"


class ForeignMethod:
    """A method of another library: callable, and bound in a way of its own."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self.function, instance)


@BOTH
def test_rule_15_a_foreign_descriptor_is_limited(limit: Any) -> None:
    class Bot:
        @limit()
        @ForeignMethod
        def chat(self, user: str) -> str:
            return f"{type(self).__name__} {user}"

    assert Bot().chat("alice") == "Bot alice"
    assert Bot.chat(Bot(), "alice") == "Bot alice"
    with pytest.raises(LimitExceeded):
        Bot().chat("alice")
    assert isinstance(vars(Bot)["chat"], ForeignMethod)


def test_rule_15_classmethods_and_staticmethods_stay_such_in_their_class() -> None:
    class Bot:
        @two_calls("cls_name")
        @classmethod
        def create(cls, cls_name: str) -> str:
            return cls_name

        @two_calls("name")
        @staticmethod
        def check(name: str) -> str:
            return name

    assert type(vars(Bot)["create"]) is classmethod
    assert type(vars(Bot)["check"]) is staticmethod
    assert Bot.create.__self__ is Bot


def test_rule_15_type_hints_can_be_read() -> None:
    decorated = a_function(two_calls())
    assert typing.get_type_hints(decorated) == {"user": str, "prompt": str, "return": str}
    assert inspect.getsource(decorated) == inspect.getsource(inspect.unwrap(decorated))


# Pickle and copy


@rate_limited("2/day", key="user")
@token_budget("100/day", key="user", reserve=1)
def answer(user: str) -> str:
    """Answer by a function that pickle can find."""
    return f"answer to {user}"


class Assistant:
    """An assistant that pickle can find."""

    def __init__(self, model: str) -> None:
        self.model = model

    @rate_limited("2/day", key=lambda self, user: (self.model, user))
    def chat(self, user: str) -> str:
        return f"{self.model}: {user}"

    @rate_limited("2/day", key="user")
    @classmethod
    def ask(cls, user: str) -> str:
        return f"{cls.__name__}: {user}"

    @staticmethod
    @rate_limited("2/day", key="user")
    def greet(user: str) -> str:
        return f"hello {user}"

    @rate_limited("2/day", key="user")
    @_loud
    def shout(self, user: str) -> str:
        return f"{self.model}: {user}"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "name", ["answer", "Assistant.chat", "Assistant.ask", "Assistant.greet"], ids=lambda name: str(name)
)
def test_rule_15_functions_pickle_as_themselves(name: str, protocol: int) -> None:
    function: Any = functools.reduce(getattr, name.split("."), __import__(__name__, fromlist=["answer"]))
    assert pickle.loads(pickle.dumps(function, protocol)) == function


@pytest.mark.parametrize("name", ["chat", "shout"])
def test_rule_15_bound_methods_pickle_with_their_instance(name: str) -> None:
    method = pickle.loads(pickle.dumps(getattr(Assistant("large"), name)))
    assert method("alice").lower() == "large: alice"
    assert admitted(method, "alice") == 1


def test_rule_15_a_pickled_function_keeps_its_counts() -> None:
    assert answer("alice") == "answer to alice"
    assert admitted(pickle.loads(pickle.dumps(answer)), "alice") == 1


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("shape", [a_function, an_async_generator, a_partial, a_callable_object])
def test_rule_15_copies_share_their_counts(copier: Any, shape: Any) -> None:
    decorated = shape(two_calls())
    run(decorated, "alice")
    assert admitted(copier([decorated])[0], "alice") == 1


# What other libraries do with functions


def test_rule_15_mock_patch_replaces_and_restores() -> None:
    original = answer
    with mock.patch(f"{__name__}.answer", return_value="mocked") as mocked:
        assert answer("alice") == "mocked"
        mocked.assert_called_once_with("alice")
    assert answer is original


def test_rule_15_mock_autospec_keeps_the_signature() -> None:
    with mock.patch(f"{__name__}.answer", autospec=True) as mocked:
        answer("alice")
        mocked.assert_called_once_with("alice")
        with pytest.raises(TypeError):
            answer()  # type: ignore[call-arg]
    with mock.patch.object(Assistant, "chat", autospec=True, return_value="mocked"):
        assert Assistant("large").chat("alice") == "mocked"
        with pytest.raises(TypeError):
            Assistant("large").chat()  # type: ignore[call-arg]
    spec = mock.create_autospec(a_coroutine_function(two_calls()), return_value="mocked")
    assert asyncio.run(spec("alice")) == "mocked"


def test_a_decorator_inside_that_adds_an_argument_is_refused_before_anything_is_charged() -> None:
    """By the function's signature the call is wrong; to guess would be to count for the wrong person."""

    @two_calls()
    @mock.patch(f"{__name__}.plainly")
    def chat(user: str, mocked: Any) -> bool:
        return plainly is mocked

    with pytest.raises(TypeError, match="mocked"):
        chat("alice")
    assert limiters_of(chat)[0].peek("alice").used == 0


def test_rule_15_lru_cache_above_asks_only_for_what_is_not_cached() -> None:
    class Bot:
        @functools.lru_cache  # noqa: B019 - the cache dies with the test
        @two_calls()
        def chat(self, user: str) -> str:
            return user

    cached = functools.lru_cache(a_function(two_calls()))
    for call in (cached, Bot().chat):
        assert [call("alice") for _ in range(10)] == [call("alice")] * 10
        assert limiters_of(call)[0].peek("alice").remaining == 1


def test_rule_15_abstract_methods_stay_abstract() -> None:
    class Base(abc.ABC):
        @two_calls()
        @abc.abstractmethod
        def above(self, user: str) -> str: ...

        @abc.abstractmethod
        @two_calls()
        def below(self, user: str) -> str: ...

        @two_calls()
        @classmethod
        @abc.abstractmethod
        def both(cls, user: str) -> str: ...

    assert Base.__abstractmethods__ == {"above", "below", "both"}
    assert inspect.isabstract(Base)
    with pytest.raises(TypeError, match="abstract"):
        Base()  # type: ignore[abstract]

    class Bot(Base):
        @two_calls()
        def above(self, user: str) -> str:
            return f"above {user}"

        def below(self, user: str) -> str:
            return f"below {user}"

        @classmethod
        def both(cls, user: str) -> str:
            return f"both {user}"

    assert Bot().above("alice") == "above alice"


@runtime_checkable
class Chats(Protocol):
    """Whatever chats."""

    def chat(self, user: str) -> str: ...


def test_rule_15_protocols_and_dataclasses_see_methods() -> None:
    @dataclasses.dataclass
    class Bot:
        model: str
        calls: int = 0

        @two_calls(lambda self, user: (self.model, user))
        def chat(self, user: str) -> str:
            self.calls += 1
            return f"{self.model}: {user}"

    bot = Bot("large")
    assert isinstance(bot, Chats)
    assert [field.name for field in dataclasses.fields(bot)] == ["model", "calls"]
    assert admitted(bot.chat, "alice") == 2
    assert bot == Bot("large", calls=2)


def test_rule_15_an_override_and_super_are_charged_each_on_its_own() -> None:
    class Bot:
        @two_calls()
        def chat(self, user: str) -> str:
            return f"bot: {user}"

    class Polite(Bot):
        @rate_limited("5/day", key="user")
        def chat(self, user: str) -> str:
            return f"please, {super().chat(user)}"

    assert Polite().chat("alice") == "please, bot: alice"
    assert limiters_of(Polite.chat)[0].peek("alice").remaining == 4
    assert limiters_of(Bot.chat)[0].peek("alice").remaining == 1
    assert Bot().chat("alice") == "bot: alice"
    with pytest.raises(RateLimitExceeded):
        Polite().chat("alice")


def test_rule_15_all_instances_share_a_method_and_self_may_tell_them_apart() -> None:
    class Bot:
        def __init__(self, name: str) -> None:
            self.name = name

        @two_calls()
        def together(self, user: str) -> None: ...

        @two_calls(lambda self: self.name)
        def apart(self, user: str) -> None: ...

    one, other = Bot("one"), Bot("other")
    one.together("alice")
    assert admitted(other.together, "alice") == 1
    assert admitted(one.apart, "alice") == 2
    assert admitted(other.apart, "alice") == 2


def test_rule_15_fastapi_reads_the_signature_and_can_answer_429() -> None:
    import fastapi
    from fastapi import testclient

    app = fastapi.FastAPI()

    @app.exception_handler(LimitExceeded)
    async def refuse(_request: object, error: LimitExceeded) -> Any:
        return fastapi.responses.JSONResponse({"retry_after": error.retry_after}, 429)

    @app.get("/sync")
    @two_calls()
    @two_tokens()
    def sync_endpoint(user: str, times: int = 1) -> str:
        return user * times

    @app.get("/async")
    @two_calls()
    async def async_endpoint(user: str, times: int = 1) -> str:
        return user * times

    app.get("/object")(an_async_callable_object(two_calls()))
    stream = a_generator(two_calls())

    @app.get("/stream")
    def stream_endpoint(user: str, times: int = 1) -> Any:
        return fastapi.responses.StreamingResponse(stream(user, user * (times - 1)))

    with testclient.TestClient(app) as client:
        for path in ("/sync", "/async", "/stream"):
            answers = [client.get(path, params={"user": "ann", "times": 3}) for _ in range(3)]
            assert [answer.status_code for answer in answers] == [200, 200, 429]
            assert "annannann" in answers[0].text
            assert answers[2].json() == {"retry_after": 86_400 if path != "/sync" else mock.ANY}
            assert client.get(path, params={"times": 3}).status_code == 422
        assert client.get("/object", params={"user": "ann"}).json() == "ann: hello"


# When a call is checked


@BOTH
def test_rule_16_functions_generators_and_async_generators_are_checked_when_called(limit: Any) -> None:
    for shape in (a_function, a_generator, an_async_generator):
        chat = shape(limit())
        opened = [chat("alice"), chat("alice")]
        with pytest.raises(LimitExceeded):
            chat("alice")
        for stream in opened:
            asyncio.run(_drained(stream))


@BOTH
def test_rule_16_a_coroutine_function_is_checked_when_awaited(limit: Any) -> None:
    chat = a_coroutine_function(limit())
    (limiter,) = limiters_of(chat)
    late = [chat("alice") for _ in range(3)]
    assert limiter.peek("alice").used == 0
    assert asyncio.run(late[0]) == "alice: hello"
    assert limiter.peek("alice").used == 1
    asyncio.run(late[1])
    with pytest.raises(LimitExceeded):
        asyncio.run(late[2])


@BOTH
def test_rule_16_a_coroutine_that_is_never_awaited_holds_nothing(limit: Any) -> None:
    chat = a_coroutine_function(limit())
    chat("alice").close()
    assert admitted(chat, "alice") == 2


def test_rule_16_a_function_that_returns_a_coroutine_is_checked_when_called() -> None:
    @two_calls()
    def chat(user: str) -> Awaitable[str]:
        return a_coroutine_function(plainly)(user)

    coroutines = [chat("alice"), chat("alice")]
    with pytest.raises(RateLimitExceeded):
        chat("alice")
    assert [asyncio.run(one) for one in coroutines] == ["alice: hello"] * 2


@BOTH
def test_rule_16_a_decorated_generator_is_a_real_one(limit: Any) -> None:
    @limit()
    def talk(user: str) -> Iterator[Any]:
        try:
            heard = yield "first"
            try:
                yield heard
            except KeyError as error:
                yield error
            return "done"
        finally:
            ended.append(user)

    ended: list[str] = []
    stream = talk("alice")
    assert isinstance(stream, types.GeneratorType)
    assert next(stream) == "first"
    assert stream.send("heard") == "heard"
    error = KeyError()
    assert stream.throw(error) is error
    with pytest.raises(StopIteration) as stop:
        next(stream)
    assert stop.value.value == "done"
    closed = talk("alice")
    next(closed)
    closed.close()
    assert ended == ["alice", "alice"]


def test_rule_8_a_generator_whose_body_never_ran_gives_its_hold_back() -> None:
    for shape in (a_generator, an_async_generator):
        chat = shape(two_tokens())
        chat("alice")
        assert admitted(chat, "alice") == 2


# One guard for all layers


def _foreign(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("amounts", [(1, 5, 5), (5, 1, 5), (5, 5, 1)])
@pytest.mark.parametrize("shape", [a_function, a_coroutine_function, a_generator, an_async_generator, a_method])
def test_rule_2_a_refused_call_charges_no_layer_whichever_refuses(shape: Any, amounts: tuple[int, int, int]) -> None:
    outer, middle, inner = amounts

    def stack(function: Any) -> Any:
        function = rate_limited(f"{inner}/hour", key="user")(function)
        function = token_budget(f"{middle}/day", key="user", reserve=1)(function)
        return rate_limited(f"{outer}/day", key="user")(function)

    chat = shape(stack)
    assert admitted(chat, "alice") == 1
    assert [limiter.peek("alice").used for limiter in limiters_of(chat)] == [1, 1, 1]


def test_rule_2_the_outer_layer_is_charged_if_a_foreign_decorator_keeps_them_apart() -> None:
    chat = rate_limited("5/day", key="user")(_foreign(rate_limited("1/day", key="user")(a_function(plainly))))
    chat("alice")
    with pytest.raises(RateLimitExceeded):
        chat("alice")
    assert [limiter.peek("alice").used for limiter in limiters_of(chat)] == [2, 1]


def test_rule_2_layers_fold_through_classmethod_and_staticmethod() -> None:
    class Bot:
        @rate_limited("5/day", key="user")
        @classmethod
        @rate_limited("1/day", key="user")
        def ask(cls, user: str) -> None: ...

    assert admitted(Bot.ask, "alice") == 1
    assert [limiter.peek("alice").used for limiter in limiters_of(Bot.ask)] == [1, 1]


def test_rule_2_layers_on_different_stores_give_back_what_was_taken() -> None:
    inner = rate_limited("1/day", key="user", store=MemoryStore())(a_function(plainly))
    chat = rate_limited("5/day", key="user", store=MemoryStore())(inner)
    assert admitted(chat, "alice") == 1
    assert [limiter.peek("alice").used for limiter in limiters_of(chat)] == [1, 1]


def test_rule_2_all_keys_and_costs_are_computed_before_any_store_is_asked() -> None:
    def fails(user: str) -> int:
        raise LookupError(user)

    inner = rate_limited("5/day", key="user", cost=fails)(a_function(plainly))
    chat = rate_limited("5/day", key="user", store=MemoryStore())(inner)
    with pytest.raises(LookupError):
        chat("alice")
    assert [limiter.peek("alice").used for limiter in limiters_of(chat)] == [0, 0]


def test_one_limiter_on_two_layers_is_charged_twice() -> None:
    shared = RateLimiter("4/day")
    chat = rate_limited(shared, key="user")(rate_limited(shared, key="user")(a_function(plainly)))
    assert admitted(chat, "alice") == 2
    assert shared.peek("alice").used == 4


def test_decorating_again_leaves_the_first_as_it_was() -> None:
    once = rate_limited("3/day", key="user")(a_function(plainly))
    twice = rate_limited("1/day", key="user")(once)
    assert [len(limiters_of(function)) for function in (once, twice)] == [1, 2]
    assert admitted(twice, "alice") == 1
    assert admitted(once, "alice") == 2


# limiters_of


def test_limiters_of_finds_the_outermost_first_through_other_decorators() -> None:
    chat = rate_limited("1/day", key="user", name="inner")(a_function(plainly))
    chat = _foreign(token_budget("2/day", key="user", name="middle")(chat))
    chat = functools.lru_cache(_loud(rate_limited("3/day", key="user", name="outer")(chat)))
    for found in (chat, functools.partial(chat, "alice"), staticmethod(chat)):
        assert [limiter.name for limiter in limiters_of(found)] == ["outer", "middle", "inner"]
    assert [type(limiter) for limiter in limiters_of(chat)] == [RateLimiter, TokenBudget, RateLimiter]


def test_limiters_of_finds_those_of_methods() -> None:
    (limiter,) = limiters_of(Assistant.chat)
    assert limiters_of(Assistant("large").chat) == (limiter,)
    for method in (Assistant.ask, Assistant("large").ask, vars(Assistant)["ask"]):
        assert limiters_of(method) == limiters_of(Assistant.ask) != ()
    assert limiters_of(Assistant("large").shout) == limiters_of(Assistant.shout) != ()


def test_limiters_of_what_is_not_decorated_is_empty() -> None:
    for function in (len, plainly, functools.partial(plainly), Assistant("large").__init__, lambda: 1):
        assert limiters_of(function) == ()


# What is refused at decoration


async def _async_key(user: str) -> str:
    return user


class _AsyncKey:
    async def __call__(self, user: str) -> str:
        return user


MISTAKES: list[tuple[Callable[[], Any], type[Exception]]] = [
    (lambda: rate_limited(key="user"), InvalidLimit),
    (lambda: token_budget(key="user"), InvalidLimit),
    (lambda: rate_limited(SlidingWindow, key="user"), InvalidLimit),  # type: ignore[arg-type]
    (lambda: rate_limited("2/day", TokenBucket, key="user"), InvalidLimit),  # type: ignore[arg-type]
    (lambda: token_budget(TokenBudget, key="user"), InvalidLimit),  # type: ignore[arg-type]
    (lambda: rate_limited("0/minute", key="user"), InvalidLimit),
    (lambda: rate_limited("2/day", None, key="user"), InvalidLimit),  # type: ignore[arg-type]
    (lambda: rate_limited(20, key="user"), InvalidLimit),  # type: ignore[arg-type]
    (lambda: rate_limited("2/day", lambda user: "2/day", key="user"), InvalidLimit),
    (lambda: rate_limited(lambda user: "2/day", "2/day", key="user"), InvalidLimit),
    (lambda: rate_limited("2/day", RateLimiter("2/day"), key="user"), InvalidLimit),
    (lambda: rate_limited(RateLimiter("2/day"), "2/day", key="user"), TypeError),
    (lambda: rate_limited(RateLimiter("2/day"), key="user", name="name"), TypeError),
    (lambda: rate_limited(RateLimiter("2/day"), key="user", store=MemoryStore()), TypeError),
    (lambda: rate_limited(TokenBudget("2/day"), key="user"), TypeError),  # type: ignore[arg-type]
    (lambda: token_budget(RateLimiter("2/day"), key="user"), TypeError),  # type: ignore[arg-type]
    (lambda: rate_limited("2/day", key=None), InvalidKey),  # type: ignore[arg-type]
    (lambda: rate_limited("2/day", key=7), InvalidKey),  # type: ignore[arg-type]
    (lambda: rate_limited("2/day", key=_async_key), InvalidKey),  # type: ignore[arg-type]
    (lambda: rate_limited("2/day", key=_AsyncKey()), InvalidKey),  # type: ignore[arg-type]
    (lambda: rate_limited("2/day", key=functools.partial(_async_key)), InvalidKey),  # type: ignore[arg-type]
    (lambda: rate_limited(_async_key, key="user"), InvalidLimit),  # type: ignore[arg-type]
    (lambda: rate_limited("2/day", key="user", cost=_async_key), TypeError),  # type: ignore[arg-type]
    (lambda: token_budget("2/day", key="user", reserve=_async_key), TypeError),  # type: ignore[arg-type]
    (lambda: token_budget("2/day", key="user", reserve=_AsyncKey()), TypeError),  # type: ignore[arg-type]
    (lambda: rate_limited("2/day", key="user", cost=-1), ValueError),
    (lambda: rate_limited("2/day", key="user", cost=True), ValueError),
    (lambda: rate_limited("2/day", key="user", cost=float("nan")), ValueError),
    (lambda: token_budget("2/day", key="user", reserve=-1), ValueError),
    (lambda: rate_limited("2/day", key="user", wait=-1), ValueError),
    (lambda: rate_limited("2/day", key="user", wait=float("nan")), ValueError),
    (lambda: rate_limited("2/day", key="user", wait=True), ValueError),
    (lambda: token_budget("2/day", key="user", wait="1"), ValueError),  # type: ignore[arg-type]
    (lambda: rate_limited("2/day", key="user", refund_on=KeyError()), TypeError),  # type: ignore[arg-type]
    (lambda: rate_limited("2/day", key="user", refund_on=[KeyError]), TypeError),  # type: ignore[arg-type]
    (lambda: rate_limited("2/day", key="user", refund_on=(KeyError, str)), TypeError),  # type: ignore[arg-type]
    (lambda: rate_limited("2/day", key="user", name=""), ValueError),
    (lambda: rate_limited("2/day", key="user", name=7), ValueError),  # type: ignore[arg-type]
    (lambda: rate_limited("2/day", key="user", store="memory://"), TypeError),  # type: ignore[arg-type]
    (lambda: token_budget("2/day", key="user", usage=7), TypeError),  # type: ignore[arg-type]
    (lambda: token_budget("2/day", key="user", weigh=7), TypeError),  # type: ignore[arg-type]
    (lambda: token_budget("2/day", key="user", on_error=None), TypeError),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("mistake", "error"), MISTAKES)
def test_a_mistake_is_refused_at_decoration(mistake: Callable[[], Decorator], error: type[Exception]) -> None:
    with pytest.raises(error):
        mistake()(a_function(plainly))


def test_a_class_given_as_a_limit_is_named() -> None:
    with pytest.raises(InvalidLimit, match="TokenBucket"):
        rate_limited("2/day", TokenBucket, key="user")  # type: ignore[arg-type]


@pytest.mark.parametrize("decorator", [rate_limited, token_budget])
def test_missing_parentheses_are_refused(decorator: Any) -> None:
    with pytest.raises(TypeError):
        decorator(a_function(plainly))


@BOTH
@pytest.mark.parametrize("target", [Assistant, property(len), "chat", None, 7], ids=shown)
def test_what_is_no_function_cannot_be_decorated(limit: Any, target: Any) -> None:
    with pytest.raises(TypeError, match="decorate a function"):
        limit()(target)


# Wrong calls and refunds


@BOTH
@pytest.mark.parametrize("key", ["user", everyone, lambda: "all", lambda *_args, **_kwargs: "all"])
@pytest.mark.parametrize("shape", [a_function, a_coroutine_function, a_generator, an_async_generator, a_method])
def test_a_wrong_call_is_refused_before_anything_is_charged(limit: Any, key: Any, shape: Any) -> None:
    chat = shape(limit(key))
    for args, kwargs in ((("alice", "hello", "more"), {}), (("alice",), {"nonsense": 1})):
        with pytest.raises(TypeError):
            run(chat, *args, **kwargs)
    with pytest.raises(TypeError):
        run(chat)
    assert admitted(chat, "alice") == 2


@pytest.mark.parametrize("shape", ["function", "coroutine", "generator", "async generator"])
def test_refund_on_gives_the_slot_back_for_these_exceptions_alone(shape: str) -> None:
    decorate = rate_limited("2/day", key="user", cost=2, refund_on=(LookupError, ConnectionError))

    def function(user: str, error: Exception) -> None:
        raise error

    async def coroutine(user: str, error: Exception) -> None:
        raise error

    def generator(user: str, error: Exception) -> Iterator[str]:
        yield user
        raise error

    async def async_generator(user: str, error: Exception) -> AsyncIterator[str]:
        yield user
        raise error

    kinds: dict[str, Any] = {
        "function": function,
        "coroutine": coroutine,
        "generator": generator,
        "async generator": async_generator,
    }
    chat = decorate(kinds[shape])
    for error in (KeyError(), ConnectionResetError(), LookupError()):
        with pytest.raises(type(error)):
            run(chat, "alice", error)
        assert limiters_of(chat)[0].peek("alice").used == 0
    with pytest.raises(ZeroDivisionError):
        run(chat, "alice", ZeroDivisionError())
    assert limiters_of(chat)[0].peek("alice").used == 2
    with pytest.raises(RateLimitExceeded):
        run(chat, "alice", KeyError())


def test_a_call_that_started_counts_by_default() -> None:
    @rate_limited("2/day", key="user")
    def chat(user: str) -> None:
        raise ConnectionError

    for _ in range(2):
        with pytest.raises(ConnectionError):
            chat("alice")
    with pytest.raises(RateLimitExceeded):
        chat("alice")


def test_refund_on_gives_back_on_its_own_layer_alone() -> None:
    @rate_limited("5/day", key="user", refund_on=KeyError)
    @rate_limited("5/day", key="user")
    def chat(user: str) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        chat("alice")
    assert [limiter.peek("alice").used for limiter in limiters_of(chat)] == [0, 1]


def _answer(_bot: object, user: str) -> str:
    return user


def _stream(_bot: object, user: str) -> Iterator[str]:
    yield user


class TwoFunctions:
    """A descriptor that is one function for the class and another, of another kind, for its instances."""

    __signature__ = inspect.signature(_answer)

    def __call__(self, _bot: object, user: str) -> str:
        raise AssertionError(user)

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return types.MethodType(_stream if instance is not None else _answer, instance or owner)


@pytest.mark.parametrize("of_class_first", [True, False])
@BOTH
def test_rule_15_a_descriptor_may_bind_functions_of_two_kinds(limit: Callable[[], Any], of_class_first: bool) -> None:
    class Bot:
        chat = limit()(TwoFunctions())

    asked = [lambda: Bot.chat("alice") == "alice", lambda: list(Bot().chat("bob")) == ["bob"]]
    assert all(ask() for ask in (asked if of_class_first else reversed(asked)))


def test_a_parameter_may_be_called_as_what_the_wrapper_uses() -> None:
    @token_budget("100/day", key="user")
    def chat(user: str, BaseException: int = 3, call: int = 4, result: int = 5) -> None:  # noqa: A002, N803
        raise KeyError(BaseException + call + result)

    with pytest.raises(KeyError, match="12"):
        chat("alice")
    assert limiters_of(chat)[0].peek("alice").used == 0


def test_each_decorator_raises_its_own_exception() -> None:
    for limit, error in ((two_calls, RateLimitExceeded), (two_tokens, TokenBudgetExceeded)):
        chat = a_function(limit())
        chat("alice")
        chat("alice")
        with pytest.raises(error) as caught:
            chat("alice")
        assert type(caught.value) is error
