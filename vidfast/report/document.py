"""A page as data: sections of paragraphs, tables and figures; Markdown and HTML are two ways to write it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    """Text cells. The first `left` columns are set to the left, the rest to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1

    def markdown(self) -> str:
        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        rule = [":--" if column < self.left else "--:" for column in range(len(self.header))]
        return "\n".join([line(self.header), line(rule), *(line(row) for row in self.rows)])


@dataclass(frozen=True)
class Figure:
    """A picture as SVG text."""

    name: str
    caption: str
    svg: str = field(repr=False)


@dataclass
class Section:
    """A heading and what stands under it. A folded section is shown closed in HTML."""

    title: str
    level: int = 2
    blocks: list[str | Table | Figure] = field(default_factory=list)
    folded: bool = False


@dataclass
class Page:
    title: str
    sections: list[Section] = field(default_factory=list)
