"""Which of a call's arguments a key, a cost, a reserve or a callable limit gets, and what can never be called."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quotalimit import InvalidKey, InvalidLimit, RateLimitExceeded, everyone, limiters_of, rate_limited, token_budget
from quotalimit._arguments import compile_call


def chat(user: str, prompt: str = "hello", *, model: str = "small") -> str:
    """A function with parameters of most kinds."""
    return user + prompt + model


def used_by(function: Callable[..., Any], key: Any) -> int:
    """Units in use on a decorated function's limit."""
    return limiters_of(function)[0].peek(key).used


CALLS: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = [
    # key, the call's arguments, the identity that is counted
    ("user", ("alice",), {}, "alice"),
    ("user", (), {"user": "alice"}, "alice"),
    ("prompt", ("alice",), {}, "hello"),
    ("model", ("alice",), {"model": "large"}, "large"),
    (lambda user: user, ("alice", "hi"), {}, "alice"),
    (lambda model, user: (model, user), ("alice",), {}, ("small", "alice")),
    (lambda *, prompt: prompt, ("alice",), {}, "hello"),
    (lambda prompt, /: prompt, ("alice",), {}, "hello"),
    (lambda user, tenant="none": (user, tenant), ("alice",), {}, ("alice", "none")),
    (lambda tenant="none", user="nobody": (tenant, user), ("alice",), {}, ("none", "alice")),
    (lambda prompt="other": prompt, ("alice",), {}, "hello"),
    (lambda: "all", ("alice",), {}, "all"),
    (everyone, ("alice",), {}, "everyone"),
    (lambda *args, **kwargs: (len(args), *kwargs), ("alice",), {"model": "large"}, (1, "model")),
    (lambda *args: (len(args), *args), ("alice", "hi"), {}, (2, "alice", "hi")),
    (lambda user, **rest: (user, *rest), (), {"user": "alice", "model": "large"}, ("alice", "model")),
    (lambda who, *rest: (who, *rest), ("alice", "hi"), {}, ("alice", "hi")),
    (lambda who: who, ("alice",), {}, "alice"),
    (lambda who, what: (who, what), ("alice", "hi"), {}, ("alice", "hi")),
    (functools.partial(lambda plan, user: (plan, user), "free"), ("alice",), {}, ("free", "alice")),
    (functools.partial(lambda user, plan: (plan, user), plan="free"), ("alice",), {}, ("free", "alice")),
    (str, ("alice",), {}, "alice"),
    ("{} {}".format, ("alice", "hi"), {}, "alice hi"),
    (operator.itemgetter(0), ("alice",), {}, "a"),
]


@pytest.mark.parametrize(("key", "args", "kwargs", "identity"), CALLS)
def test_a_key_gets_by_name_what_it_declares_or_else_the_exact_call(
    key: Any, args: tuple[Any, ...], kwargs: dict[str, Any], identity: Any
) -> None:
    decorated = rate_limited("5/day", key=key)(chat)
    decorated(*args, **kwargs)
    assert used_by(decorated, identity) == 1


def test_a_callable_object_and_a_bound_method_may_be_keys() -> None:
    class Tenant:
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, user: str) -> tuple[str, str]:
            return self.name, user

        def of(self, user: str) -> tuple[str, str]:
            return self.name, user

    for key in (Tenant("acme"), Tenant("acme").of):
        decorated = rate_limited("5/day", key=key)(chat)
        decorated("alice")
        assert used_by(decorated, ("acme", "alice")) == 1


def test_self_and_cls_are_among_the_parameters_whichever_decorator_is_on_top() -> None:
    class Bot:
        name = "bot"

        @rate_limited("5/day", key=lambda self: self.name)
        def chat(self, user: str) -> None: ...

        @rate_limited("5/day", key=lambda cls, user: (cls.name, user))
        @classmethod
        def above(cls, user: str) -> None: ...

        @classmethod
        @rate_limited("5/day", key=lambda cls, user: (cls.name, user))
        def below(cls, user: str) -> None: ...

        @rate_limited("5/day", key=lambda *args: (args[0].name, *args[1:]))
        def exact(self, user: str) -> None: ...

    bot = Bot()
    for method in (bot.chat, Bot.above, bot.below, bot.exact):
        method("alice")
    assert used_by(bot.chat, "bot") == 1
    assert [used_by(method, ("bot", "alice")) for method in (Bot.above, bot.below, bot.exact)] == [1, 1, 1]


