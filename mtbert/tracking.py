"""What a run shows and keeps: TensorBoard events, `metrics.jsonl`, the progress bar. Silent off rank 0.

A step is numbered by the update just made, from 0. What is measured after update s (its losses, an evaluation) carries
step s. So a run that continues at step n keeps what carries less than n and writes the rest again, in both sinks:
curves go on without a gap or an overlap.

This is the only file that knows TensorBoard.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from mtbert.figures import pixels
from mtbert.files import NO_ROOM
from mtbert.record import METRICS_FILE, keep_lines_before
from mtbert.runs import Rank

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from mtbert.figures import Figure

PLAIN_LINE_EVERY_S = 10.0
PLAIN_WIDTH = 160  # characters; log files have no width of their own
LONGEST_LINE = 10_000  # of a table
GROUPS = {
    "1 overview": r"metric/composite|gradient/conflict_rate|speed/tokens_per_second",
    "2 learning": r"metric/|loss/",
    "3 gradients": r"gradient/|weighting/",
    "4 speed": r"speed/|memory/",
    "5 schedule": r"",
}
"""TensorBoard sorts scalars by name, groups them by what stands before the first slash, and opens at the first group.
So there, and only there, a tag has a group in front; the first pattern that the tag begins with counts."""
LAYOUT = {
    category: {title: ["Multiline", [rf"(\d [^/]+/)?{pattern}"]] for title, pattern in charts.items()}
    for category, charts in {
        "does it learn, do the tasks fight, is it fast": {
            "score on the development sets": r"metric/.*",
            "training loss": r"loss/[^/]+$",
            "cosine between tasks' gradients": r"gradient/cosine/.*",
            "tokens per second": r"speed/tokens_per_second$",
        },
        "learning": {
            "development loss": r"loss/.*/dev$",
            "learning rates": r"learning_rate/.*",
            "passes over each dataset": r"passes/.*",
        },
        "gradients": {
            "share of pairs in conflict": r"gradient/conflict_rate$",
            "weights of surgery": r"gradient/weight/.*",
            "gradient norms": r"gradient/norm/.*",
        },
        "speed": {
            "model FLOPs utilisation, or TFLOP/s of a rank": r"speed/(mfu|model_tflops)$",
            "share of padding avoided, of time spent waiting for data": r"speed/(padding_avoided|waiting_for_data)$",
            "memory, GiB": r"memory/.*",
        },
    }.items()
}
"""TensorBoard's custom scalars: on the first screen the questions one comes with, below what else shares a chart.
Runs of earlier versions have no group before a tag."""


def grouped(tag: str) -> str:
    """A scalar's name in TensorBoard."""
    return next(f"{group}/{tag}" for group, pattern in GROUPS.items() if re.match(pattern, tag))


@contextmanager
def tokenising_told(rank: Rank, quiet: bool) -> Iterator[Callable[[str, int], None] | None]:
    """What `load_dataset` may call while it tokenises, before a `Tracker` can count steps: on a terminal a live line
    that goes in the end, elsewhere a plain line now and then. None where that is not wanted: off rank 0, or quiet."""
    if quiet or not rank.first:
        yield None
        return
    live: Progress | None = None
    due = -math.inf

    def tell(shown: str, rows: int) -> None:
        nonlocal live, due
        told = f"tokenising {shown}: {rows:,} rows"
        if sys.stdout.isatty():
            if live is None:
                live = Progress(TextColumn("{task.description}", markup=False), console=_console(), transient=True)
                live.add_task("")
                live.start()
            live.update(live.task_ids[0], description=told)
        elif (now := time.monotonic()) >= due:
            due = now + PLAIN_LINE_EVERY_S
            print(told, flush=True)

    try:
        yield tell
    finally:
        if live is not None:
            live.stop()


