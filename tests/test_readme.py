"""The README's Python examples, run in order in one namespace, as a reader would."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import REGISTRY, generate_latest

from quotalimit import MemoryStore
from quotalimit.events import listeners
from quotalimit.testing import Clock, use_store

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


class FakeClient:
    """Stands for an OpenAI client: every response reports 15 tokens."""

    def __init__(self) -> None:
        self.responses = self

    def create(self, model: str, input: str) -> Any:  # noqa: A002
        return SimpleNamespace(usage=SimpleNamespace(input_tokens=10, output_tokens=5, total_tokens=15))


@pytest.fixture
def reader() -> Iterator[InMemoryMetricReader]:
    """What OpenTelemetry measured. Nobody listens any more afterwards."""
    reader = InMemoryMetricReader()
    metrics.set_meter_provider(MeterProvider([reader]))
    yield reader
    listeners.clear()


def test_every_example_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path, reader: InMemoryMetricReader) -> None:
    namespace: dict[str, Any] = {
        "__name__": "readme",
        "client": FakeClient(),
        "MODEL": "a-model",
        "DATA": tmp_path,
        "request": SimpleNamespace(client=SimpleNamespace(host="198.51.100.1")),
    }
    assert len(EXAMPLES) >= 10
    for number, example in enumerate(EXAMPLES, start=1):
        exec(compile(example, f"README.md, example {number}", "exec"), namespace)
    for name in [name for name in namespace if name.startswith("test_")]:
        test = namespace[name]
        with use_store(MemoryStore()), Clock() as clock:
            test(clock) if "clock" in inspect.signature(test).parameters else test()
    assert_counted(reader)


def assert_counted(reader: InMemoryMetricReader) -> None:
    """The recipes counted what their examples did, and no metric has a label for an identity."""
    labels = {"limit": "strict", "answer": "admitted", "enforced": "False"}
    assert REGISTRY.get_sample_value("quotalimit_calls_total", labels) == 1
    assert REGISTRY.get_sample_value("quotalimit_tokens_total", {"limit": "readme:answer:user"}) == 15
    assert b"alice" not in generate_latest()
    data = reader.get_metrics_data()
    assert data is not None
    metrics = {metric.name: metric for metric in data.resource_metrics[0].scope_metrics[0].metrics}
    points = {
        (name, point.attributes["limit"]): point.value
        for name, metric in metrics.items()
        for point in metric.data.data_points
    }
    assert points["quotalimit.calls", "strict"] == 1
    assert points["quotalimit.tokens", "readme:answer:user"] == 15


def test_the_web_service_is_the_one_that_is_tested_under_a_real_server() -> None:
    example = README.parent / "tests" / "integrations" / "example_app.py"
    assert example.read_text() in EXAMPLES


def test_the_commands_are_the_ones_that_ci_runs() -> None:
    """`.ci/run` takes its test command from the README: there is exactly one."""
    commands = re.findall(r"^pip install .*pytest.*$", README.read_text(), re.MULTILINE)
    assert len(commands) == 1
