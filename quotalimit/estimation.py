"""How many tokens a text is, by estimate: for reserves, and for calls that report no usage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Final, TypeAlias

from quotalimit.amounts import units_or_none
from quotalimit.fields import field

_DIGITS: Final = b"0123456789"
_SPACE: Final = b" \t\r\n"
_PUNCTUATION: Final = b"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"

TOKEN: Final = 60
"""The weight of one token; a weight is text measured in sixtieths of a token."""

_CAPS: Final = (
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "maxTokens",
    "maxOutputTokens",
    "num_predict",
)
_COPIES: Final = ("n", "candidate_count", "candidateCount")
_MOST_ITEMS: Final = 1_000_000
_MOST_CONTAINERS: Final = 100_000
_MOST_INSIDE: Final = 200_000
_FOREIGN: Final = 20
"""How many items of Python's own containers one of another counts as: it may be made up as it is read."""
_DEEPEST: Final = 10_000
_NO_TEXT: Final = frozenset((str, int, float, bool, type(None)))

_TEXT_FIELDS: Final = frozenset((
    # What was said: content of messages and of stream chunks, as each provider names it.
    "content", "text", "delta", "message", "choices", "parts", "candidates", "output", "response", "data", "refusal",
    "contentBlockDelta", "contentBlockStart", "generations", "messages", "chunk",
    # What was thought, which is billed alike.
    "thinking", "reasoning", "reasoning_content", "reasoningContent", "reasoningText", "summary",
    # What was asked of tools.
    "tool_calls", "toolUse", "function", "function_call", "functionCall", "arguments", "args", "input", "name",
    "partial_json", "tool_plan", "start", "tool_call_chunks",
))  # fmt: skip
"""The fields of responses and stream items in which model-written text is found, at any depth."""

_FREE: Final = frozenset(("arguments", "args", "input"))
"""The fields of which all that is inside was written by the model, whatever it is called."""

_BEDROCK_EVENTS: Final = frozenset(("messageStart", "messageStop", "contentBlockStop", "metadata"))
_EVENTS: Final = ("ping", "content_block_start", "content-end", "tool-call-end")
"""The types of Anthropic's and Cohere's events that have none of these fields."""

_TOOL_PARTS: Final = ("tool_use", "input_json_delta")


def weigh_text(text: str | bytes) -> int:
    """The weight of a text: about a token for four bytes of words, two digits, or one and a half of punctuation.

    Against OpenAI's o200k vocabulary that is 0.9 to 1.3 of the truth for English, German, French, Spanish, Chinese,
    Japanese and Korean, and up to 1.6 for code, JSON and Markdown; it is too much for Arabic (1.4), Russian (1.8) and
    Hindi (2.1), and too little for emoji (0.7) and base64 (0.4). `tests/sdk/test_estimation.py` measures it.
    """
    data = str.encode(text, "utf-8", "surrogatepass") if isinstance(text, str) else text
    digits = len(data) - len(data.translate(None, _DIGITS))
    space = len(data) - len(data.translate(None, _SPACE))
    punctuation = len(data) - len(data.translate(None, _PUNCTUATION))
    words = len(data) - digits - space - punctuation
    return 15 * words + 30 * digits + 42 * punctuation + 10 * space


