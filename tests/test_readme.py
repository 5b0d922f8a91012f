"""The README's Python examples, run in order in one namespace, as a reader would."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


class FakeClient:
    """Stands for an OpenAI client: every response reports 15 tokens."""

    def __init__(self) -> None:
        self.responses = self

    def create(self, model: str, input: str) -> Any:  # noqa: A002
        return SimpleNamespace(usage=SimpleNamespace(input_tokens=10, output_tokens=5, total_tokens=15))


def test_every_example_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
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
    namespace["test_the_21st_call_of_a_minute_is_refused"]()


def test_the_web_service_is_the_one_that_is_tested_under_a_real_server() -> None:
    example = README.parent / "tests" / "integrations" / "example_app.py"
    assert example.read_text() in EXAMPLES


def test_the_commands_are_the_ones_that_ci_runs() -> None:
    """`.ci/run` takes its test command from the README: there is exactly one."""
    commands = re.findall(r"^pip install .*pytest.*$", README.read_text(), re.MULTILINE)
    assert len(commands) == 1
