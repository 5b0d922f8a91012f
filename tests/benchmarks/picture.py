"""The picture for the README: the cost of a call against N and against the number of keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks.report import Table

INK = "#7d8590"
"""A grey that can be read on white and on black: the picture's background is that of the page."""
COLOURS = ["#d55e00", "#2f81f7", "#009e73", "#cc79a7", "#56b4e9", "#b58900"]
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "quotalimit",
    "font.family": "sans-serif",
    "font.size": 10,
    **dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], INK),
}


def draw(panels: Mapping[str, Table], file: Path) -> None:
    """Draw the series of each table in a panel of its own, with the mapping's key below."""
    from matplotlib import pyplot, rc_context

    with rc_context(STYLE):
        figure, axes = pyplot.subplots(1, len(panels), figsize=(9, 3.6), sharey=True, layout="constrained")
        for axis, (label, table) in zip(axes, panels.items(), strict=True):
            for (name, points), colour in zip(table.series.items(), COLOURS, strict=False):
                amounts, nanoseconds = zip(*points, strict=True)
                width = 3 if name == "quotalimit" else 1.5
                axis.plot(amounts, [ns / 1e3 for ns in nanoseconds], "o-", label=name, color=colour, lw=width, ms=4)
            axis.set(xscale="log", yscale="log", xlabel=label)
            axis.minorticks_off()
            axis.grid(alpha=0.3, color=INK)
            axis.spines[["top", "right"]].set_visible(False)
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes[0].set_ylabel("microseconds a call")
        figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(COLOURS), frameon=False
        )
        figure.savefig(file, transparent=True, metadata={"Date": None})
        pyplot.close(figure)
