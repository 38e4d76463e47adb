"""The screen of `kvcensus top`."""

from __future__ import annotations

import threading
import time
from typing import ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.markup import escape
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import Footer, Input, Static, TabbedContent, TabPane

from ..printable import printable
from .details import backend_lines, bus_lines, headline, labelled, worker_lines
from .listing import Listing
from .looking import Look, Unreachable
from .rates import Rates, rates_between
from .rows import BUSES, STREAMS, SYMBOLS, WORKERS, bus_rows, stream_rows, worker_rows
from .sample import Sample
from .words import duration

_KEYS = [
    ("1 2 3 4", "workers, streams, backend, buses"),
    ("Enter", "all about a worker, and why it is not trusted"),
    ("s, r", "sort by the next column; the other way round"),
    ("/", "only rows with these words; Escape: all again"),
    ("p", "pause: nothing is asked, what is shown stays"),
    ("q", "leave"),
]
_MEANINGS = [
    ("+/S -/S", "blocks stored and removed each second"),
    ("SEQ, AGE", "last committed number, and the time since then"),
    ("LAG", "from the engine's time to the commit, on average"),
    ("GAPS", "times that numbers were missing, healed or not"),
    ("TIERS", "hbm, rhbm: another machine's, dram, ssd, obj"),
]


class Looked(Message):
    """A look has an outcome: a sample, or the reason why there is none."""

    def __init__(self, sample: Sample | None, problem: str) -> None:
        super().__init__()
        self.sample = sample
        self.problem = problem


