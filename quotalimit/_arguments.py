"""Which of a call's arguments a key, a cost, a reserve or a callable limit gets.

All questions of a function are compiled into one with the function's own signature, so that Python itself binds the
arguments, applies the defaults, and refuses a call that the function would refuse, before anything is charged.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from inspect import Parameter, Signature
from keyword import iskeyword
from typing import Any, Final, TypeAlias

from quotalimit.errors import InvalidKey, InvalidLimit

Question: TypeAlias = str | Callable[..., Any]
"""The name of a parameter, or a callable of some of the call's arguments."""

Answers: TypeAlias = Callable[..., tuple[Any, ...]]

_ANYTHING: Final = Signature([Parameter("args", Parameter.VAR_POSITIONAL), Parameter("kwargs", Parameter.VAR_KEYWORD)])
_VARIADIC: Final = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
_POSITIONAL: Final = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_MOST_POSITIONAL: Final = 64


_ERRORS: Final[dict[str, type[Exception]]] = {"key": InvalidKey, "limit": InvalidLimit}
"""What is raised for a question that can never be asked, by what it is for; a TypeError for any other."""


def compile_questions(function: Callable[..., Any], questions: Sequence[tuple[str, Question]]) -> Answers:
    """A function with the signature of `function` that answers all questions about a call, in order.

    A callable gets, by name, the parameters that it declares; one that takes `*args` or `**kwargs`, or requires
    what is not a parameter of the function, gets the exact call; one marked `wants_every_argument` gets all arguments
    by name. Each question comes with what it is for: `InvalidKey`,
    `InvalidLimit` or `TypeError`, by that, is raised for what can never be called.
    """
    signature = signature_of(function)
    names: dict[str, Any] = {}
    by_name: list[str] = []
    exact: list[str] = []
    title = getattr(function, "__name__", "call")
    title = title if title.isidentifier() and not iskeyword(title) else "call"
    prefix = _unused_prefix((title, *signature.parameters))
    for number, (purpose, question) in enumerate(questions):
        variable = f"{prefix}question_{number}"
        if isinstance(question, str):
            if question not in signature.parameters:
                error = _ERRORS.get(purpose, TypeError)
                raise error(f"{purpose}={question!r} names no parameter of {title}, which has {_listed(signature)}")
            by_name.append(question)
            continue
        names[variable] = question
        if getattr(question, "wants_every_argument", False):
            by_name.append(f"{variable}({', '.join(_every(signature))})")
            continue
        wanted = _parameters_by_name(question, signature)
        if wanted is None and not _a_call_suits_both(signature, signature_of(question)):
            raise _ERRORS.get(purpose, TypeError)(
                f"the {purpose} function {_title(question)} takes {_listed(signature_of(question))}: neither "
                f"parameters of {title}, which has {_listed(signature)}, nor what a call of it could match"
            )
        if wanted is None:
            exact.append(variable)
            by_name.append("")
        else:
            by_name.append(f"{variable}({', '.join(wanted)})")
    if not exact:
        return _compile(title, signature, by_name, names, prefix)
    named = _compile(title, signature, [source or "None" for source in by_name], names, prefix)
    whole = _compile(title, _ANYTHING, [f"{variable}(*args, **kwargs)" for variable in exact], names, prefix)

    def answers(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        found = named(*args, **kwargs)
        rest = iter(whole(*args, **kwargs))
        return tuple(answer if source else next(rest) for answer, source in zip(found, by_name, strict=True))

    return answers


def signature_of(function: Callable[..., Any]) -> Signature:
    """The signature of a callable; that of any call where it has none."""
    if isinstance(function, (classmethod, staticmethod)):  # seen through another decorator's proxy
        function = function.__func__
    try:
        return inspect.signature(function)
    except (ValueError, TypeError):
        return _ANYTHING


def _compile(title: str, signature: Signature, sources: Iterable[str], names: dict[str, Any], prefix: str) -> Answers:
    namespace = dict(names)
    header = []
    last_kind = None
    for number, parameter in enumerate(signature.parameters.values()):
        kind = parameter.kind
        if last_kind is Parameter.POSITIONAL_ONLY and kind is not Parameter.POSITIONAL_ONLY:
            header.append("/")
        if kind is Parameter.KEYWORD_ONLY and last_kind not in (Parameter.KEYWORD_ONLY, Parameter.VAR_POSITIONAL):
            header.append("*")
        stars = "*" if kind is Parameter.VAR_POSITIONAL else "**" if kind is Parameter.VAR_KEYWORD else ""
        default = ""
        if parameter.default is not Parameter.empty:
            namespace[f"{prefix}default_{number}"] = parameter.default
            default = f"={prefix}default_{number}"
        header.append(f"{stars}{parameter.name}{default}")
        last_kind = kind
    if last_kind is Parameter.POSITIONAL_ONLY:
        header.append("/")
    code = f"def {title}({', '.join(header)}):\n    return ({''.join(f'{source}, ' for source in sources)})"
    exec(compile(code, f"<quotalimit: the keys and costs of {title}>", "exec"), namespace)
    answers: Answers = namespace[title]
    return answers


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