def test_self_is_no_parameter_of_a_bound_method() -> None:
    class Bot:
        def chat(self, user: str) -> None: ...

    with pytest.raises(InvalidKey, match="self"):
        rate_limited("5/day", key="self")(Bot().chat)
    decorated = rate_limited("5/day", key=lambda *args: args)(Bot().chat)
    decorated("alice")
    assert used_by(decorated, ("alice",)) == 1


def test_a_partial_has_the_parameters_that_are_left_and_new_defaults() -> None:
    decorated = rate_limited("5/day", key=lambda user, model: (user, model))(functools.partial(chat, model="large"))
    decorated("alice")
    assert used_by(decorated, ("alice", "large")) == 1
    with pytest.raises(InvalidKey, match="user"):
        rate_limited("5/day", key="user")(functools.partial(chat, "alice"))


def test_cost_reserve_and_limit_get_arguments_as_a_key_does() -> None:
    @rate_limited(lambda model: "50/day" if model == "small" else "5/day", key="user", cost=lambda prompt: len(prompt))
    @token_budget("100/day", key="user", reserve=lambda *args, **kwargs: 10 * len(args) + len(kwargs))
    def ask(user: str, prompt: str = "hello", *, model: str = "small") -> None: ...

    ask("alice")
    ask("alice", prompt="hi")
    rate, budget = limiters_of(ask)
    assert budget.peek("alice").used == 10 + 11
    with pytest.raises(RateLimitExceeded) as caught:
        ask("bob", "too long", model="large")
    assert (caught.value.requested, caught.value.limit.amount) == (8, 5)
    with pytest.raises(RateLimitExceeded) as caught:
        ask("alice", "x" * 44)
    assert (caught.value.used, caught.value.remaining) == (7, 43)
    assert rate.tiers is not None


def test_variadic_parameters_can_be_asked_for_by_name() -> None:
    @rate_limited("5/day", key=lambda users: users, cost=lambda options: len(options))
    def ask(*users: str, **options: str) -> None: ...

    ask("alice", "bob", model="large", stop="now")
    assert used_by(ask, ("alice", "bob")) == 2


def test_a_positional_only_parameter_may_share_its_name_with_a_keyword() -> None:
    @rate_limited("5/day", key="user", cost=lambda options: len(options))
    def ask(user: str, /, **options: str) -> None: ...

    ask("alice", user="mallory", model="large")
    assert used_by(ask, "alice") == 2


def test_the_very_default_of_the_function_is_given() -> None:
    shared: list[str] = []
    seen: list[object] = []

    @rate_limited("5/day", key=lambda history: str(len(seen.append(history) or seen)))  # type: ignore[func-returns-value]
    def ask(user: str, history: list[str] = shared) -> None:
        history.append(user)

    ask("alice")
    ask("bob")
    assert seen[0] is shared
    assert seen[1] is shared
    assert shared == ["alice", "bob"]


@pytest.mark.parametrize(
    "name",
    [
        *("self", "cls", "args", "kwargs", "function", "guard", "key", "cost", "call", "_args", "entered", "instance"),
        *("_question_0_", "_question_1_", "_default_0_", "_default_1_", "ask", "print", "_", "__x", "É"),
    ],
)
def test_no_name_of_a_parameter_collides_with_anything(name: str) -> None:
    for source in (f"lambda {name}='bob', rest=1: {name}", f"lambda rest=1, *, {name}='bob': {name}"):
        ask = eval(source)
        decorated = rate_limited("5/day", key=lambda rest: str(rest), cost=lambda rest: rest)(ask)
        assert decorated(**{name: "alice"}) == "alice"
        assert used_by(decorated, "1") == 1
        by_name = rate_limited("5/day", key=name, cost=lambda rest: rest)(ask)
        assert by_name() == "bob"
        assert used_by(by_name, "bob") == 1


@pytest.mark.parametrize("name", ["_question_0_", "_default_0_", "None", "<lambda>", "a b", "def", "tuple", "é"])
def test_no_name_of_a_function_collides_with_anything(name: str) -> None:
    def ask(user: str = "alice") -> None: ...

    ask.__name__ = name
    decorated = rate_limited("5/day", key=lambda user: user, cost=lambda user: 2)(ask)
    decorated()
    assert used_by(decorated, "alice") == 2


@pytest.mark.parametrize("key", ["usr", "", "user ", "user, prompt"])
def test_a_parameter_that_does_not_exist_is_refused_at_decoration(key: str) -> None:
    with pytest.raises(InvalidKey, match="user, prompt, model"):
        rate_limited("5/day", key=key)(chat)


def single(*, user: str) -> str:
    """A function that can be called in one way alone."""
    return user


