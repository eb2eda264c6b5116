"""`python -m mtbert COMMAND`. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import secrets
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtbert.config import Config
from mtbert.config_files import DEFAULT_CONFIG, load_config, schema, to_yaml
from mtbert.errors import CommandLine, UserError, to_install
from mtbert.files import user_path
from mtbert.lock import RunLock
from mtbert.reference import reference
from mtbert.runs import Rank, check_run, create_run, discard_unstarted
from mtbert.stops import STOPPED, UNREAD, give_up, stop_requests

if TYPE_CHECKING:
    from mtbert.evaluate import Evaluation
    from mtbert.predict import Report
    from mtbert.trained import Trained


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 a user's mistake (one line on stderr), 130 stopped, 141 nobody reads stdout any more; our
    own bug raises."""
    options = _parser().parse_args(arguments)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # `>&-`
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    if isinstance(sys.stdout, io.TextIOWrapper):  # terminals without UTF-8, and half surrogate pairs that JSON let in
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status: int = options.run(options)
        with _told_of_stdout():
            sys.stdout.flush()
    except UserError as error:
        print(f"mtbert: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mtbert: interrupted", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:
        give_up(sys.stdout)
        return UNREAD
    return status


@contextlib.contextmanager
def _told_of_stdout() -> Iterator[None]:
    """For what writes on stdout, and tells of other files itself. Raises `UserError`, and `BrokenPipeError`."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        give_up(sys.stdout)
        raise UserError(f"stdout: cannot be written: {error.strerror}") from None


def _parser() -> argparse.ArgumentParser:
    parser = CommandLine(prog="python -m mtbert", description="Multi-task BERT with sharded surgery.")
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("train", help="train in this process (several ranks: launch/submit.py or torchrun)")
    _add_config(command)
    command.add_argument("--resume", metavar="RUN", help="continue this run folder instead of starting a new one")
    command.add_argument("--quiet", action="store_true", help="nothing on stdout")
    command.add_argument("--json", action="store_true", help="nothing on stdout but one JSON object at the end")
    command.set_defaults(run=_train)

    command = commands.add_parser("evaluate", help="score a run on its development sets, or a task of it on any file")
    command.add_argument("folder", metavar="RUN", help="run folder")
    command.add_argument("--checkpoint", choices=["best", "latest"], default="best")
    command.add_argument("--task", help="with --file: one of the run's tasks")
    command.add_argument("--file", metavar="FILE", help="such as a test set: the task's columns, labels too")
    command.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    command.set_defaults(run=_evaluate)

    command = commands.add_parser("compare", help="several runs side by side; those that differ in seed are one group")
    command.add_argument(
        "folders", metavar="RUN", nargs="+", help="run folders; the first is what others are held against"
    )
    command.add_argument("--checkpoint", choices=["best", "latest"], default="latest", help="which evaluation counts")
    command.add_argument(
        "--resamples", type=int, default=1000, metavar="N", help="of the paired bootstrap, at least (1000)"
    )
    command.add_argument("--html", metavar="FILE", help="also write a page with the tables and overlaid curves")
    command.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    command.set_defaults(run=_compare)

    command = commands.add_parser("report", help="a run as one HTML page: tables, curves, worst errors")
    command.add_argument("folder", metavar="RUN", help="run folder")
    command.add_argument("--checkpoint", choices=["best", "latest"], default="best", help="which evaluation")
    command.add_argument("--output", metavar="FILE", help="default: report.html in the run folder")
    command.set_defaults(run=_report)
    _add_use(commands)
    _add_checkpoint(commands)
    _add_data(commands)

    command = commands.add_parser("show-config", help="the whole configuration, defaults written out")
    _add_config(command)
    instead = command.add_mutually_exclusive_group()
    instead.add_argument("--schema", action="store_true", help="JSON schema of all keys instead, for editors")
    instead.add_argument("--reference", action="store_true", help="the page docs/configuration.md instead")
    command.set_defaults(run=_show_config)
    return parser


def _add_use(commands: Any) -> None:
    """Subcommands that use a trained run; they need nothing but its folder."""
    command = _add_run(
        commands, "predict", "answer every row of a file: the same rows out, with the task's predictions"
    )
    command.add_argument("file", metavar="FILE", help=".csv, .tsv, .jsonl; - is stdin")
    command.add_argument("--task", required=True, help="one of the run's tasks")
    command.add_argument("--out", default="-", metavar="FILE", help="where to; default: stdout")
    command.add_argument("--text", nargs="+", metavar="COLUMN", help="text column(s); default: those trained with")
    command.add_argument("--format", choices=["csv", "tsv", "jsonl"], default="", help="of FILE, if its name tells not")
    command.add_argument("--submission", action="store_true", help="ids and predictions as CS224N wants them")
    command.set_defaults(run=_predict)

    command = _add_run(commands, "embed", "sentence vectors of a file's texts")
    command.add_argument("file", metavar="FILE", help=".csv, .tsv, .jsonl; - is stdin")
    command.add_argument("--out", required=True, metavar="FILE", help="vectors.npy or vectors.parquet")
    command.add_argument("--text", metavar="COLUMN", help="text column; default: sentence, text, or the only one")
    command.add_argument("--format", choices=["csv", "tsv", "jsonl"], default="", help="of FILE, if its name tells not")
    command.set_defaults(run=_embed)

    command = _add_run(commands, "export", "a folder that transformers, sentence-transformers and onnxruntime open")
    command.add_argument("target", metavar="DIR", help="new folder")
    command.add_argument("--onnx", action="store_true", help="the ONNX files, too")
    command.set_defaults(run=_export)

    command = _add_run(commands, "serve", "answer over HTTP: /predict, /embed, /healthz")
    command.add_argument("--host", default="127.0.0.1", help="default: %(default)s, this machine only")
    command.add_argument("--port", type=int, default=8000, help="default: %(default)s; 0: any")
    command.add_argument("--max-body", type=int, default=2**20, metavar="BYTES", help="default: %(default)s")
    command.add_argument(
        "--max-batch", type=int, default=64, metavar="N", help="inputs a request; default: %(default)s"
    )
    command.add_argument("--max-text", type=int, default=10_000, metavar="CHARACTERS", help="default: %(default)s")
    command.set_defaults(run=_serve)


def _add_checkpoint(commands: Any) -> None:
    command = commands.add_parser("checkpoint", help="look at a run's checkpoints, check them, remove old ones")
    verbs = command.add_subparsers(required=True, metavar="verb")
    for name, does in (
        ("list", "step, time, size, ranks; reads the manifests only"),
        ("verify", "read every file and hold it to its checksum; exit code 1 if one is damaged"),
        ("prune", "remove all but the newest N intact ones and the best"),
    ):
        verb = verbs.add_parser(name, help=does)
        verb.add_argument("folder", metavar="RUN", help="run folder")
        if name == "prune":
            verb.add_argument("--keep", type=int, metavar="N", required=True, help="how many; at least 1")
        else:
            verb.add_argument("--json", action="store_true", help="one JSON object instead of a table")
        verb.set_defaults(run=_prune if name == "prune" else _survey, thorough=name == "verify")


def _add_data(commands: Any) -> None:
    command = commands.add_parser("data", help="look at data files, or fetch the three of the examples")
    verbs = command.add_subparsers(required=True, metavar="verb")
    verb = verbs.add_parser(
        "check", help="rows, labels, lengths, duplicates, overlaps, rows left out; exit code 1: training refuses it"
    )
    verb.add_argument("files", metavar="FILE", nargs="*", help="files to look at; or --config")
    verb.add_argument("--text", nargs="+", metavar="COLUMN", help="default: by the usual names")
    verb.add_argument("--label", metavar="COLUMN", help="default: by the usual names")
    _add_config(verb, "YAML; the files of its tasks, and whether their labels are the tasks'")
    verb.add_argument("--json", action="store_true", help="one JSON object instead of text")
    verb.set_defaults(run=_check)
    verb = verbs.add_parser("fetch", help="SST, Quora and STS from the hub, as configs/cs224n.yaml names them")
    verb.add_argument("folder", metavar="DIR")
    verb.add_argument("--task", choices=["sst", "para", "sts"], nargs="+", default=["sst", "para", "sts"])
    verb.set_defaults(run=_fetch)


def _add_run(commands: Any, name: str, does: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=does)
    command.add_argument("folder", metavar="RUN", help="run folder")
    command.add_argument("--checkpoint", choices=["best", "latest"], default="best")
    if name == "export":
        command.set_defaults(precision="fp32")
    else:
        command.add_argument(
            "--precision", choices=["auto", "fp32", "bf16"], help="default: as in the run's configuration"
        )
    return command


def _add_config(
    command: argparse.ArgumentParser, config: str = "YAML; default: the generated three-task quick start"
) -> None:
    command.add_argument("--config", type=user_path, metavar="FILE", help=config)
    command.add_argument(
        "--set",
        nargs="+",
        action="extend",  # given twice, both count
        default=[],
        metavar="KEY=VALUE",
        help="dotted keys, e.g. optimizer.lr=3e-5",
    )


def _config(options: argparse.Namespace) -> Config:
    return load_config(options.config or DEFAULT_CONFIG, options.set)


def _train(options: argparse.Namespace) -> int:
    if options.resume and (options.config or options.set):
        raise UserError("--resume: a run continues with the configuration in its folder; leave out --config and --set")
    rank = Rank.here()
    config = None if options.resume else _config(options)
    folder: Path | None = None

    def begin() -> str:
        """The run folder, which this process holds from then on."""
        source = str(options.config or DEFAULT_CONFIG)
        begun = create_run(config, source, sys.argv) if config else existing_run(options.resume)
        held.enter_context(RunLock(begun, f"{secrets.token_hex(4)}-0").held())
        return str(begun)

    try:
        with contextlib.ExitStack() as held:
            if rank.world == 1:
                folder = Path(begin())
            else:
                from mtbert.ranks import told_by_first

                folder = Path(held.enter_context(told_by_first(rank, begin)))
            from mtbert.trainer import train

            stop = held.enter_context(_stop_on_signals())
            outcome = train(folder, rank, stop, quiet=options.quiet or options.json)
    except (Exception, KeyboardInterrupt) as error:
        if folder is None or not rank.first:
            raise
        if not options.resume and isinstance(error, UserError | KeyboardInterrupt):
            discard_unstarted(folder)
        from mtbert.manifest import folders

        if folders(folder) or (isinstance(error, KeyboardInterrupt) and folder.is_dir()):
            print(_continue(folder), file=sys.stderr)
        raise
    if options.json and rank.first:
        scores = {name: _finite(score) for name, score in outcome.metrics.items()}
        record = {"run": str(folder), "status": outcome.status, "step": outcome.step, "scores": scores}
        print(json.dumps(record))
    if outcome.status == "stopped":
        if rank.first:
            print(f"stopped after step {outcome.step}; {_continue(folder)}", file=sys.stderr)
        return STOPPED
    return 0


def _continue(folder: Path) -> str:
    return f"continue with: python -m mtbert train --resume {shlex.quote(str(folder))}"


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM asked for a stop. A second request does what the signal does by default."""
    asked = threading.Event()

    def ask(number: signal.Signals, request: int) -> None:
        if request > 1:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            signal.raise_signal(number)
        asked.set()
        # not print: the signal may have come in the middle of one
        os.write(2, b"stopping: this step is finished and saved first (again: at once)\n")

    with stop_requests(ask, signal.SIGINT, signal.SIGTERM):
        yield asked.is_set


def existing_run(name: str) -> Path:
    folder = user_path(name)
    check_run(folder)
    return folder


def _evaluate(options: argparse.Namespace) -> int:
    if (options.task is None) != (options.file is None):
        raise UserError(
            "evaluate: --task says whose examples --file holds; give both, or none for the development sets"
        )
    folder = existing_run(options.folder)
    if options.file is not None:
        return _evaluate_file(folder, options)
    from mtbert.trainer import evaluate_run

    step, results, composite = evaluate_run(folder, options.checkpoint, _nobody_watches(options))
    if options.json:
        print(json.dumps({"step": step, "composite": _finite(composite), "tasks": _as_records(results)}))
    else:
        rows: list[list[str | float | None]] = [[r.task, r.metric, r.score, r.loss] for r in results]
        rows.append(["composite", None, composite, None])
        title = f"Development scores after step {step} ({options.checkpoint} checkpoint)"
        _print_table(title, ["task", "metric", "score", "loss"], rows)
    return 0


def _nobody_watches(options: argparse.Namespace) -> bool:
    """Whether stdout is for the scores alone: they are an object, or go into a file."""
    return options.json or not sys.stdout.isatty()


def _evaluate_file(folder: Path, options: argparse.Namespace) -> int:
    from mtbert.evaluate import every_score
    from mtbert.predict import SHOWN_TROUBLES
    from mtbert.trainer import evaluate_file

    step, task, result = evaluate_file(folder, options.checkpoint, options.task, options.file, _nobody_watches(options))
    data, scores = task.dataset("dev"), every_score(task, result)
    left_out = len(data.quarantined)
    for row in data.quarantined[:SHOWN_TROUBLES]:
        print(f"mtbert: {row.file} line {row.line}: {row.reason}", file=sys.stderr)
    if options.json:
        records = _as_records([result])
        records[task.name]["scores"] = {metric: _finite(score) for metric, score in scores.items()}
        counts = {"examples": len(data), "left_out": left_out}
        print(json.dumps({"step": step, "file": data.file, **counts, "tasks": records}))
    else:
        counted = f"{len(data):,} examples" + (f", {left_out:,} rows left out" if left_out else "")
        with _told_of_stdout():  # not as the table's title, which would fold the name of the file
            print(f"Scores on {data.file} after step {step} ({options.checkpoint} checkpoint): {counted}")
        rows: list[list[str | float | None]] = [[task.name, metric, score, None] for metric, score in scores.items()]
        rows[0][-1] = result.loss
        _print_table("", ["task", "metric", "score", "loss"], rows)
    return 0


def _opened(options: argparse.Namespace) -> Trained:
    folder = existing_run(options.folder)
    from mtbert.ranks import set_threads
    from mtbert.trained import load_run

    set_threads(Rank())  # engine.threads is training's
    return load_run(folder, options.checkpoint, options.precision)


def _predict(options: argparse.Namespace) -> int:
    run = _opened(options)
    from mtbert.predict import predict_file

    with _told_of_stdout():
        report = predict_file(
            run, options.task, options.file, options.out, options.text, options.format, options.submission
        )
    _tell(report, "their error says why")
    return 0


def _embed(options: argparse.Namespace) -> int:
    run = _opened(options)
    from mtbert.predict import embed_file

    report = embed_file(run, options.file, Path(options.out), options.text, options.format)
    _tell(report, "NaN stands in their place" if options.out.endswith(".npy") else "their error says why")
    return 0


def _export(options: argparse.Namespace) -> int:
    run = _opened(options)
    from mtbert.export import export

    export(run, Path(options.target), options.onnx)
    print(options.target)
    return 0


def _serve(options: argparse.Namespace) -> int:
    for name in ("max_body", "max_batch", "max_text"):
        if (value := getattr(options, name)) < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: every request would be refused; give 1 or more")
    if not 0 <= options.port < 2**16:
        raise UserError(f"--port {options.port}: ports are 1 to 65535; 0 takes a free one")
    if not options.host:  # which sockets take for every network
        raise UserError("--host: is empty; 127.0.0.1 is this machine only, 0.0.0.0 every network")
    try:
        from mtbert.serve import Limits, serve
    except ImportError:
        raise UserError(f"serve: needs FastAPI and uvicorn: {to_install('serve')}") from None

    run = _opened(options)
    serve(run, options.host, options.port, Limits(options.max_body, options.max_batch, options.max_text))
    return 0


def _survey(options: argparse.Namespace) -> int:
    folder = existing_run(options.folder)
    from mtbert.manifest import survey

    states = survey(folder, options.thorough)
    if not states:
        raise UserError(f"{folder}: has no checkpoint yet")
    if options.json:
        print(json.dumps({"run": str(folder), "checkpoints": [state.record() for state in states]}))
    else:
        rows: list[list[str | float | None]] = []
        for state in states:
            record = state.record()
            size, notes = record["bytes"], [record["state"], *state.notes]
            rows.append(
                [
                    record["step"],
                    record["saved"],
                    None if size is None else size / 1e6,
                    record["ranks"],
                    ", ".join(notes),
                ]
            )
        _print_table("", ["step", "saved", "MB", "ranks", "state"], rows)
    for state in states:
        if state.trouble:
            print(f"mtbert: {state.trouble}", file=sys.stderr)
    return int(any(state.trouble for state in states))


def _prune(options: argparse.Namespace) -> int:
    if options.keep < 1:
        raise UserError(f"--keep {options.keep}: the newest one always stays; give 1 or more")
    from mtbert.manifest import prune

    for removed in prune(existing_run(options.folder), options.keep):
        print(f"removed {removed}")
    return 0


def _check(options: argparse.Namespace) -> int:
    if bool(options.files) == bool(options.config):
        raise UserError("data check: name files, or a configuration with --config")
    if options.files and options.set:
        raise UserError("--set: changes a configuration, and files are named here; leave it out, or use --config")
    if options.config and (options.text or options.label):
        raise UserError(
            "--text, --label: a configuration says which columns they are; leave them out, or set tasks.NAME.columns"
        )
    from mtbert.datasets import as_json, as_text, check, wanted_by, wanted_files

    wanted = wanted_files(options.files, options.text, options.label) if options.files else wanted_by(_config(options))
    found, overlaps = check(wanted)
    with _told_of_stdout():
        print((as_json if options.json else as_text)(found, overlaps), end="")
    refused = [f"{each.file}: {each.unfit}" for each in found if each.unfit]
    refused += [f"{each.file} {each.refusals[0]}" for each in found if each.refused]
    for first in refused:
        print(f"mtbert: {first}", file=sys.stderr)
    return int(bool(refused))


def _fetch(options: argparse.Namespace) -> int:
    from mtbert.datasets import fetch

    for line in fetch(user_path(options.folder), options.task):
        print(line)
    print("Licences of these data are their owners'; Quora question pairs are for non-commercial use.")
    return 0


def _tell(report: Report, instead: str) -> None:
    """On stderr: stdout may be the answers. `instead`: what the output has of a row that could not be answered."""
    for trouble in report.troubles:
        print(f"mtbert: {trouble}", file=sys.stderr)
    more = f"; {report.unanswered:,} could not be answered ({instead})" if report.unanswered else ""
    print(
        f"mtbert: {report.rows:,} rows, {report.rows / max(report.seconds, 1e-9):,.0f} a second{more}", file=sys.stderr
    )


def _as_records(results: Sequence[Evaluation]) -> dict[str, dict[str, Any]]:
    return {
        result.task: {"metric": result.metric, "score": _finite(result.score), "loss": _finite(result.loss)}
        for result in results
    }


def _finite(value: float | None) -> float | None:
    """JSON knows no NaN."""
    return value if value is not None and math.isfinite(value) else None


def _compare(options: argparse.Namespace) -> int:
    if options.resamples < 100:
        raise UserError(f"--resamples {options.resamples}: an interval takes at least 100; 1000 is usual")
    folders = [existing_run(name) for name in options.folders]
    from mtbert import compare

    comparison = compare.compare(folders, options.checkpoint, options.resamples)
    if options.html:
        compare.write_page(comparison, user_path(options.html))
    if options.json:
        print(json.dumps(compare.as_json(comparison)))
        return 0
    _print_table(f"Development scores ({options.checkpoint} evaluation)", *compare.score_table(comparison))
    if comparison.differences:
        title = f"\nDifferences to {comparison.groups[0].label} (paired bootstrap, p Holm-adjusted)"
        _print_table(title, *compare.difference_table(comparison))
    for note in comparison.notes:
        print(note)
    if options.html:
        print(f"page: {options.html}")
    return 0


def _report(options: argparse.Namespace) -> int:
    folder = existing_run(options.folder)
    from mtbert.report import write_report

    print(f"page: {write_report(folder, options.checkpoint, user_path(options.output) if options.output else None)}")
    return 0


def _show_config(options: argparse.Namespace) -> int:
    told = json.dumps(schema(), indent=2) + "\n" if options.schema else ""
    told = told or (reference() if options.reference else to_yaml(_config(options)))
    with _told_of_stdout():
        print(told, end="")
    return 0


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str | float | None]]) -> None:
    from mtbert.tracking import print_table

    with _told_of_stdout():
        print_table(title, columns, rows)
