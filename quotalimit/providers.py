"""How each provider reports usage: one small function for each shape, and a table of them.

Everything is read by shape, from an SDK's objects and from plain dicts off the wire alike; no SDK is imported. To add
a provider, write a function that returns `Usage` or None, and add it to `SHAPES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from functools import lru_cache
from typing import Any, Final, TypeAlias

from quotalimit.amounts import MAX_UNITS, units_or_none
from quotalimit.fields import Fields, field, fields_of
from quotalimit.usage import Report, Usage

Shape: TypeAlias = Callable[[Fields], Usage | None]


def openai(report: Fields) -> Usage | None:
    """OpenAI chat, embeddings and audio, and all who follow: LiteLLM, Mistral, vLLM, Groq. Details are inside."""
    read, written = report.get("prompt_tokens"), report.get("completion_tokens")
    if read is None and written is None:
        return None
    inside, outside = report.get("prompt_tokens_details"), report.get("completion_tokens_details")
    from_cache = to_cache = None
    if inside is not None:
        details = fields_of(inside)
        from_cache, to_cache = details.get("cached_tokens"), details.get("cache_write_tokens")
    return _usage(
        read,
        written,
        report.get("total_tokens"),
        report.get("cache_read_input_tokens") if from_cache is None else from_cache,
        report.get("cache_creation_input_tokens") if to_cache is None else to_cache,
        None if outside is None else fields_of(outside).get("reasoning_tokens"),
    )


def openai_in_camel_case(report: Fields) -> Usage | None:
    """The same, as it is named on its way through JavaScript."""
    read, written = report.get("promptTokens"), report.get("completionTokens")
    if read is None and written is None:
        return None
    details_in = fields_of(report.get("promptTokensDetails"))
    return _usage(
        read,
        written,
        report.get("totalTokens"),
        details_in.get("cachedTokens"),
        details_in.get("cacheWriteTokens"),
        fields_of(report.get("completionTokensDetails")).get("reasoningTokens"),
    )


def anthropic(report: Fields) -> Usage | None:
    """Anthropic: input excludes what went through caches. Compaction and advice are listed in `iterations` alone."""
    if report.get("input_tokens") is None and report.get("output_tokens") is None:
        return None
    usage = _anthropic_counts(report)
    iterations = report.get("iterations")
    if not isinstance(iterations, (list, tuple)):
        return usage
    beside = [each for each in map(fields_of, iterations) if each.get("type") in ("compaction", "advisor_message")]
    return _together(usage, *map(_anthropic_counts, beside))


def _anthropic_counts(report: Fields) -> Usage | None:
    written, read = report.get("cache_creation_input_tokens"), report.get("cache_read_input_tokens")
    return _usage(
        _sum(report.get("input_tokens"), written, read),
        report.get("output_tokens"),
        None,
        read,
        written,
        fields_of(report.get("output_tokens_details")).get("thinking_tokens"),
    )


def bedrock(report: Fields) -> Usage | None:
    """Amazon Bedrock's converse: caches beside the input, as with Anthropic."""
    written, read = report.get("cacheWriteInputTokens"), report.get("cacheReadInputTokens")
    return _usage(
        _sum(report.get("inputTokens"), written, read),
        report.get("outputTokens"),
        report.get("totalTokens"),
        read,
        written,
    )


def gemini(report: Fields) -> Usage | None:
    """Google Gemini: thoughts beside the candidates, tool use beside the prompt, cached content inside it."""
    prompt, candidates = report.get("prompt_token_count"), report.get("candidates_token_count")
    total = report.get("total_token_count")
    if prompt is None and candidates is None and total is None:
        return None
    tool_use, thoughts = report.get("tool_use_prompt_token_count"), report.get("thoughts_token_count")
    cached = report.get("cached_content_token_count")
    return _usage(_sum(prompt, tool_use), _sum(candidates, thoughts), total, cached, None, thoughts)


def gemini_in_camel_case(report: Fields) -> Usage | None:
    """The same off the wire."""
    prompt, candidates = report.get("promptTokenCount"), report.get("candidatesTokenCount")
    total = report.get("totalTokenCount")
    if prompt is None and candidates is None and total is None:
        return None
    tool_use, thoughts = report.get("toolUsePromptTokenCount"), report.get("thoughtsTokenCount")
    cached = report.get("cachedContentTokenCount")
    return _usage(_sum(prompt, tool_use), _sum(candidates, thoughts), total, cached, None, thoughts)


def cohere(report: Fields) -> Usage | None:
    """Cohere: all tokens where it lists them, else the billed ones."""
    for counts in map(fields_of, (report.get("tokens"), report.get("billed_units"))):
        read, written = counts.get("input_tokens"), counts.get("output_tokens")
        if read is not None or written is not None:
            return _usage(read, written, None, report.get("cached_tokens"))
    return None


