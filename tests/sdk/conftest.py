"""Which of these tests can run: LiteLLM pins the SDKs of others, so not every environment that has those has it too."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore = [] if find_spec("litellm") else ["test_litellm.py"]