@pytest.mark.parametrize(
    "question",
    [
        lambda request: request,
        lambda user, request: (user, request),
        lambda one, two: one,
        lambda *, request: request,
        lambda request, /: request,
        lambda request, **_: request,
        lambda *_: "all",
        functools.partial(lambda plan, request: plan, "free"),
    ],
)
def test_what_can_never_be_called_is_refused_at_decoration(question: Any) -> None:
    with pytest.raises(InvalidKey):
        rate_limited("5/day", key=question)(single)
    with pytest.raises(InvalidLimit):
        rate_limited(question, key="user")(single)
    with pytest.raises(TypeError):
        rate_limited("5/day", key="user", cost=question)(single)
    with pytest.raises(TypeError):
        token_budget("5/day", key="user", reserve=question)(single)


def test_what_some_call_can_satisfy_is_accepted() -> None:
    for question in (lambda who: who, lambda who, what: who, lambda user, /, *rest: user, lambda **call: call["user"]):
        rate_limited("5/day", key=question)(chat)


def test_the_error_of_a_wrong_call_is_that_of_the_function() -> None:
    decorated: Any = rate_limited("5/day", key="user")(chat)
    for args, kwargs in (((), {}), (("alice",), {"nonsense": 1}), (("alice", "hi", "more"), {})):
        with pytest.raises(TypeError) as expected:
            chat(*args, **kwargs)
        with pytest.raises(TypeError) as caught:
            decorated(*args, **kwargs)
        assert str(caught.value) == str(expected.value)


# The compiled binder against Python itself

NAMES = ("a", "b", "c", "d")


@st.composite
def headers(draw: st.DrawFn) -> tuple[str, list[str]]:
    """The parameters of a random function, as source, and their names."""
    kinds = sorted(draw(st.lists(st.sampled_from("pmk"), max_size=len(NAMES))), key="pmk".index)
    optional_from = draw(st.integers(0, len(kinds)))
    star = draw(st.booleans())
    source: list[str] = []
    for index, (name, kind) in enumerate(zip(NAMES, kinds, strict=False)):
        if kind == "k" and not star and "*" not in source:
            source.append("*")
        if kind == "k" and star and "*args" not in source:
            source.append("*args")
        optional = draw(st.booleans()) if kind == "k" else index >= optional_from
        source.append(f"{name}='default {name}'" if optional else name)
        if kind == "p" and kinds[index + 1 : index + 2] != ["p"]:
            source.append("/")
    if star and "*args" not in source:
        source.append("*args")
    names = [*NAMES[: len(kinds)], *(["args"] if star else [])]
    if draw(st.booleans()):
        source.append("**kwargs")
        names.append("kwargs")
    return ", ".join(source), names


CALL_ARGUMENTS = st.tuples(
    st.lists(st.integers(), max_size=6), st.dictionaries(st.sampled_from([*NAMES, "args", "z"]), st.integers())
)


@settings(deadline=None, max_examples=250)
@given(headers(), st.lists(CALL_ARGUMENTS, min_size=1, max_size=6), st.data())
def test_the_compiled_binder_agrees_with_python(
    header: tuple[str, list[str]], calls: list[tuple[list[int], dict[str, int]]], data: st.DataObject
) -> None:
    """By name, by exact call and both together, also in what raises `TypeError`."""
    source, names = header
    function = eval(f"lambda {source}: locals()")
    signature = inspect.signature(function)
    asked = data.draw(st.lists(st.sampled_from(names), unique=True)) if names else []
    keys = [eval(f"lambda {name}: {name}") for name in asked]
    exact = [lambda *args, **kwargs: (args, kwargs)] if data.draw(st.booleans()) else []
    questions: Any = [("key", question) for question in (*asked, *exact, *keys)]
    answers = compile_call(function, questions, "def {title}({parameters}):\n    return ({answers})\n", {})
    positional_only = {p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.POSITIONAL_ONLY}
    for args, kwargs in calls:
        inspect_is_right = positional_only.isdisjoint(kwargs)  # with **kwargs it has had bugs here, up to Python 3.13
        try:
            expected = function(*args, **kwargs)
        except TypeError:
            with pytest.raises(TypeError):
                answers(*args, **kwargs)
            if inspect_is_right:
                with pytest.raises(TypeError):
                    signature.bind(*args, **kwargs)
            continue
        values = [expected[name] for name in asked]
        assert answers(*args, **kwargs) == (*values, *[(tuple(args), kwargs)] * len(exact), *values)
        if inspect_is_right:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            assert dict(bound.arguments) == expected
