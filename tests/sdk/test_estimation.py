"""Estimates of a call before it is made, of text against a real vocabulary, and of what a model wrote (rules 7, 8)."""

from __future__ import annotations

import argparse
import base64
import hashlib
import heapq
import inspect
import json
import sys
import textwrap
import warnings
from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import MagicMock, Mock

import anthropic.types
import langchain_core.messages as langchain
import ollama
import openai.types.chat
import openai.types.responses
import pytest
from anthropic._models import construct_type as anthropic_construct
from anthropic.lib.streaming._messages import accumulate_event, build_events
from cohere.core.unchecked_base_model import construct_type as cohere_construct
from cohere.v2.types import V2ChatResponse, V2ChatStreamResponse
from google.genai import types as genai
from mistralai.client import models as mistral
from openai import NOT_GIVEN
from openai._models import construct_type as openai_construct
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.lib.streaming.responses._responses import ResponseStreamState

from quotalimit import TokenBudget, estimate_tokens, everyone, token_budget
from quotalimit.estimation import TOKEN, tokens_of, weigh_answer, weigh_text

from ..helpers import used

TEN = "x" * 40  # ten tokens: a token for four bytes of words
OF_ROLE = 1  # and one for "user", or "text"


# As a reserve: what is held is what the call may use.


def plain(prompt: str) -> None: ...


def capped(prompt: str, max_tokens: int | None = 100) -> None: ...


def capped_by_keyword(prompt: str, *, max_output_tokens: int = 30) -> None: ...


def copied(prompt: str, max_tokens: int = 100, n: int = 1) -> None: ...


def with_options(prompt: str, **options: Any) -> None: ...


def with_config(prompt: str, config: Any = None) -> None: ...


def with_default_config(prompt: str, config: Any = {"max_tokens": 300}) -> None: ...  # noqa: B006


def of_messages(messages: Any, system: str = "") -> None: ...


def anything(*args: Any, **kwargs: Any) -> None: ...


def positional_only(prompt: str, /, **options: Any) -> None: ...


def named_as_its_own(parts: str, arguments: str) -> None: ...


def nothing() -> None: ...


USER = {"role": "user", "content": TEN}
PARTS = {"role": "user", "content": [{"type": "text", "text": TEN}]}

RESERVES: list[tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any], int]] = [
    ("text", plain, (TEN,), {}, 10),
    ("text by keyword", plain, (), {"prompt": TEN}, 10),
    ("bytes", plain, (TEN.encode(),), {}, 10),
    ("half a token is one", plain, ("xx",), {}, 1),
    ("no text", plain, ("",), {}, 1),
    ("None", plain, (None,), {}, 1),
    ("a number", plain, (12345,), {}, 1),
    ("no arguments", nothing, (), {}, 1),
    ("default cap", capped, (TEN,), {}, 110),
    ("cap", capped, (TEN, 7), {}, 17),
    ("no cap", capped, (TEN, None), {}, 10),
    ("cap that is none", capped, (TEN, -1), {}, 10),
    ("boolean cap", capped, (TEN, True), {}, 10),
    ("default cap of a keyword", capped_by_keyword, (TEN,), {}, 40),
    ("cap in **kwargs", with_options, (TEN,), {"max_completion_tokens": 200}, 210),
    ("None and a cap", with_options, (TEN,), {"max_tokens": None, "max_completion_tokens": 200}, 210),
    ("cap in a dict", with_config, (TEN, {"max_output_tokens": 300}), {}, 310),
    ("cap in a default dict", with_default_config, (TEN,), {}, 310),
    ("cap in an object", with_config, (TEN, SimpleNamespace(max_tokens=300)), {}, 310),
    ("Gemini's config", with_config, (TEN, genai.GenerateContentConfig(max_output_tokens=300)), {}, 310),
    ("Gemini's copies", with_config, (TEN, {"maxOutputTokens": 300, "candidateCount": 2}), {}, 610),
    ("Bedrock's config", with_options, (TEN,), {"inferenceConfig": {"maxTokens": 300}}, 310),
    ("Ollama's options", with_options, (TEN,), {"options": {"num_predict": 300}}, 310),
    ("Ollama's options without a cap", with_options, (TEN,), {"options": {"num_predict": -1}}, 10),
    ("greatest of several caps", with_options, (TEN,), {"max_tokens": 50, "config": {"max_tokens": 300}}, 310),
    ("copies", copied, (TEN,), {"n": 3}, 310),
    ("copies by position", copied, (TEN, 50, 4), {}, 210),
    ("no copies", copied, (TEN,), {"n": 0}, 110),
    ("message", of_messages, ([USER],), {}, 10 + OF_ROLE),
    ("messages", of_messages, ([USER, dict(USER)], TEN), {}, 30 + 2 * OF_ROLE),
    ("message of parts", of_messages, ([PARTS],), {}, 10 + 2 * OF_ROLE),
    ("tuple of texts", of_messages, ((TEN, TEN),), {}, 20),
    ("LangChain's messages", of_messages, ([langchain.SystemMessage(TEN), langchain.HumanMessage(TEN)],), {}, 20),
    ("*args", anything, (TEN, TEN), {}, 20),
    ("*args and **kwargs", anything, (TEN,), {"prompt": TEN, "max_tokens": 5}, 25),
    ("a keyword called args", anything, (TEN,), {"args": TEN}, 20),
    ("a keyword called kwargs", anything, (TEN,), {"kwargs": TEN}, 20),
    ("a keyword called like a positional", positional_only, (TEN,), {"prompt": TEN}, 20),
    ("parameters called parts and arguments", named_as_its_own, (TEN, TEN), {}, 20),
]


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "tokens"), [row[1:] for row in RESERVES], ids=[row[0] for row in RESERVES]
)
def test_rule_7_the_estimate_is_held_while_the_call_runs(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tokens: int
) -> None:
    budget = TokenBudget("1_000_000/day")
    held: list[int] = []
    signature = inspect.signature(function)

    def call(*args: Any, **kwargs: Any) -> None:
        held.append(used(budget, everyone()))

    call.__signature__ = signature  # type: ignore[attr-defined]
    token_budget(budget, key=everyone, reserve=estimate_tokens)(call)(*args, **kwargs)
    assert held == [tokens]


