"""Every system of the four papers on given data and encoder, and the page that sets our scores beside the papers'.

usage: make papers           (python -m benchmarks.papers [--rows A5 'B*'] [--budget MINUTES] [--data DIR] …)

Every finished run is a line of the record, and the page is written from the record alone; `--report` only writes it. A
run that is there, from whatever machine, is not repeated, if its configuration is still its recipe's and the files are
the same. One that is interrupted continues from its folder in `--out` when this is called again; that goes once the run
is in the record. Rows whose configurations are equal share one run. All rows come once before any comes a second time.
"""

from __future__ import annotations

import argparse
import fnmatch
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.options import amount
from benchmarks.papers.page import PAGE, all_recipes, outdated_told, search_differs, write_page
from benchmarks.papers.record import RECORD, SEARCH, Line, Record, outdated
from benchmarks.papers.rows import ROOT, ROWS, SEEDS, Recipe, changed, recipes
from benchmarks.papers.running import Runner, contents, search_of
from mtbert.config import Config
from mtbert.errors import CommandLine, UserError, count
from mtbert.stops import STOPPED

DATA = ROOT.parent / "shared" / "data"
ENCODER = ROOT / "runs" / "minilm"
"""Where `make papers` looks unless told otherwise."""


def parser() -> argparse.ArgumentParser:
    parser = CommandLine(
        "python -m benchmarks.papers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder with the CS224N files (default: ../shared/data beside the checkout)")
    parser.add_argument(
        *["--encoder"],
        help="Hugging Face folder or hub name (default: runs/minilm; --set encoder.shape=… for a new one)",
    )
    parser.add_argument("--encoder-name", metavar="NAME", help="what the page calls it (default: by its own README)")
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="ROW", help="names or patterns, such as A5 'D*'")
    parser.add_argument(
        *["--seeds"], type=count, default=SEEDS, help="of the rows that a finding rests on; the others get one"
    )
    parser.add_argument("--budget", type=amount, default=math.inf, metavar="MINUTES", help="start no run after that")
    parser.add_argument("--jobs", type=count, default=1, help="rows at a time, which share the cores")
    parser.add_argument("--redo", action="store_true", help="also runs whose recipe has changed since")
    parser.add_argument("--steps", type=count, help="cut every row to so many steps: a look at whether all works")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="for every row")
    parser.add_argument("--record", type=Path, default=RECORD, metavar="FILE", help="default: benchmarks/papers.jsonl")
    parser.add_argument(
        *["--page"], type=Path, metavar="FILE", help="default: docs/papers.md; of another record, beside it"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/papers"), help="folder for the runs, and of a search C7")
    parser.add_argument("--report", action="store_true", help="run nothing, write the page")
    parser.add_argument("--keep-runs", action="store_true", help="also once they are in the record")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    reader = parser()
    options = reader.parse_args(arguments)
    rows = [row for row in ROWS if any(fnmatch.fnmatchcase(row.name, pattern) for pattern in options.rows)]
    if not rows:
        reader.error(f"--rows: no such row; there are {', '.join(row.name for row in ROWS)}")
    settings = [*places(reader, options), *options.set]
    if options.jobs > 1:  # a thread a run wastes less than all threads on one: about a fifth on two cores
        settings.append(f"engine.threads={max(1, len(os.sched_getaffinity(0)) // options.jobs)}")
    record = Record(options.record)
    target = options.page or (PAGE if is_tracked(record) else options.record.with_suffix(".md"))
    try:
        lines = record.lines()
        everything = all_recipes(lines, settings, options.steps)
        if is_tracked(record) and (keys := changed(everything)):
            raise UserError(f"{RECORD}: holds runs of the recipes as they are; to change {keys}, name another --record")
        old = outdated(lines, everything)
        for line in old:
            print(f"outdated: {outdated_told(line, everything)}" + "; --redo runs it again" * (not options.redo))
        if not options.report:
            wanted = recipes(rows, options.seeds, settings, options.steps)
            skipped = set() if options.redo else {(line.row, line.seed) for line in old}
            todo = to_be_run(wanted, lines, skipped)
            end = started + 60 * options.budget
            runner = Runner(options.out.absolute(), record, options.encoder_name, options.keep_runs, end)
            runner.out.mkdir(parents=True, exist_ok=True)
            for recipe in todo:
                record.refuse_others(contents(recipe.config), lines)
            runner.refuse_changed(todo)
            with runner.ended_by_sigterm():
                for number, (recipe, _) in enumerate(runner.perform_all(todo, options.jobs), 1):
                    print(f"{number}/{len(todo)} {recipe.row.name} seed {recipe.seed}: {recipe.row.system}", flush=True)
                    report(record, target, settings, options.steps)
            take_search(runner, lines, everything)
        report(record, target, settings, options.steps)
    except UserError as error:
        print(f"{reader.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return STOPPED
    print(f"written: {target}")
    return 0


def to_be_run(wanted: Sequence[Recipe], lines: Sequence[Line], skipped: set[tuple[str, int]]) -> list[Recipe]:
    """The first recipe of those with one configuration, where the record has none with it."""
    first = {recipe.key: recipe for recipe in reversed(wanted)}
    done = {line.key for line in lines}
    return [
        recipe
        for recipe in wanted
        if recipe is first[recipe.key] and recipe.key not in done and (recipe.row.name, recipe.seed) not in skipped
    ]


def report(record: Record, target: Path, settings: Sequence[str], steps: int | None) -> None:
    with record.locked():  # else a slower process would write an older page over a newer one
        lines = record.lines()
        write_page(target, lines, all_recipes(lines, settings, steps))


def take_search(runner: Runner, lines: Sequence[Line], wanted: Sequence[Recipe]) -> None:
    """Put the search in the folder of runs into the record, if there is one that is not there."""
    search = search_of(runner.out / SEARCH, runner.encoder)
    if search is None:
        return
    if keys := search_differs(search, base_of_search(wanted)):
        print(f"not recorded: {runner.out / SEARCH}, the search varied another configuration ({keys})")
        return
    stamped = {"when", "machine", "commit"}
    if all(search.model_dump(exclude=stamped) != line.model_dump(exclude=stamped) for line in lines):
        runner.record.put(search)


def base_of_search(wanted: Sequence[Recipe]) -> Config:
    return next(recipe.config for recipe in wanted if (recipe.row.name, recipe.seed) == ("C6", 0))


def is_tracked(record: Record) -> bool:
    return record.path.resolve() == RECORD.resolve()


def places(reader: argparse.ArgumentParser, options: argparse.Namespace) -> list[str]:
    """Where data and encoder lie, as settings; ends the program if that is nowhere and something is to be run."""
    data, encoder = options.data, options.encoder
    if data is None and not any(text.startswith("data.") for text in options.set):
        data = DATA
        if not options.report and not data.is_dir():
            reader.error(f"--data: no {data}; name the folder with the CS224N files (ids-sst-train.csv and others)")
    if encoder is None and not any(text.startswith(("encoder.pretrained=", "encoder.shape=")) for text in options.set):
        encoder = ENCODER
        if not options.report and not encoder.is_dir():
            instead = "name a Hugging Face folder, or a hub name such as sentence-transformers/all-MiniLM-L6-v2"
            reader.error(f"--encoder: no {encoder}; {instead}")
    settings = [f"data.dir={Path(data).absolute()}"] if data else []
    if encoder:
        settings.append(f"encoder.pretrained={Path(encoder).absolute() if Path(encoder).is_dir() else encoder}")
    return settings


if __name__ == "__main__":
    sys.exit(main())
