"""Tables of what was measured, with what was aimed at beside it, as Markdown."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Aim:
    """What a figure is to be at most, or at least."""

    bound: float
    unit: str = "×"
    at_least: bool = False

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.bound:g}{self.unit}"

    def met(self, figure: float) -> bool:
        compare: Callable[[float, float], bool] = operator.ge if self.at_least else operator.le
        return compare(figure, self.bound)


@dataclass
class Table:
    """A table of figures, its notes, and which of its aims were not met."""

    title: str
    columns: Sequence[str]
    notes: Sequence[str] = ()
    rows: list[Sequence[str]] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    series: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """Nanoseconds a call against what the table varies, by name, for the picture."""

    def add(self, what: str, *cells: str, figure: float = 0.0, aim: Aim | None = None) -> None:
        """Add a row; with an aim, whether the figure meets it."""
        if aim is None:
            self.rows.append((what, *cells, "", ""))
            return
        verdict = "met" if aim.met(figure) else "**not met**"
        if not aim.met(figure):
            self.missed.append(f"{self.title}: {what}")
        self.rows.append((what, *cells, str(aim), verdict))

    def __str__(self) -> str:
        lines = [f"### {self.title}", ""]
        head = (*self.columns, "aim", "")
        if not any(row[-1] for row in self.rows):
            head, rows = head[:-2], [row[:-2] for row in self.rows]
        else:
            rows = list(self.rows)
        rule = ("---", *("---:" for _ in self.columns[1:]), "---", "---")[: len(head)]
        lines += [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]
        lines += ["", *self.notes, ""]
        return "\n".join(lines)


def ns(figure: float) -> str:
    return f"{figure:,.0f} ns"


def times(figure: float) -> str:
    return f"{figure:.2f}×"
