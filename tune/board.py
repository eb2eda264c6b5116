"""What one sees of a search while it runs: a live table on a terminal, a line per event in a log file."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from launch.show import Unwatched, show
from mtbert.stops import give_up
from mtbert.yaml_files import inline_yaml
from tune.study import COMPOSITE, Study, Tried

if TYPE_CHECKING:
    from tune.search import Settings

STYLES = {"running": "cyan", "complete": "green", "pruned": "yellow", "failed": "red"}
ROOM = 8
"""Lines of the terminal that the table leaves to everything else."""


class Board:
    """`unread`: its reader has enough (`| head`), or its terminal was closed."""

    unread = False

    def __init__(self, study: Study, settings: Settings) -> None:
        self._study, self._settings = study, settings
        # asked once: rich takes FORCE_COLOR in a log file for a terminal, and one that was closed for none
        terminal = sys.stdout.isatty()
        self._console = Console(file=sys.stdout, force_terminal=terminal)
        # not in a thread of rich's, which keeps to itself that the terminal was closed
        self._live = Live(console=self._console, auto_refresh=False) if terminal else None

    def __enter__(self) -> Board:
        if self._live:
            with self._noticed():
                self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            with self._noticed():
                self._live.update(self._table())
                self._live.stop()

    @contextlib.contextmanager
    def _noticed(self) -> Iterator[None]:
        try:
            yield
        except Unwatched:
            self.unread = True
        except OSError:  # of the terminal
            give_up(sys.stdout)
            self.unread = True

    def say(self, words: str) -> None:
        """Before and after the search."""
        with self._noticed():
            show(f"{words}\n".encode())

    def show(self, number: int) -> None:
        """Trial `number` has changed. Asks for a stop, as TERM does, when nobody reads that any more."""
        if self._live:
            with self._noticed():
                self._live.update(self._table(), refresh=True)
        else:
            self.say(self._line(self._study.tried()[number]))
        if self.unread:
            signal.raise_signal(signal.SIGTERM)  # with the SIGHUP of a closed terminal it is one request

    def _line(self, trial: Tried) -> str:
        if trial.state == "running" and not trial.scores:
            return f"trial {trial.number}: {_shown(trial)}"
        scores = "  ".join(f"{name} {score:.4f}" for name, score in trial.scores.items())
        error = f"  {_first_line(trial.error)}" if trial.error else ""
        best = self._study.best()
        star = "  best so far" if best and best.number == trial.number else ""
        state = "" if trial.state == "running" else f"  {trial.state}"
        return f"trial {trial.number}: {trial.examples:,} examples  {scores}{state}{star}{error}"

    def _table(self) -> Table:
        tried, best = self._study.tried(), self._study.best()
        over = [trial.state for trial in tried]
        counts = ", ".join(f"{over.count(state)} {state}" for state in STYLES if state in over)
        table = Table(
            title=f"{len(tried)} of {self._settings.trials} trials: {counts}",
            title_justify="left",
            box=None,
            pad_edge=False,
            header_style="bold",
        )
        names = [COMPOSITE, *(name for name in (tried[-1].scores if tried else {}) if name != COMPOSITE)]
        names = list(dict.fromkeys([*names, *(name for trial in tried for name in trial.scores)]))
        for column in ("trial", "state", "examples", *names):
            table.add_column(column, justify="left" if column == "state" else "right", no_wrap=True)
        table.add_column("values", overflow="ellipsis", no_wrap=True)
        shown = tried[-max(3, self._console.height - ROOM) :]
        if best and best.number < shown[0].number:
            shown = [best, *shown[1:]]
        for trial in shown:
            star = "*" if best and trial.number == best.number else ""
            scores = (f"{trial.scores[name]:.4f}" if name in trial.scores else "-" for name in names)
            told = _first_line(trial.error) or _shown(trial)
            state = f"[{STYLES[trial.state]}]{trial.state}"
            table.add_row(f"{star}{trial.number}", state, f"{trial.examples:,}", *scores, escape(told))
        return table


def _shown(trial: Tried) -> str:
    return "  ".join(f"{name}={brief(value)}" for name, value in trial.values.items())


def brief(value: object) -> str:
    """A value in few characters."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list) and all(isinstance(each, float) for each in value):
        return "[" + " ".join(f"{each:.2f}" for each in value) + "]"
    return inline_yaml(value)


def _first_line(text: str) -> str:
    """Of an error; of a traceback the last, where the reason is."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return ""
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]
