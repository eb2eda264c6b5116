"""`python -m mtbert train | evaluate | show-config`. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mtbert.config import Config, UserError, load_config, schema, to_yaml
from mtbert.reference import reference
from mtbert.runs import Rank, create_run, discard_unstarted

if TYPE_CHECKING:
    from mtbert.evaluate import Evaluation


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 a user's mistake (one line on stderr); our own bug raises."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except UserError as error:
        print(f"mtbert: {error}", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mtbert", description="Multi-task BERT with sharded surgery.")
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("train", help="train in this process (several ranks: launch/submit.py)")
    _add_config(command)
    command.add_argument("--resume", metavar="RUN", help="continue this run folder instead of starting a new one")
    command.add_argument("--quiet", action="store_true", help="nothing on stdout")
    command.set_defaults(run=_train)

    command = commands.add_parser("evaluate", help="score a run on its development sets")
    command.add_argument("folder", metavar="RUN", help="run folder")
    command.add_argument("--checkpoint", choices=["best", "latest"], default="best")
    command.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    command.set_defaults(run=_evaluate)

    command = commands.add_parser("show-config", help="the whole configuration, defaults written out")
    _add_config(command)
    instead = command.add_mutually_exclusive_group()
    instead.add_argument("--schema", action="store_true", help="JSON schema of all keys instead, for editors")
    instead.add_argument("--reference", action="store_true", help="the page docs/configuration.md instead")
    command.set_defaults(run=_show_config)
    return parser


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", metavar="FILE", help="YAML; default: the generated three-task quick start")
    command.add_argument(
        "--set",
        nargs="+",
        action="extend",  # given twice, both count
        default=[],
        metavar="KEY=VALUE",
        help="dotted keys, e.g. optimizer.lr=3e-5",
    )


def default_config() -> Path:
    """configs/quickstart.yaml of this checkout."""
    return Path(__file__).parent.parent / "configs" / "quickstart.yaml"


def _config(options: argparse.Namespace) -> Config:
    return load_config(options.config or default_config(), options.set)


def _train(options: argparse.Namespace) -> int:
    if options.resume and (options.config or options.set):
        raise UserError("--resume: a run continues with the configuration in its folder; leave out --config and --set")
    if options.resume:
        folder = existing_run(options.resume)
    else:
        config = _config(options)
        folder = create_run(config, str(options.config or default_config()), sys.argv)
    from mtbert.trainer import train

    try:
        train(folder, Rank(), quiet=options.quiet)
    except UserError:
        if not options.resume:
            discard_unstarted(folder)
        raise
    return 0


def existing_run(name: str) -> Path:
    folder = Path(name).expanduser()
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: no run folder (it holds no config.yaml); give one that training made")
    return folder


def _evaluate(options: argparse.Namespace) -> int:
    folder = existing_run(options.folder)
    from mtbert.trainer import evaluate_run

    step, results, composite = evaluate_run(folder, options.checkpoint)
    if options.json:
        print(json.dumps({"step": step, "composite": composite, "tasks": _as_records(results)}))
    else:
        for result in results:
            loss = f"   loss {result.loss:.4f}" if result.loss is not None else ""
            print(f"{result.task:<12} {result.metric:<10} {result.score:.4f}{loss}")
        print(f"{'composite':<23} {composite:.4f}   after step {step} ({options.checkpoint} checkpoint)")
    return 0


def _as_records(results: Sequence[Evaluation]) -> dict[str, dict[str, str | float | None]]:
    return {result.task: {"metric": result.metric, "score": result.score, "loss": result.loss} for result in results}


def _show_config(options: argparse.Namespace) -> int:
    if options.schema:
        print(json.dumps(schema(), indent=2))
    else:
        print(reference() if options.reference else to_yaml(_config(options)), end="")
    return 0
