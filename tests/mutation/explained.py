"""The mutants that no test notices, and why none need: `explained.toml`."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

from .mutants import ROOT, Mutant

EXPLAINED = Path(__file__).parent / "explained.toml"

Explained: TypeAlias = dict[str, set[str]]
"""The keys of mutants, by module: the reasons are for readers."""


def read_explained() -> Explained:
    explained = tomllib.loads(EXPLAINED.read_text())
    return {module: {key for keys in reasons.values() for key in keys} for module, reasons in explained.items()}


def is_explained(mutant: Mutant, explained: Explained) -> bool:
    return mutant.key in explained.get(_module(mutant.path), ())


def stale(mutants: Iterable[Mutant], explained: Explained) -> list[str]:
    """The explanations, of modules all of whose mutants these are, that explain none."""
    known = {(_module(mutant.path), mutant.key) for mutant in mutants}
    modules = {module for module, _ in known}
    return [
        f"{module}: {key}"
        for module in sorted(modules.intersection(explained))
        for key in sorted(explained[module])
        if (module, key) not in known
    ]


def _module(path: Path) -> str:
    return str(path.relative_to(ROOT / "quotalimit"))
