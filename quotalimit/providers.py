"""How each provider reports usage: one small function for each shape, and a table of them.

Everything is read by shape, from an SDK's objects and from plain dicts off the wire alike; no SDK is imported. To add
a provider, write a function that returns `Usage` or None, and add it to `SHAPES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final, TypeAlias

from quotalimit.amounts import MAX_UNITS, units_or_none
from quotalimit.usage import Report, Usage

Shape: TypeAlias = Callable[[Any], Usage | None]


@lru_cache(maxsize=1_024)
def is_mapping(kind: type) -> bool:
    """Whether objects of a type have items rather than attributes."""
    return issubclass(kind, Mapping)


def field(holder: Any, *names: str) -> Any:
    """The first field of an object, or of a dict, that is there and not None."""
    for name in names:
        try:
            value = holder.get(name) if is_mapping(holder.__class__) else getattr(holder, name, None)
        except Exception:  # a property of a foreign object may do anything; what cannot be read is unknown
            value = None
        if value is not None:
            return value
    return None


def openai(report: object) -> Usage | None:
    """OpenAI chat, embeddings and audio, and all who follow: LiteLLM, Mistral, vLLM, Groq. Details are inside."""
    read, written = (
        field(report, "prompt_tokens", "promptTokens"),
        field(report, "completion_tokens", "completionTokens"),
    )
    if read is None and written is None:
        return None
    details_in = field(report, "prompt_tokens_details", "promptTokensDetails")
    details_out = field(report, "completion_tokens_details", "completionTokensDetails")
    return _usage(
        read,
        written,
        cache_read=_either(details_in, ("cached_tokens", "cachedTokens"), report, "cache_read_input_tokens"),
        cache_write=_either(
            details_in, ("cache_write_tokens", "cacheWriteTokens"), report, "cache_creation_input_tokens"
        ),
        reasoning=field(details_out, "reasoning_tokens", "reasoningTokens"),
        total=field(report, "total_tokens", "totalTokens"),
    )


def anthropic(report: object) -> Usage | None:
    """Anthropic: input excludes what went through caches. Compaction and advice are listed in `iterations` alone."""
    caches = ("cache_creation_input_tokens", "cache_read_input_tokens", "server_tool_use", "cache_creation")
    if field(report, "input_tokens", "output_tokens") is None or not _has(report, *caches):
        return None
    iterations = field(report, "iterations")
    beside = [
        _anthropic_counts(iteration)
        for iteration in (iterations if isinstance(iterations, (list, tuple)) else ())
        if field(iteration, "type") in ("compaction", "advisor_message")
    ]
    return _together(_anthropic_counts(report), *beside)


def _anthropic_counts(report: object) -> Usage:
    written = field(report, "cache_creation_input_tokens")
    read = field(report, "cache_read_input_tokens")
    return _usage(
        _sum(field(report, "input_tokens"), written, read),
        field(report, "output_tokens"),
        cache_read=read,
        cache_write=written,
        reasoning=field(field(report, "output_tokens_details"), "thinking_tokens"),
    )


def bedrock(report: object) -> Usage | None:
    """Amazon Bedrock's converse: caches beside the input, as with Anthropic."""
    if not _has(report, "inputTokens", "outputTokens"):
        return None
    written, read = field(report, "cacheWriteInputTokens"), field(report, "cacheReadInputTokens")
    return _usage(
        _sum(field(report, "inputTokens"), written, read),
        field(report, "outputTokens"),
        cache_read=read,
        cache_write=written,
        total=field(report, "totalTokens"),
    )


def gemini(report: object) -> Usage | None:
    """Google Gemini: thoughts beside the candidates, tool use beside the prompt, cached content inside it."""
    prompt = field(report, "prompt_token_count", "promptTokenCount")
    candidates = field(report, "candidates_token_count", "candidatesTokenCount")
    total = field(report, "total_token_count", "totalTokenCount")
    if prompt is None and candidates is None and total is None:
        return None
    thoughts = field(report, "thoughts_token_count", "thoughtsTokenCount")
    return _usage(
        _sum(prompt, field(report, "tool_use_prompt_token_count", "toolUsePromptTokenCount")),
        _sum(candidates, thoughts),
        cache_read=field(report, "cached_content_token_count", "cachedContentTokenCount"),
        reasoning=thoughts,
        total=total,
    )


