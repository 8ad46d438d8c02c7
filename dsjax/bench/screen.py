"""Records of a benchmark on the screen: progress while it runs, tables and notes after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

Record = dict[str, Any]
TABLE_WIDTH = 136
LIVE_ROWS = 12


class Layout:
    """Columns of a table of records: kind and shape, then `heads`, filled by `cells`.

    Figures are set to the right, heads in `left` to the left; heads in `whole` are not wrapped.
    `width` is what the table needs at least.
    """

    def __init__(
        self,
        heads: Sequence[str],
        cells: Callable[[Record], list[str]],
        *,
        whole: Sequence[str] = (),
        left: Sequence[str] = (),
        width: int = TABLE_WIDTH,
    ):
        self.width = width
        self._heads, self._whole, self._left = heads, whole, left
        self._figures = cells

    def table(self, found: Sequence[Record], title: str | None = None) -> Table:
        """A line a record."""
        grid = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
        grid.add_column("kind", no_wrap=True)
        grid.add_column("shape", no_wrap=True)
        for head in self._heads:
            justify = "left" if head in self._left else "right"
            grid.add_column(head, justify=justify, no_wrap=head in self._whole)
        for record in found:
            grid.add_row(*self.cells(record))
        return grid

    def cells(self, record: Record) -> list[str]:
        name = [record["kind"], record["shape"]]
        if "us" not in record:
            return [*name, "failed" if record["failed"] else "not timed"]
        return [*name, *self._figures(record)]


class Screen:
    """Progress: a bar below the newest rows on a terminal, a line a row elsewhere."""

    def __init__(self, console: Console, total: int, layout: Layout):
        self._console, self._layout = console, layout
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), console=console,
        )  # fmt: skip
        self._task = self._bar.add_task("compiling", total=total)
        self._live = Live(self._bar, console=console, transient=True)

    def __enter__(self) -> Screen:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def begun(self, what: str) -> None:
        self._bar.update(self._task, description=what)

    def measured(self, found: Sequence[Record]) -> None:
        """Of all rows so far."""
        self._bar.update(self._task, completed=len(found))
        if self._console.is_terminal:
            self._live.update(Group(self._layout.table(found[-LIVE_ROWS:]), self._bar))
            return
        print_note(self._console, " ".join(filter(None, self._layout.cells(found[-1]))))


def print_table(console: Console, layout: Layout, found: Sequence[Record], title: str) -> None:
    width = max(layout.width, console.width)  # a narrow terminal wraps lines but loses no figure
    wide = Console(file=console.file, width=width, force_terminal=console.is_terminal)
    wide.print(layout.table(found, title))


def print_note(console: Console, note: str) -> None:
    console.print(note, highlight=False, soft_wrap=True, markup=False)


def row_notes(found: Sequence[Record]) -> list[str]:
    """What the rows say, once for all rows that say the same."""
    rows: dict[str, list[str]] = {}
    for record in found:
        if record["note"]:
            rows.setdefault(record["note"], []).append(f"{record['kind']} {record['shape']}")
    return [f"{', '.join(names)}: {note}" for note, names in rows.items()]


def micros(us: float) -> str:
    return f"{us:.2f}" if us < 100 else f"{us:.1f}"


def beside(other: float | None, us: float) -> str:
    """A peer's microseconds, and how many times faster ours is."""
    return "" if other is None else f"{micros(other)} ({other / us:.2f}x)"
