"""Long fuzzing runs the property tests, all of them and no others, with more examples."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = """
from pathlib import Path

from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

def note(name):
    with (Path(__file__).parent / name).open("a") as file:
        file.write(".")

@settings(max_examples=4, database=None)
@given(st.integers())
def test_of_properties(number):
    note("function")

class Machine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        note("machine")

    @rule(number=st.integers())
    def step(self, number):
        pass

TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=3, database=None)

def test_of_a_case():
    note("case")
"""


def test_fuzzing_runs_the_property_tests_alone_with_more_examples(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "tests.fuzz", "--times", "5", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    assert "2 passed" in run.stdout, run.stdout + run.stderr
    examples = {path.name: len(path.read_text()) for path in tmp_path.iterdir() if path.suffix == "" and path.is_file()}
    assert examples == {"function": 20, "machine": 15}