class Tracker:
    """Writes into a run folder and on stdout; on ranks other than 0 every method does nothing.

    Args:
        run_dir: gets `metrics.jsonl` and `events.out.tfevents.*`, so that a run bears its folder's name in TensorBoard.
        first_step: the step this process begins with; earlier records of this and later steps are dropped.
        total_steps: steps of the whole run, for the bar.
        quiet: nothing on stdout; the files are written all the same.
    """

    def __init__(self, run_dir: Path, rank: Rank, first_step: int, total_steps: int, quiet: bool = False) -> None:
        self._run_dir = run_dir
        self._first_step = first_step
        self._events: SummaryWriter | None = None
        self._events_from = first_step
        self._lines: _Lines | None = None
        damaged = 0
        if rank.first:
            damaged = keep_lines_before(run_dir, first_step)
            self._lines = _Lines(run_dir / METRICS_FILE)
        self._display = _display(first_step, total_steps) if rank.first and not quiet else None
        if damaged:
            self.message(f"{METRICS_FILE}: {damaged} line(s) were damaged and are dropped")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One JSON line and one point per tag. A value that is not finite is null in JSON and named in `not_finite`."""
        assert not values.keys() & {"step", "time", "not_finite"}, "a tag would hide a field of the line"
        if not self._lines:
            return
        now = time.time()
        line: dict[str, object] = {"step": step, "time": round(now, 3)}
        line |= {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        if broken := {tag: str(value) for tag, value in values.items() if not math.isfinite(value)}:
            line["not_finite"] = broken
        if not self._lines.write(json.dumps(line, allow_nan=False) + "\n"):
            return  # no room for events either
        with self._no_room_survived():
            for tag, value in values.items():
                self._writer().add_scalar(grouped(tag), value, step, walltime=now)
        self._events_from = step + 1

    def text(self, tag: str, markdown: str) -> None:
        """A page of TensorBoard's text tab."""
        if self._lines:
            self._writer().add_text(tag, markdown, self._first_step)

    def figures(self, step: int, draw: Callable[[], Mapping[str, Figure]]) -> None:
        """Pictures by tag; `draw` is called on rank 0 alone, and first imports what it draws with."""
        if self._lines:
            with self._no_room_survived():
                for tag, figure in draw().items():
                    self._writer().add_image(tag, pixels(figure), step, dataformats="HWC")

    def settings(self, values: Mapping[str, Any]) -> None:
        """The run's row of TensorBoard's HParams tab; numbers and texts as they are, anything else as text.

        No experiment summary: one run's would fix the columns of all, and without it TensorBoard takes the union.
        """
        if self._lines:
            from torch.utils.tensorboard.summary import hparams

            plain = {key: value if isinstance(value, (int, float)) else str(value) for key, value in values.items()}
            _, start, _ = hparams(plain, {})
            with self._no_room_survived():
                self._writer()._get_file_writer().add_summary(start)

    def finished(self) -> None:
        """The HParams tab then calls the run a success."""
        if self._lines:
            from torch.utils.tensorboard.summary import hparams

            _, _, end = hparams({}, {})
            with self._no_room_survived():
                self._writer()._get_file_writer().add_summary(end)

    def phase(self, name: str, first: int, last: int) -> None:
        """A phase of steps `first` to `last`, both included, begins or is continued."""
        if self._display:
            self._display.phase(name, first, last)

    def progress(self, step: int, losses: Mapping[str, float], examples_per_second: float) -> None:
        if self._display:
            self._display.progress(step, losses, examples_per_second)

    def message(self, text: str) -> None:
        """A line on stdout, above the bar."""
        if self._display:
            self._display.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str | float | None]]) -> None:
        """Aligned on stdout: numbers to the right, floats with four decimals, None as a dash."""
        if self._display:
            print_table(title, columns, rows, self._display.console)

    def flush(self) -> None:
        """Before a checkpoint: what is lost with a killed run, or a power cut, would be a gap in the resumed curve."""
        if self._lines:
            self._lines.sync()
        if self._events:
            with self._no_room_survived():
                self._events.flush()

    def close(self) -> None:
        """Ends the bar and writes out what is buffered. Calling it again does nothing."""
        if self._display:
            self._display.close()
        if self._events:
            with self._no_room_survived():
                self._events.close()
        if self._lines:
            self._lines.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _writer(self) -> SummaryWriter:
        if self._events is None:
            # TensorBoard takes a second to import
            from torch.utils.tensorboard import SummaryWriter

            # purge_step on fresh runs too: a loader that saw a first file without it ignores it in the second one
            self._events = SummaryWriter(self._run_dir, purge_step=self._events_from, flush_secs=20)
            self._events.add_custom_scalars(LAYOUT)
        return self._events

    @contextmanager
    def _no_room_survived(self) -> Iterator[None]:
        """TensorBoard's writer gives up for good on a full disk; another one takes over when there is room again."""
        try:
            yield
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            self._events = None