def cohere(report: object) -> Usage | None:
    """Cohere: all tokens where it lists them, else the billed ones."""
    tokens = field(report, "tokens")
    counts = tokens if field(tokens, "input_tokens", "output_tokens") is not None else field(report, "billed_units")
    if field(counts, "input_tokens", "output_tokens") is None:
        return None
    return _usage(
        field(counts, "input_tokens"), field(counts, "output_tokens"), cache_read=field(report, "cached_tokens")
    )


def langchain(report: object) -> Usage | None:
    """LangChain's `usage_metadata`: details inside."""
    details_in, details_out = field(report, "input_token_details"), field(report, "output_token_details")
    if details_in is None and details_out is None:
        return None
    return _usage(
        field(report, "input_tokens"),
        field(report, "output_tokens"),
        cache_read=field(details_in, "cache_read"),
        cache_write=field(details_in, "cache_creation"),
        reasoning=field(details_out, "reasoning"),
        total=field(report, "total_tokens"),
    )


def openai_responses(report: object) -> Usage | None:
    """OpenAI Responses, pydantic-ai, and whoever counts input and output tokens. Details are inside."""
    if field(report, "input_tokens", "output_tokens", "total_tokens") is None:
        return None
    details_in, details_out = field(report, "input_tokens_details"), field(report, "output_tokens_details")
    return _usage(
        field(report, "input_tokens"),
        field(report, "output_tokens"),
        cache_read=_either(details_in, ("cached_tokens",), report, "cache_read_tokens"),
        cache_write=_either(details_in, ("cache_write_tokens",), report, "cache_write_tokens"),
        reasoning=_either(details_out, ("reasoning_tokens", "thinking_tokens"), report, "output_reasoning_tokens"),
        total=field(report, "total_tokens"),
    )


def ollama(report: object) -> Usage | None:
    """Ollama: counts at the top level of a response, in a stream of the last one."""
    read, written = field(report, "prompt_eval_count"), field(report, "eval_count")
    return None if read is None and written is None else _usage(read, written)


SHAPES: Final[tuple[Shape, ...]] = (openai, anthropic, bedrock, gemini, cohere, langchain, openai_responses)
"""The shapes of a usage report, tried in order: those with fields of their own before those that share them."""

REPORTS: Final = ("usage", "usage_metadata", "usageMetadata", "meta")
"""What a response calls its usage report."""

_RUNNING: Final[tuple[Shape, ...]] = (anthropic, gemini)
"""The shapes whose reports in a stream are running totals though they may not say of which response."""

_HOLDERS: Final = (
    (),  # a response; the last chunk of OpenAI's chat; Anthropic's message_delta
    ("response",),  # events of OpenAI Responses
    ("message",),  # Anthropic's message_start
    ("metadata",),  # Bedrock's stream
    ("data",),  # Mistral's stream
    ("delta",),  # Cohere's message-end
    ("chunk",),  # events of OpenAI's chat.completions.stream()
)
"""Where in a response, or in an item of a stream, the object that holds the usage is."""


_NONSENSE: Final = Usage(input_tokens=-1)


def read_usage(result: object) -> Usage | None:
    """Read the usage that a model's response reports, or None if it reports none that makes sense.

    Understands a `Usage` and the responses of OpenAI (chat, Responses, embeddings), Anthropic, Gemini, Bedrock,
    Mistral, Cohere, LangChain, Ollama, LiteLLM and pydantic-ai, as objects and as dicts off the wire. Counts that are
    negative, no whole numbers or in contradiction are unknown usage. Bare numbers are ignored: a judge that
    returns 7 has not used 7 tokens.
    """
    report = read_report(result)
    return None if report is None else report.usage


