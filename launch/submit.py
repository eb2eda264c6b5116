"""`python launch/submit.py --nodes 2`: the main job, on Slurm where there is one, otherwise on this machine.

No torch in here: mistakes in the command or the configuration show at once, before a run folder exists.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started as a script: the checkout, not launch/, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launch.records import ROOT, End, Lock, job_folder, log_path
from mtbert.config import Config, UserError, load_config, to_yaml
from mtbert.runs import create_run, write_atomically

DEFAULT_CONFIG = Path("configs") / "quickstart.yaml"

RESUMABLE = ("checkpoint.", "data.cache=", "data.dir=", "engine.threads=", "run.evaluate_every=", "run.log_every=")
"""What --set may change when a run is continued: nothing that would alter the model or the course of training."""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python launch/submit.py",
        description="Train on a Slurm cluster where sbatch exists, otherwise on this machine.",
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what to train")
    what.add_argument("--config", type=Path, metavar="YAML", help=f"configuration (default: {DEFAULT_CONFIG})")
    what.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="overrides")
    what.add_argument("--resume", type=Path, metavar="RUN", help="continue a run folder from its last checkpoint")

    where = parser.add_argument_group("where")
    where.add_argument("--nodes", type=_count, default=1, metavar="N", help="nodes (default: 1)")
    where.add_argument("--ranks-per-node", type=_count, metavar="N", help="CPU ranks on each node (default: 1)")
    where.add_argument("--gpus-per-node", type=_count, metavar="N", help="GPUs on each node, one rank each")
    where.add_argument("--local", action="store_true", help="run here even where sbatch exists")

    how = parser.add_argument_group("how")
    how.add_argument("--dry-run", action="store_true", help="show what would be run and stop")
    return parser


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    try:
        return submit(parser().parse_args(words), ["python", "launch/submit.py", *words])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def submit(args: argparse.Namespace, command: list[str]) -> int:
    if args.ranks_per_node and args.gpus_per_node:
        raise UserError("--ranks-per-node is for CPUs; with --gpus-per-node there is one rank per GPU")
    source, config = _configuration(args)
    return _here(args, source, config, command)


def _configuration(args: argparse.Namespace) -> tuple[Path, Config]:
    """The file and the checked configuration: all that can be known to be wrong is found here."""
    if args.resume is None:
        source = args.config or next(
            (root / DEFAULT_CONFIG for root in (Path(), ROOT) if (root / DEFAULT_CONFIG).is_file()), DEFAULT_CONFIG
        )
    else:
        if args.config is not None:
            raise UserError("--resume takes the configuration from the run folder; leave --config out")
        source = args.resume / "config.yaml"
        if not source.is_file():
            raise UserError(f"--resume {args.resume}: no run folder, {source.name} is missing there")
        if barred := [text for text in args.overrides if not text.startswith(RESUMABLE)]:
            raise UserError(
                f"--set {barred[0]}: a continued run keeps what it trains; only these can change: "
                f"{', '.join(key.rstrip('.=') for key in RESUMABLE)}"
            )
    config = load_config(source, args.overrides)
    _check_files(config)
    return source, config


def _check_files(config: Config) -> None:
    folder = config.data.dir
    if folder is None or "://" in folder:
        return
    if not Path(folder).expanduser().is_dir():
        raise UserError(f"data.dir {folder}: no such folder")
    for name, task in config.tasks.items():
        for key, file in (("train", task.train), ("dev", task.dev)):
            if not (path := Path(folder).expanduser() / file).is_file():
                raise UserError(f"tasks.{name}.{key}: no file {path}")


def _folder(args: argparse.Namespace, source: Path, config: Config, command: list[str]) -> Path:
    """A new run folder, or the one to continue with its configuration brought up to date."""
    if args.resume is None:
        run = create_run(config, str(source), command)
    else:
        run = args.resume
        if holder := Lock(run, "-").holder():
            raise UserError(f"--resume {run}: a job is using this run folder ({holder})")
        write_atomically(run / "config.yaml", to_yaml(config))
    job_folder(run).mkdir(exist_ok=True)
    return run


# --------------------------------------------------------------------------------------- on this machine


def _here(args: argparse.Namespace, source: Path, config: Config, command: list[str]) -> int:
    from launch.local import gpus_here, run_here  # submitit takes a moment to import

    gpus = args.gpus_per_node or (0 if args.ranks_per_node else gpus_here() // args.nodes)
    if gpus * args.nodes > gpus_here():
        raise UserError(
            f"--gpus-per-node {gpus}: {args.nodes} node(s) need {gpus * args.nodes}, here are {gpus_here()}"
        )
    ranks = gpus or args.ranks_per_node or 1
    why = "" if args.local else "no sbatch here, so "
    device = "GPU" if gpus else "CPU"
    print(f"{why}running on this machine: {args.nodes} node(s) × {ranks} {device} rank(s)", flush=True)
    if args.dry_run:
        print(f"\n{to_yaml(config)}", end="")
        return 0
    run = _folder(args, source, config, command)
    print(f"run folder {run}", flush=True)
    end = run_here(run, args.nodes, ranks, gpus * args.nodes)
    return report(run, end, resume=f"python launch/submit.py --nodes {args.nodes} --resume {run}")


def report(run: Path, end: End | None, resume: str) -> int:
    """Last words of a job to its user; returns the exit code."""
    if end is None:
        print(f"error: the job was killed; see {log_path(run).parent}/; continue with: {resume}", file=sys.stderr)
        return 1
    if end.status == "mistake":
        print(f"error: {end.message}", file=sys.stderr)
        return 2
    if end.status == "failed":
        print(f"rank {end.rank} on {end.host} failed; all output: {log_path(run).parent}/", file=sys.stderr)
        print(end.message.rstrip(), file=sys.stderr)
        return 1
    if end.status == "stopped":
        at = "before the first step" if end.step is None else f"at step {end.step}"
        print(f"stopped {at}; continue with: {resume}")
        return 130
    print(f"run folder   {run}\nTensorBoard  tensorboard --logdir {run.parent}")
    return 0


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
