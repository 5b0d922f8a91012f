"""What a call to a model used: reading it, recording it, and estimating it from text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from quotalimit.amounts import units_or_none


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens that a call processed, each counted once.

    `input_tokens` has all that was read, from and into caches too, of which `cache_read_tokens` and
    `cache_write_tokens` are parts. `output_tokens` has all that was written, of which `reasoning_tokens` are a part.
    `total_tokens` is what the provider reports, and at least input + output.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0
    total_tokens: int = 0

    def __post_init__(self) -> None:
        both = self.input_tokens + self.output_tokens
        if self.total_tokens < both:
            object.__setattr__(self, "total_tokens", both)

    @property
    def is_known(self) -> bool:
        """Whether every count is a whole number and none is negative: anything else is unknown usage."""
        counts = (self.input_tokens, self.output_tokens, self.cache_read_tokens, self.cache_write_tokens)
        return all(type(count) is int and count >= 0 for count in (*counts, self.reasoning_tokens, self.total_tokens))


Reading: TypeAlias = Usage | int
"""Known usage: as a provider reports it, or units to charge as they are."""


def read_usage(result: object) -> Usage | None:
    """Read the usage that a model's response reports, or None if it reports none that makes sense.

    Reads a `Usage`, and objects or dicts with a `usage` of OpenAI's shape. Bare numbers are ignored: a judge that
    returns 7 has not used 7 tokens.
    """
    if isinstance(result, Usage):
        return result if result.is_known else None
    if result is None or isinstance(result, (str, bytes, int, float)):
        return None
    reported = field(result, "usage")
    if isinstance(reported, Usage):
        return reported if reported.is_known else None
    return None if reported is None else _read_openai(reported)


def _read_openai(reported: object) -> Usage | None:
    """OpenAI: chat completions and embeddings count prompt and completion, Responses input and output."""
    tokens_in = _first(reported, "prompt_tokens", "input_tokens")
    tokens_out = _first(reported, "completion_tokens", "output_tokens")
    total = _first(reported, "total_tokens")
    if tokens_in is None and tokens_out is None and total is None:
        return None
    details_in = _first(reported, "prompt_tokens_details", "input_tokens_details")
    details_out = _first(reported, "completion_tokens_details", "output_tokens_details")
    counts = (
        tokens_in,
        tokens_out,
        _first(details_in, "cached_tokens"),
        _first(details_in, "cache_write_tokens"),
        _first(details_out, "reasoning_tokens"),
        total,
    )
    known = [0 if count is None else units_or_none(count) for count in counts]
    return None if None in known else Usage(*(count or 0 for count in known))


def field(holder: object, name: str) -> Any:
    """A field of an object or of a dict from the wire; None if it has none."""
    if isinstance(holder, Mapping):
        return holder.get(name)
    try:
        return getattr(holder, name, None)
    except Exception:  # a property of a foreign object may do anything; what cannot be read is unknown
        return None


def _first(holder: object, *names: str) -> Any:
    for name in names:
        value = field(holder, name)
        if value is not None:
            return value
    return None


class Recorder:
    """The usage recorded while a call runs, each source once, and the call that it runs in."""

    __slots__ = ("_sources", "enclosing", "finished", "recorded")

    def __init__(self, enclosing: Recorder | None) -> None:
        self.enclosing = enclosing
        self.finished = False
        self.recorded: list[tuple[Reading, tuple[object, ...]]] = []
        self._sources: dict[int, object] = {}

    def record(self, reading: Reading, sources: tuple[object, ...]) -> None:
        """Add a reading, unless one of its sources has been read before."""
        if self.knows(sources):
            return
        self.recorded.append((reading, sources))
        for source in sources:  # kept alive, for the id of a dead object may come again
            self._sources[id(source)] = source

    def knows(self, sources: Iterable[object]) -> bool:
        """Whether usage has been read from one of these objects."""
        return any(id(source) in self._sources for source in sources)


_running: Final[ContextVar[Recorder | None]] = ContextVar("quotalimit_running", default=None)
begin: Final = _running.set
"""Make a recorder that of the running call; returns a token for `end`."""


def end(token: Token[Recorder | None]) -> None:
    """Go back to the call that ran before."""
    try:
        _running.reset(token)
    except ValueError:  # closed in another context than it began in, by a finalizer or an event loop
        pass


def running() -> Recorder | None:
    """The innermost call that is charged by its usage and has not ended."""
    return unfinished(_running.get())


def unfinished(recorder: Recorder | None) -> Recorder | None:
    """The first call that has not ended, from this one outwards."""
    while recorder is not None and recorder.finished:
        recorder = recorder.enclosing
    return recorder


def record_usage(response: object) -> bool:
    """Report what the running call used, where its return value does not show it.

    Takes a model's response, a `Usage`, or a number of units to charge as they are. Returns True if it was recorded;
    outside a call that a token budget counts it does nothing and returns False, as for a response that reports no
    usage. The same response, recorded twice or recorded and returned, counts once. Raises `ValueError` for a number
    that is negative, boolean or not finite.
    """
    recorder = running()
    if recorder is None:
        return False
    reading = to_reading(response)
    if reading is None:
        if isinstance(response, (bool, int, float)):
            raise ValueError(f"usage must be a number of at least 0, not {response!r}")
        return False
    recorder.record(reading, sources_of(response))
    return True


def to_reading(response: object) -> Reading | None:
    """What a response, a `Usage` or a number says was used; None if it says nothing that makes sense."""
    return units_or_none(response) if isinstance(response, (bool, int, float)) else read_usage(response)


def sources_of(result: object) -> tuple[object, ...]:
    """The objects by which usage is recognised as read before: the result and its `usage`. Never bare values."""
    if result is None or isinstance(result, (str, bytes, int, float)):
        return ()
    reported = field(result, "usage")
    return (result,) if reported is None or isinstance(reported, (int, float)) else (result, reported)


_BYTES_PER_TOKEN: Final = 4
_MOST_PARTS: Final = 10_000


def estimate_tokens(*parts: object) -> int:
    """Estimate the tokens of all text in the arguments: strings, also inside dicts, lists and tuples. At least 1.

    One token for four bytes of UTF-8, which is about right for English and for code and too much for few languages.
    """
    return tokens_in(text_bytes(parts))


def tokens_in(size: int) -> int:
    """Tokens in so many bytes of text, by estimate. At least 1."""
    return max(1, -(-size // _BYTES_PER_TOKEN))


def text_bytes(value: object) -> int:
    """Bytes of text in a value, at any depth; every container is read once, and ten thousand parts at most."""
    size = 0
    todo: list[object] = [value]
    seen: set[int] = set()
    while todo and len(seen) < _MOST_PARTS:
        part = todo.pop()
        if isinstance(part, str):
            size += len(part.encode("utf-8", "surrogatepass"))
        elif isinstance(part, (Mapping, list, tuple)) and id(part) not in seen:
            seen.add(id(part))
            todo.extend(part.values() if isinstance(part, Mapping) else part)
        elif type(part) is bytes:
            size += len(part)
    return size