def test_gemini_contents_are_estimated() -> None:
    contents = [genai.Content(role="user", parts=[genai.Part(text=TEN), genai.Part(text=TEN)])]
    assert 20 <= estimate_tokens(contents) <= 20 + OF_ROLE


async def test_every_kind_of_function_may_reserve_by_estimate() -> None:
    budget = TokenBudget("1_000_000/day")
    decorate = token_budget(budget, key="user", reserve=estimate_tokens)
    held: list[int] = []

    class Bot:
        @decorate
        def ask(self, user: int, prompt: str, max_tokens: int = 5) -> None:
            held.append(used(budget, user))

        @classmethod
        @decorate
        def ask_class(cls, user: int, prompt: str, max_tokens: int = 5) -> None:
            held.append(used(budget, user))

        @staticmethod
        @decorate
        def ask_static(user: int, prompt: str, max_tokens: int = 5) -> None:
            held.append(used(budget, user))

    @decorate
    async def ask_later(user: int, prompt: str, max_tokens: int = 5) -> None:
        held.append(used(budget, user))

    @decorate
    def stream(user: int, prompt: str, max_tokens: int = 5) -> Generator[None, None, None]:
        held.append(used(budget, user))
        yield

    @decorate
    async def stream_later(user: int, prompt: str, max_tokens: int = 5) -> AsyncGenerator[None, None]:
        held.append(used(budget, user))
        yield

    Bot().ask(1, TEN)
    Bot.ask_class(2, TEN)
    Bot.ask_static(3, TEN)
    await ask_later(4, TEN)
    list(stream(5, TEN))
    assert [item async for item in stream_later(6, TEN)] == [None]
    assert held == [15] * 6


def test_an_estimate_is_at_least_one() -> None:
    assert estimate_tokens() == estimate_tokens("") == estimate_tokens(prompt=[]) == 1
    assert tokens_of(0) == 1


# Against a real vocabulary.

ENGLISH = """The committee met on Thursday to discuss whether the old bridge should be repaired or replaced. Several
engineers argued that the foundations, although more than a century old, were still in excellent condition; others
pointed out that traffic had doubled in the last ten years and would probably double again. In the end nobody was
surprised when the decision was put off until the spring. Please summarise the arguments of both sides in three
sentences, and explain which of them you find more convincing."""

GERMAN = """Der Ausschuss traf sich am Donnerstag, um darüber zu beraten, ob die alte Brücke instand gesetzt oder durch
eine neue ersetzt werden sollte. Mehrere Ingenieure erklärten, die Fundamente seien trotz ihres Alters von über hundert
Jahren in ausgezeichnetem Zustand; andere wiesen darauf hin, dass sich der Verkehr in den letzten zehn Jahren verdoppelt
habe. Am Ende war niemand überrascht, als die Entscheidung auf das Frühjahr verschoben wurde. Bitte fasse die Gründe
beider Seiten in drei Sätzen zusammen."""

FRENCH = """La commission s'est réunie jeudi afin de décider si le vieux pont devait être réparé ou remplacé. Plusieurs
ingénieurs ont soutenu que les fondations, bien que vieilles de plus d'un siècle, étaient encore en excellent état ;
d'autres ont fait remarquer que la circulation avait doublé en dix ans et doublerait sans doute encore. Finalement,
personne n'a été surpris lorsque la décision a été reportée au printemps. Résumez les arguments des deux camps en trois
phrases, s'il vous plaît."""

SPANISH = """La comisión se reunió el jueves para debatir si el viejo puente debía repararse o sustituirse. Varios
ingenieros sostuvieron que los cimientos, aunque tienen más de un siglo, seguían en excelente estado; otros señalaron
que el tráfico se había duplicado en los últimos diez años y que probablemente volvería a duplicarse. Al final nadie se
sorprendió cuando la decisión se aplazó hasta la primavera. Resume los argumentos de ambas partes en tres frases y
explica cuál te parece más convincente."""

RUSSIAN = """В четверг комиссия собралась, чтобы обсудить, следует ли отремонтировать старый мост или построить новый.
Несколько инженеров утверждали, что фундамент, которому уже больше ста лет, по-прежнему находится в отличном состоянии;
другие указывали, что движение за последние десять лет удвоилось и, вероятно, удвоится снова. В конце концов никто не
удивился, когда решение отложили до весны. Пожалуйста, изложи доводы обеих сторон в трёх предложениях."""

