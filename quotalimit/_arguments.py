"""Which of a call's arguments a key, a cost, a reserve or a callable limit gets.

All questions of a function are compiled into one with the function's own signature, so that Python itself binds the
arguments, applies the defaults, and refuses a call that the function would refuse, before anything is charged.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from inspect import Parameter, Signature
from keyword import iskeyword
from types import FunctionType
from typing import Any, Final, NamedTuple, TypeAlias

from quotalimit.errors import InvalidKey, InvalidLimit

Question: TypeAlias = str | Callable[..., Any]
"""The name of a parameter, or a callable of some of the call's arguments."""

Answers: TypeAlias = Callable[..., tuple[Any, ...]]

_ANYTHING: Final = Signature([Parameter("args", Parameter.VAR_POSITIONAL), Parameter("kwargs", Parameter.VAR_KEYWORD)])
_VARIADIC: Final = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
_POSITIONAL: Final = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_STARS: Final[dict[Any, str]] = {Parameter.VAR_POSITIONAL: "*", Parameter.VAR_KEYWORD: "**"}
_VALUES: Final[dict[Any, str]] = {Parameter.VAR_POSITIONAL: "*{}, ", Parameter.VAR_KEYWORD: "*{}.values(), "}
_MOST_POSITIONAL: Final = 64
_RECEIVERS: Final = ("self", "cls")
"""What the first parameter of a method is called: whose method it is, and nothing that a model is told."""


_ANSWERS: Final = "def {title}({parameters}):\n    return ({answers})\n"
_ARGUMENTS: Final = "def {title}({parameters}):\n    return ({values})\n"

_ERRORS: Final[dict[str, type[Exception]]] = {"key": InvalidKey, "limit": InvalidLimit}
"""What is raised for a question that can never be asked, by what it is for; a TypeError for any other."""


def compile_call(
    function: Callable[..., Any],
    questions: Sequence[tuple[str, Question]],
    template: str,
    names: dict[str, Any],
    *,
    bound: bool = False,
) -> Callable[..., Any]:
    """A function around another, written by a template, that asks all questions about a call.

    A callable gets, by name, the parameters that it declares; one that takes `*args` or `**kwargs`, or requires
    what is not a parameter of the function, gets the exact call; one marked `wants_every_argument` gets all arguments
    by name. Each question comes with what it is for: `InvalidKey`, `InvalidLimit` or `TypeError`, by that, is raised
    for what can never be called.

    In the template `{parameters}` and `{arguments}` are what it takes and passes on, `{values}` all arguments but
    `self` or `cls`, defaults applied, `{answers}` the answers to all questions and `{answer}` that to the first; `{_}`
    begins the names that the template brings, its own and `names`. The parameters are those of a plain function, so
    that nothing is packed and unpacked, and the exact call of any other. If `bound`, what is to be called, which knows
    the first argument already, comes before all arguments and is called `{_}function`.
    """
    written = _Written(function, questions)
    is_plain = type(function) is FunctionType and not any(hasattr(function, name) for name in _LOOKS_OTHERWISE)
    if is_plain and not written.exact and not bound:
        return written.compile(template, names, written.named())
    names = names | {"answer": written.answers(), "value": written.compile(_ARGUMENTS, {}, written.named())}
    return written.compile(template, names, written.exactly(bound))


_LOOKS_OTHERWISE: Final = ("__wrapped__", "__signature__")
"""What a function has that says of itself that it takes other arguments than it does."""


class _Form(NamedTuple):
    """How a function that is written takes a call, passes it on, and asks the questions."""

    parameters: str
    arguments: str
    values: str
    answers: str
    answer: str


