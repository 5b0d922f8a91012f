"""The fake answers of `quotalimit.testing` are what the SDKs themselves would make of them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import anthropic.types
import botocore.session
import cohere
import cohere.v2.types
import langchain_core.messages
import ollama
import openai.types.chat
import openai.types.responses
import pytest
from botocore.validate import ParamValidator
from google.genai import types as genai
from mistralai.client import models as mistral
from pydantic import TypeAdapter

from quotalimit import Usage, limiters_of, read_usage, token_budget
from quotalimit.testing import fake_response, fake_stream

from ..helpers import used

Check = Callable[[Any], Any]


def fields_of(fake: Any) -> Any:
    """What a fake is made of, as it would come off the wire; what is a property of the SDK's own objects left out."""
    if isinstance(fake, list):
        return [fields_of(each) for each in fake]
    if isinstance(fake, SimpleNamespace):
        return {name: fields_of(value) for name, value in vars(fake).items()}
    return fake


def validated(kind: Any, *properties: str) -> Check:
    """The SDK's own object, which its model makes of a fake, with the same properties."""
    adapter = TypeAdapter[Any](kind)

    def check(fake: Any) -> Any:
        fields = fields_of(fake)
        shown = {name: fields.pop(name) for name in properties}
        own = adapter.validate_python(fields)
        assert {name: getattr(own, name) for name in properties} == shown
        return own

    return check


def langchain(kind: Any) -> Check:
    return lambda fake: kind(content=fake.content, id=fake.id, usage_metadata=fake.usage_metadata)


BEDROCK = botocore.session.get_session().get_service_model("bedrock-runtime")


def bedrock(shape: Any) -> Check:
    def check(fake: Any) -> Any:
        report = ParamValidator().validate(fake, shape)
        assert not report.has_errors(), report.generate_report()
        return fake

    return check


SDKS: dict[Any, tuple[Check, Check]] = {
    "openai": (
        validated(openai.types.chat.ChatCompletion),
        validated(openai.types.chat.ChatCompletionChunk),
    ),
    "openai-responses": (
        validated(openai.types.responses.Response, "output_text"),
        validated(openai.types.responses.ResponseStreamEvent),
    ),
    "anthropic": (
        validated(anthropic.types.Message),
        validated(anthropic.types.RawMessageStreamEvent),
    ),
    "gemini": (
        validated(genai.GenerateContentResponse, "text"),
        validated(genai.GenerateContentResponse, "text"),
    ),
    "bedrock": (
        bedrock(BEDROCK.operation_model("Converse").output_shape),
        bedrock(BEDROCK.shape_for("ConverseStreamOutput")),
    ),
    "mistral": (validated(mistral.ChatCompletionResponse), validated(mistral.CompletionEvent)),
    "cohere": (validated(cohere.V2ChatResponse), validated(cohere.v2.types.V2ChatStreamResponse)),
    "ollama": (validated(ollama.ChatResponse), validated(ollama.ChatResponse)),
    "langchain": (langchain(langchain_core.messages.AIMessage), langchain(langchain_core.messages.AIMessageChunk)),
}
TEXT = "It is a good morning."


@pytest.mark.parametrize("like", SDKS)
def test_the_sdk_accepts_a_fake_answer_and_reports_the_same(like: Any) -> None:
    fake = fake_response(TEXT, input_tokens=30, output_tokens=7, like=like)
    own = SDKS[like][0](fake)
    assert read_usage(own) == read_usage(fake) == Usage(input_tokens=30, output_tokens=7)


@pytest.mark.parametrize("like", SDKS)
def test_the_sdk_accepts_the_items_of_a_fake_stream_and_they_are_charged_the_same(like: Any) -> None:
    @token_budget("1_000/day", key="user")
    def items(user: str) -> Any:
        stream = fake_stream(TEXT, input_tokens=30, output_tokens=7, like=like)
        for item in stream["stream"] if like == "bedrock" else stream:
            yield SDKS[like][1](item) if user == "sdk" else item

    for user in ("sdk", "fake"):
        assert len(list(items(user))) >= 5
        assert used(limiters_of(items)[0], user) == 37
