"""A table of rows that change all the time: sorted, filtered, and with the cursor on the same row throughout."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text
from textual.widgets import DataTable

from ..printable import printable
from .rows import Column, Row, chosen, ordered


class Listing(DataTable[Text]):
    """Shows rows in as many lines as there are: a line is written anew only where its words have changed."""

    def __init__(self, columns: Sequence[Column], name: str) -> None:
        super().__init__(id=name, cursor_type="row", cell_padding=0, fixed_columns=1)
        self._shown_columns = columns
        self._rows: list[Row] = []
        self._lines: list[list[tuple[str, str]]] = []
        self._widths: list[int] = []
        self.shown: list[Row] = []
        self.sorted_by = 0
        self.descending = False
        self.words = ""

    @property
    def selected(self) -> Row | None:
        """The row under the cursor."""
        return self.shown[self.cursor_row] if 0 <= self.cursor_row < len(self.shown) else None

    def show(self, rows: list[Row]) -> None:
        """Show other rows, or the same with other words."""
        self._rows = rows
        self._draw()

    def sort_by(self, number: int) -> None:
        """Sort by a column; by the same one again, the other way round."""
        self.descending = not self.descending if number == self.sorted_by else self._shown_columns[number].right
        self.sorted_by = number
        self._widths = []
        self._draw()

    def sort_by_next(self) -> None:
        """Sort by the column to the right."""
        self.sorted_by = (self.sorted_by + 1) % len(self._shown_columns)
        self.descending = self._shown_columns[self.sorted_by].right
        self._widths = []
        self._draw()

    def filter(self, words: str) -> None:
        """Show only rows that say all of these words."""
        self.words = words
        self._draw()

    def on_data_table_header_selected(self, event: DataTable.HeaderSelected) -> None:
        """A click on the head of a column sorts by it."""
        event.stop()
        self.sort_by(event.column_index)

    def _draw(self) -> None:
        selected = self.selected
        columns = self._shown_columns
        rows = chosen(self._rows, columns, self.words)
        self.shown = ordered(rows, columns[self.sorted_by], self.descending)
        lines = [[(printable(column.cell(row)), column.style(row)) for column in columns] for row in self.shown]
        widths = [
            max(least, column.width, len(self._head_of(at)), *(len(line[at][0]) for line in lines), 0)
            for at, (column, least) in enumerate(zip(columns, self._widths or [0] * len(columns)))
        ]
        if widths != self._widths or len(lines) != len(self._lines):
            self._begin_anew(lines, widths)
        else:
            self._update(lines)
        self._lines = lines
        if selected is not None:
            at = next((at for at, row in enumerate(self.shown) if row.key == selected.key), 0)
            if at != self.cursor_row:
                self.move_cursor(row=at, animate=False)

    def _begin_anew(self, lines: list[list[tuple[str, str]]], widths: list[int]) -> None:
        at, left = self.cursor_row, self.scroll_x
        self.clear(columns=True)
        self._widths = widths
        for number, (column, width) in enumerate(zip(self._shown_columns, widths)):
            self.add_column(self._cell(number, self._head_of(number), "bold"), width=width + 1, key=column.title)
        for number, line in enumerate(lines):
            cells = [self._cell(at, words, style) for at, (words, style) in enumerate(line)]
            self.add_row(*cells, key=str(number))
        self.move_cursor(row=min(at, max(0, len(lines) - 1)), animate=False)
        self.scroll_to(x=left, animate=False)

    def _update(self, lines: list[list[tuple[str, str]]]) -> None:
        for number, (line, before) in enumerate(zip(lines, self._lines)):
            if line == before:
                continue
            for at, (words, style) in enumerate(line):
                if (words, style) != before[at]:
                    self.update_cell(str(number), self._shown_columns[at].title, self._cell(at, words, style))

    def _head_of(self, number: int) -> str:
        arrow = "▼" if self.descending else "▲"
        return self._shown_columns[number].title + (arrow if number == self.sorted_by else "")

    def _cell(self, at: int, words: str, style: str) -> Text:
        """With a space behind it, which keeps columns apart."""
        width = self._widths[at]
        return Text(
            f"{words:>{width}} " if self._shown_columns[at].right else f"{words:<{width}} ", style, no_wrap=True
        )