class _Written:
    """All questions of a function, written as source code that asks them."""

    def __init__(self, function: Callable[..., Any], questions: Sequence[tuple[str, Question]]) -> None:
        self.signature = signature = signature_of(function)
        title = getattr(function, "__name__", "call")
        self.title = title if title.isidentifier() and not iskeyword(title) else "call"
        self.prefix = _unused_prefix((self.title, *signature.parameters))
        self.names: dict[str, Any] = {}
        self.sources: list[str] = []
        self.exact: list[str] = []
        for number, (purpose, question) in enumerate(questions):
            self._write(f"{self.prefix}question_{number}", purpose, question)

    def _write(self, variable: str, purpose: str, question: Question) -> None:
        signature = self.signature
        if isinstance(question, str):
            if question not in signature.parameters:
                raise _ERRORS.get(purpose, TypeError)(
                    f"{purpose}={question!r} names no parameter of {self.title}, which has {_listed(signature)}"
                )
            self.sources.append(question)
            return
        self.names[variable] = question
        if getattr(question, "wants_every_argument", False):
            self.sources.append(f"{variable}({', '.join(_every(signature))})")
            return
        wanted = _parameters_by_name(question, signature)
        if wanted is not None:
            self.sources.append(f"{variable}({', '.join(wanted)})")
            return
        if not _a_call_suits_both(signature, signature_of(question)):
            raise _ERRORS.get(purpose, TypeError)(
                f"the {purpose} function {_title(question)} takes {_listed(signature_of(question))}: neither "
                f"parameters of {self.title}, which has {_listed(signature)}, nor what a call of it could match"
            )
        self.exact.append(variable)
        self.sources.append("")

    def named(self) -> _Form:
        """The form with the function's own parameters. Questions that get the exact call are answered by None."""
        answers = [source or "None" for source in self.sources]
        in_order = "".join(f"{answer}, " for answer in answers)
        return _Form(
            parameters=self._parameters(),
            arguments=self._arguments(),
            values=self._values(),
            answers=in_order,
            answer=answers[0] if answers else "None",
        )

    def exactly(self, bound: bool) -> _Form:
        """The form that takes any call, and passes it on as it is."""
        before = f"{self.prefix}function, /, " if bound else ""
        arguments = "*args[1:], **kwargs" if bound else "*args, **kwargs"
        answer, value = (f"{self.prefix}{name}(*args, **kwargs)" for name in ("answer", "value"))
        return _Form(
            parameters=f"{before}*args, **kwargs",
            arguments=arguments,
            values=f"*{value}, ",
            answers=f"*{answer}, ",
            answer=f"{answer}[0]",
        )

    def compile(self, template: str, names: dict[str, Any], form: _Form) -> Callable[..., Any]:
        """The function that a template makes of the questions."""
        namespace = self.names | {f"{self.prefix}{name}": value for name, value in names.items()}
        code = template.format(_=self.prefix, title=self.title, **form._asdict())
        exec(compile(code, f"<quotalimit: the call of {self.title}>", "exec"), namespace)
        function: Callable[..., Any] = namespace[self.title]
        return function

    def answers(self) -> Answers:
        """A function with the signature of the other that answers all questions about a call, in order."""
        named: Answers = self.compile(_ANSWERS, {}, self.named())
        if not self.exact:
            return named
        asked = "".join(f"{variable}(*args, **kwargs), " for variable in self.exact)
        whole: Answers = self.compile(_ANSWERS, {}, self.exactly(False)._replace(answers=asked))

        def answers(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
            found = named(*args, **kwargs)
            rest = iter(whole(*args, **kwargs))
            return tuple(answer if source else next(rest) for answer, source in zip(found, self.sources, strict=True))

        return answers

    def _parameters(self) -> str:
        header = []
        last_kind = None
        for number, parameter in enumerate(self.signature.parameters.values()):
            kind = parameter.kind
            if last_kind is Parameter.POSITIONAL_ONLY and kind is not Parameter.POSITIONAL_ONLY:
                header.append("/")
            if kind is Parameter.KEYWORD_ONLY and last_kind not in (Parameter.KEYWORD_ONLY, Parameter.VAR_POSITIONAL):
                header.append("*")
            default = ""
            if parameter.default is not Parameter.empty:
                self.names[f"{self.prefix}default_{number}"] = parameter.default
                default = f"={self.prefix}default_{number}"
            header.append(f"{_STARS.get(kind, '')}{parameter.name}{default}")
            last_kind = kind
        if last_kind is Parameter.POSITIONAL_ONLY:
            header.append("/")
        return ", ".join(header)

    def _arguments(self) -> str:
        """The function's own parameters, as a call of it passes them."""
        return ", ".join(
            f"{name}={name}" if p.kind is Parameter.KEYWORD_ONLY else f"{_STARS.get(p.kind, '')}{name}"
            for name, p in self.signature.parameters.items()
        )

    def _values(self) -> str:
        """All that the function is called with, defaults applied, one after the other, but for whose method it is."""
        parameters = list(self.signature.parameters.items())
        if parameters and parameters[0][0] in _RECEIVERS:
            parameters = parameters[1:]
        return "".join(_VALUES.get(p.kind, "{}, ").format(name) for name, p in parameters)


def signature_of(function: Callable[..., Any]) -> Signature:
    """The signature of a callable; that of any call where it has none."""
    if isinstance(function, (classmethod, staticmethod)):  # seen through another decorator's proxy
        function = function.__func__
    try:
        return inspect.signature(function)
    except (ValueError, TypeError):
        return _ANYTHING


def _unused_prefix(taken: Iterable[str]) -> str:
    """The start of names that collide with none of these."""
    prefix = "_"
    while any(name.startswith(prefix) for name in taken):
        prefix += "_"
    return prefix


def _every(signature: Signature) -> list[str]:
    """All arguments by name; by position those whose name may be among the **kwargs too."""
    parameters = list(signature.parameters.values())
    shadowed = any(p.kind is Parameter.VAR_KEYWORD for p in parameters)
    nameless = [p for p in parameters if shadowed and p.kind in (Parameter.POSITIONAL_ONLY, Parameter.VAR_POSITIONAL)]
    named = [p for p in parameters if p not in nameless]
    return [p.name for p in nameless] + [
        f"{'**' if p.kind is Parameter.VAR_KEYWORD else p.name + '='}{p.name}" for p in named
    ]


def _parameters_by_name(question: Callable[..., Any], signature: Signature) -> list[str] | None:
    """How a callable is called by name; None if it gets the exact call instead."""
    asked = signature_of(question)
    wanted = asked.parameters.values()
    if not any(parameter.kind in _VARIADIC for parameter in wanted):
        shared = [p for p in wanted if p.name in signature.parameters]
        required = [p for p in wanted if p.default is Parameter.empty or p.kind is Parameter.POSITIONAL_ONLY]
        if all(p in shared for p in required) and (shared or not wanted):
            return _arguments(list(wanted), shared)
    return None


def _arguments(wanted: list[Parameter], shared: list[Parameter]) -> list[str]:
    """The arguments of a call by name, written by position as far as possible, which is faster."""
    by_position = next((i for i, p in enumerate(wanted) if p not in shared or p.kind not in _POSITIONAL), len(wanted))
    return [p.name if i < by_position else f"{p.name}={p.name}" for i, p in enumerate(wanted) if p in shared]


def _a_call_suits_both(one: Signature, other: Signature) -> bool:
    """Whether some call, so many positional arguments and some keywords, is right for both signatures."""
    return any(
        _keywords_suit(one, other, positional) and _keywords_suit(other, one, positional)
        for positional in range(_MOST_POSITIONAL)
    )


def _keywords_suit(one: Signature, other: Signature, positional: int) -> bool:
    """Whether, after so many positional arguments, what `one` still requires can be given to both by keyword."""
    parameters = list(one.parameters.values())
    takes = [p for p in parameters if p.kind in _POSITIONAL]
    if positional > len(takes) and not any(p.kind is Parameter.VAR_POSITIONAL for p in parameters):
        return False
    open_ones = [p for p in parameters if p.kind not in _VARIADIC and p not in takes[:positional]]
    return all(
        p.kind is not Parameter.POSITIONAL_ONLY and _accepts_keyword(other, p.name, positional)
        for p in open_ones
        if p.default is Parameter.empty
    )


def _accepts_keyword(signature: Signature, name: str, positional: int) -> bool:
    parameters = list(signature.parameters.values())
    filled = [p.name for p in parameters if p.kind in _POSITIONAL][:positional]
    if name in filled:
        return False
    known = signature.parameters.get(name)
    if known is not None and known.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY):
        return True
    return any(p.kind is Parameter.VAR_KEYWORD for p in parameters)


def _listed(signature: Signature) -> str:
    return ", ".join(map(str, signature.replace(return_annotation=Signature.empty).parameters)) or "none"


def _title(question: Callable[..., Any]) -> str:
    return getattr(question, "__qualname__", None) or repr(question)