def langchain(report: Fields) -> Usage | None:
    """LangChain's `usage_metadata`: details inside."""
    details_in = fields_of(report.get("input_token_details"))
    return _usage(
        report.get("input_tokens"),
        report.get("output_tokens"),
        report.get("total_tokens"),
        details_in.get("cache_read"),
        details_in.get("cache_creation"),
        fields_of(report.get("output_token_details")).get("reasoning"),
    )


def openai_responses(report: Fields) -> Usage | None:
    """OpenAI Responses, pydantic-ai, and whoever counts input and output tokens. Details are inside."""
    inside, outside = report.get("input_tokens_details"), report.get("output_tokens_details")
    from_cache = to_cache = thought = None
    if inside is not None:
        details = fields_of(inside)
        from_cache, to_cache = details.get("cached_tokens"), details.get("cache_write_tokens")
    if outside is not None:
        details = fields_of(outside)
        thought = _either(details.get("reasoning_tokens"), details.get("thinking_tokens"))
    return _usage(
        report.get("input_tokens"),
        report.get("output_tokens"),
        report.get("total_tokens"),
        report.get("cache_read_tokens") if from_cache is None else from_cache,
        report.get("cache_write_tokens") if to_cache is None else to_cache,
        report.get("output_reasoning_tokens") if thought is None else thought,
    )


def ollama(report: Fields) -> Usage | None:
    """Ollama: counts at the top level of a response, in a stream of the last one."""
    return _usage(report.get("prompt_eval_count"), report.get("eval_count"))


SHAPES: Final[tuple[tuple[Shape, tuple[str, ...]], ...]] = (
    (openai, ("prompt_tokens", "completion_tokens")),
    (openai_in_camel_case, ("promptTokens", "completionTokens")),
    (anthropic, ("cache_creation_input_tokens", "cache_read_input_tokens", "cache_creation", "server_tool_use")),
    (bedrock, ("inputTokens", "outputTokens")),
    (gemini, ("prompt_token_count", "candidates_token_count", "total_token_count")),
    (gemini_in_camel_case, ("promptTokenCount", "candidatesTokenCount", "totalTokenCount")),
    (cohere, ("tokens", "billed_units")),
    (langchain, ("input_token_details", "output_token_details")),
    (openai_responses, ("input_tokens", "output_tokens", "total_tokens")),
)
"""The shapes of a usage report, and the fields of which a report must have one to be asked for each.

They are tried in order: those with fields of their own before those that share them.
"""

REPORTS: Final = ("usage", "usage_metadata", "usageMetadata", "meta")
"""What a response calls its usage report."""

_RUNNING: Final[tuple[Shape, ...]] = (anthropic, gemini, gemini_in_camel_case)
"""The shapes whose reports in a stream are running totals though they may not say of which response."""

_HOLDERS: Final = (
    "response",  # events of OpenAI Responses
    "message",  # Anthropic's message_start
    "metadata",  # Bedrock's stream
    "data",  # Mistral's stream
    "delta",  # Cohere's message-end
    "chunk",  # events of OpenAI's chat.completions.stream()
)
"""Where in an item of a stream the object that holds the usage is, if it is not the item itself."""

_VALUES: Final = (str, bytes, int, float)
_BARE: Final = (*_VALUES, Enum)
_MOST_ITEMS: Final = 10_000
_new: Final = tuple.__new__
_NONSENSE: Final = Usage(input_tokens=-1)


def read_usage(result: object) -> Usage | None:
    """Read the usage that a model's response reports, or None if it reports none that makes sense.

    Understands a `Usage` and the responses of OpenAI (chat, Responses, embeddings), Anthropic, Gemini, Bedrock,
    Mistral, Cohere, LangChain, Ollama, LiteLLM and pydantic-ai, as objects and as dicts off the wire. Counts that are
    negative, no whole numbers or in contradiction are unknown usage. A list or tuple of responses, as of
    `asyncio.gather`, reports their sum. Bare numbers are ignored: a judge that returns 7 has not used 7 tokens.
    """
    try:
        if isinstance(result, Usage):
            return result if result.is_known else None
        if result is None or isinstance(result, _VALUES):
            return None
        fields = fields_of(result)
        report = fields_of(fields.get("usage"))
        if "prompt_tokens" in report:  # the most common shape, found at once
            usage = openai(report)
            if usage is not None and usage.total_tokens:
                return usage
        if _is_list(result):
            return _sum_in(result)
        found = _find(result, fields, False)
    except Exception:  # a foreign object may do anything; what cannot be read is unknown
        return None
    return None if found is None else found[0]


