"""How many tokens a text is, by estimate: for reserves, and for calls that report no usage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from quotalimit.amounts import units_or_none
from quotalimit.providers import field

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
_MOST_PARTS: Final = 10_000

_TEXT_FIELDS: Final = frozenset((
    # What was said: content of messages and of stream chunks, as each provider names it.
    "content", "text", "delta", "message", "choices", "parts", "candidates", "output", "response", "data", "refusal",
    "contentBlockDelta", "contentBlockStart", "generations", "messages", "chunk",
    # What was thought, which is billed alike.
    "thinking", "reasoning", "reasoning_content", "reasoningContent", "reasoningText", "summary",
    # What was asked of tools.
    "tool_calls", "toolUse", "function", "function_call", "functionCall", "arguments", "args", "input", "name",
    "partial_json", "tool_plan", "start",
))  # fmt: skip
"""The fields of responses and stream items in which model-written text is found, at any depth."""


def weigh_text(text: str | bytes) -> int:
    """The weight of a text: about a token for four bytes of words, two digits, or one and a half of punctuation.

    Against OpenAI's o200k vocabulary that is 0.8 to 1.3 of the truth for English, German, French, Chinese, Japanese,
    Korean, code, Markdown and JSON; it is too much for Arabic (1.4), Russian (1.7) and Hindi (1.9), and too little
    for emoji (0.6) and base64 (0.4). `tests/test_estimation.py` measures it.
    """
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
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
    if field(answer, "snapshot") is not None or (isinstance(kind, str) and kind.endswith((".done", "_stop"))):
        return 0
    return sum(map(weigh_text, _texts((answer,), _TEXT_FIELDS)))


def _texts(values: Iterable[object], names: frozenset[str] | None) -> Iterator[str | bytes]:
    """The strings in values, at any depth; where `names` are given, of what has such fields in those alone.

    Each container is looked at once and ten thousand parts at most, so that hostile input cannot keep it busy. Only
    what an object holds is read, never a property: a mock would make up more for ever.
    """
    todo = list(values)
    seen: set[int] = set()
    while todo and len(seen) < _MOST_PARTS:
        value = todo.pop()
        if isinstance(value, str) or type(value) is bytes:
            yield value
            continue
        if value is None or isinstance(value, (bool, int, float)) or id(value) in seen:
            continue
        seen.add(id(value))
        try:
            todo.extend(_inside(value, names))
        except Exception:  # a foreign container may do anything; what cannot be read is no text
            continue


def _inside(value: object, names: frozenset[str] | None) -> Iterable[object]:
    if isinstance(value, (list, tuple)):
        return value[:_MOST_PARTS]
    fields = value if isinstance(value, Mapping) else getattr(value, "__dict__", None)
    if not isinstance(fields, Mapping):
        return ()
    told = [fields[name] for name in names if name in fields] if names else []
    return told or (list(fields.values()) if value is fields else ())


def estimate_tokens(*parts: object, **arguments: object) -> int:
    """Estimate what a call will use, from its arguments: ready for `reserve=estimate_tokens`.

    Counts the text in all arguments, also inside messages, lists and dicts, and adds the call's own cap on its output
    (`max_tokens`, `max_completion_tokens` or `max_output_tokens`) times the number of answers that it asks for (`n`).
    As a `reserve` it gets every argument by name, defaults applied. At least 1. `weigh_text` says how far off it is.
    """
    caps = _found(_CAPS, parts, arguments)
    copies = _found(_COPIES, parts, arguments)
    written = max(caps, default=0) * max(1, *copies, 1)
    return tokens_of(weigh_arguments((*parts, *arguments.values()))) + written


estimate_tokens.wants_every_argument = True  # type: ignore[attr-defined]


def _found(names: tuple[str, ...], parts: Iterable[object], arguments: Mapping[str, object]) -> list[int]:
    """The settings of these names among the arguments, or one level down: in a config object or dict."""
    holders = [arguments, *arguments.values(), *parts]
    settings = (units_or_none(field(holder, *names)) for holder in holders if not isinstance(holder, (str, bytes)))
    return [setting for setting in settings if setting is not None]
