"""What a benchmark has found: shown as a table, stored as JSON, and drawn where matplotlib is there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Panels = Mapping[str, Mapping[str, float]]
"""Figures by the title of a panel and the name of a bar."""


def show(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*headings, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)


def store(path: Path, figures: Any, panels: Panels | None = None, unit: str = "") -> None:
    """Write figures to a JSON file, and some of them as bars to a drawing beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(path)
    if panels:
        draw(path.with_suffix(".svg"), panels, unit)


def draw(path: Path, panels: Panels, unit: str) -> None:
    """Draw a bar for each figure, the panels one below the other."""
    try:
        import matplotlib
    except ImportError:
        print("There is no drawing, matplotlib is missing. Install the extra `benchmarks`.")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [1 + 0.3 * len(bars) for bars in panels.values()]
    drawing, axes = pyplot.subplots(
        len(panels), 1, figsize=(8, sum(heights)), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for axis, (title, bars) in zip(axes[:, 0], panels.items(), strict=True):
        axis.barh(list(bars), list(bars.values()))
        axis.set_title(title)
        axis.set_xlabel(unit)
        axis.invert_yaxis()
    drawing.tight_layout()
    drawing.savefig(path)
    print(path)