ARABIC = """اجتمعت اللجنة يوم الخميس لمناقشة ما إذا كان ينبغي إصلاح الجسر القديم أو استبداله. وقال عدد من المهندسين إن
الأساسات لا تزال في حالة ممتازة على الرغم من أن عمرها يزيد على مئة عام، بينما أشار آخرون إلى أن حركة المرور تضاعفت خلال
السنوات العشر الماضية وأنها ستتضاعف على الأرجح مرة أخرى. وفي النهاية لم يفاجأ أحد عندما تأجل القرار إلى الربيع. من فضلك
لخص حجج الطرفين في ثلاث جمل."""

HINDI = (
    "समिति की बैठक गुरुवार को हुई, जिसमें इस बात पर चर्चा की गई कि पुराने पुल की मरम्मत की जाए या उसकी "
    "जगह नया पुल बनाया जाए। कई इंजीनियरों ने कहा कि नींव सौ साल से अधिक पुरानी होने के बावजूद अब भी बहुत "
    "अच्छी हालत में है; दूसरों ने बताया कि पिछले दस वर्षों में यातायात दोगुना हो गया है और शायद फिर से "
    "दोगुना हो जाएगा। अंत में जब निर्णय वसंत तक टाल दिया गया तो किसी को आश्चर्य नहीं हुआ। कृपया दोनों "
    "पक्षों के तर्कों को तीन वाक्यों में संक्षेप में बताइए।"
)

CHINESE = (
    "委员会于星期四开会，讨论这座旧桥应该维修还是重建。几位工程师认为，虽然地基已有一百多年的历史，但状况"
    "仍然非常好；另一些人则指出，过去十年里交通量翻了一番，而且很可能还会再翻一番。最后，当决定被推迟到明"
    "年春天时，谁也没有感到意外。请用三句话概括双方的理由，并说明你认为哪一方更有说服力。"
)

JAPANESE = (
    "委員会は木曜日に会議を開き、古い橋を修理するべきか、それとも架け替えるべきかについて話し合いました。"
    "何人かの技術者は、基礎は百年以上前のものではあるが、今でも非常に良い状態にあると主張しました。一方で"
    "、この十年間で交通量が二倍になり、おそらく今後さらに倍増するだろうと指摘する人もいました。結局、決定"
    "が春まで延期されたとき、誰も驚きませんでした。両者の意見を三つの文でまとめてください。"
)

KOREAN = (
    "위원회는 목요일에 모여 오래된 다리를 수리할 것인지 아니면 새로 지을 것인지 논의했습니다. 여러 "
    "기술자들은 기초가 백 년이 넘었지만 여전히 매우 좋은 상태라고 주장했습니다. 다른 사람들은 지난 십 년 "
    "동안 교통량이 두 배로 늘었고 앞으로도 다시 두 배로 늘어날 것이라고 지적했습니다. 결국 결정이 봄까지 "
    "미루어졌을 때 아무도 놀라지 않았습니다. 양쪽의 주장을 세 문장으로 요약해 주세요."
)

MARKDOWN = """# Installing

Run the following command, *then* restart your shell:

```sh
pip install --upgrade example-package
```

## Options

| option      | default | meaning                                  |
|-------------|---------|------------------------------------------|
| `--verbose` | off     | print what is being done                 |
| `--jobs N`  | 4       | run at most **N** jobs at the same time  |

1. Open [the settings page](https://example.org/settings).
2. Choose *Advanced*, then **Reset**.
   - Your files are kept.
   - Your preferences are not.

> Note: this cannot be undone. See [issue 1042](https://example.org/issues/1042) for why.
"""

RECORDS = [
    {
        "id": 1000 + number,
        "name": name,
        "email": f"{name.lower()}@example.org",
        "active": number % 2 == 0,
        "tags": ["customer", "newsletter"][: 1 + number % 2],
        "address": {"street": "12 Station Road", "city": "Springfield", "zip": "04100"},
        "balance": number * 17.25,
    }
    for number, name in enumerate(["Alice", "Bob", "Charlotte", "David", "Eleanor", "Frank"])
]

BYTES = b"".join(hashlib.sha256(bytes([number])).digest() for number in range(40))

# What `weigh_text` claims of itself: 0.8 to 1.3 of the truth for some; for others it names a figure, which is what it
# is about. Of Spanish and digits it claims nothing: the bounds are what was measured, near enough.
FAIR = (0.9, 1.3)
TECHNICAL = (0.9, 1.6)
SAMPLES: list[tuple[str, str, tuple[float, float]]] = [
    ("English", ENGLISH, FAIR),
    ("German", GERMAN, FAIR),
    ("French", FRENCH, FAIR),
    ("Spanish", SPANISH, FAIR),
    ("Russian", RUSSIAN, (1.5, 1.9)),
    ("Arabic", ARABIC, (1.2, 1.6)),
    ("Hindi", HINDI, (1.7, 2.1)),
    ("Chinese", CHINESE, FAIR),
    ("Japanese", JAPANESE, FAIR),
    ("Korean", KOREAN, FAIR),
    ("Python: textwrap", inspect.getsource(textwrap), TECHNICAL),
    ("Python: heapq", inspect.getsource(heapq), TECHNICAL),
    ("Python: argparse", inspect.getsource(argparse), TECHNICAL),
    ("JSON, indented", json.dumps(RECORDS, indent=2), TECHNICAL),
    ("JSON", json.dumps(RECORDS), TECHNICAL),
    ("JSON, compact", json.dumps(RECORDS, separators=(",", ":")), TECHNICAL),
    ("Markdown", MARKDOWN, TECHNICAL),
    ("digits", " ".join(str(number * 7_919) for number in range(1, 200)), (0.8, 1.6)),
    ("emoji", "😀🎉🚀👍🏽❤️🔥🙏😂🤔✅🌍🐍" * 20, (0.4, 0.8)),
    ("base64", base64.b64encode(BYTES).decode(), (0.3, 0.5)),
]