class Page(ModalScreen[None]):
    """Text over the tables, until a key."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape,enter,q,question_mark", "dismiss", "Back")]

    def __init__(self, title: str, text: Text) -> None:
        super().__init__()
        self._title, self._text = title, text

    def compose(self) -> ComposeResult:
        page = VerticalScroll(Static(self._text, id="text"), id="page")
        page.border_title = escape(printable(self._title))
        page.border_subtitle = "Esc: back"
        yield page

    def show(self, text: Text) -> None:
        """Other text."""
        self.query_one("#text", Static).update(text)


class WorkerPage(Page):
    """Everything about one worker, as of the last look."""

    def __init__(self, worker: str, text: Text) -> None:
        super().__init__(worker, text)
        self.worker = worker


class Top(App[None]):
    """Asks again and again, in a thread of its own, and shows what it got."""

    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #head { height: auto; padding: 0 1; background: $panel; }
    #filter { display: none; height: 1; border: none; padding: 0 1; }
    #filter.open { display: block; }
    TabbedContent, TabPane { height: 1fr; padding: 0; }
    Listing { height: 1fr; padding: 0 0 0 1; }
    #backend_lines { padding: 0 1; }
    Page { align: center middle; }
    #page { width: 90%; max-width: 110; height: auto; max-height: 90%; border: round $accent; padding: 0 1;
            background: $surface; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        ("1", "tab('workers')", "Workers"),
        ("2", "tab('streams')", "Streams"),
        ("3", "tab('backend')", "Backend"),
        Binding("4", "tab('buses')", "Buses", show=False),
        ("s", "sort", "Sort"),
        Binding("r", "reverse", "Reverse", show=False),
        ("slash", "filter", "Filter"),
        ("p", "pause", "Pause"),
        ("question_mark", "help", "Help"),
        ("q", "quit", "Quit"),
        Binding("escape", "all", "All", show=False),
        Binding("ctrl+c", "quit", "Quit", show=False, priority=True),
    ]

    def __init__(self, look: Look, where: str, interval_s: float) -> None:
        super().__init__()
        self._look, self._where, self._interval_s = look, where, interval_s
        self._sample: Sample | None = None
        self._rates: Rates | None = None
        self._problem = ""
        self._ended = threading.Event()
        self._asking = threading.Event()
        self._asking.set()

    # What is there

    def compose(self) -> ComposeResult:
        yield Static(self._head(), id="head")
        with TabbedContent(id="tabs"):
            with TabPane("Workers", id="workers"):
                yield Listing(WORKERS, "worker_table")
            with TabPane("Streams", id="streams"):
                yield Listing(STREAMS, "stream_table")
            with TabPane("Backend", id="backend"), VerticalScroll():
                yield Static(id="backend_lines")
            with TabPane("Buses", id="buses"):
                yield Listing(BUSES, "bus_table")
        yield Input(placeholder="words to look for", id="filter", compact=True)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Begin to look. The thread holds nobody up who leaves."""
        self.title = "kvcensus top"
        self.query_one("#tabs", TabbedContent).hide_tab("buses")
        self.query_one("#worker_table").focus()
        threading.Thread(target=self._follow, daemon=True).start()

    def on_unmount(self) -> None:
        self._ended.set()
        self._asking.set()

    def _follow(self) -> None:
        while not self._ended.is_set():
            self._asking.wait()
            try:
                self.post_message(Looked(self._look(), ""))
            except Unreachable as problem:
                self.post_message(Looked(None, str(problem)))
            self._ended.wait(self._interval_s)

    def on_looked(self, looked: Looked) -> None:
        """Show what came."""
        self._problem = looked.problem
        if looked.sample is not None and self._asking.is_set():
            before, self._sample = self._sample, looked.sample
            self._rates = rates_between(before, looked.sample) if before is not None else None
            self._show(looked.sample)
        self._update_head()

    def _show(self, sample: Sample) -> None:
        rates = self._rates
        self.query_one("#worker_table", Listing).show(worker_rows(sample, rates))
        self.query_one("#stream_table", Listing).show(stream_rows(sample, rates))
        self.query_one("#backend_lines", Static).update(backend_lines(sample, rates))
        tabs = self.query_one("#tabs", TabbedContent)
        if sample.buses:
            self.query_one("#bus_table", Listing).show(bus_rows(sample))
            tabs.show_tab("buses")
        if isinstance(self.screen, WorkerPage):
            self.screen.show(worker_lines(sample, rates, self.screen.worker))

    def _update_head(self) -> None:
        self.screen_stack[0].query_one("#head", Static).update(self._head())

    def _head(self) -> Text:
        sample = self._sample
        release = f" {sample.version}" if sample is not None else ""
        first = Text.assemble((f"kvcensus{release}", "bold"), f" at {self._where}, every {self._interval_s:g} s")
        if not self._asking.is_set():
            first.append("   paused: p goes on", "bold yellow")
        listing = self._listing()
        if listing is not None and listing.words:
            first.append(f"   only {listing.words!r}: {len(listing.shown)}", "yellow")
        lines = [first]
        if self._problem:
            age = f", shown is what was {duration(time.monotonic() - sample.at_s)} ago" if sample is not None else ""
            lines.append(Text(f"✕ {self._problem}; trying again{age}", "bold red"))
        elif sample is None:
            lines.append(Text("asking…"))
        if sample is not None:
            lines += headline(sample, self._rates)
        return Text("\n").join(lines)

    # What can be done

    def _listing(self) -> Listing | None:
        """The table that is seen, None where there is none."""
        if not self.screen_stack:
            return None
        main = self.screen_stack[0]
        tabs = main.query(TabbedContent)
        pane = tabs.first().active_pane if tabs else None
        return next(iter(pane.query(Listing)), None) if pane is not None else None

    def action_tab(self, name: str) -> None:
        """Show another table."""
        if name == "buses" and not (self._sample and self._sample.buses):
            self.notify("This daemon follows no bus.")
            return
        self.query_one("#tabs", TabbedContent).active = name
        if (listing := self._listing()) is not None:
            listing.focus()

    def on_tabbed_content_tab_activated(self) -> None:
        self._update_head()

    def action_sort(self) -> None:
        """Sort by the next column."""
        if (listing := self._listing()) is not None:
            listing.sort_by_next()

    def action_reverse(self) -> None:
        """Sort the other way round."""
        if (listing := self._listing()) is not None:
            listing.sort_by(listing.sorted_by)

    def action_filter(self) -> None:
        """Ask for words, beginning with those that are looked for already."""
        listing = self._listing()
        if listing is None:
            return
        box = self.query_one("#filter", Input)
        box.value = listing.words
        box.add_class("open")
        box.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Show only what says these words."""
        if (listing := self._listing()) is not None:
            listing.filter(event.value)
            self._update_head()

    def on_input_submitted(self) -> None:
        """The words stay; the keys belong to the table again."""
        self.query_one("#filter", Input).remove_class("open")
        if (listing := self._listing()) is not None:
            listing.focus()

    def action_all(self) -> None:
        """Show every row again."""
        box = self.query_one("#filter", Input)
        box.value = ""
        box.remove_class("open")
        if (listing := self._listing()) is not None:
            listing.filter("")
            listing.focus()
        self._update_head()

    def action_pause(self) -> None:
        """Stop asking, or go on."""
        if self._asking.is_set():
            self._asking.clear()
        else:
            self._asking.set()
        self._update_head()

    def on_data_table_row_selected(self) -> None:
        """Everything about the worker, or the bus, under the cursor."""
        listing = self._listing()
        row = listing.selected if listing is not None else None
        if row is None or self._sample is None:
            return
        if row.bus is not None:
            self.push_screen(Page(row.key, bus_lines(row.bus)))
            return
        worker = row.worker.worker_id if row.worker else row.stream.worker_id if row.stream else ""
        self.push_screen(WorkerPage(worker, worker_lines(self._sample, self._rates, worker)))

    def action_help(self) -> None:
        """Keys and words."""
        symbols = [(symbol, trust.value) for trust, symbol in SYMBOLS.items()]
        self.push_screen(Page("help", labelled([*_KEYS, ("", ""), *_MEANINGS, ("", ""), *symbols])))