def read_report(result: object, *, streaming: bool = False) -> Report | None:
    """The usage that a response or an item of a stream reports, and how it goes with the rest of its stream."""
    if isinstance(result, Usage):
        return Report(result) if result.is_known else None
    if result is None or isinstance(result, (str, bytes, int, float)):
        return None
    for path in _HOLDERS:
        holder = field(result, *path) if path else result
        if holder is None or isinstance(holder, (str, bytes, int, float)):
            continue
        report = field(holder, *REPORTS)
        found = _shaped(holder if report is None else report, (ollama,) if report is None else SHAPES)
        if found is None:
            continue
        usage, shape = found
        images = field(field(holder, "tool_usage"), "image_gen")  # hosted tools are counted beside the model
        if images is not None:
            usage = _together(usage, openai_responses(images) or Usage())
        if not usage.is_known:
            return None
        if not streaming:
            usage = _together(*[usage] * _hidden_calls(holder))
        response = field(holder, "id", "response_id", "responseId")
        response = response if isinstance(response, str) else None
        chunk = shape is langchain or (shape is openai_responses and field(holder, "usage_metadata") is not None)
        running = shape in _RUNNING or field(result, "type") == "message_delta"  # Anthropic's, off the wire
        opens = field(result, "type") == "message_start"
        return Report(usage, response, chunk or (response is None and not running), opens)
    found = _shaped(result, SHAPES)  # the usage of a response by itself
    return Report(found[0], adds=True) if found is not None and found[0].is_known else None


def _shaped(report: object, shapes: tuple[Shape, ...]) -> tuple[Usage, Shape | None] | None:
    """A report's usage and the first shape that it has; None if it has none."""
    if isinstance(report, Usage):
        return report, None
    for shape in shapes:
        usage = shape(report)
        if usage is not None:
            return (_NONSENSE if _is_default(report, usage) else usage), shape
    return None


def _hidden_calls(response: object) -> int:
    """How many calls google-genai made for a response: with automatic function calling it reports the last alone.

    Each of them read less than the last one, so that so many times the last is never less than what was billed.
    """
    calls = 1
    history = field(response, "automatic_function_calling_history")
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


def _together(*usages: Usage) -> Usage:
    """The sum of usages; nonsense if one of them is."""
    total = Usage()
    for usage in usages:
        if not usage.is_known:
            return _NONSENSE
        total += usage
    return total


def _usage(
    read: Any,
    written: Any,
    *,
    cache_read: Any = None,
    cache_write: Any = None,
    reasoning: Any = None,
    total: Any = None,
) -> Usage:
    """A usage of counts that make sense together, or one that says of itself that they do not."""
    counts: list[int] = []
    for count in (read, written, cache_read, cache_write, reasoning, total):
        units = 0 if count is None else units_or_none(count)
        if units is None:
            return _NONSENSE
        counts.append(units)
    usage = Usage(*counts)
    tokens_in, _, from_cache, to_cache, _, _ = counts
    return _NONSENSE if from_cache + to_cache > tokens_in or usage.total_tokens > MAX_UNITS else usage


def _is_default(report: object, usage: Usage) -> bool:
    """Whether no count was on the wire: Mistral's SDK fills in zeros then, and so does pydantic-ai for its requests."""
    if usage.total_tokens:
        return False
    told = field(report, "model_fields_set")
    return (isinstance(told, set) and not told) or bool(units_or_none(field(report, "requests")))


def _either(details: object, names: tuple[str, ...], report: object, name: str) -> Any:
    """A count from the details, or from the report itself."""
    count = field(details, *names)
    return field(report, name) if count is None else count


def _sum(*counts: Any) -> Any:
    """The sum of the counts that are there; None if none is, and -1, which is no count, if one makes no sense."""
    known = [units_or_none(count) for count in counts if count is not None]
    if not known:
        return None
    return -1 if None in known else sum(count or 0 for count in known)


def _has(report: Any, *names: str) -> bool:
    try:
        if is_mapping(report.__class__):
            return any(name in report for name in names)
        return any(hasattr(report, name) for name in names)
    except Exception:
        return False