def _is_list(value: object) -> bool:
    """Whether it is a plain list or tuple, which does nothing of its own when it is looked at."""
    return type(value) is list or type(value) is tuple


def _sum_in(results: object) -> Usage | None:
    usages = [usage for each, _ in responses_in(results) if (usage := read_usage(each)) is not None]
    total = _together(*usages)
    return total if usages and total is not _NONSENSE else None


def responses_in(result: object) -> Sequence[tuple[object, tuple[object, ...]]]:
    """A result, or what is in a list or tuple of them at any depth, each with the objects that it is recognised by.

    In a list the same object (or its `usage`) comes once, and what cannot report usage not at all. More than ten
    thousand items are not looked at.
    """
    if not _is_list(result):
        return ((result, sources_of(result)),)
    found: list[tuple[object, tuple[object, ...]]] = []
    seen: set[int] = set()
    room = _MOST_ITEMS
    todo: list[Any] = [result]
    while todo:
        each = todo.pop()
        if not _is_list(each):
            sources = sources_of(each)
            if sources and seen.isdisjoint(map(id, sources)):
                seen.update(map(id, sources))
                found.append((each, sources))
        elif id(each) not in seen:
            seen.add(id(each))
            items = each[:room]
            room -= len(items)
            todo += reversed(items)
    return found


def sources_of(result: object) -> tuple[object, ...]:
    """The objects by which usage is recognised as read before: the result and its `usage`. Never bare values.

    Of a dict the `usage` is enough, and does not keep the rest of it alive.
    """
    if result is None or type(result) is tuple or issubclass(type(result), _BARE):
        return ()
    fields = fields_of(result)
    for name in REPORTS:
        reported = fields.get(name)
        if reported is not None:
            if issubclass(type(reported), (int, float)):
                return (result,)
            return (reported,) if type(result) is dict else (result, reported)
    return (result,)


def read_report(result: object, *, streaming: bool = False) -> Report | None:
    """The usage that a response or an item of a stream reports, and how it goes with the rest of its stream."""
    try:
        if isinstance(result, Usage):
            return Report(result) if result.is_known else None
        if result is None or isinstance(result, _VALUES):
            return None
        fields = fields_of(result)
        found = _find(result, fields, streaming)
    except Exception:  # a foreign object may do anything; what cannot be read is unknown
        return None
    if found is None:
        return None
    usage, shape, holder, name = found
    if holder is None:
        return Report(usage, None, True)
    kind = fields.get("type")
    response = holder.get("id")
    if response is None:
        response = _either(holder.get("response_id"), holder.get("responseId"))
    chunk = shape is langchain or (shape is openai_responses and name == "usage_metadata")
    if isinstance(response, str):
        return Report(usage, response, chunk, kind == "message_start")
    adds = shape not in _RUNNING and kind != "message_delta"  # Anthropic's, off the wire
    return Report(usage, None, chunk or adds, kind == "message_start")


_Found: TypeAlias = tuple[Usage, Shape | None, Fields | None, str | None]
"""A usage and its shape, the fields of the object that holds it, and its name there; None of one by itself."""


def _find(result: object, fields: Fields, streaming: bool) -> _Found | None:
    """The usage in a response, or in an item of a stream, if it makes sense."""
    found = _held(result, fields, streaming)
    if found is None:
        for name in _HOLDERS:
            holder = fields.get(name)
            if holder is not None and not isinstance(holder, _VALUES):
                found = _held(holder, fields_of(holder), streaming)
                if found is not None:
                    break
        else:
            found = _shaped(result, fields, None, None) or _unparsed(fields)
    return None if found is None or found[0] is _NONSENSE else found


def _unparsed(fields: Fields) -> _Found | None:
    """The usage in an answer that is handed on as it came: `with_raw_response` of OpenAI and Anthropic."""
    response = fields.get("http_response")
    if response is None or not isinstance(response.content, bytes):  # that of a stream is not there, and raises
        return None
    body = fields_of(response.json())
    return _held(body, body, False)


def _held(holder: object, fields: Fields, streaming: bool) -> _Found | None:
    """The usage that an object holds, with what is counted beside it."""
    for name in REPORTS:
        report = fields.get(name)
        if report is not None:
            break
    else:
        usage = ollama(fields)
        return None if usage is None else (_told(holder, usage), ollama, fields, None)
    found = _shaped(report, report if type(report) is dict else fields_of(report), fields, name)
    if found is None:
        return None
    usage, shape, _, _ = found
    if shape is openai_responses:  # hosted tools are counted beside the model
        hosted = fields.get("tool_usage")
        if hosted is not None:
            images = openai_responses(fields_of(fields_of(hosted).get("image_gen")))
            return _together(usage, images), shape, fields, name
    elif (shape is gemini or shape is gemini_in_camel_case) and not streaming:
        return _together(*[usage] * _hidden_calls(fields)), shape, fields, name
    return found


