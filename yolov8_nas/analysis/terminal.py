"""An analysis in the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from yolov8_nas.analysis import tables
from yolov8_nas.analysis.figures import Analysis


def render(analysis: Analysis) -> RenderableType:
    """Everything there is to read, at any width of the terminal from 80 on."""
    return Group(*_parts(analysis))


def _parts(analysis: Analysis) -> Iterator[RenderableType]:
    yield Text(analysis.model["file"], style="bold")
    yield Text(tables.heading(analysis), style="dim")
    for figures in tables.all_tables(analysis):
        yield Text()
        yield _table(figures)
        if figures.note:
            yield Text(figures.note, style="dim")
    if analysis.not_traced:
        yield Text(f"\noperators not told: {analysis.not_traced}")
    yield Text(f"\n{tables.recommendation(analysis)}", style="bold")
    yield Text("\nFindings" if analysis.findings else "\nFindings: nothing stands out", style="bold")
    for finding in analysis.findings:
        yield Text.assemble((f"{finding.topic}: ", "bold"), finding.text, " ", (finding.remedy, "italic"))
    for note in analysis.notes:
        yield Text(f"note: {note}", style="yellow")


def _table(figures: tables.Figures) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", title=figures.title, title_style="bold")
    table.title_justify = "left"
    for place, column in enumerate(figures.columns):
        table.add_column(column, justify="left" if place < figures.words or not column else "right", overflow="fold")
    for row in figures.rows:
        table.add_row(*map(Text, row))
    return table