class _Lines:
    """A file that is appended to; each line reaches a reader (the tuner) at once. What finds no room comes later."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._late = b""

    def write(self, line: str) -> bool:
        """Whether all is written that ever came."""
        self._late += line.encode()
        try:
            while self._late:
                self._late = self._late[self._file.write(self._late) :]
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
        return not self._late

    def sync(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise

    def close(self) -> None:
        self.write("")
        self._file.close()


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str | float | None]], console: Console | None = None
) -> None:
    """Aligned on stdout: numbers to the right, floats with four decimals, None as a dash. No colours off a terminal.

    Where a line has no room, the first column folds, and if that is not enough the line is longer: no number is cut.
    """
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        words = any(isinstance(row[number], str) for row in rows)
        cells = [column, *(_cell(row[number]) for row in rows)]
        least = max(cell_len(part) for cell in cells for part in ([cell] if number else cell.split() or [""]))
        table.add_column(column, justify="left" if words else "right", no_wrap=number > 0, min_width=least)
    for row in rows:
        table.add_row(*map(_cell, row))
    console = console or _console()
    shortest = Measurement.get(console, console.options.update(max_width=LONGEST_LINE), table).minimum
    if shortest > console.width:
        table.width = shortest
    console.print(table, markup=False, highlight=False, crop=False)


class _Console(Console):
    """Leaves it to the command what becomes of it when nobody reads stdout any more; rich ends with exit code 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def _console() -> Console:
    # not Console.is_terminal, which FORCE_COLOR turns on in log files; what is in brackets or between colons is text
    return (
        _Console(file=sys.stdout, markup=False, emoji=False)
        if sys.stdout.isatty()
        else _Console(file=sys.stdout, markup=False, emoji=False, width=PLAIN_WIDTH, force_terminal=False)
    )


def _cell(value: str | float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _named(losses: Mapping[str, float]) -> str:
    return "  ".join(f"{task} {loss:.3f}" for task, loss in losses.items())


# ------------------------------------------------------------------------------------------- on stdout


class _Bar:
    """A live line per phase, on a terminal."""

    def __init__(self, first_step: int) -> None:
        self.console = _console()
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}"),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=self.console,
            refresh_per_second=4,
            expand=True,
        )
        self._first_step = first_step
        self._phase: TaskID | None = None
        self._begins = 0

    def phase(self, name: str, first: int, last: int) -> None:
        if self._phase is not None:
            self._bar.stop_task(self._phase)
        done = max(self._first_step - first, 0)
        self._phase = self._bar.add_task(name, total=last - first + 1, completed=done, losses="", speed="")
        self._begins = first
        self._bar.start()

    def progress(self, step: int, losses: Mapping[str, float], examples_per_second: float) -> None:
        assert self._phase is not None, "a phase begins before its first step"
        speed = f"{examples_per_second:.0f} examples/s"
        self._bar.update(self._phase, completed=step + 1 - self._begins, losses=_named(losses), speed=speed)

    def close(self) -> None:
        self._bar.stop()


class _Plain:
    """A plain line now and then, for log files and pipes."""

    def __init__(self, first_step: int, total_steps: int) -> None:
        self.console = _console()
        self._first_step = first_step
        self._total_steps = total_steps
        self._phase = "train"
        self._started = time.monotonic()
        self._due = self._started

    def phase(self, name: str, first: int, last: int) -> None:
        self._phase = name
        print(f"phase {name}: steps {first} to {last}", flush=True)

    def progress(self, step: int, losses: Mapping[str, float], examples_per_second: float) -> None:
        now = time.monotonic()
        done = step + 1
        if now < self._due and done < self._total_steps:
            return
        self._due = now + PLAIN_LINE_EVERY_S
        left = (now - self._started) / (done - self._first_step) * (self._total_steps - done)
        print(
            f"{self._phase} {done}/{self._total_steps}  {_named(losses)}  {examples_per_second:.0f} examples/s  "
            f"{_clock(left)} left",
            flush=True,
        )

    def close(self) -> None:
        pass


def _display(first_step: int, total_steps: int) -> _Bar | _Plain:
    return _Bar(first_step) if sys.stdout.isatty() else _Plain(first_step, total_steps)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
