"""Curves over steps, drawn in a terminal.

Owns size and look of the drawing (plotext does the drawing). Knows no job.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotext
from rich.console import Console

WIDEST, LINES = 90, 18


def draw(
    console: Console, what: str, names: Sequence[str], curves: Sequence[Mapping[int, float]]
) -> None:
    """Print a drawing of one line a name; nothing where no curve has a point."""
    if not any(curves):
        return
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(min(console.width, WIDEST), LINES)
    for name, curve in zip(names, curves, strict=True):
        if curve:
            plotext.plot(list(curve), list(curve.values()), label=name, marker="braille")
    plotext.xlabel("step")
    plotext.ylabel(what)
    drawn = plotext.build()
    console.out(drawn if console.is_terminal else plotext.uncolorize(drawn), highlight=False)
