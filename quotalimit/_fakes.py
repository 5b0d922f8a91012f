"""Answers of models as their SDKs hand them out, made without any SDK: what `quotalimit.testing` gives to tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from types import SimpleNamespace
from typing import Any, Final, Literal, NamedTuple, TypeAlias

Like: TypeAlias = Literal[
    "openai", "openai-responses", "anthropic", "gemini", "bedrock", "mistral", "cohere", "ollama", "langchain"
]
"""Whose answers a fake is like. `"openai"` is a chat completion, and what all who follow OpenAI return."""

Fields: TypeAlias = dict[str, Any]


class Counts(NamedTuple):
    """What a fake answer says and reports."""

    text: str
    read: int
    written: int

    @property
    def total(self) -> int:
        return self.read + self.written

    @property
    def pieces(self) -> list[str]:
        """The text in the pieces in which a stream brings it."""
        return self.text.split(" ") if " " not in self.text else [f"{word} " for word in self.text.split(" ")]


class FakeStream:
    """A stream of a fake answer: iterated either way, a context manager either way, and closed."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = iter(items)

    def __iter__(self) -> FakeStream:
        return self

    def __next__(self) -> Any:
        return next(self._items)

    def __aiter__(self) -> FakeStream:
        return self

    async def __anext__(self) -> Any:
        try:
            return next(self._items)
        except StopIteration:
            raise StopAsyncIteration from None

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> FakeStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the stream."""
        self._items = iter(())


def fake_response(
    text: str = "Hello.", *, input_tokens: int = 10, output_tokens: int = 5, like: Like = "openai"
) -> Any:
    """A model's answer that says `text` and reports its usage: `fake_response(input_tokens=900, like="anthropic")`.

    It has the attributes of the SDK's own (`.choices[0].message.content`, `.content[0].text`, `.output_text`, `.text`),
    and is a dict where the SDK returns one (Bedrock). Raises `ValueError` for an SDK that is not known.
    """
    return _maker(like).response(Counts(text, input_tokens, output_tokens))


def fake_stream(text: str = "Hello.", *, input_tokens: int = 10, output_tokens: int = 5, like: Like = "openai") -> Any:
    """The same answer as a stream, for sync and async code: the text in pieces, the usage where the SDK tells it."""
    stream = FakeStream(_maker(like).items(Counts(text, input_tokens, output_tokens)))
    return {"stream": stream} if like == "bedrock" else stream


def _maker(like: str) -> Maker:
    try:
        return _MAKERS[like]
    except KeyError:
        raise ValueError(f"no fake answers like {like!r}: there are those of {', '.join(_MAKERS)}") from None


def _objects(fields: Any) -> Any:
    """Fields as objects of an SDK have them: attributes, all the way down."""
    if isinstance(fields, list):
        return [_objects(each) for each in fields]
    if isinstance(fields, dict):
        return SimpleNamespace(**{name: _objects(value) for name, value in fields.items()})
    return fields


def _openai_usage(counts: Counts) -> Fields:
    return {"prompt_tokens": counts.read, "completion_tokens": counts.written, "total_tokens": counts.total}


def _openai(counts: Counts) -> Any:
    message = {"role": "assistant", "content": counts.text, "refusal": None, "tool_calls": None}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    head = {"id": "chatcmpl-fake", "object": "chat.completion", "created": 0, "model": "fake"}
    return _objects({**head, "choices": [choice], "usage": _openai_usage(counts)})


def _openai_chunks(counts: Counts) -> Iterator[Fields]:
    head = {"id": "chatcmpl-fake", "object": "chat.completion.chunk", "created": 0, "model": "fake"}
    for piece in counts.pieces:
        delta = {"role": "assistant", "content": piece, "tool_calls": None}
        yield {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}], "usage": None}
    end = {"role": None, "content": None, "tool_calls": None}
    yield {**head, "choices": [{"index": 0, "delta": end, "finish_reason": "stop"}], "usage": None}
    yield {**head, "choices": [], "usage": _openai_usage(counts)}


def _responses_fields(counts: Counts | None) -> Fields:
    """A response of OpenAI's; None for one that has only begun."""
    head: Fields = {"id": "resp_fake", "object": "response", "created_at": 0.0, "model": "fake", "error": None}
    head |= {"parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
    if counts is None:
        return {**head, "status": "in_progress", "output": [], "usage": None}
    content = {"type": "output_text", "text": counts.text, "annotations": []}
    item = {"id": "msg_fake", "type": "message", "role": "assistant", "status": "completed", "content": [content]}
    usage = {
        "input_tokens": counts.read,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": counts.written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": counts.total,
    }
    return {**head, "status": "completed", "output": [item], "usage": usage}


def _responses(counts: Counts) -> Any:
    return _objects({**_responses_fields(counts), "output_text": counts.text})


def _responses_events(counts: Counts) -> Iterator[Fields]:
    yield {"type": "response.created", "response": _responses_fields(None), "sequence_number": 0}
    place = {"item_id": "msg_fake", "output_index": 0, "content_index": 0, "logprobs": []}
    number = 0
    for number, piece in enumerate(counts.pieces, start=1):
        yield {"type": "response.output_text.delta", "delta": piece, **place, "sequence_number": number}
    yield {"type": "response.completed", "response": _responses_fields(counts), "sequence_number": number + 1}


def _anthropic_fields(content: list[Fields], read: int, written: int, stop_reason: str | None) -> Fields:
    usage = {"input_tokens": read, "output_tokens": written}
    usage |= {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
    head = {"id": "msg_fake", "type": "message", "role": "assistant", "model": "fake"}
    return {**head, "content": content, "stop_reason": stop_reason, "stop_sequence": None, "usage": usage}


def _anthropic(counts: Counts) -> Any:
    block = {"type": "text", "text": counts.text, "citations": None}
    return _objects(_anthropic_fields([block], counts.read, counts.written, "end_turn"))


def _anthropic_events(counts: Counts) -> Iterator[Fields]:
    yield {"type": "message_start", "message": _anthropic_fields([], counts.read, min(1, counts.written), None)}
    yield {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": "", "citations": None}}
    for piece in counts.pieces:
        yield {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": piece}}
    yield {"type": "content_block_stop", "index": 0}
    ended = {"stop_reason": "end_turn", "stop_sequence": None}
    yield {"type": "message_delta", "delta": ended, "usage": {"output_tokens": counts.written}}
    yield {"type": "message_stop"}


def _gemini_fields(text: str, read: int, written: int, finish_reason: str | None) -> Fields:
    usage = {"prompt_token_count": read, "candidates_token_count": written, "total_token_count": read + written}
    candidate = {"content": {"role": "model", "parts": [{"text": text}]}, "finish_reason": finish_reason, "index": 0}
    return {"candidates": [candidate], "usage_metadata": usage, "response_id": "fake", "model_version": "fake"}


def _gemini(counts: Counts) -> Any:
    return _objects({**_gemini_fields(counts.text, counts.read, counts.written, "STOP"), "text": counts.text})


def _gemini_chunks(counts: Counts) -> Iterator[Fields]:
    last = len(counts.pieces)
    for number, piece in enumerate(counts.pieces, start=1):
        running = counts.written * number // last
        yield {**_gemini_fields(piece, counts.read, running, "STOP" if number == last else None), "text": piece}


def _bedrock_usage(counts: Counts) -> Fields:
    return {"inputTokens": counts.read, "outputTokens": counts.written, "totalTokens": counts.total}


def _bedrock(counts: Counts) -> Fields:
    message = {"role": "assistant", "content": [{"text": counts.text}]}
    return {
        "output": {"message": message},
        "stopReason": "end_turn",
        "usage": _bedrock_usage(counts),
        "metrics": {"latencyMs": 0},
    }


def _bedrock_events(counts: Counts) -> Iterator[Fields]:
    yield {"messageStart": {"role": "assistant"}}
    for piece in counts.pieces:
        yield {"contentBlockDelta": {"contentBlockIndex": 0, "delta": {"text": piece}}}
    yield {"contentBlockStop": {"contentBlockIndex": 0}}
    yield {"messageStop": {"stopReason": "end_turn"}}
    yield {"metadata": {"usage": _bedrock_usage(counts), "metrics": {"latencyMs": 0}}}


def _mistral_events(counts: Counts) -> Iterator[Fields]:
    head = {"id": "fake", "object": "chat.completion.chunk", "created": 0, "model": "fake"}
    for piece in counts.pieces:
        choice = {"index": 0, "delta": {"role": "assistant", "content": piece}, "finish_reason": None}
        yield {"data": {**head, "choices": [choice], "usage": None}}
    choice = {"index": 0, "delta": {"content": ""}, "finish_reason": "stop"}
    yield {"data": {**head, "choices": [choice], "usage": _openai_usage(counts)}}


def _cohere_usage(counts: Counts) -> Fields:
    tokens = {"input_tokens": float(counts.read), "output_tokens": float(counts.written)}
    return {"tokens": tokens, "billed_units": tokens}


def _cohere(counts: Counts) -> Any:
    message = {"role": "assistant", "content": [{"type": "text", "text": counts.text}]}
    return _objects({"id": "fake", "finish_reason": "COMPLETE", "message": message, "usage": _cohere_usage(counts)})


def _cohere_events(counts: Counts) -> Iterator[Fields]:
    yield {"type": "message-start", "id": "fake", "delta": {"message": {"role": "assistant"}}}
    for piece in counts.pieces:
        yield {"type": "content-delta", "index": 0, "delta": {"message": {"content": {"text": piece}}}}
    yield {"type": "message-end", "id": "fake", "delta": {"finish_reason": "COMPLETE", "usage": _cohere_usage(counts)}}


def _ollama_fields(text: str, counts: Counts | None) -> Fields:
    """An answer of Ollama's; None for a part of one, which tells no counts."""
    told = {"prompt_eval_count": counts and counts.read, "eval_count": counts and counts.written}
    message = {"role": "assistant", "content": text}
    return {
        "model": "fake",
        "created_at": "1970-01-01T00:00:00Z",
        "done": counts is not None,
        "message": message,
    } | told


def _ollama_parts(counts: Counts) -> Iterator[Fields]:
    for piece in counts.pieces:
        yield _ollama_fields(piece, None)
    yield _ollama_fields("", counts)


def _langchain(text: str, counts: Counts | None) -> Any:
    """A message of LangChain's, whose usage is a dict; None for a part of one, which tells no counts."""
    usage: Fields | None = None
    if counts is not None:
        usage = {"input_tokens": counts.read, "output_tokens": counts.written, "total_tokens": counts.total}
        usage |= {"input_token_details": {}, "output_token_details": {}}
    return SimpleNamespace(type="ai", content=text, id="run-fake", tool_calls=[], usage_metadata=usage)


def _langchain_chunks(counts: Counts) -> Iterator[Any]:
    return chain((_langchain(piece, None) for piece in counts.pieces), [_langchain("", counts)])


class Maker(NamedTuple):
    """What makes the fake answers of one SDK: at once, and in the items of a stream."""

    response: Callable[[Counts], Any]
    items: Callable[[Counts], Iterator[Any]]


def _of_objects(items: Callable[[Counts], Iterator[Fields]]) -> Callable[[Counts], Iterator[Any]]:
    return lambda counts: map(_objects, items(counts))


_MAKERS: Final[dict[str, Maker]] = {
    "openai": Maker(_openai, _of_objects(_openai_chunks)),
    "openai-responses": Maker(_responses, _of_objects(_responses_events)),
    "anthropic": Maker(_anthropic, _of_objects(_anthropic_events)),
    "gemini": Maker(_gemini, _of_objects(_gemini_chunks)),
    "bedrock": Maker(_bedrock, _bedrock_events),
    "mistral": Maker(_openai, _of_objects(_mistral_events)),
    "cohere": Maker(_cohere, _of_objects(_cohere_events)),
    "ollama": Maker(
        lambda counts: _objects(_ollama_fields(counts.text, counts)),
        _of_objects(_ollama_parts),
    ),
    "langchain": Maker(lambda counts: _langchain(counts.text, counts), _langchain_chunks),
}
