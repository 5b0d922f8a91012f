"""The mutants that no test notices, and why none need: `explained.toml`."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

from .mutants import ROOT, Mutant

EXPLAINED = Path(__file__).parent / "explained.toml"

Explained: TypeAlias = dict[str, dict[str, list[str]]]
"""For each module, mutants by what explains them."""


def read_explained() -> Explained:
    return tomllib.loads(EXPLAINED.read_text())


def is_explained(mutant: Mutant, explained: Explained) -> bool:
    return any(mutant.key in keys for keys in explained.get(_module(mutant.path), {}).values())


def stale(mutants: Iterable[Mutant], explained: Explained) -> list[str]:
    """The explanations, of modules all of whose mutants these are, that explain none."""
    keys: dict[str, set[str]] = {}
    for mutant in mutants:
        keys.setdefault(_module(mutant.path), set()).add(mutant.key)
    return [
        f"{module}: {key}"
        for module, known in keys.items()
        for explaining in explained.get(module, {}).values()
        for key in explaining
        if key not in known
    ]


def _module(path: Path) -> str:
    return str(path.relative_to(ROOT / "quotalimit"))