@pytest.fixture(scope="module")
def vocabulary() -> Any:
    """OpenAI's o200k, as a package ships it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it opens its data in a deprecated way
        import bpe_openai

        return bpe_openai.get_encoding("o200k_base")


@pytest.mark.parametrize(("text", "bounds"), [row[1:] for row in SAMPLES], ids=[row[0] for row in SAMPLES])
def test_an_estimate_is_as_far_off_as_it_claims(vocabulary: Any, text: str, bounds: tuple[float, float]) -> None:
    ratio = estimate_tokens(text) / len(vocabulary.encode(text))
    assert bounds[0] <= ratio <= bounds[1]


def test_the_weight_of_a_text_is_that_of_its_parts() -> None:
    """A stream is weighed chunk by chunk, and cut anywhere between characters."""
    for _, text, _ in SAMPLES:
        assert sum(weigh_text(piece) for piece in pieces(text, 3)) == weigh_text(text) == weigh_text(text.encode())
    assert weigh_text("\ud800") > 0


# What a model wrote, in whole answers and in streams: counted about once.


def pieces(text: str, size: int = 7) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


SAID, THOUGHT = ENGLISH, GERMAN
ARGUMENTS = {"name": "report.txt", "text": "Draft.", "body": FRENCH, "tags": ["bridge", "committee"]}
ASKED = json.dumps(ARGUMENTS, ensure_ascii=False)
SIGNATURE = base64.b64encode(BYTES).decode()


def chat_chunk(**delta: Any) -> dict[str, Any]:
    choices = [{"index": 0, "delta": delta, "finish_reason": None}]
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices, "usage": None}


def tool_chunk(arguments: str, **first: Any) -> dict[str, Any]:
    function = {"arguments": arguments, **({"name": "write"} if first else {})}
    return chat_chunk(tool_calls=[{"index": 0, "type": "function", "function": function, **first}])


CHAT = {
    "id": "c",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [
        {
            "index": 0,
            "finish_reason": "tool_calls",
            "logprobs": None,
            "message": {
                "role": "assistant",
                "content": SAID,
                "tool_calls": [
                    {"id": "t", "type": "function", "function": {"name": "write", "arguments": ASKED}},
                ],
            },
        }
    ],
}
REASONED = json.loads(json.dumps(CHAT))
REASONED["choices"][0]["message"]["reasoning_content"] = THOUGHT

CHAT_CHUNKS = [
    chat_chunk(role="assistant", content=""),
    *(chat_chunk(content=piece) for piece in pieces(SAID)),
    tool_chunk("", id="t"),
    *(tool_chunk(piece) for piece in pieces(ASKED)),
]
REASONED_CHUNKS = [*(chat_chunk(reasoning_content=piece) for piece in pieces(THOUGHT)), *CHAT_CHUNKS]

RESPONSE = {
    "id": "r",
    "object": "response",
    "created_at": 1,
    "model": "m",
    "status": "completed",
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
    "instructions": "Instructions of the caller's. " * 50,
    "text": {"format": {"type": "text"}},
    "reasoning": {"effort": "medium", "summary": None},
    "output": [
        {"type": "reasoning", "id": "a", "summary": [{"type": "summary_text", "text": THOUGHT}]},
        {
            "type": "message",
            "id": "b",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": SAID, "annotations": []}],
        },
        {"type": "function_call", "id": "c", "call_id": "c", "name": "write", "arguments": ASKED},
    ],
}


def responses_events() -> list[dict[str, Any]]:
    begun = {**RESPONSE, "status": "in_progress", "output": []}
    reasoning, message, function = RESPONSE["output"]
    thinking = {"item_id": "a", "output_index": 0, "summary_index": 0}
    saying = {"item_id": "b", "output_index": 1, "content_index": 0}
    asking = {"item_id": "c", "output_index": 2}
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": begun},
        {"type": "response.in_progress", "response": begun},
        {"type": "response.output_item.added", "output_index": 0, "item": {**reasoning, "summary": []}},
        {"type": "response.reasoning_summary_part.added", **thinking, "part": {"type": "summary_text", "text": ""}},
        *({"type": "response.reasoning_summary_text.delta", **thinking, "delta": piece} for piece in pieces(THOUGHT)),
        {"type": "response.reasoning_summary_text.done", **thinking, "text": THOUGHT},
        {"type": "response.reasoning_summary_part.done", **thinking, "part": reasoning["summary"][0]},
        {"type": "response.output_item.done", "output_index": 0, "item": reasoning},
        {"type": "response.output_item.added", "output_index": 1, "item": {**message, "content": []}},
        {
            "type": "response.content_part.added",
            **saying,
            "part": {"type": "output_text", "text": "", "annotations": []},
        },
        *({"type": "response.output_text.delta", **saying, "delta": piece, "logprobs": []} for piece in pieces(SAID)),
        {"type": "response.output_text.done", **saying, "text": SAID, "logprobs": []},
        {"type": "response.content_part.done", **saying, "part": message["content"][0]},
        {"type": "response.output_item.done", "output_index": 1, "item": message},
        {"type": "response.output_item.added", "output_index": 2, "item": {**function, "arguments": ""}},
        *({"type": "response.function_call_arguments.delta", **asking, "delta": piece} for piece in pieces(ASKED)),
        {"type": "response.function_call_arguments.done", **asking, "name": "write", "arguments": ASKED},
        {"type": "response.output_item.done", "output_index": 2, "item": function},
        {"type": "response.completed", "response": RESPONSE},
    ]
    return [{**event, "sequence_number": number} for number, event in enumerate(events)]


MESSAGE = {
    "id": "m",
    "type": "message",
    "role": "assistant",
    "model": "m",
    "stop_reason": "tool_use",
    "stop_sequence": None,
    "usage": {"input_tokens": 1, "output_tokens": 1},
    "content": [
        {"type": "thinking", "thinking": THOUGHT, "signature": SIGNATURE},
        {"type": "text", "text": SAID},
        {"type": "tool_use", "id": "t", "name": "write", "input": ARGUMENTS},
    ],
}


def anthropic_events() -> list[dict[str, Any]]:
    def delta(index: int, kind: str, **fields: str) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": index, "delta": {"type": kind, **fields}}

    def block(index: int, **fields: Any) -> dict[str, Any]:
        return {"type": "content_block_start", "index": index, "content_block": fields}

    return [
        {"type": "message_start", "message": {**MESSAGE, "content": [], "stop_reason": None}},
        block(0, type="thinking", thinking="", signature=""),
        *(delta(0, "thinking_delta", thinking=piece) for piece in pieces(THOUGHT)),
        delta(0, "signature_delta", signature=SIGNATURE),
        {"type": "content_block_stop", "index": 0},
        block(1, type="text", text=""),
        *(delta(1, "text_delta", text=piece) for piece in pieces(SAID)),
        {"type": "content_block_stop", "index": 1},
        block(2, type="tool_use", id="t", name="write", input={}),
        *(delta(2, "input_json_delta", partial_json=piece) for piece in pieces(ASKED)),
        {"type": "content_block_stop", "index": 2},
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 9}},
        {"type": "message_stop"},
    ]


def gemini(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"candidates": [{"content": {"role": "model", "parts": list(parts)}, "index": 0}], "modelVersion": "m"}


GEMINI_PARTS: list[dict[str, Any]] = [
    {"text": THOUGHT, "thought": True},
    {"text": SAID, "thoughtSignature": base64.b64encode(b"signed").decode()},
    {"functionCall": {"name": "write", "args": ARGUMENTS}},
]
GEMINI_CHUNKS = [
    *(gemini({"text": piece, "thought": True}) for piece in pieces(THOUGHT)),
    *(gemini({"text": piece}) for piece in pieces(SAID)),
    gemini(GEMINI_PARTS[2]),
]

BEDROCK = {
    "output": {
        "message": {
            "role": "assistant",
            "content": [
                {"reasoningContent": {"reasoningText": {"text": THOUGHT, "signature": SIGNATURE}}},
                {"text": SAID},
                {"toolUse": {"toolUseId": "t", "name": "write", "input": ARGUMENTS}},
            ],
        }
    },
    "stopReason": "tool_use",
    "metrics": {"latencyMs": 900},
}
BEDROCK_EVENTS: list[dict[str, Any]] = [
    {"messageStart": {"role": "assistant"}},
    *(
        {"contentBlockDelta": {"delta": {"reasoningContent": {"text": piece}}, "contentBlockIndex": 0}}
        for piece in pieces(THOUGHT)
    ),
    {"contentBlockDelta": {"delta": {"reasoningContent": {"signature": SIGNATURE}}, "contentBlockIndex": 0}},
    {"contentBlockStop": {"contentBlockIndex": 0}},
    *({"contentBlockDelta": {"delta": {"text": piece}, "contentBlockIndex": 1}} for piece in pieces(SAID)),
    {"contentBlockStart": {"start": {"toolUse": {"toolUseId": "t", "name": "write"}}, "contentBlockIndex": 2}},
    *(
        {"contentBlockDelta": {"delta": {"toolUse": {"input": piece}}, "contentBlockIndex": 2}}
        for piece in pieces(ASKED)
    ),
    {"messageStop": {"stopReason": "tool_use"}},
]


def mistral_message(**fields: Any) -> dict[str, Any]:
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": THOUGHT}]}
    content = [thinking, {"type": "text", "text": SAID}]
    calls = [{"id": "t", "type": "function", "function": {"name": "write", "arguments": ASKED}, "index": 0}]
    message = {"role": "assistant", "content": content, "tool_calls": calls}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return {**CHAT, "choices": choices, "usage": {}, **fields}


def mistral_events() -> list[dict[str, Any]]:
    def thought(piece: str) -> dict[str, Any]:
        return chat_chunk(content=[{"type": "thinking", "thinking": [{"type": "text", "text": piece}]}])

    call = chat_chunk(
        tool_calls=[{"id": "t", "type": "function", "function": {"name": "write", "arguments": ASKED}, "index": 0}]
    )
    chunks = [*map(thought, pieces(THOUGHT)), *(chat_chunk(content=piece) for piece in pieces(SAID)), call]
    return [{"data": chunk} for chunk in chunks]


COHERE = {
    "id": "c",
    "finish_reason": "TOOL_CALL",
    "message": {
        "role": "assistant",
        "tool_plan": THOUGHT,
        "content": [{"type": "text", "text": SAID}],
        "tool_calls": [{"id": "t", "type": "function", "function": {"name": "write", "arguments": ASKED}}],
    },
}


def cohere_events() -> list[dict[str, Any]]:
    def event(kind: str, **message: Any) -> dict[str, Any]:
        return {"type": kind, "index": 0, "delta": {"message": message}}

    def call(arguments: str, **first: Any) -> dict[str, Any]:
        return {"function": {"arguments": arguments, **({"name": "write"} if first else {})}, **first}

    half = len(pieces(SAID)) // 2
    return [
        {"type": "message-start", "id": "c", "delta": {"message": {"role": "assistant"}}},
        *(event("tool-plan-delta", tool_plan=piece) for piece in pieces(THOUGHT)),
        event("content-start", content={"type": "text", "text": ""}),
        *(event("content-delta", content={"text": piece}) for piece in pieces(SAID)[:half]),
        *(event("content-delta", content={"thinking": piece}) for piece in pieces(SAID)[half:]),
        {"type": "content-end", "index": 0},
        event("tool-call-start", tool_calls=call("", id="t", type="function")),
        *(event("tool-call-delta", tool_calls=call(piece)) for piece in pieces(ASKED)),
        {"type": "tool-call-end", "index": 0},
    ]


def ollama_chunk(**message: Any) -> dict[str, Any]:
    return {"model": "m", "done": False, "message": {"role": "assistant", **message}}


OLLAMA_CALLS = [{"function": {"name": "write", "arguments": ARGUMENTS}}]
OLLAMA = ollama_chunk(content=SAID, thinking=THOUGHT, tool_calls=OLLAMA_CALLS)
OLLAMA_CHUNKS = [
    *(ollama_chunk(content="", thinking=piece) for piece in pieces(THOUGHT)),
    *(ollama_chunk(content=piece) for piece in pieces(SAID)),
    ollama_chunk(content="", tool_calls=OLLAMA_CALLS),
]
OLLAMA_GENERATED = {"model": "m", "done": False, "response": SAID, "thinking": THOUGHT}

LANGCHAIN_CALL = {"name": "write", "args": ARGUMENTS, "id": "t", "type": "tool_call"}


def langchain_call_chunk(piece: str, **first: Any) -> Any:
    call = {"name": None, "args": piece, "id": None, "index": 0, **first}
    return langchain.AIMessageChunk(content="", tool_call_chunks=[call])


def built(kind: Any, wires: Iterable[Any]) -> list[Any]:
    return [kind.model_validate(wire) for wire in wires]


def by_openai(kind: Any, wires: Iterable[Any]) -> list[Any]:
    return [openai_construct(value=wire, type_=kind) for wire in wires]


def by_anthropic(kind: Any, wires: Iterable[Any]) -> list[Any]:
    return [anthropic_construct(value=wire, type_=kind) for wire in wires]


def by_cohere(kind: Any, wires: Iterable[Any]) -> list[Any]:
    return [cohere_construct(type_=kind, object_=wire) for wire in wires]


def openai_chat_helper() -> list[Any]:
    """The events of `client.chat.completions.stream()`, made by the SDK of the chunks."""
    state: Any = ChatCompletionStreamState(input_tools=NOT_GIVEN, response_format=NOT_GIVEN)
    chunks = by_openai(openai.types.chat.ChatCompletionChunk, CHAT_CHUNKS)
    return [event for chunk in chunks for event in state.handle_chunk(chunk)]


def openai_responses_helper() -> list[Any]:
    """The events of `client.responses.stream()`, made by the SDK of the raw events."""
    state: Any = ResponseStreamState(input_tools=NOT_GIVEN, text_format=NOT_GIVEN)
    events = by_openai(openai.types.responses.ResponseStreamEvent, responses_events())
    return [event for raw in events for event in state.handle_event(raw)]


def anthropic_helper() -> list[Any]:
    """The events of `client.messages.stream()`, made by the SDK of the raw events."""
    events: list[Any] = []
    snapshot: Any = None
    json_bufs: dict[int, bytes] = {}
    for raw in by_anthropic(anthropic.types.RawMessageStreamEvent, anthropic_events()):
        snapshot = accumulate_event(event=raw, current_snapshot=snapshot, json_bufs=json_bufs)
        events += build_events(event=raw, message_snapshot=snapshot)
    return events


class Written(NamedTuple):
    """Items, and the texts that a model wrote in them."""

    name: str
    items: Callable[[], list[Any]]
    texts: tuple[str, ...]


ALL = (SAID, THOUGHT, ASKED)
CHUNK = openai.types.chat.ChatCompletionChunk
WRITTEN = [
    Written("text", lambda: [SAID], (SAID,)),
    Written("texts", lambda: pieces(SAID), (SAID,)),
    Written("OpenAI chat", lambda: by_openai(openai.types.chat.ChatCompletion, [CHAT]), (SAID, ASKED)),
    Written("OpenAI chat off the wire", lambda: [CHAT], (SAID, ASKED)),
    Written("OpenAI chat that thinks", lambda: by_openai(openai.types.chat.ChatCompletion, [REASONED]), ALL),
    Written("OpenAI chat that thinks, off the wire", lambda: [REASONED], ALL),
    Written("OpenAI chat chunks", lambda: by_openai(CHUNK, CHAT_CHUNKS), (SAID, ASKED)),
    Written("OpenAI chat chunks that think", lambda: by_openai(CHUNK, REASONED_CHUNKS), ALL),
    Written("OpenAI chat chunks off the wire", lambda: REASONED_CHUNKS, ALL),
    Written("OpenAI chat stream helper", openai_chat_helper, (SAID, ASKED)),
    Written("OpenAI Responses", lambda: by_openai(openai.types.responses.Response, [RESPONSE]), ALL),
    Written("OpenAI Responses off the wire", lambda: [RESPONSE], ALL),
    Written(
        "OpenAI Responses events",
        lambda: by_openai(openai.types.responses.ResponseStreamEvent, responses_events()),
        ALL,
    ),
    Written("OpenAI Responses events off the wire", responses_events, ALL),
    Written("OpenAI Responses events, cut off", lambda: responses_events()[:-1], ALL),
    Written("OpenAI Responses stream helper", openai_responses_helper, ALL),
    Written("OpenAI Responses stream helper, cut off", lambda: openai_responses_helper()[:-1], ALL),
    Written("Anthropic", lambda: by_anthropic(anthropic.types.Message, [MESSAGE]), ALL),
    Written("Anthropic off the wire", lambda: [MESSAGE], ALL),
    Written("Anthropic events", lambda: by_anthropic(anthropic.types.RawMessageStreamEvent, anthropic_events()), ALL),
    Written("Anthropic events off the wire", anthropic_events, ALL),
    Written("Anthropic stream helper", anthropic_helper, ALL),
    Written("Gemini", lambda: built(genai.GenerateContentResponse, [gemini(*GEMINI_PARTS)]), ALL),
    Written("Gemini off the wire", lambda: [gemini(*GEMINI_PARTS)], ALL),
    Written("Gemini chunks", lambda: built(genai.GenerateContentResponse, GEMINI_CHUNKS), ALL),
    Written("Gemini chunks off the wire", lambda: GEMINI_CHUNKS, ALL),
    Written("Bedrock", lambda: [BEDROCK], ALL),
    Written("Bedrock events", lambda: BEDROCK_EVENTS, ALL),
    Written("Mistral", lambda: built(mistral.ChatCompletionResponse, [mistral_message()]), ALL),
    Written("Mistral off the wire", lambda: [mistral_message()], ALL),
    Written("Mistral events", lambda: built(mistral.CompletionEvent, mistral_events()), ALL),
    Written("Mistral events off the wire", mistral_events, ALL),
    Written("Cohere", lambda: by_cohere(V2ChatResponse, [COHERE]), ALL),
    Written("Cohere off the wire", lambda: [COHERE], ALL),
    Written("Cohere events", lambda: by_cohere(V2ChatStreamResponse, cohere_events()), ALL),
    Written("Cohere events off the wire", cohere_events, ALL),
    Written("Ollama", lambda: built(ollama.ChatResponse, [OLLAMA]), ALL),
    Written("Ollama off the wire", lambda: [OLLAMA], ALL),
    Written("Ollama chunks", lambda: built(ollama.ChatResponse, OLLAMA_CHUNKS), ALL),
    Written("Ollama chunks off the wire", lambda: OLLAMA_CHUNKS, ALL),
    Written("Ollama generate", lambda: built(ollama.GenerateResponse, [OLLAMA_GENERATED]), (SAID, THOUGHT)),
    Written("Ollama generate off the wire", lambda: [OLLAMA_GENERATED], (SAID, THOUGHT)),
    Written("LangChain", lambda: [langchain.AIMessage(SAID, tool_calls=[LANGCHAIN_CALL])], (SAID, ASKED)),
    Written(
        "LangChain, tools in its content too",  # as langchain-anthropic makes it
        lambda: [langchain.AIMessage(content=list(MESSAGE["content"]), tool_calls=[LANGCHAIN_CALL])],
        ALL,
    ),
    Written("LangChain chunks", lambda: [langchain.AIMessageChunk(content=piece) for piece in pieces(SAID)], (SAID,)),
    Written(
        "LangChain chunks of a tool's arguments",
        lambda: [langchain_call_chunk("", name="write", id="t"), *map(langchain_call_chunk, pieces(ASKED))],
        (ASKED,),
    ),
]


@pytest.mark.parametrize("written", WRITTEN, ids=lambda written: written.name)
def test_rule_8_what_a_model_wrote_is_counted_about_once(written: Written) -> None:
    """Each text is a third of an answer or more: one that is missed, or counted twice, is out of bounds."""
    weight = sum(map(weigh_answer, written.items()))
    assert 0.85 <= weight / sum(map(weigh_text, written.texts)) <= 1.15


@pytest.mark.parametrize("written", WRITTEN, ids=lambda written: written.name)
def test_rule_8_a_stream_that_tells_no_usage_is_charged_its_text(written: Written) -> None:
    """By the ledger: prompt and answer, where there is neither usage nor a reserve."""
    budget = TokenBudget("1_000_000/day")
    items = written.items()

    @token_budget(budget, key=everyone, usage=lambda item: None)
    def stream(prompt: str) -> Generator[Any, Any, Any]:
        yield from items

    assert len(list(stream(TEN))) == len(items)
    truth = 10 + sum(map(weigh_text, written.texts)) / TOKEN
    assert 0.85 * truth <= used(budget, everyone()) <= 1.15 * truth


# Hostile input is dealt with quickly: by counted calls, which are the same on any machine.


def steps(work: Callable[[], object]) -> int:
    count = 0

    def step(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(step)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def nested(depth: int, wrap: Callable[[Any], Any], core: Any = TEN) -> Any:
    for _ in range(depth):
        core = wrap(core)
    return core


def cyclic() -> Any:
    message: dict[str, Any] = {"content": TEN}
    message["message"] = message["choices"] = message
    message["parts"] = [message, [message]]
    return message


def cyclic_object() -> Any:
    holder = SimpleNamespace(content=TEN)
    holder.message = holder.choices = holder
    return holder


class Raising:
    """What cannot be looked into."""

    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no")

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


class RaisingDict(dict[str, Any]):
    def __contains__(self, _: object) -> bool:
        raise RuntimeError("no")

    def values(self) -> Any:
        raise RuntimeError("no")

    get = values


HOSTILE: list[tuple[str, Callable[[], Any], int | None]] = [
    ("a MagicMock", MagicMock, None),
    ("a Mock", Mock, None),
    ("a dict of mocks", lambda: {"choices": [MagicMock()], "content": MagicMock()}, None),
    ("a cyclic dict", cyclic, 10),
    ("a cyclic object", cyclic_object, 10),
    ("lists in lists", lambda: nested(5_000, lambda core: [core]), 10),
    ("dicts in dicts", lambda: nested(5_000, lambda core: {"content": core}), 10),
    ("lists too deep", lambda: nested(100_000, lambda core: [core]), None),
    ("lists that double", lambda: nested(60, lambda core: [core, core], [TEN]), 10),
    ("a megabyte", lambda: "x" * 1_000_000, 250_000),
    ("a megabyte of bytes", lambda: b"x" * 1_000_000, 250_000),
    ("a megabyte in messages", lambda: [{"content": "x" * 1_000} for _ in range(1_000)], 250_000),
    ("a million numbers", lambda: [0.5] * 1_000_000, None),
    ("what raises", Raising, None),
    ("text beside what raises", lambda: [Raising(), TEN, RaisingDict(a=1)], 10),
]
MOST_STEPS = 200_000

MANY: list[tuple[str, Callable[[], Any], int]] = [
    ("texts", lambda: [TEN] * 50_000, 500_000),
    ("texts in a tuple, among other things", lambda: (TEN, None, 7, TEN.encode(), [TEN]) * 20_000, 400_010),  # one list
    ("messages", lambda: [{"content": TEN} for _ in range(50_000)], 500_000),
    ("messages of parts", lambda: [{"content": [{"text": TEN}]} for _ in range(20_000)], 200_000),
    ("lists in lists", lambda: [[TEN] * 2_000 for _ in range(20)], 400_000),
]


@pytest.mark.parametrize(("make", "tokens"), [row[1:] for row in MANY], ids=[row[0] for row in MANY])
def test_of_many_texts_none_is_left_out(make: Callable[[], Any], tokens: int) -> None:
    assert estimate_tokens(make()) == tokens
    assert tokens_of(weigh_answer(make())) == tokens


@pytest.mark.parametrize(
    "event",
    [
        {"messageStart": {"role": "assistant"}},
        {"contentBlockStop": {"contentBlockIndex": 0}},
        {"messageStop": {"stopReason": "end_turn"}},
        {"metadata": {"metrics": {"latencyMs": 900}, "trace": {"guardrail": {"modelOutput": [TEN]}}}},
        {"type": "ping"},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content-end", "index": 0},
    ],
    ids=str,
)
def test_the_words_of_an_event_without_text_are_not_counted(event: dict[str, Any]) -> None:
    assert weigh_answer(event) == 0


@pytest.mark.parametrize(("make", "tokens"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
def test_hostile_arguments_are_estimated_in_few_steps(make: Callable[[], Any], tokens: int | None) -> None:
    """Where the text is within reach it is counted, once for each container; what is never-ending is left alone."""
    argument = make()
    assert steps(lambda: estimate_tokens(argument)) < MOST_STEPS
    estimate = estimate_tokens(argument)
    assert estimate == tokens if tokens is not None else 1 <= estimate <= 100


@pytest.mark.parametrize(("make", "tokens"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
def test_hostile_answers_are_weighed_in_few_steps(make: Callable[[], Any], tokens: int | None) -> None:
    answer = make()
    assert steps(lambda: weigh_answer(answer)) < MOST_STEPS
    estimate = tokens_of(weigh_answer(answer))
    assert estimate == tokens if tokens is not None else 1 <= estimate <= 100