def tokens_of(weight: int) -> int:
    """A weight in tokens, rounded up; at least 1, for no call is free."""
    return max(1, -(-weight // TOKEN))


def weigh_arguments(arguments: Iterable[object]) -> int:
    """The weight of all text in a call's arguments: strings at any depth of dicts, lists, tuples and SDK objects."""
    return sum(map(weigh_text, _texts(arguments, None)))


def weigh_answer(answer: object) -> int:
    """The weight of what a model wrote, in a result or an item of a stream: text, thoughts and tool arguments.

    Of SDK objects only the fields that hold those are read, and events that repeat what came before are passed over.
    """
    kind = field(answer, "type")
    if issubclass(type(kind), str) and _repeats(kind, answer):
        return 0
    return sum(map(weigh_text, _texts((answer,), _TEXT_FIELDS)))


def _repeats(kind: str, item: object) -> bool:
    """Whether an item of a stream tells what others tell.

    Of OpenAI Responses those are all but the deltas; of other helpers' streams all but the chunks, or raw events, that
    they hand on.
    """
    if kind.startswith("response."):
        return not kind.endswith(".delta")
    if kind == "chunk":
        return False
    if kind.endswith((".done", "_stop")) or kind == "tool_calls.function.arguments.delta":
        return True
    return field(item, "snapshot") is not None


_Part: TypeAlias = tuple[object, frozenset[str] | None, bool, int]
"""A value, the fields to read of it, whether it is the outermost, which need not have such fields, and its depth."""


def _texts(values: Iterable[object], names: frozenset[str] | None) -> Iterator[str | bytes]:
    """The strings in values, at any depth; where `names` are given, of what has such fields in those alone.

    Each container is looked at once. What is beyond ten thousand levels, a million items in one list, or two hundred
    thousand items in all (ten thousand in containers that are not Python's own) is not looked at, so that hostile
    input, endless perhaps, does not keep it busy. Only what an object holds is read, never a property: a mock would
    make up more for ever.
    """
    todo: list[_Part] = [(value, names, True, 0) for value in values]
    seen: set[int] = set()
    room = _MOST_INSIDE
    while todo:
        value, fields, outermost, depth = todo.pop()
        kind = type(value)  # what it says of its class may raise
        if issubclass(kind, str) or kind is bytes:
            yield value  # type: ignore[misc]
            continue
        if value is None or issubclass(kind, (bool, int, float)) or id(value) in seen:
            continue
        if room <= 0 or len(seen) >= _MOST_CONTAINERS or depth > _DEEPEST:
            continue
        seen.add(id(value))
        before = len(todo)
        price = 1 if kind is dict or kind is list or kind is tuple else _FOREIGN
        try:
            most = room // price
            todo.extend(islice(_inside(value, fields, outermost, depth + 1), most))
        except Exception:  # a foreign container may do anything; what cannot be read is no text
            pass
        room -= (len(todo) - before + 1) * price


def _inside(value: object, names: frozenset[str] | None, outermost: bool, depth: int) -> Iterable[_Part]:
    if isinstance(value, (list, tuple)):
        return ((item, names, outermost, depth) for item in (value if len(value) < 1_000 else _condensed(value)))
    if isinstance(value, Mapping):
        told = _told(value, names) if names else []
        if not told and (names is None or (outermost and not _is_event(value))):
            return ((inner, None, False, depth) for inner in value.values())
    else:
        fields = getattr(value, "__dict__", None)
        extra = getattr(value, "__pydantic_extra__", None)
        if not isinstance(fields, Mapping):
            return ()
        told = _told({**fields, **extra} if isinstance(extra, dict) else fields, _TEXT_FIELDS)
    return [(inner, None if name in _FREE else names, False, depth) for name, inner in told]


def _condensed(items: Sequence[object]) -> list[object]:
    """What may have text of a long list: its strings as one, and what is no plain value."""
    items = list(islice(items, _MOST_ITEMS))
    text = "".join([item for item in items if type(item) is str])
    return [text, *[item for item in items if type(item) not in _NO_TEXT][:_MOST_CONTAINERS]]


def _is_event(item: Mapping[str, object]) -> bool:
    """Whether a dict is an event of a stream, though it has no text: Bedrock's, and others off the wire."""
    return item.keys() <= _BEDROCK_EVENTS or item.get("type") in _EVENTS


def _told(fields: Mapping[str, object], names: frozenset[str]) -> list[tuple[str, object]]:
    """The fields of these names. What was asked of tools LangChain tells up to three times; once is enough."""
    told = {name: fields[name] for name in names if name in fields}
    content = told.get("content")
    if isinstance(content, list) and any(field(part, "type") in _TOOL_PARTS for part in content):
        told.pop("tool_calls", None)
        told.pop("tool_call_chunks", None)
    elif told.get("tool_call_chunks"):
        told.pop("tool_calls", None)
    return list(told.items())


def estimate_tokens(*parts: object, **arguments: object) -> int:
    """Estimate what a call will use, from its arguments: ready for `reserve=estimate_tokens`.

    Counts the text in all arguments, also inside messages, lists and dicts, and adds the call's own cap on its output
    (`max_tokens`, `max_completion_tokens` or `max_output_tokens`) times the number of answers that it asks for (`n`).
    As a `reserve` it gets every argument by name, defaults applied; `self` and `cls` are not looked into for text. At
    least 1. `weigh_text` says how far off it is.
    """
    caps = _found(_CAPS, parts, arguments)
    copies = _found(_COPIES, parts, arguments)
    written = max(caps, default=0) * max(1, *copies, 1)
    told = (value for name, value in arguments.items() if name not in ("self", "cls"))
    return tokens_of(weigh_arguments((*parts, *told))) + written


estimate_tokens.wants_every_argument = True  # type: ignore[attr-defined]


def _found(names: tuple[str, ...], parts: Iterable[object], arguments: Mapping[str, object]) -> list[int]:
    """The settings of these names among the arguments, or one level down: in a config object or dict."""
    holders = [arguments, *arguments.values(), *parts]
    settings = (
        units_or_none(field(holder, *names)) for holder in holders if not issubclass(type(holder), (str, bytes))
    )
    return [setting for setting in settings if setting is not None]