def _shaped(report: object, fields: Fields, holder: Fields | None, name: str | None) -> _Found | None:
    """A report's usage by the first shape that it has; None if it has none."""
    if isinstance(report, Usage):
        return report if report.is_known else _NONSENSE, None, holder, name
    for shape in _shapes_of(fields):
        usage = shape(fields)
        if usage is not None:
            return usage if usage.total_tokens else _told(report, usage), shape, holder, name
    return None


def _shapes_of(fields: Fields) -> tuple[Shape, ...]:
    """The shapes that a report with these fields may have."""
    if type(fields) is not dict or len(fields) > _MANY:
        return tuple(shape for shape, names in SHAPES if any(name in fields for name in names))
    return _shapes_with(tuple(fields))


_MANY: Final = 100


@lru_cache(maxsize=256)
def _shapes_with(fields: tuple[str, ...]) -> tuple[Shape, ...]:
    return tuple(shape for shape, names in SHAPES if any(name in fields for name in names))


def _hidden_calls(response: Fields) -> int:
    """How many calls google-genai made for a response: with automatic function calling it reports the last alone.

    It is charged so many times the last. That is more than was billed where each call read what the one before it read
    and wrote, and so used no more than the last; it may be less where an early call thought much, for thoughts are
    billed once and do not come back in the next prompt. `record_usage` in the tools, or no automatic calling, is exact.
    """
    calls = 1
    history = response.get("automatic_function_calling_history")
    for content in reversed(history if isinstance(history, list) else []):
        parts = field(content, "parts")
        if field(content, "role") == "model":
            calls += 1
        elif not any(
            field(part, "function_response", "functionResponse") is not None
            for part in (parts if isinstance(parts, (list, tuple)) else ())
        ):
            break  # the prompt: what is before it was billed with earlier responses
    return calls


def _together(*usages: Usage | None) -> Usage:
    """The sum of usages; nonsense if one of them is."""
    total = Usage()
    for usage in usages:
        if usage is _NONSENSE:
            return _NONSENSE
        if usage is not None:
            total += usage
    return total if total.total_tokens <= MAX_UNITS else _NONSENSE


def _usage(
    read: Any,
    written: Any,
    total: Any = None,
    cache_read: Any = None,
    cache_write: Any = None,
    reasoning: Any = None,
) -> Usage | None:
    """A usage of counts that make sense together, or one that says of itself that they do not; None of no counts."""
    if cache_read is cache_write is reasoning is None:
        if type(read) is type(written) is type(total) is int and read >= 0 and written >= 0:
            if read + written <= total <= MAX_UNITS:  # most are so plain
                return _new(Usage, (read, written, 0, 0, 0, total))
        elif read is written is total is None:
            return None
    counts = (read, written, cache_read, cache_write, reasoning, total)
    for count in counts:
        if type(count) is not int:
            read, written, cache_read, cache_write, reasoning, total = map(_units, counts)
            break
    if read < 0 or written < 0 or cache_read < 0 or cache_write < 0 or reasoning < 0 or total < 0:
        return _NONSENSE
    if total < read + written:
        total = read + written
    if cache_read + cache_write > read or total > MAX_UNITS or reasoning > MAX_UNITS:
        return _NONSENSE
    return _new(Usage, (read, written, cache_read, cache_write, reasoning, total))


def _units(count: Any) -> int:
    """A count as units: 0 if it is not there, -1 if it makes no sense."""
    if count is None:
        return 0
    if type(count) is int:
        return count
    units = units_or_none(count)
    return -1 if units is None else units


def _told(report: object, usage: Usage) -> Usage:
    """Nothing, as it was told, or nonsense: Mistral's SDK fills in zeros, and so does pydantic-ai for its requests."""
    if usage.total_tokens:
        return usage
    told = field(report, "model_fields_set")
    is_default = (isinstance(told, set) and not told) or bool(units_or_none(field(report, "requests")))
    return _NONSENSE if is_default else usage


def _either(count: Any, other: Any) -> Any:
    return other if count is None else count


def _sum(*counts: Any) -> Any:
    """The sum of the counts that are there; None if none is, and -1, which is no count, if one makes no sense."""
    total: int | None = None
    for count in counts:
        if count is not None:
            units = count if type(count) is int else _units(count)
            if units < 0:
                return -1
            total = units if total is None else total + units
    return total
