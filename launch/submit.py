"""`python launch/submit.py --nodes 2`: the main job, on Slurm where there is one, otherwise on this machine.

Mistakes in the command or the configuration show at once, before a run folder exists. torch is imported only to look up
a method of surgery or weighting, where one waits in a queue for such a mistake.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import difflib
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

if not __package__:  # started as a script: the checkout, not launch/, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launch.records import (
    JobNote,
    Lock,
    log_path,
    make_job_folder,
    read_note,
    snapshot_code,
    submit_command,
    write_note,
    writing_to,
)
from launch.show import length
from mtbert.config import Config, SurgeryConfig, WeightingConfig
from mtbert.config_files import DEFAULT_CONFIG, load_config, to_yaml
from mtbert.errors import CommandLine, UserError, count
from mtbert.files import user_path, write_atomically
from mtbert.runs import check_encoder, check_run, create_run, discard_unstarted, independent, local_folder
from mtbert.stops import STOPPED, UNREAD, give_up

RESUMABLE = ("checkpoint.", "data.cache=", "data.dir=", "engine.threads=", "run.evaluate_every=", "run.log_every=")
"""What --set may change when a run is continued: nothing that would alter the model or the course of training."""

OF_SLURM = (
    "--partition", "--time", "--grace", "--account", "--qos", "--constraint", "--exclude", "--mem", "--cpus-per-rank",
    "--slurm",
)  # fmt: skip

NOT_OF_SLURM = {
    "array": "use --array",
    "cpus-per-task": "use --cpus-per-rank",
    "gpus-per-node": "use --gpus-per-node",
    "nodes": "use --nodes",
    "ntasks-per-node": "use --ranks-per-node",
    "time": "use --time",
    **dict.fromkeys(
        ("error", "export", "gpus-per-task", "ntasks", "open-mode", "output", "signal", "wrap"),
        "is set by the launcher",
    ),
}
"""What --slurm may not give: the batch script counts on it."""

EPILOG = """
status [RUN ...]   how jobs stand (default: all under runs/)
cancel RUN ...     save and end
--follow RUN       watch a job that was submitted before
"""


def parser() -> argparse.ArgumentParser:
    parser = CommandLine(
        prog="python launch/submit.py",
        usage="%(prog)s [--nodes N] [options]\n       %(prog)s status [RUN ...]\n       %(prog)s cancel RUN ...",
        description="Train on a Slurm cluster where sbatch exists, otherwise on this machine.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("verb", nargs="?", default="train", help=argparse.SUPPRESS)  # checked after unknown options
    parser.add_argument("runs", nargs="*", type=user_path, help=argparse.SUPPRESS)

    what = parser.add_argument_group("what to train")
    what.add_argument(
        "--config", type=user_path, metavar="YAML", help="configuration (default: configs/quickstart.yaml)"
    )
    what.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="overrides")
    what.add_argument("--resume", type=user_path, metavar="RUN", help="continue a run folder from its last checkpoint")
    what.add_argument("--array", metavar="KEY=V1,V2,...", help="one job per value, for example seed=0,1,2")

    where = parser.add_argument_group("where")
    where.add_argument("--nodes", type=count, default=1, metavar="N", help="nodes (default: 1)")
    where.add_argument("--ranks-per-node", type=count, metavar="N", help="CPU ranks on each node (default: 1)")
    where.add_argument("--gpus-per-node", type=count, metavar="N", help="GPUs on each node, one rank each")
    where.add_argument("--local", action="store_true", help="run here even where sbatch exists")

    slurm = parser.add_argument_group("Slurm (without them, the cluster's defaults)")
    slurm.add_argument("--partition", metavar="NAME")
    slurm.add_argument("--time", metavar="LIMIT", help="90 (minutes), 1:30:00 or 1-12; a job at its limit is requeued")
    slurm.add_argument("--grace", type=count, metavar="SECONDS",
                       help="before its limit, to save; more than an evaluation takes (default: 90)")  # fmt: skip
    for name in ("account", "qos", "constraint", "exclude", "mem"):
        slurm.add_argument(f"--{name}", metavar="X", help="as for sbatch")
    slurm.add_argument("--cpus-per-rank", type=count, metavar="N")
    slurm.add_argument("--slurm", nargs="+", action="extend", default=[], metavar="OPTION[=VALUE]",
                       help="any other option of sbatch, for example reservation=mine")  # fmt: skip

    how = parser.add_argument_group("how")
    how.add_argument("--dry-run", action="store_true", help="show the batch script and the configuration and stop")
    how.add_argument("--follow", nargs="?", type=user_path, const=True, metavar="RUN",
                     help="show rank 0's log until the job ends and return its exit code")  # fmt: skip
    return parser


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    args, unknown = parser().parse_known_args(words)
    if unknown:
        near = difflib.get_close_matches(
            unknown[0].partition("=")[0], re.findall("--[a-z-]+", parser().format_help()), n=1
        )
        hint = f"; did you mean {near[0]}?" if near else ""
        parser().error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    others = {"status": status, "cancel": cancel}
    if args.verb != "train" and args.verb not in others:
        parser().error(f"{args.verb}: expected an option, or one of train, {', '.join(others)}")
    try:
        code = _do(args, words, others)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head`
        give_up(sys.stdout)
        return UNREAD
    except KeyboardInterrupt:  # before there is a job
        print("interrupted", file=sys.stderr)
        return STOPPED
    return code


def _do(args: argparse.Namespace, words: list[str], others: Mapping[str, Callable[[list[Path]], int]]) -> int:
    options = _options(words)
    if args.verb != "train":
        _refuse(options, f"{args.verb} takes run folders and no options")
        return others[args.verb](args.runs)
    if args.runs:
        raise UserError(f"train {args.runs[0]}: --config takes a configuration, --resume a run folder to continue")
    if isinstance(args.follow, Path):
        _refuse([name for name in options if name != "--follow"], "--follow RUN only watches a job")
        return follow_again(args.follow)
    return train(args, ["python", "launch/submit.py", *words])


def _options(words: list[str]) -> list[str]:
    """Those that were typed. No value begins so: argparse would have taken it for an option."""
    return [word.partition("=")[0] for word in words if word.startswith("--")]


def _refuse(options: list[str], why: str) -> None:
    if options:
        raise UserError(f"{why}; leave {', '.join(options)} out")


def train(args: argparse.Namespace, command: list[str]) -> int:
    if args.ranks_per_node and args.gpus_per_node:
        raise UserError("--ranks-per-node is for CPUs; with --gpus-per-node there is one rank per GPU")
    if args.array and args.resume:
        raise UserError("--array makes new runs; continue each of them with --resume")
    if args.time is not None:
        from launch.slurm import minutes  # submitit takes a moment to import

        minutes(args.time)
    for word in args.slurm:
        if why := NOT_OF_SLURM.get(word.partition("=")[0].removeprefix("--").replace("_", "-")):
            raise UserError(f"--slurm {word}: {why}")
    of_slurm = [option for option in _options(command) if option in OF_SLURM]
    if args.local:
        _refuse(of_slurm, "--local trains without Slurm")
    source = _source(args)
    values: list[str | None] = [*_array(args.array)] if args.array else [None]
    configs = [load_config(source, [*args.overrides, *([value] if value else [])]) for value in values]
    for config in configs:
        _check_files(config)
        if args.resume is None:  # which has its encoder with it
            check_encoder(config.encoder)
            if config.encoder.pretrained is not None:
                local_folder(config.encoder.pretrained)
    if args.local or shutil.which("sbatch") is None:
        if of_slurm:
            print(f"not used, as there is no Slurm here: {', '.join(of_slurm)}", file=sys.stderr)
        return _here(args, source, configs, values, command)
    return _on_slurm(args, source, configs, values, command)


# ------------------------------------------------------------------- what can be known before it starts


def _source(args: argparse.Namespace) -> Path:
    """The file the configuration comes from."""
    if args.resume is None:
        return args.config or DEFAULT_CONFIG
    if args.config is not None:
        raise UserError("--resume takes the configuration from the run folder; leave --config out")
    source: Path = args.resume / "config.yaml"
    if not source.is_file():
        raise UserError(f"--resume {args.resume}: no run folder, {source.name} is missing there")
    check_resumable(args.resume, args.overrides)
    return source


def check_resumable(run: Path, overrides: list[str]) -> None:
    """Raises `UserError` where `run` cannot be continued, or not with these overrides."""
    check_run(run)
    if barred := [text for text in overrides if not text.startswith(RESUMABLE)]:
        raise UserError(
            f"--set {barred[0]}: a continued run keeps what it trains; only these can change: "
            f"{', '.join(key.rstrip('.=') for key in RESUMABLE)}"
        )
    of_evaluations = [text for text in overrides if text.startswith("run.evaluate_every=")]
    if of_evaluations and load_config(run / "config.yaml").schedule.kind == "adaptive":
        raise UserError(f"--set {of_evaluations[0]}: evaluations decide what an adaptive schedule draws; leave it out")


def _array(text: str) -> list[str]:
    key, equals, values = text.partition("=")
    if not equals or not key or not all(values.split(",")):
        raise UserError(f"--array {text}: expected KEY=V1,V2,..., for example seed=0,1,2")
    return [f"{key}={value}" for value in values.split(",")]


def _check_files(config: Config) -> None:
    """As `mtbert.data.locate_file` finds them, without torch. Raises `UserError` for one that is missing."""
    if config.data.generate is not None:
        return
    folder = config.data.dir
    if folder is not None and not user_path(folder).is_dir():
        raise UserError(f"data.dir {folder}: no such folder")
    for name, task in config.tasks.items():
        for key, file in (("train", task.train), ("dev", task.dev)):
            if not file or file.startswith("hub:"):
                continue
            path = user_path(folder or ".") / user_path(file)
            if not path.is_file():
                unset = f" in {Path.cwd()}; data.dir is not set" if folder is None and not path.is_absolute() else ""
                raise UserError(f"tasks.{name}.{key}: no file {path}{unset}")


def _check_methods(configs: list[Config]) -> None:
    """Raises `UserError` for an option that the method of weighting or surgery does not take, or a missing package."""
    for config in configs:
        if config.surgery != SurgeryConfig() or config.weighting != WeightingConfig():
            from mtbert.building import methods_of

            methods_of(config)


# ----------------------------------------------------------------------------------------- run folders


def _folders(
    args: argparse.Namespace,
    source: Path,
    configs: list[Config],
    values: list[str | None],
    command: list[str],
    undo: contextlib.ExitStack,
) -> tuple[Path, list[Path]]:
    """The folder that holds the job's code, and a run folder per configuration: itself, or those of an array in it.

    `undo` gets what takes back all that it does. An array that is there already gets more runs.
    """
    if args.resume is not None:
        run: Path = args.resume
        if holder := Lock(run, "-").holder():
            raise UserError(f"--resume {run}: a job is using this run folder ({holder})")
        with writing_to(run):
            before = source.read_bytes()
            write_atomically(source, to_yaml(independent(configs[0])))
            undo.callback(write_atomically, source, before)
            make_job_folder(run)
        return run, [run]
    if not args.array:
        run = create_run(configs[0], str(source), command)
        undo.callback(shutil.rmtree, run, ignore_errors=True)
        make_job_folder(run)
        return run, [run]
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = user_path(configs[0].run.dir) / (configs[0].run.name or f"{stamp}-{source.stem}-array")
    if not folder.exists():
        undo.callback(_remove_empty_array, folder)
    elif (folder / "code").exists():
        print(f"{folder}: trains with the code of {folder / 'code'}, from its first submission", flush=True)
    runs = []
    for config, value in zip(configs, values, strict=True):
        place = config.run.model_copy(update={"dir": str(folder), "name": _folder_name(str(value))})
        runs.append(create_run(config.model_copy(update={"run": place}), str(source), command))
        undo.callback(shutil.rmtree, runs[-1], ignore_errors=True)
        make_job_folder(runs[-1])
        (runs[-1] / "code").symlink_to(Path("..") / "code")
    snapshot_code(folder)
    make_job_folder(folder)
    return folder, runs


def _remove_empty_array(folder: Path) -> None:
    """Unless another submission has put runs of its own there meanwhile."""
    with contextlib.suppress(OSError):
        if not {path.name for path in folder.iterdir()} - {"code", "job"}:
            shutil.rmtree(folder)


def check_over(run: Path | None) -> None:
    """Raises `UserError` for a run to be continued whose job waits or runs, wherever it is to go on."""
    from launch.slurm import not_over

    if run is not None and (note := read_note(run)) and not_over(run, note):
        watch = f"watch it with: {submit_command('--follow', run)}; or " if note.cluster == "slurm" else ""
        raise UserError(f"{run}: job {note.id} is not over; {watch}end it with: {submit_command('cancel', run)}")


def _folder_name(value: str) -> str:
    """Of a run in an array."""
    return value.replace("/", "_")


# --------------------------------------------------------------------------------------- on this machine


def _here(
    args: argparse.Namespace, source: Path, configs: list[Config], values: list[str | None], command: list[str]
) -> int:
    from launch.local import gpu_numbers, gpus_here, run_here
    from launch.show import report

    here = gpus_here()
    gpus = args.gpus_per_node or (0 if args.ranks_per_node else here // args.nodes)
    if gpus * args.nodes > here:
        raise UserError(f"--gpus-per-node {gpus}: {args.nodes} node(s) need {gpus * args.nodes}, here are {here}")
    gpu_numbers(gpus)  # a mistake in CUDA_VISIBLE_DEVICES must not leave a run folder
    if here and not gpus and not args.ranks_per_node:
        print(f"{here} GPU(s) stay idle, fewer than the {args.nodes} nodes; --nodes 1 would use them", file=sys.stderr)
    ranks = gpus or args.ranks_per_node or 1
    why = "" if args.local else "no sbatch here, so "
    device = "GPU" if gpus else "CPU"
    print(f"{why}running on this machine: {args.nodes} node(s) × {ranks} {device} rank(s)", flush=True)
    if args.dry_run:
        _check_methods(configs)  # the ranks would, in a moment
        _show_configurations(configs, values)
        return 0
    check_over(args.resume)
    code = 0
    with contextlib.ExitStack() as undo:
        _, runs = _folders(args, source, configs, values, command, undo)
        for run in runs:
            print(f"run folder {run}", flush=True)
            note, end = run_here(run, args.nodes, ranks, gpus * args.nodes, begun=undo.pop_all)
            now = report(run, note, end)
            _discard(args, run, now)
            code = code or now
            if now == STOPPED:
                break
    return code


# --------------------------------------------------------------------------------------------- on Slurm


def _on_slurm(
    args: argparse.Namespace, source: Path, configs: list[Config], values: list[str | None], command: list[str]
) -> int:
    from launch import slurm

    _check_methods(configs)
    if args.dry_run:
        folder = args.resume or user_path(configs[0].run.dir) / (configs[0].run.name or "RUN")
        runs = [folder / _folder_name(value) for value in values if value] or [folder]
        print(slurm.script(args, f"mtbert-{folder.name}", folder, runs))
        _show_configurations(configs, values)
        return 0
    check_over(args.resume)
    with contextlib.ExitStack() as undo:
        folder, runs = _folders(args, source, configs, values, command, undo)
        starts = [length(log_path(run)) for run in runs]
        notes = slurm.submit_jobs(args, f"mtbert-{folder.name}", folder, runs)
        undo.pop_all()  # the job is there
    trouble, unnoted = "", []
    for run, note in zip(runs, notes, strict=True):
        try:
            with writing_to(run):
                write_note(run, note)
        except UserError as error:
            trouble = str(error)
            unnoted.append(note.id)
        print(f"job {note.id}: {args.nodes} node(s) × {note.ranks_per_node} rank(s), run folder {run}", flush=True)
    if unnoted:
        raise UserError(f"{trouble}; submitted all the same, end it with: scancel {' '.join(unnoted)}")
    if not args.follow:
        print(f"watch with: {submit_command('--follow', runs[0])}")
        return 0
    codes = []
    for run, note, start in zip(runs, notes, starts, strict=True):
        codes.append(slurm.follow(run, note, start))
        _discard(args, run, codes[-1])
    return max(codes)


def _discard(args: argparse.Namespace, run: Path, code: int) -> None:
    """After a mistake that was found before the first step, the name of a new run is free again."""
    if code == 2 and args.resume is None:
        discard_unstarted(run)


def follow_again(run: Path) -> int:
    from launch import slurm

    note = _note(run)
    if note.cluster == "local":
        raise UserError(f"--follow {run}: its job ran on {note.host} without Slurm; read {run}/logs/rank0.log")
    return slurm.follow(run, note, None)


def status(runs: list[Path]) -> int:
    from launch import slurm

    named = _runs(runs)
    for run in named:
        _note(run)
    rows = [("run", "job", "state", "step"), *slurm.standings(named or _submitted(Path("runs"), "**"))]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def cancel(runs: list[Path]) -> int:
    from launch import slurm

    if not runs:
        raise UserError("cancel: which run? give its folder")
    code = 0
    for run in _runs(runs):
        try:
            print(slurm.cancel(run, _note(run)))
        except UserError as error:  # one that is over must not keep the others running
            print(f"error: {error}", file=sys.stderr)
            code = 2
    return code


def _runs(folders: list[Path]) -> list[Path]:
    """The same; for the folder of an array, all runs in it."""
    return [run for folder in folders for run in _runs_of_array(folder) or [folder]]


def _runs_of_array(folder: Path) -> list[Path]:
    """Not of a folder that only holds runs: whoever names that may not mean all of them."""
    is_array = all((folder / name).is_dir() for name in ("code", "job"))
    return _submitted(folder, "*") if is_array else []


def _submitted(folder: Path, depth: str) -> list[Path]:
    """The runs below a folder from which a job was submitted."""
    return sorted(path.parent.parent for path in folder.glob(f"{depth}/job/job.json"))


def _note(run: Path) -> JobNote:
    if note := read_note(run):
        return note
    if runs := _runs_of_array(run):
        raise UserError(f"{run}: an array of {len(runs)} runs; name one of them, such as {runs[0]}")
    raise UserError(f"{run}: no job was submitted from this folder")


def _show_configurations(configs: list[Config], values: list[str | None]) -> None:
    for config, value in zip(configs, values, strict=True):
        print(f"\n# configuration{f' with {value}' if value else ''}\n{to_yaml(config)}", end="")


if __name__ == "__main__":
    sys.exit(main())
